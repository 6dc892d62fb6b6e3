"""Saving and restoring a run, with orbax. A checkpoint's number is its last finished epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import logging
import os
import pathlib
import re
import sys
import traceback
from typing import Any

from flax import nnx
import jax
import orbax.checkpoint as ocp

from ddpo_jax import distributed
from ddpo_jax.console import say
from ddpo_jax.errors import UserError
from ddpo_jax.files import absolute, expand_home, read_jsonl
from ddpo_jax.messages import one_line
from ddpo_jax.types import TrainState

FORMAT_VERSION = 3

_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # a file is not there, or not a file
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # in the messages of tensorstore
_RANK_AXES = {"lora_down": 1, "lora_up": 0}


class DamagedError(UserError):
  """A checkpoint of which files are missing, or do not hold what was written."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint held."""

  epoch: int  # the last finished one; training goes on with the next
  state: TrainState
  meta: dict[str, Any]  # what `Checkpointer.save` was given


def run_of(path: str | os.PathLike) -> pathlib.Path:
  """The run folder that a path names: itself, or that of its `checkpoints`, or of one in there."""
  return _run_and_epoch(path)[0]


def _run_and_epoch(path: str | os.PathLike) -> tuple[pathlib.Path, int | None]:
  """The run folder that a path names, and the epoch if it names one checkpoint."""
  resolved = expand_home(path).resolve()
  if (resolved / "checkpoints").is_dir():  # a run, even one that is called "checkpoints" itself
    return resolved, None
  # As it is given first: `checkpoints` may be a link to a folder of any name on another disk.
  for each in (pathlib.Path(absolute(path)), resolved):
    if each.name.isdigit() and each.parent.name == "checkpoints":
      return each.parent.parent.resolve(), int(each.name)
    if each.name == "checkpoints":
      return each.parent.resolve(), None
  return resolved, None


def find(path: str | os.PathLike, name: str = "resume_from") -> tuple[pathlib.Path, int]:
  """The run folder and the epoch of the newest of `find_all`."""
  run, epochs = find_all(path, name)
  return run, epochs[0]


def find_all(path: str | os.PathLike, name: str = "resume_from"
             ) -> tuple[pathlib.Path, list[int]]:
  """Resolves a path to a run folder and its checkpoints, the newest first.

  Args:
    path: a run folder, its `checkpoints` folder, or one checkpoint in that (which is then
      the only one).
    name: of the field or option that holds the path, for messages.

  Raises:
    UserError: if there is no checkpoint.
  """
  given = f"{name}={str(path)!r}"
  path, (run, epoch) = expand_home(path), _run_and_epoch(path)
  if not path.is_dir():
    problem = "is a file" if path.exists() else "does not exist"
    raise UserError(f"{given} {problem}; must be a run folder or a checkpoint in it")
  if epoch is not None:
    return run, [epoch]
  epochs = saved_epochs(run)
  if not epochs:
    raise UserError(f"{given} holds no checkpoint; must be a run folder whose checkpoints/ "
                    "has at least one")
  return run, epochs


def saved_epochs(run: pathlib.Path) -> list[int]:
  """The epochs of a run's finished checkpoints, the newest first."""
  folder = run / "checkpoints"
  epochs = set(ocp.utils.checkpoint_steps(folder) if folder.is_dir() else [])
  # To orbax a user's copy that is called best_19 is one of epoch 19, which may be gone.
  return sorted((epoch for epoch in epochs if _folder(run, epoch).is_dir()), reverse=True)


def to_resume(resume_from: str, run: pathlib.Path) -> tuple[pathlib.Path, list[int]]:
  """Which run's checkpoints `run` goes on from, the newest first; none where "auto" finds none.

  Raises:
    UserError: if `resume_from` is a path without a checkpoint, or the run has lost its own.
  """
  if resume_from != "auto":
    return find_all(resume_from)
  epochs = saved_epochs(run)
  if not epochs:
    check_none_is_lost(run, "resume_from='auto'")
  return run.resolve(), epochs


def check_none_is_lost(run: pathlib.Path, named: str) -> None:
  """Refuses to start a run over whose checkpoints have vanished: that would delete its metrics.

  Args:
    run: the run's folder.
    named: the option that leads to it, with its value, for the message.

  Raises:
    UserError: if the run has finished more epochs than it may have without a checkpoint.
  """
  folder = run / "checkpoints"
  advice = f"{named}: {folder} {{}}; bring it back, or choose another run_name"
  if folder.is_symlink() and not folder.exists():
    raise UserError(advice.format(f"is a link to {os.readlink(folder)}, which does not exist"))
  epochs = len(read_jsonl(run / "metrics.jsonl"))
  # Each checkpoint is finished before the next epoch is; a run may end in between.
  if epochs > _save_freq(run) + 1:
    raise UserError(advice.format(f"has no checkpoint, though {epochs} epochs are finished"))


def _save_freq(run: pathlib.Path) -> int:
  try:
    return int(json.loads((run / "config.json").read_text(encoding="utf-8"))["save_freq"])
  except (OSError, ValueError, LookupError, TypeError):
    return 0  # unknown: then two finished epochs count as proof that there were checkpoints


