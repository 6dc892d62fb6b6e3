"""The same seed on 1, 2, 4 and 8 devices: the same samples, gradients and weights."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from small_model import small_model

from configs import base
from ddpo_jax import build, compilation, devices, inner_loop, train, update
from ddpo_jax.batches import BatchPlan
from ddpo_jax.compilation import compiler_options
from ddpo_jax.config import resolve
from ddpo_jax.devices import usable_cores
from ddpo_jax.errors import UserError
from ddpo_jax.interrupt import Stop
from ddpo_jax.prompts import get_prompt_fn
from ddpo_jax.rewards import get_rewards

ROOT = pathlib.Path(__file__).parents[1]
IMAGES = 32


def make_config(devices):
  """32 images in 4 batches, 2 optimizer steps of 2 accumulated batches, whatever the devices."""
  config = base.get_config()
  config.pretrained.model = str(small_model())
  config.mixed_precision = "no"
  config.prompt_fn = "simple_animals"
  # Half as many steps as users take. With few, the stride to t = 1 spans most of the noise, and
  # 1/σ magnifies the rounding of the network's output there a hundredfold.
  config.sample.num_steps = 25
  config.sample.guidance_scale = 2.0  # magnifies it too
  config.train.timestep_fraction = 0.08
  config.sample.batch_size = 8 // devices
  config.sample.num_batches_per_epoch = IMAGES // 8
  config.train.batch_size = 8 // devices
  config.train.gradient_accumulation_steps = 2
  config.train.learning_rate = 1e-3
  config.per_prompt_stat_tracking.min_count = 2
  return resolve(config)


def run_epoch(devices, trajectory=None):
  """Samples, and trains on that or on the trajectory given."""
  cfg = make_config(devices)
  trainer = build.build(cfg, BatchPlan.create(cfg, devices),
                        get_prompt_fn(cfg.prompt_fn), get_rewards(cfg.reward_fn, {}),
                        build.open_model(cfg))
  rollout = trainer.worker.run(trainer.state.params, epoch=0)
  # JPEG sizes jump by bytes where a pixel rounds the other way; these do not.
  smooth = np.random.default_rng(0).normal(size=IMAGES).astype(np.float32)
  batch = train.make_batch(trainer, rollout, smooth)
  if trajectory is not None:
    batch = dataclasses.replace(batch, trajectory=jax.tree.map(
        lambda own, given: jax.device_put(np.asarray(given), own.sharding),
        batch.trajectory, trajectory))
  steps = inner_loop.optimizer_steps(trainer, batch, 0, Stop())
  next(steps)
  # After one step Adam's first moment is (1 − beta1) times the clipped gradient.
  gradient = flat(trainer.state.opt_state[1][0].mu)
  metrics = list(steps)
  return rollout, gradient, flat(trainer.state.params), metrics


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def single():
  return run_epoch(1)


@pytest.fixture(scope="module")
def single_in_order():
  """As the shared program's first inner epoch, which is not shuffled, but by the plain update."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(update, "choose_microbatches",
                  functools.partial(update.choose_microbatches, in_order=True))
    return run_epoch(1)


@pytest.mark.parametrize("devices,shared", ((2, False), (4, False), (8, False), (4, True)))
def test_as_on_one_device(request, devices, shared, monkeypatch):
  """`shared`: by the program that in half precision is both sampler and update."""
  single = request.getfixturevalue("single_in_order" if shared else "single")
  if shared:
    monkeypatch.setattr(build, "uses_shared_program", lambda cfg: True)
  # Trained on the same trajectory, which rounding tells apart by some 1e-5 after 25 steps.
  rollout, gradient, weights, metrics = run_epoch(devices, single[0].trajectory)
  assert len(metrics) == 1  # the second of two
  for name in ("loss", "grad_norm"):  # means over devices too
    np.testing.assert_allclose(getattr(metrics[0], name), getattr(single[3][0], name), rtol=0.01,
                               err_msg=name)
  # As the root mean square of log ratios: these are differences of numbers near 1.
  log_ratios = [np.sqrt(2 * each.approx_kl) for each in (metrics[0], single[3][0])]
  assert log_ratios[1] > 5e-6
  np.testing.assert_allclose(*log_ratios, rtol=0, atol=2e-7)
  assert rollout.prompts == single[0].prompts
  np.testing.assert_allclose(rollout.trajectory.log_probs,
                             single[0].trajectory.log_probs, rtol=0, atol=1e-5)
  np.testing.assert_allclose(rollout.trajectory.latents, single[0].trajectory.latents, rtol=0,
                             atol=2e-4)
  assert np.abs(rollout.images.astype(int) - single[0].images.astype(int)).max() <= 1
  np.testing.assert_allclose(rollout.rewards["jpeg_compressibility"],
                             single[0].rewards["jpeg_compressibility"], atol=0.01)
  difference = np.linalg.norm(gradient - single[1])
  assert 0 < np.linalg.norm(single[1])
  assert difference < 1e-5 * np.linalg.norm(single[1])
  assert np.linalg.norm(weights - single[2]) < 1e-3 * np.linalg.norm(single[2])


