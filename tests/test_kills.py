"""SIGKILL at 20 random moments of a run, some of them while it saves. Takes half an hour.

    pytest -m slow tests/test_kills.py
"""

import json
import random
import time

import pytest
from test_processes import arguments, metrics_of, start, start_two, weights_of, without_times

KILLS = 20
EPOCHS = 8


def start_demo(logdir, name):
  """The demo as it is, of fewer epochs, each of them saved."""
  command = [argument for argument in arguments(logdir, name)
             if not argument.startswith(("--config.pretrained", "--config.sample",
                                         "--config.train", "--config.reward"))]
  return [start([*command, *saved_often()], 1)]


def start_processes(logdir, name):
  return start_two(logdir, name, *saved_often())


def saved_often():
  return (f"--config.num_epochs={EPOCHS}", "--config.save_freq=1",
          "--config.resume_from=auto")


def kill(processes):
  for process in processes:
    process.kill()
  for process in processes:
    process.communicate()


def wait(processes):
  for process in processes:
    errors = process.communicate(timeout=1200)[1]
    assert process.returncode == 0, errors


def wait_for_line(processes, run):
  lines = len(metrics_of(run))
  while len(metrics_of(run)) == lines and all(p.poll() is None for p in processes):
    time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("begin", (start_demo, start_processes))
def test_killed_run_is_the_run_never_killed(tmp_path, begin):
  seconds = random.Random(0)
  started, processes = time.monotonic(), begin(tmp_path, "whole")
  wait_for_line(processes, tmp_path / "whole")
  first_epoch = time.monotonic() - started
  wait(processes)
  for count in range(KILLS):
    processes = begin(tmp_path, "killed")
    if count % 5 == 4:  # as an epoch is logged and saved
      wait_for_line(processes, tmp_path / "killed")
      time.sleep(seconds.uniform(0, 0.5))
    else:
      time.sleep(seconds.uniform(0, 1.2 * first_epoch))
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
  assert weights_of(runs[0]).tobytes() == weights_of(runs[1]).tobytes()
  (rewards, others) = ((run / "rewards.jsonl").read_text() for run in runs)
  assert list(map(json.loads, rewards.splitlines())) == list(map(json.loads, others.splitlines()))
