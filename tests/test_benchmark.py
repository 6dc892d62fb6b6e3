"""The benchmark runs on both sides, and counts what it says it counts."""

import argparse
import json
import shutil
import subprocess
import sys
import timeit
import types

from flax import nnx
import jax
import jax.numpy as jnp
import pytest
from runs import ROOT, start
from small_model import small_config, small_model

from configs import demo
from ddpo_jax import build, resource_errors
from ddpo_jax.benchmark import compare, flops, profile
from ddpo_jax.benchmark.jax_side import JaxSide, random_model
from ddpo_jax.benchmark.side import _DOING, Side
from ddpo_jax.config import resolve
from ddpo_jax.errors import UserError
from ddpo_jax.models import layers
from ddpo_jax.shared_program import SharedProgram


@pytest.mark.slow  # a minute
def test_both_sides_do_the_same_work(tmp_path):
  """Small enough to be no measurement; the sides are processes of their own."""
  process = start([
      str(ROOT / "scripts" / "benchmark.py"), "--config", str(ROOT / "configs" / "demo.py"),
      "--reference", "torch", "--rounds", "1", "--skip_start", "--profile",
      "--output", str(tmp_path / "results.json"),
      f"--config.pretrained.model={small_model()}", "--config.sample.num_steps=2",
      "--config.sample.batch_size=4", "--config.train.batch_size=2",
      f"--config.compilation_cache={tmp_path / 'cache'}"], stdout=subprocess.PIPE)
  printed, errors = process.communicate(timeout=600)
  assert process.returncode == 0, errors
  results = json.loads((tmp_path / "results.json").read_text())
  assert set(results["rates"]) == {"ddpo_jax", "torch"}
  (ours,), (theirs,) = results["epochs"]["ddpo_jax"], results["epochs"]["torch"]
  assert ours["images"] == theirs["images"] > 0
  for side in results["memory"].values():
    assert side["peak_rss_bytes"] > 1e8
  assert results["jpeg"]["images"] == 256
  for part in ("sampling", "training"):
    profile = results["profile"][part]
    assert 0 < profile["busy_seconds"] and profile["operations"]
  assert "times as fast" in printed


def test_an_old_schedulers_file_means_what_it_means_in_training(tmp_path):
  """It lacks steps_offset, without which the last step has no density."""
  shutil.copytree(small_model(), tmp_path, dirs_exist_ok=True)
  file = tmp_path / "scheduler" / "scheduler_config.json"
  values = json.loads(file.read_text())
  del values["steps_offset"], values["clip_sample"]
  file.write_text(json.dumps(values))
  cfg = resolve(small_config(**{"pretrained.model": str(tmp_path)}))
  schedule, trained = (model.shapes.noise_schedule for model in
                       (random_model(cfg), build.open_model(cfg)))
  assert schedule == trained and schedule.steps_offset == 1


def test_flops_are_counted_from_shapes():
  """A convolution, and a matrix product in a loop that runs five times."""
  x, kernel, matrix = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 16)), jnp.ones((16, 16))

  def network(x):
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME",
                                     dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.lax.scan(lambda y, _: (y @ matrix, None), y, length=5)[0]

  pixels = 2 * 8 * 8
  assert flops.count(network, x) == 2 * pixels * (3 * 3 * 3 * 16 + 5 * 16 * 16)


