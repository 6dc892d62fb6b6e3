"""SIGKILL at 20 random moments of a run, some of them while it saves. Takes a quarter of an hour.

    pytest -m slow tests/test_kills.py
"""

import random
import time

import numpy as np
import pytest
from runs import (
  command,
  finish,
  metrics_of,
  small_command,
  start,
  start_two,
  weights_of,
  without_times,
)

from ddpo_jax import checkpoint

KILLS = 20
EPOCHS = 10
OPTIONS = (f"--config.num_epochs={EPOCHS}", "--config.save_freq=1",
           "--config.resume_from=auto")


def start_demo(logdir, name):
  return [start(command(logdir, name, *OPTIONS))]


def start_processes(logdir, name):
  return start_two(small_command(logdir, name, *OPTIONS))


def kill(processes):
  for process in processes:
    process.kill()
  for process in processes:
    process.communicate()


def wait(processes):
  codes, errors = finish(processes)
  assert not any(codes), errors


def wait_for_lines(processes, run, count):
  """Until so many epochs are logged, or the run has ended."""
  while len(metrics_of(run)) < count and all(p.poll() is None for p in processes):
    time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("begin", (start_demo, start_processes))
def test_killed_run_is_the_run_never_killed(tmp_path, begin):
  seconds = random.Random(0)
  wait(begin(tmp_path, "whole"))
  started, processes = time.monotonic(), begin(tmp_path, "timed")  # nothing to compile
  wait_for_lines(processes, tmp_path / "timed", 1)
  first_epoch = time.monotonic() - started
  kill(processes)
  run = tmp_path / "killed"
  for count in range(KILLS):
    saved = next(iter(checkpoint.saved_epochs(run)), -1) + 1
    logged = len(metrics_of(run))
    processes = begin(tmp_path, "killed")
    if count % 4 == 3:  # as an epoch is logged and saved; every second time after another
      wait_for_lines(processes, run, max(saved + (2 if count % 8 == 3 else 1), logged + 1))
      time.sleep(seconds.uniform(0, 0.12 * first_epoch))
    else:
      time.sleep(seconds.uniform(0, 0.9 * first_epoch))
    kill(processes)
    saved = checkpoint.saved_epochs(run)
    print(f"kill {count + 1}: {len(metrics_of(run))} epochs logged, checkpoints {saved}",
          flush=True)
    assert EPOCHS - 1 not in saved, "too fast: nothing was left to kill"
  assert saved, "too slow: nothing was saved to be resumed"
  wait(begin(tmp_path, "killed"))
  runs = [tmp_path / "whole", run]
  whole_lines, killed_lines = (without_times(metrics_of(run)) for run in runs)
  assert [line["epoch"] for line in killed_lines] == list(range(EPOCHS))
  assert killed_lines == whole_lines
  np.testing.assert_array_equal(*map(weights_of, runs))
  rewards, others = ((run / "rewards.jsonl").read_text() for run in runs)
  assert rewards == others
