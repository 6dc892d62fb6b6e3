"""The training loop: sample, score, turn rewards into advantages, update; every epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shlex
import sys
import time
import traceback
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from ddpo_jax import (
  advantages,
  checkpoint,
  diagnostics,
  distributed,
  files,
  glibc,
  model_names,
  prompts,
  resource_errors,
  run_folder,
  tracking,
  update,
  validation,
)
from ddpo_jax.build import Trainer, build, open_model
from ddpo_jax.config import Config
from ddpo_jax.console import say, write
from ddpo_jax.devices import (
  AXIS,
  configure_devices,
  configure_jax,
  open_in_background,
  peak_memory_bytes,
  plan_batches,
)
from ddpo_jax.errors import USAGE_ERROR, DivergedError, UserError
from ddpo_jax.inner_loop import needs_rescoring, optimizer_steps, roll_out
from ddpo_jax.interrupt import Stop, ending_with, interruptible
from ddpo_jax.messages import counted
from ddpo_jax.resume import checkpoint_of, resume, set_aside_damaged
from ddpo_jax.rollout import Rollout
from ddpo_jax.types import Batch

_COMPILING = "Compiling, and reading the model: half a minute to two minutes, less from the cache"
_WARNS_ON_GPUS = "; XLA's warnings of memory meanwhile are of kernels that it only tries"
_EVAL_IMAGES = 8


def train(cfg: Config) -> pathlib.Path:
  """Runs the experiment that the config describes.

  Returns:
    The run's folder.

  Raises:
    UserError: for anything in the config, its paths or the reward's values that the user
      can correct.
    Interrupted: after SIGTERM, SIGINT or SIGHUP, once what was finished is saved.
    DivergedError: if training does not get finite numbers any more; likewise.
  """
  started = time.perf_counter()
  glibc.share_arenas()
  distributed.initialize(cfg.distributed)
  configure_devices()
  plan = plan_batches(cfg)
  distributed.check_devices()
  open_in_background()
  run_name = distributed.broadcast_from_main(run_folder.choose_run_name(cfg))
  with distributed.raising_together():
    prepared = validation.prepare(cfg, run_name)
  configure_jax(cfg)
  say(plan.describe())
  cfg = with_absolute_paths(cfg)
  with distributed.raising_together():
    model = open_model(cfg)
  with contextlib.ExitStack() as closing:
    with distributed.raising_together():
      claim = run_folder.claim(prepared.run, cfg)
      closing.callback(claim.release)
    run = pathlib.Path(distributed.broadcast_from_main(str(claim.path)))
    writes_to = run.absolute()  # a reward may change the working folder
    say(_COMPILING + (_WARNS_ON_GPUS if jax.default_backend() == "gpu" else ""))
    with ending_with(claim.release):  # nothing is lost yet, so there is nothing to wait for
      trainer = build(cfg, plan, prepared.prompt_fn, prepared.reward_fns, model)
    stop = closing.enter_context(interruptible())
    cfg = trainer.cfg  # with the rank of lora.init_from
    first_epoch, damaged = resume(trainer, run) if cfg.resume_from else (0, [])
    with distributed.raising_together():
      tracker = tracking.Tracker(writes_to, cfg, first_epoch)
    closing.callback(tracker.close)
    set_aside_damaged(run, damaged)
    checkpointer = checkpoint.Checkpointer(run, cfg.num_checkpoint_limit)
    closing.callback(checkpointer.close)
    say(f"Writing to {run}")
    run_epochs(trainer, tracker, checkpointer, first_epoch, stop, started)
  if first_epoch < cfg.num_epochs:
    say(f"Done: {counted(cfg.num_epochs, 'epoch')}. {run / 'report.html'} shows what came of it; "
        f"scripts/sample.py --run {shlex.quote(str(run))} draws from the result")
  return run


def with_absolute_paths(cfg: Config) -> Config:
  """The config with its files as they are called from any folder."""
  return dataclasses.replace(
      cfg, prompt_fn_kwargs=prompts.absolute_paths(cfg.prompt_fn, cfg.prompt_fn_kwargs),
      lora=dataclasses.replace(cfg.lora, init_from=files.absolute(cfg.lora.init_from)),
      pretrained=dataclasses.replace(
          cfg.pretrained, model=model_names.absolute(cfg.pretrained.model)))


def run_epochs(trainer: Trainer, tracker: tracking.Tracker,
               checkpointer: checkpoint.Checkpointer, first_epoch: int, stop: Stop,
               started: float) -> None:
  """Runs the epochs that are left, with an evaluation before the first, and saves checkpoints."""
  cfg = trainer.cfg
  if first_epoch >= cfg.num_epochs:
    say(f"{counted(first_epoch, 'epoch')} done already; for more, num_epochs={cfg.num_epochs} "
        f"must be above {first_epoch}")
  finished, state, is_saved = first_epoch - 1, checkpoint_of(trainer), True
  if finished >= 0:
    # A run that goes on from another's checkpoint has it from the start: should it be killed
    # before its own first one, resume_from="auto" finds it.
    checkpointer.save(finished, *state)
    is_saved = first_epoch < cfg.num_epochs or checkpointer.finish_writing()
  try:
    evaluate(trainer, tracker, first_epoch)  # once more, should the run have ended in it
    for epoch in range(first_epoch, cfg.num_epochs):
      run_epoch(trainer, tracker, epoch, stop, started)
      finished, state = epoch, checkpoint_of(trainer)
      evaluate(trainer, tracker, epoch + 1)
      if epoch + 1 == cfg.num_epochs:
        is_saved = checkpointer.save_and_wait(epoch, *state)
      elif not checkpointer.finish_writing() or (epoch + 1) % cfg.save_freq == 0:
        checkpointer.save(epoch, *state)
  except BaseException as error:
    if not distributed.raised_on_all(error):
      end_alone(cfg, error)
    # An epoch is a pure function of the state before it, so nothing is lost: neither by a
    # signal, nor where a reward fails or exits, or training gets no finite numbers.
    if finished >= 0:
      is_saved = checkpointer.save_and_wait(finished, *state)
      say(_saved(checkpointer, finished) if is_saved else _not_saved(checkpointer, finished))
    raise
  if not is_saved:
    raise UserError(_not_saved(checkpointer, finished))


def _saved(checkpointer: checkpoint.Checkpointer, epoch: int) -> str:
  return (f"Saved after {counted(epoch + 1, 'epoch')}: --config.resume_from="
          f"{shlex.quote(str(checkpointer.run))} goes on from there")


def _not_saved(checkpointer: checkpoint.Checkpointer, epoch: int) -> str:
  run, newest = checkpointer.run, checkpointer.newest()
  failed = f"{run}: the checkpoint after {counted(epoch + 1, 'epoch')} could not be written"
  if newest is None:
    return f"{failed}, and there is none before it; make room there, and start the run again"
  return (f"{failed}; make room there, and --config.resume_from={shlex.quote(str(run))} goes on "
          f"after {counted(newest + 1, 'epoch')}")


def end_alone(cfg: Config, error: BaseException) -> NoReturn:
  """Ends this process at once, because the others may wait for it in a collective operation.

  To save or to shut down takes all of them. They end when they find that this one is gone.
  """
  try:
    with resource_errors.with_advice(cfg):
      raise error
  except UserError as known:
    status = USAGE_ERROR
    write(str(known), sys.stderr)
  except BaseException:
    status = 1
    traceback.print_exc()
  write(f"Process {jax.process_index()} ends without saving, because the others may wait for it; "
        "the last checkpoint is kept", sys.stderr)
  sys.stderr.flush()
  os._exit(status)


def run_epoch(trainer: Trainer, tracker: tracking.Tracker, epoch: int, stop: Stop,
              started: float) -> None:
  """Samples, scores, updates, and logs one epoch."""
  first = int(trainer.state.step) == 0
  rollout = roll_out(trainer, epoch, stop.check)
  if first:
    check_predictions(trainer, rollout)
  rewards = total_rewards(trainer, rollout)
  batch = make_batch(trainer, rollout, rewards)
  training_started = time.perf_counter()
  step_metrics = []
  for on_device in optimizer_steps(trainer, batch, epoch, stop, rollout.gradients):
    step_metrics.append(jax.device_get(on_device))
    count_skipped(trainer, step_metrics[-1], epoch)
    if first and len(step_metrics) == 1:
      say(f"First optimizer step after {time.perf_counter() - started:.1f} s")
  training_seconds = time.perf_counter() - training_started
  metrics = epoch_metrics(trainer, rollout, rewards, step_metrics, training_seconds)
  with distributed.raising_together():
    tracker.log_epoch(epoch, metrics, rollout.prompts, rewards, rollout.images,
                      rollout.local_indices, rollout.reward_info.per_image())
  for warning in trainer.watch.new_warnings(metrics):
    say(warning)


def evaluate(trainer: Trainer, tracker: tracking.Tracker, epochs: int) -> None:
  """Draws the same prompts from the same noise as ever, every `eval_freq` epochs."""
  cfg = trainer.cfg
  if cfg.eval_freq and (epochs % cfg.eval_freq == 0 or epochs == cfg.num_epochs):
    images, prompts = trainer.worker.sample_fixed_batch(trainer.state.params)
    with distributed.raising_together():
      tracker.log_eval(epochs, images[:_EVAL_IMAGES], prompts[:_EVAL_IMAGES])


def check_predictions(trainer: Trainer, rollout: Rollout) -> None:
  """Refuses a model with which no sample has a log-probability that is a finite number."""
  any_finite = jax.jit(lambda log_probs: jnp.isfinite(log_probs.sum(axis=-1)).any())
  is_right = bool(any_finite(rollout.trajectory.log_probs))  # collective, so outside of the block
  with distributed.raising_together():
    if not is_right:
      raise UserError(
          f"pretrained.model={trainer.cfg.pretrained.model!r}: what its UNet predicts is not "
          "finite; its files must hold no NaN or infinity, and its numbers must not be too large "
          f"for mixed_precision={trainer.cfg.mixed_precision!r}")


def count_skipped(trainer: Trainer, metrics: update.UpdateMetrics, epoch: int) -> None:
  """Counts skipped steps in a row; raises DivergedError if there are too many."""
  trainer.skipped_in_a_row = trainer.skipped_in_a_row + 1 if metrics.skipped else 0
  cfg = trainer.cfg
  if trainer.skipped_in_a_row > cfg.train.max_skipped_steps:
    raise DivergedError(
        f"train.learning_rate={cfg.train.learning_rate:g}: loss or gradient was not finite in the "
        f"last {trainer.skipped_in_a_row} optimizer steps, up to epoch {epoch + 1}/"
        f"{cfg.num_epochs}, all of them skipped (train.max_skipped_steps="
        f"{cfg.train.max_skipped_steps}); {diagnostics.remedy_of_no_finite_numbers(cfg)}")


def total_rewards(trainer: Trainer, rollout: Rollout) -> np.ndarray:
  """The reward function's values, or the weighted sum of several: [samples] float32."""
  if trainer.combiner is not None:
    return trainer.combiner.combine(rollout.rewards)
  (rewards,) = rollout.rewards.values()
  return rewards


