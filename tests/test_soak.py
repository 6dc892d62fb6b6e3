"""Many epochs in one process: its memory, threads and files stay, nothing is compiled anew.

    pytest -m slow tests/test_soak.py -s    # 300 epochs; a short version runs with the rest
"""

import os
import pathlib
import threading
import time

import jax
import numpy as np
import pytest
from small_model import small_config

from ddpo_jax import train
from ddpo_jax.config import resolve

ROOT = pathlib.Path(__file__).parents[1]
COMPILED = "/jax/core/compile/backend_compile_duration"
SETTLED = 20  # epochs after which memory must stay


class Probe:
  """A reward that notes, once an epoch, what the process holds."""

  def __init__(self):
    self.compiled, self.seen = 0, []

  def on_event(self, name, seconds, **_):
    del seconds
    self.compiled += name == COMPILED

  def __call__(self, images, prompts, metadata):
    self.seen.append((resident_bytes(), threading.active_count(),
                      len(os.listdir("/proc/self/fd")), self.compiled))
    return images.mean(axis=(1, 2, 3)), {}


def resident_bytes():
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE")


probe = Probe()


def measured(images, prompts, metadata):
  return probe(images, prompts, metadata)


def soak(tmp_path, monkeypatch, epochs):
  """Runs so many epochs; what was seen in each: [epochs, 4]."""
  global probe
  probe = Probe()
  monkeypatch.setattr("jax.device_count", lambda: 1)
  config = small_config(
      logdir=str(tmp_path), run_name="run", reward_fn=f"{__name__}:measured",
      num_epochs=epochs, save_freq=10, eval_freq=50)
  jax.monitoring.register_event_duration_secs_listener(probe.on_event)
  started = time.perf_counter()
  try:
    train.train(resolve(config))
  finally:
    jax.monitoring.unregister_event_duration_listener(probe.on_event)
  print(f"\n{epochs} epochs in {time.perf_counter() - started:.0f} s")
  return np.array(probe.seen)


def check_steady(seen, since):
  memory, threads, files, compiled = seen.T
  for epoch in sorted({0, 1, 2, since, len(seen) // 2, len(seen) - 1}):
    print(f"epoch {epoch + 1}: {memory[epoch] / 2**20:.1f} MiB, {threads[epoch]} threads, "
          f"{files[epoch]} files, {compiled[epoch]} programs compiled")
  # The first epoch samples and updates; all programs are there when the second scores.
  assert compiled[0] > 0 and compiled[-1] == compiled[since]
  # A checkpoint is written in threads and files of its own, which come and go: what stays counts.
  assert np.median(threads[since:]) <= np.median(threads[:since]) + 1
  assert np.median(files[since:]) <= np.median(files[:since]) + 1


def test_nothing_grows(tmp_path, monkeypatch):
  seen = soak(tmp_path, monkeypatch, 24)
  assert len(seen) == 24
  check_steady(seen, since=12)


@pytest.mark.slow
def test_soak(tmp_path, monkeypatch):
  seen = soak(tmp_path, monkeypatch, 300)
  check_steady(seen, since=SETTLED - 1)
  memory = seen[:, 0]
  assert abs(memory[-1] / memory[SETTLED - 1] - 1) < 0.05