def test_flops_of_a_gradient_are_those_that_are_asked_for():
  """A convolution's backward pass has two parts; of a frozen one only the first is needed."""
  conv = layers.Conv(8, 32, dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = jnp.ones((2, 8, 8, 8))
  forward = 2 * 2 * 8 * 8 * 9 * 8 * 32
  assert flops.count(jax.value_and_grad(lambda x: conv(x).sum()), x) == 2 * forward


def test_zeros_between_pixels_are_no_work():
  """Of a strided convolution's gradient in x, as XLA computes it: what it takes forward."""
  kernel = jnp.ones((3, 3, 4, 16))
  strided = lambda x: jax.lax.conv_general_dilated(
      x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
  forward = 2 * 2 * 4 * 4 * 9 * 4 * 16
  backward = flops.count(jax.grad(lambda x: strided(x).sum()), jnp.ones((2, 8, 8, 4)))
  assert flops.count(strided, jnp.ones((2, 8, 8, 4))) == backward == forward


def test_flops_leave_out_what_is_recomputed(monkeypatch):
  """And leave the model to recompute it as before."""
  monkeypatch.setattr(flops, "compiled", lambda *_: None)
  models = random_model(resolve(small_config())).shapes
  counted = {}
  for mode in ("none", "full"):
    models.unet.gradient_checkpointing = mode
    counted[mode] = flops.of_models(models, guided=True, use_lora=False)
    assert models.unet.gradient_checkpointing == mode
  assert counted["none"] == counted["full"]
  unguided = flops.of_models(models, guided=False, use_lora=False)["denoising_step"]["counted"]
  assert 1.5 < counted["none"]["denoising_step"]["counted"] / unguided <= 2


def test_flops_of_training_every_weight(monkeypatch):
  """As much again as forward for gradients in the inputs, and once more for those in matrices."""
  monkeypatch.setattr(flops, "compiled", lambda *_: None)
  counted = {}
  for use_lora in (True, False):
    raw = demo.get_config()
    raw.pretrained.model, raw.use_lora = str(small_model()), use_lora
    cfg = resolve(raw)
    side = argparse.Namespace(_cfg=cfg, _shapes=random_model(cfg).shapes)
    parts = JaxSide.flops(side)
    forward, both = (parts[part]["counted"] for part in ("denoising_step", "training_timestep"))
    counted[use_lora] = both / forward
  assert 2 < counted[True] < 2.5
  assert 2.8 < counted[False] <= 3


def test_flops_of_flash_attention(monkeypatch):
  """What cuDNN computes is no product in the traced program, but counts as XLA's attention does."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
  query, key = jnp.ones((2, 64, 4, 16), jnp.bfloat16), jnp.ones((2, 32, 4, 16), jnp.bfloat16)

  def count(implementation):
    attend = lambda query, key: jax.nn.dot_product_attention(
        query, key, key, implementation=implementation).astype(jnp.float32).sum()
    return [flops.count(each, query, key) for each in (attend, jax.value_and_grad(attend, (0, 1)))]

  products = 2 * 2 * 64 * 32 * 4 * 16
  assert count("cudnn") == count("xla") == [2 * products, 6 * products]


def test_rates():
  epochs = [{"images": 8, "sampling_seconds": s, "reward_seconds": 1, "training_seconds": 4}
            for s in (2, 4, 8)]
  rates = compare.rates(epochs, visits=10)
  assert rates["images_per_second"] == [2, 1, 4]  # median, least, largest
  assert rates["sample_timesteps_per_second"] == [20, 20, 20]
  assert rates["epoch_seconds"] == [9, 7, 13]


@pytest.mark.parametrize("together", (False, True))
def test_parts_are_measured_apart(together):
  """Of an epoch that a run has, and of one where sampling and training do their own work alone."""
  program = object.__new__(SharedProgram)
  program._first_parts = frozenset({(0, 0)} if together else ())

  def run_epoch(apart=False):
    seconds = {"sampling_seconds": 2.0, "training_seconds": 4.0} if apart else {
        "sampling_seconds": 4.5, "training_seconds": 0.5}
    return {"images": 8, "reward_seconds": 1.0, "sampler_drift": 0.1 if apart else 0.3, **seconds}

  side = types.SimpleNamespace(_trainer=types.SimpleNamespace(update=program),
                               _run_epoch=run_epoch)
  epoch = JaxSide.epoch(side)
  rates = compare.rates([epoch], visits=10)
  assert {name: median for name, (median, *_) in rates.items()} == {
      "images_per_second": 4, "sample_timesteps_per_second": 20,
      "epoch_seconds": 6 if together else 7}
  assert epoch["gradient_while_sampling"] == together
  assert epoch["sampler_drift"] == (0.3 if together else 0.1)


@pytest.mark.parametrize("key,expected", (("epoch_seconds", 2.0), ("images_per_second", 0.5)))
def test_ratio_is_ours_over_theirs_in_speed(key, expected):
  assert compare._ratio(key, {key: [1.0]}, {key: [2.0]}) == expected


def test_a_profile_adds_up_what_is_of_one_kind():
  operations = [("fusion.12", 1.0), ("fusion.3", 2.0), ("dot", 4.0), ("while.1", 9.0),
                ("sm90_gemm_64x64_3", 0.5)]
  assert profile.summarize(operations) == {"busy_seconds": 7.5, "operations": [
      ("dot", 4.0, 1), ("fusion", 3.0, 2), ("sm90_gemm_64x64", 0.5, 1)]}


def test_a_profile_sees_what_is_done():
  """Half a second of products, of which the middle is looked at."""
  x = jnp.ones((256, 256))
  product = jax.jit(lambda x: x @ x)
  one = min(timeit.repeat(lambda: product(x).block_until_ready(), number=10)) / 10
  seen = profile.during(
      lambda: [product(x).block_until_ready() for _ in range(int(0.5 / one))], 0.5)
  assert 0 < seen["seconds"] < 0.5
  assert seen["operations"] and seen["busy_seconds"] > 0.05 * seen["seconds"]


class FakeSide:
  """Answers at once; ends when it is asked for what is in `ends_at`."""

  devices = 1

  def __init__(self, name, *ends_at):
    self.name, self.ends_at = name, ends_at

  def call(self, method):
    if method in self.ends_at:
      raise UserError(f"{self.name} failed: no memory")
    return {"images": 4, "sampling_seconds": 1.0, "reward_seconds": 0.0,
            "training_seconds": 1.0, "seconds": 1.0, "platform": "gpu", "devices": self.devices}

  def close(self):
    pass


def test_a_reference_that_ends_is_left_out(capsys):
  """Where torch.compile finds no compiler, or memory is short, the others are measured."""
  sides = [FakeSide("ddpo_jax"), FakeSide("torch"), FakeSide("torch.compile", "epoch")]
  epochs = compare.run_rounds(sides, 2)
  assert {name: len(of) for name, of in epochs.items()} == {"ddpo_jax": 2, "torch": 2}
  assert "torch.compile failed: no memory; going on without it" in capsys.readouterr().err
  with pytest.raises(UserError, match="ddpo_jax failed"):
    compare.run_rounds([FakeSide("ddpo_jax", "epoch"), FakeSide("torch")], 2)


def test_what_was_measured_is_kept(monkeypatch, tmp_path):
  """A benchmark that is cut short leaves what it had."""
  config = demo.get_config()
  config.compilation_cache = ""
  monkeypatch.setattr(compare, "Side", lambda name, *_: FakeSide(name, "flops"))
  options = argparse.Namespace(skip_start=False, reference=["torch"], torch_compile=False,
                               rounds=1, profile=False, output=str(tmp_path / "results.json"))
  with pytest.raises(UserError):
    compare.measure(resolve(config), ["benchmark.py", "--config=demo.py"], options, "as started")
  results = json.loads((tmp_path / "results.json").read_text())
  assert results["start"] == {"cold": 1.0, "warm": 1.0}
  assert results["rates"]["ddpo_jax"]["images_per_second"] == [4.0, 4.0, 4.0]
  assert set(results["epochs"]) == set(results["memory"]) == {"ddpo_jax", "torch"}


def test_one_gpu_is_compared_with_one(monkeypatch):
  """The reference uses one, whatever there is."""
  monkeypatch.setattr(compare, "Side", lambda name, *_: FakeSide(name, "epoch"))
  monkeypatch.setattr(FakeSide, "devices", 8)
  options = argparse.Namespace(skip_start=True, reference=["torch"], torch_compile=False,
                               rounds=1, profile=False, output=None)
  with pytest.raises(UserError, match="^--reference torch uses one GPU, and JAX finds 8; set CUDA"):
    compare.measure(resolve(demo.get_config()), ["benchmark.py"], options, "")


def test_sides_leave_each_other_memory(monkeypatch):
  """JAX would take most of a GPU at once; with no other side beside it, it may."""
  given = {}
  monkeypatch.setattr(compare, "Side", lambda name, command, environment=None:
                      given.update({name: environment}))
  for reference in ([], ["torch"]):
    options = argparse.Namespace(reference=reference, torch_compile=True)
    compare.start_sides(["ours"], ["benchmark.py"], options)
    assert given["ddpo_jax"] == ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if reference else None)
  assert set(given) == {"ddpo_jax", "torch", "torch.compile"}


@pytest.mark.parametrize("user,expected", ((None, "false"), ("true", "true")))
def test_a_side_gets_variables_that_the_user_has_not_set(monkeypatch, user, expected):
  if user is not None:
    monkeypatch.setenv("A_VARIABLE", user)
  tell = "import json, os; input(); print(json.dumps(os.environ['A_VARIABLE']))"
  side = Side("side", [sys.executable, "-c", tell], {"A_VARIABLE": "false"})
  assert side.call("") == expected
  side.close()


def test_a_reference_that_is_not_installed_is_refused(monkeypatch, capsys):
  monkeypatch.setattr(compare, "_is_installed", lambda name: name != "peft")
  assert compare.main(["benchmark.py", "--reference", "torch"]) == 2
  assert capsys.readouterr().err.strip() == (
      "--reference=torch needs peft: pip install -e '.[test]'")


FAILING = """
from ddpo_jax.benchmark import side
from ddpo_jax.errors import UserError

class Failing:
  def decode(self):
    raise {error}

side.serve(Failing)
"""


@pytest.mark.parametrize("code,message", [
    (FAILING.format(error="ValueError('no\\nsuch kernel')"),
     "our side failed: ValueError: no such kernel"),
    (FAILING.format(error="UserError('sample.eta is wrong')"),
     "our side failed: sample.eta is wrong"),
    (FAILING.format(error="MemoryError()").replace("side.serve(Failing)", """
from configs import demo
from ddpo_jax import config, resource_errors
side.serve(Failing, resource_errors.with_advice(config.resolve(demo.get_config())))"""),
     f"our side failed: {resource_errors.out_of_memory(resolve(demo.get_config()))}"),
    (FAILING.replace("side.serve(Failing)", "side.serve(lambda: 1 / 0)"),
     "our side failed: ZeroDivisionError: division by zero"),
    ("raise SystemExit(3)", "our side ended with status 3; if nothing above says why, it may "
                            "have been ended for lack of memory")])
def test_a_side_that_fails_is_one_line(code, message, capfd):
  side = Side("our side", [sys.executable, "-c", code])
  with pytest.raises(UserError) as error:
    side.call("decode")
  assert str(error.value) == message
  side.close()
  shown = capfd.readouterr().err
  assert shown.splitlines()[0] == "our side: decoding images"
  assert ("Traceback" in shown) == ("Error: " in message)  # whatever is no error of the user's


def test_what_is_measured_is_shown_in_words():
  methods = {name for name in vars(JaxSide) if not name.startswith("_")}
  assert methods == set(_DOING)


@pytest.mark.parametrize("arguments,says", [
    (["--config.seed=x"], True), (["--config", "none.py"], False), (["--config=none.py"], False)])
def test_what_is_measured_without_a_config_is_said(monkeypatch, capsys, arguments, says):
  assert compare.main(["benchmark.py", *arguments]) == 2
  *said, error = capsys.readouterr().err.splitlines()
  assert error.startswith("seed" if says else "--config=none.py")
  assert len(said) == says
  if says:
    assert "Stable Diffusion 1.5" in said[0] and "--config configs/demo.py" in said[0]


def test_arguments_may_have_spaces(tmp_path, capsys):
  """Also in the middle of what looks like an option."""
  assert compare.main(["benchmark.py", "--config", str(tmp_path / "a --config b.py")]) == 2
  assert f"{tmp_path}/a --config b.py' does not exist" in capsys.readouterr().err


def test_torch_compile_needs_torch(capsys):
  assert compare.main(["benchmark.py", "--config=configs/demo.py", "--torch_compile"]) == 2
  assert capsys.readouterr().err.startswith("--torch_compile needs --reference=torch")


def test_the_reference_has_no_other_rewards(capsys):
  """It would score JPEG sizes beside an aesthetic score."""
  pytest.importorskip("peft")
  arguments = [f"--config={ROOT}/configs/single_gpu.py:aesthetic", "--reference=torch"]
  assert compare.main(["benchmark.py", *arguments]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line == ("reward_fn='aesthetic_score': with --reference it must be one of "
                  "jpeg_compressibility, jpeg_incompressibility, which both sides have")


def test_help_names_the_config(capsys):
  with pytest.raises(SystemExit):
    compare.main(["benchmark.py", "--help"])
  assert capsys.readouterr().out.startswith("usage: benchmark.py [--config FILE[:EXPERIMENT]]")


def test_the_reference_says_what_it_is():
  for library in ("torch", "diffusers", "peft"):
    pytest.importorskip(library)
  process = start([str(ROOT / "scripts" / "torch_reference.py"), "--help"],
                  stdout=subprocess.PIPE)
  printed, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors
  assert printed.startswith("usage: started by scripts/benchmark.py --reference torch")


@pytest.mark.parametrize("name", (".", "file/x.json", "a" * 300, "a\0"))
def test_an_output_that_cannot_be_written_is_refused_first(monkeypatch, tmp_path, capsys, name):
  monkeypatch.setattr(compare, "measure", lambda *_: pytest.fail("work began"))
  (tmp_path / "file").write_text("")
  assert compare.main(["benchmark.py", f"--config={ROOT / 'configs' / 'demo.py'}",
                       "--output", str(tmp_path / name)]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("--output=") and "must be a file's path" in line
  assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_output_may_be_in_ones_home(monkeypatch, tmp_path):
  """A shell leaves --output=~/x as it is."""
  given = []
  monkeypatch.setattr(compare, "measure", lambda cfg, command, options, _: given.append(options))
  monkeypatch.setattr(compare, "describe", lambda results: "")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert compare.main(["benchmark.py", f"--config={ROOT / 'configs' / 'demo.py'}",
                       "--output=~/results.json"]) == 0
  assert [options.output for options in given] == [str(tmp_path / "results.json")]