def make_batch(trainer: Trainer, rollout: Rollout, rewards: np.ndarray) -> Batch:
  """Turns rewards into advantages and lays the epoch out for the update."""
  if trainer.stat_tracker is None:
    values = advantages.normalize(rewards)
  else:
    values = trainer.stat_tracker.update(rollout.prompts, rewards)
  shape = rollout.trajectory.log_probs.shape[:2]
  sharding = jax.NamedSharding(trainer.mesh, jax.P(None, AXIS))
  global_advantages = values.reshape(shape)
  return Batch(trajectory=rollout.trajectory, text_embeddings=rollout.text_embeddings,
               negative_embedding=trainer.worker.negative_embedding,
               advantages=jax.make_array_from_callback(
                   shape, sharding, lambda index: global_advantages[index]))


def epoch_metrics(trainer: Trainer, rollout: Rollout, rewards: np.ndarray,
                  step_metrics: list[update.UpdateMetrics], training_seconds: float
                  ) -> dict[str, float | int | None]:
  """Builds a line of metrics.jsonl.

  `sampler_drift` is the `ratio_drift` of the first optimizer step. `ratio_drift` is the same, or
  0 where log-probabilities were recomputed because of it. Means are over the optimizer steps
  that were not skipped, if there are any.
  """
  each = rollout.rewards if trainer.combiner is not None else {}
  # In float32 the square of a large one is infinite.
  rewards, each = jax.tree.map(lambda values: values.astype(np.float64), (rewards, each))
  taken = [step for step in step_metrics if not step.skipped] or step_metrics
  mean = lambda name: float(np.mean([getattr(step, name) for step in taken]))
  drift = float(step_metrics[0].ratio_drift)
  return {
      "reward_mean": float(rewards.mean()), "reward_std": float(rewards.std()),
      "reward_min": float(rewards.min()), "reward_max": float(rewards.max()),
      **{f"reward/{name}_mean": float(values.mean()) for name, values in each.items()},
      **{f"reward/{name}_std": float(values.std()) for name, values in each.items()},
      **rollout.reward_info.means(),
      "sampling_seconds": rollout.sampling_seconds,
      "diversity": diagnostics.diversity(rollout.images),
      "reward_seconds": rollout.reward_seconds, "training_seconds": training_seconds,
      "images_per_second": len(rewards) / rollout.sampling_seconds,
      "loss": mean("loss"), "approx_kl": mean("approx_kl"),
      "clipfrac": mean("clipfrac"), "grad_norm": mean("grad_norm"),
      "ratio_drift": 0.0 if needs_rescoring(trainer, drift) else drift,
      "sampler_drift": drift,
      "skipped_steps": int(sum(step.skipped for step in step_metrics)),
      "learning_rate": trainer.cfg.train.learning_rate,
      "optimizer_steps": int(trainer.state.step),
      "peak_memory_bytes": peak_memory_bytes(),
  }
