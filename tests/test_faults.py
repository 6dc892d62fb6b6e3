"""Faults in a running run: it goes on, or stops with all finished epochs; then it resumes exactly.

    pytest -m "slow or not slow" tests/test_faults.py    # each kind in the first, the second
                                                         # and the last epoch
"""

import contextlib
import dataclasses
import errno
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import HEALTHY, metrics_of, without_times
import servers
from small_model import small_config

from ddpo_jax import checkpoint, diagnostics, resource_errors, resume, tracking, train
from ddpo_jax.advantages import PerPromptStatTracker
from ddpo_jax.config import resolve
from ddpo_jax.errors import Interrupted, UserError
from ddpo_jax.rewards.llava import make_llava_bertscore
from ddpo_jax.rewards.remote import RewardError

EPOCHS = 3


class Injection:
  """What happens in which epoch; `now` is the epoch that is under way."""

  def __init__(self, run=None, moment=-1, fault=None):
    self.run, self.moment, self.fault = run, moment, fault
    self.now, self.armed = -1, False


injection = Injection()


def brightness(images):
  return images.mean(axis=(1, 2, 3))


def scored(images, prompts, metadata):
  """Called once an epoch. A fault gives another result, raises, or prepares one for later."""
  injection.now += 1
  if injection.now == injection.moment:
    result = injection.fault(images, prompts, metadata)
    if result is not None:
      return result
  return brightness(images), {}


# ---- the faults ----


def reward_raises(images, prompts, metadata):
  raise ConnectionError("the server is gone")


def reward_is_nan(images, prompts, metadata):
  return np.where(np.arange(len(images)) == 2, np.nan, brightness(images)), {}


def reward_is_infinite(images, prompts, metadata):
  return np.full(len(images), np.inf), {}


def one_reward_too_few(images, prompts, metadata):
  return brightness(images)[1:], {}


def reward_is_no_pair(images, prompts, metadata):
  return brightness(images)


def reward_exits(images, prompts, metadata):
  raise SystemExit("the reward gives up")


def server_is_gone(images, prompts, metadata):
  with servers.serve(servers.llava) as llava:
    reward_fn = make_llava_bertscore(url=llava.url, time_limit=0.5, backoff=0.1)
  return reward_fn(images, prompts, metadata)


def out_of_memory(images, prompts, metadata):
  jnp.zeros((2**46,), jnp.float32).block_until_ready()


def arm(images, prompts, metadata):
  """For what happens later in the epoch."""
  injection.armed = True


def signal_once(images, prompts, metadata):
  os.kill(os.getpid(), signal.SIGTERM)


def signal_and_arm(images, prompts, metadata):
  injection.armed = True
  os.kill(os.getpid(), signal.SIGINT)


# ---- where the armed ones strike ----


def no_gradients(monkeypatch):
  """Advantages that make the loss NaN on the device, for the whole epoch."""
  make_batch = train.make_batch

  def poisoned(*args):
    batch = make_batch(*args)
    return dataclasses.replace(batch, advantages=batch.advantages * jnp.nan
                               ) if injection.armed else batch

  monkeypatch.setattr(train, "make_batch", poisoned)


def no_room_for_the_metrics(monkeypatch):
  """Lines go to a device that is always full."""
  append = tracking.append_jsonl

  def full(path, line):
    if not injection.armed:
      return append(path, line)
    with open("/dev/full", "w") as file:
      file.write(str(line))

  monkeypatch.setattr(tracking, "append_jsonl", full)


def no_room_for_the_grid(monkeypatch):
  grid = tracking.image_grid

  def full(*args):
    if injection.armed:
      raise OSError(errno.ENOSPC, "No space left on device")
    return grid(*args)

  monkeypatch.setattr(tracking, "image_grid", full)


