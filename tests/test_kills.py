"""SIGKILL at 20 random moments of a run, some of them while it saves. Takes half an hour.

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

KILLS = 20
EPOCHS = 8
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


def wait_for_line(processes, run):
  lines = len(metrics_of(run))
  while len(metrics_of(run)) == lines and all(p.poll() is None for p in processes):
    time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("begin", (start_demo, start_processes))
def test_killed_run_is_the_run_never_killed(tmp_path, begin):
  seconds = random.Random(0)
  wait(begin(tmp_path, "whole"))
  started, processes = time.monotonic(), begin(tmp_path, "timed")  # nothing to compile
  wait_for_line(processes, tmp_path / "timed")
  first_epoch = time.monotonic() - started
  kill(processes)
  for count in range(KILLS):
    processes = begin(tmp_path, "killed")
    if count % 4 == 3:  # as an epoch is logged and saved
      wait_for_line(processes, tmp_path / "killed")
      time.sleep(seconds.uniform(0, 0.12 * first_epoch))
    else:
      time.sleep(seconds.uniform(0, 0.9 * first_epoch))
    kill(processes)
    saved = sorted(path.name for path in (tmp_path / "killed").glob("checkpoints/*"))
    print(f"kill {count + 1}: {len(metrics_of(tmp_path / 'killed'))} epochs logged, "
          f"checkpoints {saved}", flush=True)
    assert str(EPOCHS - 1) not in saved, "too fast: nothing was left to kill"
  wait(begin(tmp_path, "killed"))
  runs = [tmp_path / name for name in ("whole", "killed")]
  whole_lines, killed_lines = (without_times(metrics_of(run)) for run in runs)
  assert [line["epoch"] for line in killed_lines] == list(range(EPOCHS))
  assert killed_lines == whole_lines
  np.testing.assert_array_equal(*map(weights_of, runs))
  rewards, others = ((run / "rewards.jsonl").read_text() for run in runs)
  assert rewards == others
