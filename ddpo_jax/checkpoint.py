"""Saving and restoring a run, with orbax. A checkpoint's number is its last finished epoch."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import os
import pathlib
from typing import Any

from flax import nnx
import jax
import orbax.checkpoint as ocp

from ddpo_jax.types import TrainState, UserError

FORMAT_VERSION = 1


class DamagedError(UserError):
  """A checkpoint that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint held."""

  epoch: int  # the last finished one; training goes on with the next
  state: TrainState
  meta: dict[str, Any]  # what `Checkpointer.save` was given


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
  path = pathlib.Path(path).expanduser().resolve()
  if not path.is_dir():
    raise UserError(f"{given} does not exist; must be a run folder or a checkpoint in it")
  if path.name.isdigit() and path.parent.name == "checkpoints":
    return path.parent.parent, [int(path.name)]
  run = path.parent if path.name == "checkpoints" else path
  epochs = saved_epochs(run)
  if not epochs:
    raise UserError(f"{given} holds no checkpoint; must be a run folder whose checkpoints/ "
                    "has at least one")
  return run, epochs


def saved_epochs(run: pathlib.Path) -> list[int]:
  """The epochs of a run's finished checkpoints, the newest first."""
  folder = run / "checkpoints"
  return sorted(ocp.utils.checkpoint_steps(folder) if folder.is_dir() else [], reverse=True)


class Checkpointer:
  """Writes a run's checkpoints in the background and keeps the newest ones."""

  def __init__(self, run: pathlib.Path, keep: int):
    """Opens `run`/checkpoints, of which at most `keep` stay."""
    policy = ocp.checkpoint_managers.LatestN(keep)
    self._manager = _manager(run, ocp.CheckpointManagerOptions(
        preservation_policy=policy, enable_async_checkpointing=True,
        cleanup_tmp_directories=True))

  def save(self, epoch: int, state: TrainState, meta: dict[str, Any]) -> None:
    """Starts writing; returns once the arrays are copied. `meta` must be JSON-able."""
    if epoch in self._manager.all_steps():
      return
    self._manager.save(epoch, args=ocp.args.Composite(
        state=ocp.args.StandardSave(_flatten(state)),
        meta=ocp.args.JsonSave({"format_version": FORMAT_VERSION, **meta})))

  def drop_after(self, epoch: int) -> None:
    """Deletes the checkpoints of later epochs, which are about to be made again."""
    for later in self._manager.all_steps():
      if later > epoch:
        self._manager.delete(later)

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.wait_until_finished()
    self._manager.close()


def restore_meta(run: pathlib.Path, epoch: int) -> dict[str, Any]:
  """Reads what `Checkpointer.save` was given beside the state.

  Raises:
    DamagedError: if it is missing or cannot be read.
    UserError: if it is of another format.
  """
  where = f"checkpoint {run / 'checkpoints' / str(epoch)}"
  with _manager(run, ocp.CheckpointManagerOptions(create=False)) as manager:
    with _as_damage(where):
      meta = manager.restore(epoch, args=ocp.args.Composite(
          meta=ocp.args.JsonRestore())).meta
  version = meta.pop("format_version", None)
  if version != FORMAT_VERSION:
    raise UserError(f"{where} has format_version {version}; must be {FORMAT_VERSION}")
  return meta


def restore(run: pathlib.Path, epoch: int, like: TrainState) -> Restored:
  """Reads a checkpoint into the shapes, dtypes and shardings of `like`.

  Raises:
    DamagedError: if it is missing, cannot be read, or is of another model.
    UserError: if it is of another format.
  """
  meta = restore_meta(run, epoch)
  abstract = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
              for path, x in _flatten(like).items()}
  where = f"checkpoint {run / 'checkpoints' / str(epoch)}"
  with _manager(run, ocp.CheckpointManagerOptions(create=False)) as manager:
    with _as_damage(where):
      flat = manager.restore(epoch, args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract))).state
  treedef = jax.tree.structure(like)
  return Restored(epoch, jax.tree.unflatten(treedef, [flat[k] for k in abstract]), meta)


def restore_params(run: pathlib.Path, epoch: int, like: nnx.State) -> nnx.State:
  """Reads the trained weights alone, on this machine's first device.

  Args:
    run: the run's folder.
    epoch: of the checkpoint.
    like: the same weights of the same model; LoRA's may be of another rank.

  Raises:
    UserError: if the checkpoint is missing, damaged or of another model.
  """
  paths, treedef = jax.tree.flatten_with_path(like)
  names = ["params/" + jax.tree_util.keystr(path, simple=True, separator="/")
           for path, _ in paths]
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  where = f"checkpoint {run / 'checkpoints' / str(epoch)}"
  with _manager(run, ocp.CheckpointManagerOptions(create=False)) as manager:
    with _as_damage(where):
      stored = manager.item_metadata(epoch).state
      abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
                  for name, x in stored.items()}
      flat = manager.restore(epoch, args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract))).state
  absent = [name for name in names if name not in flat]
  if absent:
    raise UserError(f"{where} has no {absent[0]!r}; is pretrained.model still the model "
                    "that it was trained on?")
  return jax.tree.unflatten(treedef, [flat[name] for name in names])


@contextlib.contextmanager
def _as_damage(where: str) -> Iterator[None]:
  """Turns whatever orbax raises for files that are not as it left them into one error."""
  try:
    yield
  except Exception as error:  # of many types: of the file system, of the formats, of its own
    reason = " ".join(str(error).split())[:300]
    raise DamagedError(
        f"{where} cannot be read, or is of another model: {reason}") from error


def _manager(run: pathlib.Path, options: ocp.CheckpointManagerOptions
             ) -> ocp.CheckpointManager:
  return ocp.CheckpointManager((run / "checkpoints").resolve(), options=options,
                               item_handlers={"state": ocp.StandardCheckpointHandler(),
                                              "meta": ocp.JsonCheckpointHandler()})


def _flatten(state: TrainState) -> dict[str, jax.Array]:
  """The state's arrays by their path, in tree order."""
  leaves, _ = jax.tree.flatten_with_path(state)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
          for path, leaf in leaves}