def evaluation_fails(monkeypatch):
  log_eval = tracking.Tracker.log_eval

  def fails(tracker, epochs, *args):
    if epochs == injection.moment + 1 and injection.armed:
      raise PermissionError(errno.EACCES, "Permission denied")
    log_eval(tracker, epochs, *args)

  monkeypatch.setattr(tracking.Tracker, "log_eval", fails)


def checkpoint_fails_once(monkeypatch):
  """As its folder is given its name, in the background: nothing tells the loop."""
  folder = ocp.path.atomicity.AtomicRenameTemporaryPath
  finalize = folder.finalize

  async def fails(self):
    if injection.armed and self.get_final().name == str(injection.moment):
      injection.armed = False
      raise OSError(errno.ENOSPC, "No space left on device")
    await finalize(self)

  monkeypatch.setattr(folder, "finalize", fails)


def no_room_for_the_checkpoint(monkeypatch):
  save = checkpoint.Checkpointer.save

  def full(self, epoch, state, meta):
    if injection.armed and epoch == injection.moment:
      raise ValueError("Error writing local file: No space left on device")  # as tensorstore
    save(self, epoch, state, meta)

  monkeypatch.setattr(checkpoint.Checkpointer, "save", full)


def signal_in_the_save(monkeypatch):
  save = checkpoint.Checkpointer.save

  def interrupted(self, epoch, state, meta):
    save(self, epoch, state, meta)
    if injection.armed:
      os.kill(os.getpid(), signal.SIGINT)

  monkeypatch.setattr(checkpoint.Checkpointer, "save", interrupted)


def report_fails(monkeypatch):
  def fails(run):
    raise RuntimeError("no font")

  monkeypatch.setattr("ddpo_jax.report.write_report", fails)


class LostTracker:
  name = "lost"

  def log_epoch(self, *args):
    if injection.armed:
      raise ConnectionError("the tracker is gone")

  def log_eval(self, *args):
    pass

  def close(self):
    pass


def tracker_is_lost(monkeypatch):
  make = tracking.Loggers

  def with_lost(*args):
    loggers = make(*args)
    loggers._loggers.append(LostTracker())
    return loggers

  monkeypatch.setattr(tracking, "Loggers", with_lost)


def nothing(monkeypatch):
  pass


# What strikes, where, and what the run then raises (None: it goes on).
KINDS = {
    "reward raises": (reward_raises, nothing, ConnectionError),
    "reward is NaN": (reward_is_nan, nothing, UserError),
    "reward is infinite": (reward_is_infinite, nothing, UserError),
    "one reward too few": (one_reward_too_few, nothing, UserError),
    "reward is no pair": (reward_is_no_pair, nothing, UserError),
    "reward exits": (reward_exits, nothing, RuntimeError),
    "reward server is gone": (server_is_gone, nothing, RewardError),
    "loss is not finite": (arm, no_gradients, FloatingPointError),
    "disk is full: metrics": (arm, no_room_for_the_metrics, UserError),
    "disk is full: images": (arm, no_room_for_the_grid, UserError),
    "disk is full: checkpoint": (arm, no_room_for_the_checkpoint, UserError),
    "out of memory": (out_of_memory, nothing, UserError),
    "checkpoint fails once": (arm, checkpoint_fails_once, None),
    "tracker is lost": (arm, tracker_is_lost, None),
    "report fails": (arm, report_fails, None),
    "signal": (signal_once, nothing, Interrupted),
    "second signal in the save": (signal_and_arm, signal_in_the_save,
                                  (KeyboardInterrupt, Interrupted)),
}
MESSAGES = {
    "reward is NaN": rf"{__name__}:scored' returned nan for sample 2, prompt '\w+'; must be"}
