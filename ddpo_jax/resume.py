"""Going on with a run: what a checkpoint holds of a trainer, and back."""

from __future__ import annotations

from collections.abc import Iterable
import json
import pathlib

import jax
import numpy as np

from ddpo_jax import checkpoint, distributed
from ddpo_jax.build import Trainer
from ddpo_jax.console import say
from ddpo_jax.errors import UserError
from ddpo_jax.messages import counted
from ddpo_jax.model_names import is_moved
from ddpo_jax.resume_checks import check_continues, check_sizes
from ddpo_jax.types import TrainState


def resume(trainer: Trainer, run: pathlib.Path) -> tuple[int, list[int]]:
  """Restores what a checkpoint holds.

  All processes take the same one: the newest that is damaged for none of them.

  Returns:
    The epoch to go on with, and the epochs of this run's checkpoints that are damaged.
  """
  with distributed.raising_together():
    source, epochs = checkpoint.to_resume(trainer.cfg.resume_from, run)
  epochs = json.loads(distributed.broadcast_from_main(json.dumps(epochs)))
  if not epochs:
    return 0, []
  damaged: list[int] = []
  while isinstance(restored := _restore(trainer, source, epochs[0]), checkpoint.DamagedError):
    damaged.append(epochs.pop(0))
    if not epochs:
      raise UserError(f"{restored}; there is none that is older, so start a new run") from restored
    say(f"{restored}. Trying the one before it")
  say(f"Resuming after {counted(restored.epoch + 1, 'epoch')}, with "
      f"{checkpoint.describe(source, restored.epoch)}")
  model, before = trainer.cfg.pretrained.model, restored.meta["config"]["pretrained"]["model"]
  if is_moved(model, before):
    say(f"Warning: pretrained.model={model!r} must hold the same weights as {before!r}, which is "
        "not there any more")
  trainer.state = restored.state
  if trainer.stat_tracker is not None:
    trainer.stat_tracker.load_state_dict(restored.meta["per_prompt_stats"])
  if trainer.combiner is not None:
    trainer.combiner.load_state_dict(restored.meta["reward_stats"])
  trainer.watch.load_state_dict(restored.meta["watch"])
  trainer.skipped_in_a_row = restored.meta["skipped_in_a_row"]
  return restored.epoch + 1, damaged if source == run.resolve() else []


def _restore(trainer: Trainer, run: pathlib.Path, epoch: int
             ) -> checkpoint.Restored | checkpoint.DamagedError:
  """What a checkpoint holds; on every process the error if it is damaged for any of them."""
  damage = None
  with distributed.raising_together():
    try:
      meta, where = checkpoint.restore_meta(run, epoch), checkpoint.describe(run, epoch)
      check_continues(trainer.cfg, meta["config"], where)
      check_sizes(trainer.cfg, trainer.plan, meta, where)
      restored = checkpoint.restore(run, epoch, trainer.state)
    except checkpoint.DamagedError as error:
      damage = error
  if not distributed.max_over_processes(int(damage is not None)):
    return restored
  return damage or checkpoint.DamagedError(
      f"{checkpoint.describe(run, epoch)} is damaged for another process")


def set_aside_damaged(run: pathlib.Path, epochs: Iterable[int]) -> None:
  """Makes room for these epochs' new checkpoints; nothing is deleted."""
  with distributed.raising_together():
    for epoch in epochs if distributed.is_main() else ():
      say(f"Keeping the damaged checkpoint as {checkpoint.set_aside(run, epoch)}")


def checkpoint_of(trainer: Trainer) -> tuple[TrainState, dict]:
  """The state as it is now, in host memory, and the rest as JSON.

  A copy, because the update overwrites the state, and on a CPU that would be the same memory.
  """
  state_of = lambda part: None if part is None else part.state_dict()
  meta = {"config": trainer.cfg.to_dict(), "sizes": trainer.plan.sizes,
          "per_prompt_stats": state_of(trainer.stat_tracker),
          "reward_stats": state_of(trainer.combiner), "watch": trainer.watch.state_dict(),
          "skipped_in_a_row": trainer.skipped_in_a_row}
  return jax.tree.map(np.array, trainer.state), meta
