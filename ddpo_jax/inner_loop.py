"""An epoch's optimizer steps; recomputes log-probabilities where rounding moved them too far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key
from tqdm import tqdm

from ddpo_jax import diagnostics, glibc, rng_streams, update
from ddpo_jax.build import Trainer
from ddpo_jax.console import hide_bars
from ddpo_jax.interrupt import Stop
from ddpo_jax.rollout import Rollout
from ddpo_jax.shared_program import Mode, SharedProgram
from ddpo_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class _Step:
  """Which optimizer step of an epoch, and how its samples are chosen."""

  key: Key[Array, ""]  # of the inner epoch's shuffle
  index: Int[Array, ""]  # within the inner epoch
  in_order: bool  # whether the inner epoch is not shuffled, see `update.choose_microbatches`


def roll_out(trainer: Trainer, epoch: int, check_stop: Callable[[], None] = lambda: None
             ) -> Rollout:
  """Samples and scores an epoch, with the first optimizer step's gradient where that is possible.

  Args:
    trainer: its policy and loss scale are those of the first optimizer step as well.
    epoch: from 0.
    check_stop: see `RolloutWorker.run`, and for what is raised.
  """
  state = trainer.state
  return trainer.worker.run(state.params, epoch, check_stop,
                            state.loss_scale.scale if samples_first_step(trainer) else None)


def samples_first_step(trainer: Trainer) -> bool:
  """Whether `roll_out` computes the first optimizer step's gradient."""
  return isinstance(trainer.update, SharedProgram) and trainer.update.samples_first_step


def optimizer_steps(trainer: Trainer, batch: Batch, epoch: int, stop: Stop,
                    gradients: MutableSequence[Array] | None = None
                    ) -> Iterator[update.UpdateMetrics]:
  """Takes the epoch's optimizer steps, yielding each one's metrics on the device.

  In the first the policy is still the sampler's: the shared program takes its log-probabilities
  as the old ones. Where they show that the sampler's are too far from the update's, it recomputes
  those that the other steps will read.

  With `gradients`, from the rollout, of the first step only its optimizer's part is left to do.
  They take memory, so they are removed then.
  """
  glibc.return_freed_memory()  # what sampling took
  shuffle = jax.random.fold_in(jax.random.key(trainer.cfg.seed), rng_streams.SHUFFLE)
  shuffle = jax.random.fold_in(shuffle, epoch)
  in_order = isinstance(trainer.update, SharedProgram)  # whether or not there are gradients
  steps = [_Step(jax.random.fold_in(shuffle, inner), jnp.int32(index), in_order and inner == 0)
           for inner in range(trainer.cfg.train.num_inner_epochs)
           for index in range(trainer.plan.steps_per_inner_epoch)]
  if isinstance(trainer.update, SharedProgram):
    return _shared_steps(trainer, trainer.update, batch, steps, epoch, stop, gradients)
  return _plain_steps(trainer, trainer.update, batch, steps, epoch, stop)


def _plain_steps(trainer: Trainer, program: update.Update, batch: Batch, steps: Sequence[_Step],
                 epoch: int, stop: Stop) -> Iterator[update.UpdateMetrics]:
  for step in _progress(steps, f"Epoch {epoch}: training"):
    stop.check()
    trainer.state, metrics = program(
        trainer.state, trainer.frozen_unet, batch, step.key, step.index)
    yield metrics


def _shared_steps(trainer: Trainer, program: SharedProgram, batch: Batch, steps: Sequence[_Step],
                  epoch: int, stop: Stop, gradients: MutableSequence[Array] | None
                  ) -> Iterator[update.UpdateMetrics]:
  def visit(mode: Mode, step: _Step, batch: Batch) -> tuple[update.Sums, Batch]:
    return program.accumulate(
        mode, state=trainer.state, frozen=trainer.frozen_unet, batch=batch, key=step.key,
        index=step.index, check_stop=stop.check, in_order=step.in_order)

  was_sampled = bool(gradients)  # they are removed below
  for number, step in enumerate(_progress(steps, f"Epoch {epoch}: training")):
    if number == 0 and gradients:
      sums = program.first_step(gradients, trainer.state, trainer.frozen_unet, batch, step.key,
                                stop.check)
      gradients.clear()
    else:
      sums, batch = visit(Mode.STEP if number else Mode.FIRST_STEP, step, batch)
    if number == 0:  # before the policy changes
      drift = float(jax.device_get(program.largest_drift(sums)))
      again = steps[1:1 + num_steps_rescored(trainer, drift)]
      if (was_sampled and trainer.cfg.train.num_inner_epochs > 1
          and needs_rescoring(trainer, drift)):
        again = [step, *again]  # later inner epochs read what it would have written
      for other in _progress(again, f"Epoch {epoch}: log-probabilities"):
        _, batch = visit(Mode.SCORE, other, batch)
    trainer.state, metrics = program.finish(trainer.state, sums)
    yield metrics


def needs_rescoring(trainer: Trainer, drift: float) -> bool:
  """Whether an epoch's log-probabilities are recomputed: drift is too large, and they can be.

  Args:
    trainer: its update is able to where it is a `SharedProgram`.
    drift: the `ratio_drift` of the epoch's first optimizer step.
  """
  tolerance = diagnostics.drift_tolerance(trainer.cfg.train.clip_range)
  acceptable = drift <= tolerance  # False where it is not finite
  return not acceptable and isinstance(trainer.update, SharedProgram)


def num_steps_rescored(trainer: Trainer, drift: float) -> int:
  """How many of an epoch's optimizer steps, from the second on, recompute log-probabilities."""
  if not needs_rescoring(trainer, drift):
    return 0
  every_timestep = trainer.plan.num_train_timesteps == trainer.cfg.sample.num_steps
  # Where every timestep is trained, one inner epoch reads all that the others do.
  inner_epochs = 1 if every_timestep else trainer.cfg.train.num_inner_epochs
  return trainer.plan.steps_per_inner_epoch * inner_epochs - 1


def _progress(steps: Sequence[_Step], description: str) -> Iterable[_Step]:
  return tqdm(steps, desc=description, leave=False, dynamic_ncols=True,
              disable=not steps or hide_bars(), unit="step")