MOMENTS = (0, 1, EPOCHS - 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("logs")


def make_config(folder, name, **changes):
  return resolve(small_config(**{
      "logdir": str(folder), "run_name": name, "resume_from": "auto",
      "reward_fn": f"{__name__}:scored", "num_epochs": EPOCHS, "save_freq": 1, "eval_freq": 0,
      "train.max_skipped_steps": 0, **changes}))


def run(cfg):
  """As the command line does, but with the errors for the test to look at."""
  with resource_errors.with_advice(cfg):
    return train.train(cfg)


@pytest.fixture(scope="module", autouse=True)
def one_build():
  """Loads and compiles once: each run starts from a copy of the same trainer.

  And no run writes a report.
  """
  build, open_model, built = train.build, train.open_model, []

  def copy(cfg, plan, *args):
    if not built:
      built.append(build(cfg, plan, *args))
    (first,) = built
    # The update is given the state for good.
    return dataclasses.replace(
        first, cfg=cfg, state=jax.tree.map(jnp.copy, first.state), skipped_in_a_row=0,
        stat_tracker=PerPromptStatTracker(16, 2), watch=diagnostics.Watch(cfg))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("jax.device_count", lambda: 1)
    patch.setattr(train, "build", copy)
    patch.setattr(train, "open_model", lambda cfg: None if built else open_model(cfg))
    patch.setattr("ddpo_jax.report.write_report", lambda run: None)
    yield built


def weights_of(path, one_build):
  """The trained weights of the newest checkpoint."""
  like = one_build[0].state.params
  restored = checkpoint.restore_params(*checkpoint.find(path), like)
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(restored)])


@pytest.fixture(scope="module")
def whole(folder, one_build):
  """The run that nothing happens to: its metrics, and its weights."""
  global injection
  injection = Injection()
  path = run(make_config(folder, "whole"))
  return without_times(metrics_of(path)), weights_of(path, one_build)


def cases():
  for kind in KINDS:
    for moment in MOMENTS:
      yield pytest.param(kind, moment, id=f"{kind} in epoch {moment}",
                         marks=[] if moment == 1 else [pytest.mark.slow])


@pytest.mark.parametrize("kind,moment", cases())
def test_fault(folder, whole, one_build, monkeypatch, kind, moment):
  global injection
  fault, strike, raised = KINDS[kind]
  name = f"{kind.replace(' ', '_').replace(':', '')}_{moment}"
  cfg, path = make_config(folder, name), folder / name
  injection = Injection(path, moment, fault)
  with monkeypatch.context() as patch:
    strike(patch)
    with pytest.raises(raised, match=MESSAGES.get(kind)) if raised else contextlib.nullcontext():
      run(cfg)
  if raised:
    # Of the epoch that failed nothing counts; a full disk keeps what was saved before.
    assert checkpoint.saved_epochs(path) == list(range(moment - 1, -1, -1))
    injection = Injection()
    run(cfg)
  lines, weights = whole
  assert without_times(metrics_of(path)) == lines
  np.testing.assert_array_equal(weights_of(path, one_build), weights)


# ---- resuming ----


def test_resume_from_another_model_is_refused(folder, whole):
  cfg = make_config(folder, "whole", **{"seed": 1, "lora.rank": 2, "sample.num_steps": 3})
  with pytest.raises(UserError) as error:
    run(cfg)
  lines = str(error.value).splitlines()
  assert len(lines) == 3
  assert any("lora.rank=2" in line and "has 3" in line for line in lines)


def test_no_later_checkpoint_is_lost(folder, whole, monkeypatch):
  """Neither those that cannot be read now: the disk's trouble is not theirs.

  Nor those after the epoch that the user goes on from.
  """
  global injection
  injection = Injection()
  cfg, path = make_config(folder, "whole"), folder / "whole"

  def fails(*args, **kwargs):
    raise OSError(errno.EIO, "Input/output error")

  with monkeypatch.context() as patch:
    patch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", fails)
    with pytest.raises(UserError, match="checkpoints/2 cannot be read .Input/output error"):
      run(cfg)
  assert checkpoint.saved_epochs(path) == [2, 1, 0]
  again = dataclasses.replace(cfg, resume_from=str(path / "checkpoints" / "0"), num_epochs=2)
  with pytest.raises(UserError, match=r"later checkpoints \(1, 2\).*overwrite; set run_name"):
    run(again)
  assert checkpoint.saved_epochs(path) == [2, 1, 0]
  run(dataclasses.replace(again, run_name="branch"))
  assert checkpoint.saved_epochs(folder / "branch") == [1, 0]


