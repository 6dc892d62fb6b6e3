"""Runs that are killed or told to stop, in processes of their own, and go on."""

import signal

import numpy as np
from runs import (
    TINY,
    command,
    finish,
    metrics_of,
    start,
    wait_for_epochs,
    weights_of,
    without_times,
)

from ddpo_jax import checkpoint

SMALL = (f"--config.pretrained.model={TINY}", "--config.sample.num_steps=2",
         "--config.sample.batch_size=2", "--config.train.batch_size=1",
         "--config.sample.guidance_scale=1.0")


def test_killed_run_resumed_is_the_run_never_killed(tmp_path):
  """SIGKILL, which nothing can prepare for, while epochs and checkpoints are written."""
  options = (*SMALL, "--config.num_epochs=12", "--config.save_freq=1",
             "--config.resume_from=auto")
  codes, errors = finish([start(command(tmp_path, "whole", *options))])
  assert codes == [0], errors
  for epochs in (1, 5):
    with open(tmp_path / "stdout", "w") as stdout:
      killed = start(command(tmp_path, "killed", *options), stdout=stdout)
    wait_for_epochs([killed], tmp_path / "killed", epochs)
    killed.kill()
    killed.communicate()
  assert "epoch 4/12  reward" in (tmp_path / "stdout").read_text()  # said at once
  codes, errors = finish([start(command(tmp_path, "killed", *options))])
  assert codes == [0], errors
  runs = [tmp_path / name for name in ("whole", "killed")]
  whole_lines, killed_lines = (without_times(metrics_of(run)) for run in runs)
  assert [line["epoch"] for line in killed_lines] == list(range(12))
  assert killed_lines == whole_lines
  np.testing.assert_array_equal(*map(weights_of, runs))


def test_sigterm_saves_and_exits_143(tmp_path):
  """The last finished epoch is there to go on from."""
  process = start(command(tmp_path, "run", *SMALL, "--config.num_epochs=1000",
                          "--config.save_freq=1000"))
  wait_for_epochs([process], tmp_path / "run", 2)
  process.send_signal(signal.SIGTERM)
  codes, errors = finish([process])
  assert codes == [143], errors
  assert "signal 15" in errors[0]
  assert checkpoint.find(tmp_path / "run")[1] == len(metrics_of(tmp_path / "run")) - 1
