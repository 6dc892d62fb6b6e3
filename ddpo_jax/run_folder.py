"""Where a run writes: which folder is its own, and that no other run writes there."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import os
import pathlib
import time

from ddpo_jax import checkpoint, distributed
from ddpo_jax.config import Config
from ddpo_jax.console import say
from ddpo_jax.errors import UserError
from ddpo_jax.files import read_jsonl

_LOCK_SECONDS = 30  # for which a run waits for the end of the one that it continues


def choose_run_name(cfg: Config) -> str:
  """The name given, or one made from the time."""
  return cfg.run_name or datetime.datetime.now().strftime("%Y.%m.%d_%H.%M.%S")


def is_named_by_checkpoint(cfg: Config) -> bool:
  """Whether the run has no name of its own and writes where its checkpoint came from."""
  return bool(cfg.resume_from) and not cfg.run_name


def named_by(cfg: Config) -> str:
  """The field, with its value, that says where the run's folder is: for messages."""
  field = "resume_from" if is_named_by_checkpoint(cfg) else "logdir"
  return f"{field}={getattr(cfg, field)!r}"


def choose_run_folder(cfg: Config, name: str = "") -> pathlib.Path:
  """The run's folder: a new one, or the one that `resume_from` continues.

  A run that ended before its first epoch did has nothing to lose: a new one takes its place.

  Args:
    cfg: of the run.
    name: from `choose_run_name`, where it has been asked already.

  Raises:
    UserError: if a run that is not to be continued is already there.
  """
  name = name or choose_run_name(cfg)
  if is_named_by_checkpoint(cfg):  # and so not by "auto"
    return checkpoint.run_of(cfg.resume_from)
  run = pathlib.Path(cfg.logdir).expanduser() / name
  parts = ("config.json", "checkpoints", "metrics.jsonl")
  if any((run / part).exists() for part in parts) and not _continues(cfg, run):
    _check_nothing_is_lost(run, name)
  return run


def _continues(cfg: Config, run: pathlib.Path) -> bool:
  """Whether the config resumes this run, and does not start another one in its folder."""
  if cfg.resume_from in ("", "auto"):
    return cfg.resume_from == "auto"
  return checkpoint.run_of(cfg.resume_from) == run.resolve()


def _check_nothing_is_lost(run: pathlib.Path, name: str) -> None:
  """Refuses a folder whose run has finished an epoch, or may still be in its first one."""
  taken = f"run_name={name!r}: {run} already holds a run; choose another name, or"
  if checkpoint.saved_epochs(run):
    raise UserError(f"{taken} continue it with resume_from={str(run)!r}")
  checkpoint.check_none_is_lost(run, f"run_name={name!r}")
  begin_again = f"{taken} start it again from its first epoch with resume_from='auto'"
  if read_jsonl(run / "metrics.jsonl"):
    raise UserError(begin_again)
  try:
    lock = _lock(run, shared=True)  # processes of one run ask at the same time
  except BlockingIOError:
    raise _in_use(run) from None
  if lock is None:
    raise UserError(begin_again)
  os.close(lock)


def _in_use(run: pathlib.Path) -> UserError:
  return UserError(f"run_name={run.name!r}: another run is writing to {run} at the moment; wait "
                   "for its end, or choose another name")


def _lock(folder: pathlib.Path, shared: bool = False) -> int | None:
  """Locks a folder for as long as the file descriptor that it returns is open.

  The system closes it when the process ends, however it ends. None where the file system
  has no such locks, as some network file systems.

  Raises:
    BlockingIOError: if the folder is locked.
  """
  try:
    import fcntl  # not on every system
    descriptor = os.open(folder, os.O_RDONLY)
  except (ImportError, OSError):
    return None
  try:
    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
  except OSError as error:
    os.close(descriptor)
    if isinstance(error, BlockingIOError):
      raise
    return None
  return descriptor


@dataclasses.dataclass
class Claim:
  """A run's folder, which no other run may write to until it is released."""

  path: pathlib.Path
  lock: int | None = None  # an open file descriptor, where this process holds the lock

  def __post_init__(self):
    if self.lock is not None:
      # A worker that a reward forked would hold the lock for as long as it outlives a killed run.
      os.register_at_fork(after_in_child=self._close)

  def release(self) -> None:
    """Gives the folder up, and removes it if the run has written nothing into it."""
    if self.lock is not None:
      self._close()
      with contextlib.suppress(OSError):  # it is not empty
        self.path.rmdir()

  def _close(self) -> None:
    if self.lock is not None:
      os.close(self.lock)
      self.lock = None


def claim(run: pathlib.Path, cfg: Config) -> Claim:
  """Makes the run's folder and locks it; on process 0, for all of them.

  A run that is being continued may be saving, and its end is waited for. A folder that is named
  by the time gets a number where another run began in the same second.

  Raises:
    UserError: if the folder cannot be made, or another run is writing to it.
  """
  if not distributed.is_main():
    return Claim(run)
  try:
    if not cfg.run_name and not cfg.resume_from:
      run = _make_new(run)
    run.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"{named_by(cfg)}: {run} cannot be made: {error}") from error
  return Claim(run, _wait_for_lock(run, _LOCK_SECONDS if cfg.resume_from else 0))


def _make_new(run: pathlib.Path) -> pathlib.Path:
  """Makes a folder that was not there, called `run` or, where that is taken, `run`_2, …"""
  names = itertools.chain([run.name], (f"{run.name}_{i}" for i in itertools.count(2)))
  for path in map(run.with_name, names):
    with contextlib.suppress(FileExistsError):
      path.mkdir(parents=True)
      return path
  raise AssertionError("there is always another number")


def _wait_for_lock(run: pathlib.Path, seconds: float) -> int | None:
  give_up = time.monotonic() + seconds
  said = False
  while True:
    try:
      return _lock(run)
    except BlockingIOError:
      if time.monotonic() >= give_up:
        raise _in_use(run) from None
    if not said:
      say(f"Another run is writing to {run}: waiting up to {seconds} s for its end")
      said = True
    time.sleep(0.5)