def test_an_evaluation_that_fails_loses_no_epoch(folder, whole, one_build, monkeypatch):
  """Its epoch is finished by then, and saved although it is none of those that are."""
  global injection
  name, moment = "evaluation_fails", 1
  cfg = make_config(folder, name, save_freq=EPOCHS, eval_freq=1)
  injection = Injection(folder / name, moment, arm)
  with monkeypatch.context() as patch:
    evaluation_fails(patch)
    with pytest.raises(PermissionError):
      run(cfg)
  assert checkpoint.saved_epochs(folder / name) == [moment]
  injection = Injection()
  run(cfg)
  pictures = sorted(path.name for path in (folder / name / "images").glob("eval_*"))
  assert pictures == [f"eval_{epochs:04d}.jpg" for epochs in range(EPOCHS + 1)]
  lines, weights = whole
  assert without_times(metrics_of(folder / name)) == lines
  np.testing.assert_array_equal(weights_of(folder / name, one_build), weights)


def test_a_checkpoint_that_failed_is_replaced_by_the_next_epochs(folder, monkeypatch, capsys):
  """Long before another one is due; and the run's end waits for its last one."""
  global injection
  cfg = make_config(folder, "replaced", save_freq=2, num_epochs=4)
  injection = Injection(folder / "replaced", 1, arm)
  with monkeypatch.context() as patch:
    checkpoint_fails_once(patch)
    run(cfg)
  assert checkpoint.saved_epochs(folder / "replaced") == [3, 2]
  assert "could not be written (" in capsys.readouterr().out


def test_the_tracker_is_closed_whatever_happens_to_the_last_checkpoint(folder, monkeypatch):
  global injection
  injection = Injection()
  closed = []

  def fails(self):
    raise OSError(errno.EIO, "Input/output error")

  monkeypatch.setattr(checkpoint.Checkpointer, "close", fails)
  monkeypatch.setattr(tracking.Tracker, "close", lambda self: closed.append(self))
  with pytest.raises(OSError, match="Input/output error"):
    run(dataclasses.replace(make_config(folder, "closing"), num_epochs=1))
  assert len(closed) == 1


def test_what_is_remembered_is_resumed(folder, whole, one_build):
  """Beside the weights and the statistics of rewards."""
  cfg = make_config(folder, "remembered")
  (trainer,) = one_build
  trainer = dataclasses.replace(trainer, cfg=cfg, stat_tracker=PerPromptStatTracker(16, 2),
                                watch=diagnostics.Watch(cfg), skipped_in_a_row=3)
  trainer.watch.new_warnings(HEALTHY)
  state, meta = resume.checkpoint_of(trainer)
  checkpointer = checkpoint.Checkpointer(folder / "remembered", 2)
  checkpointer.save(0, state, meta)
  checkpointer.close()
  resumed = dataclasses.replace(trainer, watch=diagnostics.Watch(cfg), skipped_in_a_row=0)
  assert resume.resume(resumed, folder / "remembered") == (1, [])
  assert resumed.skipped_in_a_row == 3
  assert len(resumed.watch.new_warnings(HEALTHY | {"diversity": 0.05})) == 1


# ---- learning trouble ----


def test_a_run_with_a_constant_reward_says_so(folder, monkeypatch, capsys):
  global injection
  injection = Injection()
  monkeypatch.setattr(f"{__name__}.brightness", lambda images: np.ones(len(images)))
  path = run(make_config(folder, "constant"))
  assert capsys.readouterr().out.count("all images get the same reward") == 1
  assert all(0 < line["diversity"] < 1 for line in metrics_of(path))