def collectives(compiled):
  """How many numbers each of them exchanges."""
  results = re.findall(r"= (.*) (?:all|collective|reduce-scatter)[-a-z]*\(", compiled.as_text())
  return sorted(sum(math.prod(int(n) for n in shape.split(",") if n)
                    for shape in re.findall(r"f32\[([\d,]*)\]", result))
                for result in results)


@pytest.mark.parametrize("shared", (False, True))
def test_devices_exchange_one_gradient_per_optimizer_step(shared, monkeypatch):
  """Beside it only a scalar, the largest ratio drift, however many microbatches there are."""
  if shared:
    monkeypatch.setattr(build, "uses_shared_program", lambda cfg: True)
  cfg = make_config(8)
  trainer = build.build(cfg, BatchPlan.create(cfg, 8), get_prompt_fn(cfg.prompt_fn),
                        get_rewards(cfg.reward_fn, {}), build.open_model(cfg))
  state, program = trainer.state, trainer.update
  if shared:
    assert collectives(program._visit) == []
    sums = program._zero_sums(state.params, trainer.frozen_unet)
    sums = program._pull_back(state.params, trainer.frozen_unet, sums)
    program = program._finish.lower(state, sums).compile()
  trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  assert collectives(program) == [1, trained + 3]  # loss, KL and clip fraction ride along


@pytest.mark.parametrize("batch_size,forced,expected", [
    (64, "", "cores"), (12, "", "1 1"), (64, "--xla_force_host_platform_device_count=3", "3 1")])
