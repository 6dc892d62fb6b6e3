"""Runs in processes of their own, and what they leave."""

import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from ddpo_jax import checkpoint, lora, rollout, train
from ddpo_jax.build import load_models
from ddpo_jax.config import resolve

ROOT = pathlib.Path(__file__).parents[1]


def command(logdir, name, *options):
  """The demo as a run called `name`; compiled programs are shared within `logdir`."""
  return [str(ROOT / "scripts" / "train.py"), "--config", str(ROOT / "configs" / "demo.py"),
          f"--config.logdir={logdir}", f"--config.run_name={name}",
          f"--config.compilation_cache={logdir / 'cache'}", *options]


def start(arguments, devices=1, stdout=subprocess.DEVNULL, **environment):
  """Starts Python on `devices` virtual devices, in an environment as users have it."""
  usual = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
  flags = f"--xla_force_host_platform_device_count={devices}"
  return subprocess.Popen(
      [sys.executable, *arguments], cwd=ROOT, text=True, stdout=stdout,
      stderr=subprocess.PIPE,
      env={**usual, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **environment})


def small_command(logdir, name, *more):
  """An epoch of 16 images, 8 at a time on 4 devices, in 2 optimizer steps."""
  from small_model import small_model  # not there in processes that import this module
  return command(
      logdir, name, f"--config.pretrained.model={small_model()}", "--config.sample.num_steps=20",
      "--config.train.timestep_fraction=0.1", "--config.sample.batch_size=2",
      "--config.train.batch_size=2", "--config.train.learning_rate=3e-4",
      "--config.sample.guidance_scale=1.0",
      "--config.reward_fn=tests.runs:brightness",
      "--config.num_epochs=2", "--config.save_freq=100", *more)


def free_address():
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    return f"localhost:{listener.getsockname()[1]}"


def start_two(arguments):
  address = free_address()
  return [start([*arguments, f"--config.distributed.coordinator_address={address}",
                 "--config.distributed.num_processes=2",
                 f"--config.distributed.process_id={i}"], devices=2) for i in (0, 1)]


def finish(processes):
  """Waits for all: their exit statuses, and what each wrote to standard error."""
  errors = [process.communicate(timeout=600)[1] for process in processes]
  return [process.returncode for process in processes], errors


def wait_for_epochs(processes, run, count):
  """Returns once `count` epochs are logged; fails if a process ends before."""
  deadline = time.monotonic() + 300
  while len(metrics_of(run)) < count:
    for process in processes:
      assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < deadline
    time.sleep(0.01)


def metrics_of(run):
  """The finished lines of metrics.jsonl."""
  path = run / "metrics.jsonl"
  text = path.read_text() if path.exists() else ""
  return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]


def without_times(lines):
  times = ("_seconds", "_per_second", "_bytes")
  return [{k: v for k, v in line.items() if not k.endswith(times)} for line in lines]


def weights_of(run, epoch=None):
  """The trained weights of a checkpoint, by default the newest, as one vector."""
  cfg = resolve(json.loads((run / "config.json").read_text()) | {"resume_from": ""})
  params = lora.partition(load_models(cfg).unet)[1]
  epoch = checkpoint.find(run)[1] if epoch is None else epoch
  leaves = jax.tree.leaves(checkpoint.restore_params(run, epoch, params))
  return np.concatenate([np.ravel(leaf) for leaf in leaves])


# Metrics of an epoch that call for no warning.
HEALTHY = {"ratio_drift": 1e-9, "diversity": 0.3, "reward_std": 1.0, "reward_mean": 5.0,
           "clipfrac": 0.2, "skipped_steps": 1, "loss": 0.01, "grad_norm": 0.1}


# ---- reward functions, for those processes to import ----


def brightness(images, prompts, metadata):
  """Smooth, unlike a JPEG's size, which jumps as a pixel rounds the other way."""
  values = images.mean(axis=(1, 2, 3))
  return values, {"half": values / 2, "prompt": prompts}


_prompts_drawn = itertools.count(1)


def no_more_prompts_on_process_one(rng, after):
  """Four are drawn before a run; in an epoch its own eight, and then those of all sixteen."""
  if jax.process_index() == 1 and next(_prompts_drawn) > after:
    raise KeyError("no such prompt")
  return "a red circle", {}


def no_device_on_process_one(rng):
  """From the first prompts that are drawn for sampling, before the first epoch."""
  def fails(*_):
    raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

  if jax.process_index() == 1:
    rollout.RolloutWorker._launch = fails
  return "a red circle", {}


def fails_on_process_one(images, prompts, metadata):
  if jax.process_index() == 1:
    raise ConnectionError("the server is gone")
  return images.mean(axis=(1, 2, 3)), {}


_batches_scored = itertools.count()


def loses_its_device_on_process_one(images, prompts, metadata):
  """In the second epoch, and where no process asks whether the others are well."""
  def fails(*_):
    raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

  if jax.process_index() == 1 and next(_batches_scored) >= 2:
    train.make_batch = fails
  return images.mean(axis=(1, 2, 3)), {}