class Checkpointer:
  """Writes a run's checkpoints in the background and keeps the newest ones."""

  def __init__(self, run: pathlib.Path, keep: int):
    """Opens `run`/checkpoints, of which at most `keep` stay."""
    _hide_tracebacks()
    self.run, self._keep = run, keep
    self._folder = (run / "checkpoints").resolve()  # a reward may change the working folder
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    policy = ocp.checkpoint_managers.LatestN(self._keep)
    return ocp.CheckpointManager(
        self._folder, options=ocp.CheckpointManagerOptions(
            preservation_policy=policy, enable_async_checkpointing=True,
            cleanup_tmp_directories=True),
        item_handlers={"state": ocp.StandardCheckpointHandler(),
                       "meta": ocp.JsonCheckpointHandler()})

  def save(self, epoch: int, state: TrainState, meta: dict[str, Any]) -> None:
    """Starts writing. `meta` must be JSON-able.

    The state's arrays are NumPy's, and must not change any more. Of replicated device arrays
    orbax would have each device write a part, which takes longer for LoRA's few megabytes.

    A checkpoint before it that could not be written does not keep this one from being tried.
    """
    self.finish_writing()
    if epoch in self._manager.all_steps():
      return
    saved = self._manager.save(epoch, args=ocp.args.Composite(
        state=ocp.args.StandardSave(_flatten(state)),
        meta=ocp.args.JsonSave({"format_version": FORMAT_VERSION, **meta})))
    if not saved:  # orbax declines an epoch before those that are there
      raise RuntimeError(f"{describe(self.run, epoch)} was not saved: there are later ones, of "
                         "another run")

  def save_and_wait(self, epoch: int, state: TrainState, meta: dict[str, Any]) -> bool:
    """As `save`, for a run's last checkpoint: waits until it is written, else tries once more.

    Returns:
      Whether it is written.
    """
    self.save(epoch, state, meta)
    if self.finish_writing():
      return True
    self.save(epoch, state, meta)
    return self.finish_writing(then="")

  def finish_writing(self, then: str = "; it will be tried again") -> bool:
    """Waits for what is being written; returns False if that failed on any process. Collective.

    A failure is said once, with what happens `then`, and the checkpoint counts as not saved.
    """
    failed = False
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      failed = True
      say(f"Warning: a checkpoint could not be written ({one_line(error)}){then}")
    if not distributed.max_over_processes(int(failed)):
      return True
    # Where several files could not be written, this manager's next save would raise what it has
    # not said yet.
    with contextlib.suppress(Exception):
      self._manager.close()
    self._manager = self._open()
    return False

  def newest(self) -> int | None:
    """The epoch of the newest checkpoint that is written."""
    return self._manager.latest_step()

  def close(self) -> None:
    """Waits for what is being written. A failure is said."""
    try:
      self._manager.close()
    except Exception as error:
      say(f"Warning: a checkpoint could not be written ({one_line(error)})")


def _raised_by_orbax(record: logging.LogRecord) -> bool:
  """Whether it reports an exception that went through orbax, or names a file of orbax's."""
  frames = traceback.extract_tb(record.exc_info[2]) if record.exc_info else []
  return ("orbax-checkpoint" in record.getMessage()
          or any("orbax" in frame.filename for frame in frames))


@functools.cache
def _hide_tracebacks() -> None:
  """Silences orbax's own reports of a failed write, which `finish_writing` says in one line.

  There would be hundreds: each of its threads logs its error, each file that is left to write finds
  its event loop closed, and of two that fail at once asyncio logs the one nobody waits for.
  """
  logging.getLogger("absl").addFilter(
      lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)
  logging.getLogger("asyncio").addFilter(lambda record: not _raised_by_orbax(record))
  others = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
      others(unraisable)

  sys.unraisablehook = hook


def set_aside(run: pathlib.Path, epoch: int) -> pathlib.Path:
  """Renames a damaged checkpoint, so that its epoch can be saved again; returns the new path."""
  folder = _folder(run, epoch)
  name = f"{epoch}.damaged"  # no number, so that orbax leaves it alone
  names = itertools.chain([name], (f"{name}.{i}" for i in itertools.count(2)))
  return folder.rename(next(path for path in map(folder.with_name, names) if not path.exists()))


def restore_meta(run: pathlib.Path, epoch: int) -> dict[str, Any]:
  """Reads what `Checkpointer.save` was given beside the state. No collective is in it.

  Raises:
    DamagedError: if it is missing or is not what was written.
    UserError: if it is of another format, or the system cannot read it now.
  """
  with _as_damage(describe(run, epoch)):
    meta = dict(ocp.JsonCheckpointHandler().restore(_folder(run, epoch) / "meta"))
  version = meta.pop("format_version", None)
  if version != FORMAT_VERSION:
    raise UserError(f"{describe(run, epoch)} has format_version {version}; must be "
                    f"{FORMAT_VERSION}")
  return meta