def test_without_a_gpu_each_core_is_a_device(batch_size, forced, expected):
  """Unless the batch is too small to share, or the user says how many devices there are."""
  program = ("from configs import base; from ddpo_jax.config import resolve\n"
             "from ddpo_jax.devices import configure_devices, plan_batches\n"
             "config = base.get_config()\n"
             f"config.sample.batch_size = config.train.batch_size = {batch_size}\n"
             "for _ in range(2):\n"  # a second run in the same process has the same plan
             "  configure_devices()\n"
             "  plan = plan_batches(resolve(config))\n"
             "  print(plan.num_devices, plan.devices_per_batch)")
  environment = {**os.environ, "XLA_FLAGS": forced, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  run = subprocess.run([sys.executable, "-c", program], env=environment, check=True,
                       capture_output=True, text=True)
  cores = max(n for n in range(1, len(os.sched_getaffinity(0)) + 1)
              if batch_size % n == 0 and batch_size // n >= 8 or n == 1)
  expected = f"{cores} {cores}" if expected == "cores" else expected
  assert run.stdout.splitlines() == [expected] * 2


@pytest.mark.parametrize("kind,platform,expected", [
    ("NVIDIA H100 80GB HBM3", "gpu", "NVIDIA H100 80GB HBM3 (gpu)"), ("cpu", "cpu", "cpu")])
def test_the_plan_names_the_devices(monkeypatch, kind, platform, expected):
  device = types.SimpleNamespace(device_kind=kind, platform=platform)
  monkeypatch.setattr(jax, "devices", lambda: [device] * 8)
  plan = devices.plan_batches(make_config(1))
  assert f"Devices = {plan.num_devices} x {expected}\n" in plan.describe()


@pytest.mark.parametrize("options", ([], ["--dry_run"]))
def test_platforms_that_are_not_there(options):
  run = subprocess.run(
      [sys.executable, "scripts/train.py", "--config=configs/demo.py", *options],
      env={**os.environ, "JAX_PLATFORMS": "nope"}, cwd=ROOT, capture_output=True, text=True)
  assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
  assert "JAX finds no device of JAX_PLATFORMS='nope'" in run.stderr


@pytest.mark.parametrize("script,options", (
    ("sample", ["--model=tiny", "--prompts=a"]), ("sample", ["--run={run}", "--prompts=a"]),
    ("export_lora", ["--run={run}"])))
def test_platforms_that_are_not_there_for_other_scripts(script, options, tmp_path):
  run = tmp_path / "run"
  (run / "checkpoints" / "0").mkdir(parents=True)
  (run / "config.json").write_text(json.dumps(make_config(1).to_dict()))
  options = [option.format(run=run) for option in options]
  done = subprocess.run(
      [sys.executable, f"scripts/{script}.py", *options, f"--output={tmp_path}/a.safetensors"
       if script == "export_lora" else f"--output={tmp_path}/a.jpg"],
      env={**os.environ, "JAX_PLATFORMS": "nope"}, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
  assert "JAX finds no device of JAX_PLATFORMS='nope'" in done.stderr


def test_a_gpu_that_is_not_there(monkeypatch):
  """Where its plugin is not installed either, JAX says no more than AssertionError."""
  def devices_of_jax():
    raise AssertionError
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  monkeypatch.setattr(jax, "devices", devices_of_jax)
  with pytest.raises(UserError, match=r"JAX_PLATFORMS='cuda'; must be unset, 'cpu'"):
    devices.plan_batches(make_config(1))


@pytest.mark.parametrize("backend,flags,expected", [
    ("cpu", "", {"xla_cpu_prefer_vector_width": 512}),
    ("gpu", "", {"xla_gpu_dot_merger_threshold_mb": 1, "xla_gpu_enable_triton_gemm": False}),
    ("gpu", "--xla_gpu_enable_triton_gemm=true", {"xla_gpu_dot_merger_threshold_mb": 1}),
    ("tpu", "", {}), ("cpu", "--xla_cpu_prefer_vector_width=128", {})])
def test_compiler_options(monkeypatch, backend, flags, expected):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setenv("XLA_FLAGS", flags)
  assert compiler_options() == expected


def test_options_that_xla_does_not_know_are_left_out():
  assert compilation._is_known("xla_cpu_prefer_vector_width", 512)
  assert not compilation._is_known("xla_cpu_no_such_option", 512)


_COUNT_ARENAS = """
import ctypes, re, sys, threading
from ddpo_jax import glibc
glibc.share_arenas()
ready, libc = threading.Barrier(21), ctypes.CDLL("libc.so.6")
libc.malloc.restype = ctypes.c_void_p
def allocate():
  libc.malloc(100_000)
  ready.wait()
  ready.wait()
threads = [threading.Thread(target=allocate) for _ in range(20)]
for thread in threads: thread.start()
ready.wait()
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
ready.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's arenas")
@pytest.mark.parametrize("wish,expected", ((None, usable_cores() + 1), ("2", 2)))
def test_threads_share_arenas(tmp_path, wish, expected):
  environment = {k: v for k, v in os.environ.items() if k != "MALLOC_ARENA_MAX"}
  if wish is not None:
    environment["MALLOC_ARENA_MAX"] = wish
  subprocess.run([sys.executable, "-c", _COUNT_ARENAS, str(tmp_path / "arenas.xml")],
                 check=True, env=environment, cwd=ROOT)
  assert (tmp_path / "arenas.xml").read_text().count("<heap nr=") == expected


def test_the_compilation_cache_stays_where_it_was(monkeypatch, tmp_path):
  """A reward may change the working folder."""
  monkeypatch.chdir(tmp_path)
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
           "jax_default_matmul_precision")
  before = {name: jax.config.values[name] for name in names}
  try:
    devices.configure_jax(dataclasses.replace(make_config(1), compilation_cache="cache"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache")
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


@pytest.mark.parametrize("home,folder", [(None, None), ("home", "home/.cache/ddpo_jax/xla")])
def test_a_user_without_a_home_has_no_compilation_cache(monkeypatch, tmp_path, home, folder):
  """As in a container that sets no HOME, for a user who has no entry in it."""
  def unknown(user):
    raise KeyError(user)
  monkeypatch.setattr("pwd.getpwuid", unknown)
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.delenv("HOME")
  if home:
    monkeypatch.setenv("HOME", str(tmp_path / home))
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
           "jax_default_matmul_precision")
  before = {name: jax.config.values[name] for name in names}
  cfg = dataclasses.replace(make_config(1), compilation_cache="auto")
  try:
    for configure in (lambda: devices.configure_jax(cfg), devices.configure_jax_for_base_model):
      jax.config.update("jax_compilation_cache_dir", None)
      configure()
      expected = None if folder is None else str(tmp_path / folder)
      assert jax.config.values["jax_compilation_cache_dir"] == expected
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
