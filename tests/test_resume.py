"""Runs that are killed or told to stop, in processes of their own, and go on."""

import signal

import numpy as np
from runs import (
    command,
    finish,
    metrics_of,
    start,
    wait_for_epochs,
    weights_of,
    without_times,
)
from small_model import small_model

from ddpo_jax import checkpoint

EPOCHS = 12


def usual_options():
  return (f"--config.pretrained.model={small_model()}", "--config.sample.num_steps=2",
          "--config.sample.batch_size=2", "--config.train.batch_size=1",
          "--config.sample.guidance_scale=1.0", "--config.resume_from=auto",
          f"--config.num_epochs={EPOCHS}")


def run_to_the_end(logdir, name, *options):
  codes, errors = finish([start(command(logdir, name, *usual_options(), *options))])
  assert codes == [0], errors
  return without_times(metrics_of(logdir / name)), weights_of(logdir / name)


def test_stopped_run_resumed_is_the_run_never_stopped(tmp_path):
  """First SIGKILL, which nothing can prepare for, while epochs and checkpoints are written.

  Then SIGTERM, which must save the last finished epoch.
  """
  lines, weights = run_to_the_end(tmp_path, "whole", "--config.save_freq=1")
  run = tmp_path / "stopped"
  with open(tmp_path / "stdout", "w") as stdout:
    killed = start(command(tmp_path, "stopped", *usual_options(), "--config.save_freq=1"),
                   stdout=stdout)
  wait_for_epochs([killed], run, 4)
  killed.kill()
  killed.communicate()
  assert "epoch 3/12  reward" in (tmp_path / "stdout").read_text()  # said at once

  told = start(command(tmp_path, "stopped", *usual_options(), "--config.save_freq=1000"))
  wait_for_epochs([told], run, 6)
  told.send_signal(signal.SIGTERM)
  codes, errors = finish([told])
  assert codes == [143], errors
  assert "signal 15" in errors[0]
  assert checkpoint.find(run)[1] == len(metrics_of(run)) - 1 < EPOCHS - 1

  resumed_lines, resumed_weights = run_to_the_end(tmp_path, "stopped")
  assert [line["epoch"] for line in resumed_lines] == list(range(EPOCHS))
  assert resumed_lines == lines
  np.testing.assert_array_equal(resumed_weights, weights)