def restore(run: pathlib.Path, epoch: int, like: TrainState) -> Restored:
  """Reads a checkpoint into the shapes, dtypes and shardings of `like`. No collective is in it.

  Raises:
    DamagedError: if files are missing or do not hold what was written.
    UserError: if it is of another format or model, or the system cannot read it now.
  """
  meta = restore_meta(run, epoch)
  abstract = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
              for path, x in _flatten(like).items()}
  stored = _stored_shapes(run, epoch)
  for name in [*abstract, *stored]:
    if name not in abstract or stored.get(name) != abstract[name].shape:
      raise _another_model(run, epoch, name)
  flat = _restore_arrays(run, epoch, abstract)
  treedef = jax.tree.structure(like)
  return Restored(epoch, jax.tree.unflatten(treedef, [flat[k] for k in abstract]), meta)


def restore_params(run: pathlib.Path, epoch: int, like: nnx.State) -> nnx.State:
  """Reads the trained weights alone, to where those of `like` are.

  Args:
    run: the run's folder.
    epoch: of the checkpoint.
    like: the same weights of the same model, on one device; LoRA's may be of another rank.

  Raises:
    UserError: if the checkpoint is missing, damaged or of another model.
  """
  leaves, treedef = jax.tree.flatten_with_path(like)
  wanted = {f"params/{_name(path)}": leaf for path, leaf in leaves}
  stored = _stored_shapes(run, epoch)
  for name, leaf in wanted.items():
    if name not in stored or _without_rank(name, stored[name]) != _without_rank(name, leaf.shape):
      raise _another_model(run, epoch, name)
  flat = _restore_arrays(run, epoch, {
      name: jax.ShapeDtypeStruct(stored[name], leaf.dtype, sharding=leaf.sharding)
      for name, leaf in wanted.items()})
  return jax.tree.unflatten(treedef, [flat[name] for name in wanted])


def _stored_shapes(run: pathlib.Path, epoch: int) -> dict[str, tuple[int, ...]]:
  """The shapes of the arrays that a checkpoint's state has, by their path."""
  with _as_damage(describe(run, epoch)):
    tree = ocp.PyTreeCheckpointHandler().metadata(_folder(run, epoch) / "state").tree
    return {name: tuple(array.shape) for name, array in tree.items()}


def _restore_arrays(run: pathlib.Path, epoch: int,
                    abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """Reads these arrays of a checkpoint's state and no others.

  By the handler and not by a manager, which would make processes wait for each other.
  """
  arguments = ocp.args.PyTreeRestore(
      dict(abstract), restore_args=ocp.checkpoint_utils.construct_restore_args(dict(abstract)),
      partial_restore=True)
  with _as_damage(describe(run, epoch)):
    return ocp.PyTreeCheckpointHandler().restore(
        _folder(run, epoch) / "state", args=arguments)


def _without_rank(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """A weight's shape without what LoRA's rank decides."""
  axes = [_RANK_AXES[part] for part in name.split("/") if part in _RANK_AXES]
  return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _another_model(run: pathlib.Path, epoch: int, name: str) -> UserError:
  return UserError(f"{describe(run, epoch)} is of another model, whose {name!r} is missing or of "
                   "another shape; pretrained.model must be the one that it was trained on, and "
                   "lora.init_from its file, if that has several ranks")


@contextlib.contextmanager
def _as_damage(where: str) -> Iterator[None]:
  """Tells damaged files from files that cannot be read now; other errors pass.

  Raises:
    DamagedError: if files are missing or do not hold what was written.
    UserError: if the system cannot read them: they may be whole.
  """
  try:
    yield
  except Exception as error:
    cause: BaseException = error
    while cause.__cause__ is not None:
      cause = cause.__cause__
    reason = " ".join(str(cause).partition(" [tensorstore_spec")[0].split())[:300]
    if not isinstance(cause, (ValueError, TypeError, LookupError, EOFError, OSError)) or (
        "RESOURCE_EXHAUSTED" in reason):
      raise
    number = _os_error(cause)
    if number is None or number in _MISSING:
      raise DamagedError(f"{where} is damaged ({reason}): use another checkpoint") from error
    raise UserError(
        f"{where} cannot be read ({os.strerror(number)}), but may be intact; make it readable, "
        f"or use another checkpoint: {reason}") from error


def _os_error(error: BaseException) -> int | None:
  """The number of the system's error that this one is, or None if it is of another kind."""
  if isinstance(error, OSError):
    return error.errno
  found = _OS_ERROR.search(str(error))
  return int(found[1]) if found else None


def _folder(run: pathlib.Path, epoch: int) -> pathlib.Path:
  return run.resolve() / "checkpoints" / str(epoch)


def describe(run: pathlib.Path, epoch: int) -> str:
  """What messages call a checkpoint."""
  return f"checkpoint {run / 'checkpoints' / str(epoch)}"


def _flatten(state: TrainState) -> dict[str, jax.Array]:
  """The state's arrays by their path, in tree order."""
  leaves, _ = jax.tree.flatten_with_path(state)
  return {_name(path): leaf for path, leaf in leaves}


def _name(path: jax.tree_util.KeyPath) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
