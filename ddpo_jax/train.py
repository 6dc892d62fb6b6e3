"""The training loop: sample, score, turn rewards into advantages, update; every epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
import functools
import json
import pathlib
import signal
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key
import numpy as np
import optax
from tqdm import tqdm

from ddpo_jax import (
  advantages,
  checkpoint,
  diagnostics,
  distributed,
  lora,
  memory,
  tracking,
  update,
  validation,
)
from ddpo_jax.config import BatchPlan, Config, check_continues
from ddpo_jax.console import hide_bars, say
from ddpo_jax.devices import (
  AXIS,
  configure_devices,
  host_memory,
  plan_batches,
  samples_at_once,
)
from ddpo_jax.diffusion import DDIMSchedule
from ddpo_jax.diffusion.sampler import native_size
from ddpo_jax.embeddings import embedding_shape
from ddpo_jax.models import StableDiffusion, Unread, open_pretrained
from ddpo_jax.models.layers import place_weights, placed_shapes, set_compute_dtype
from ddpo_jax.models.unet import UNet2DConditionModel
from ddpo_jax.rewards.combined import RewardCombiner
from ddpo_jax.rollout import FrozenModels, Rollout, RolloutWorker, SamplingConfig
from ddpo_jax.types import Batch, Interrupted, PromptFn, RewardFn, TrainState, Trajectory

P = jax.sharding.PartitionSpec

DTYPES = {"no": jnp.float32, "fp16": jnp.float16, "bf16": jnp.bfloat16}
# Keys are folded from the seed by purpose, then by epoch: sampling takes the plain seed.
_LORA_STREAM, _SHUFFLE_STREAM, _EVAL_STREAM = 1_000_001, 1_000_002, 1_000_003
_EVAL_IMAGES = 8

_Step = tuple[Key[Array, ""], Int[Array, ""]]  # an inner epoch's shuffle; the step's index


@dataclasses.dataclass
class Trainer:
  """What is built once; the loop only calls it."""

  cfg: Config
  plan: BatchPlan
  mesh: jax.sharding.Mesh
  worker: RolloutWorker
  update: update.Update
  frozen_unet: nnx.State
  state: TrainState
  stat_tracker: advantages.PerPromptStatTracker | None
  combiner: RewardCombiner | None  # of several reward functions
  watch: diagnostics.Watch
  skipped_in_a_row: int = 0


def train(cfg: Config) -> pathlib.Path:
  """Runs the experiment that the config describes.

  Returns:
    The run's folder.

  Raises:
    UserError: for anything in the config, its paths or the reward's values that the user
      can correct.
    Interrupted: after SIGTERM or SIGINT, once what was finished is saved.
    FloatingPointError: if training does not get finite numbers any more; likewise.
  """
  started = time.perf_counter()
  memory.share_arenas()
  distributed.initialize(cfg.distributed)
  configure_devices()
  plan = plan_batches(cfg)
  run_name = distributed.agreed(tracking.choose_run_name(cfg))
  with distributed.failing_together():
    prepared = validation.prepare(cfg, run_name)
    configure_jax(cfg)
  run = prepared.run
  say(plan.describe())
  with distributed.failing_together():
    model = open_model(cfg)
  with interruptible() as stop:
    say("Compiling, and reading the model")
    trainer = build(cfg, plan, prepared.prompt_fn, prepared.reward_fns, model)
    first_epoch = resume(trainer, run) if cfg.resume_from else 0
    with contextlib.ExitStack() as closing:
      with distributed.failing_together():
        tracker = tracking.Tracker(run, cfg, first_epoch)
      closing.callback(tracker.close)
      checkpointer = checkpoint.Checkpointer(run, cfg.num_checkpoint_limit)
      closing.callback(checkpointer.close)
      dropped = checkpointer.drop_after(first_epoch - 1)
      if dropped:
        say(f"Deleting later checkpoints, of epochs {', '.join(map(str, dropped))}")
      say(f"Writing to {run}")
      run_epochs(trainer, tracker, checkpointer, first_epoch, stop, started)
  return run


def configure_jax(cfg: Config) -> None:
  """Settings of JAX itself: the compilation cache, and TF32 where it is allowed."""
  folder = cfg.compilation_cache_folder()
  if folder is not None:
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  precision = "tensorfloat32" if cfg.allow_tf32 else "highest"
  jax.config.update("jax_default_matmul_precision", precision)


def build(cfg: Config, plan: BatchPlan, prompt_fn: PromptFn,
          reward_fns: Mapping[str, RewardFn], model: Unread[StableDiffusion]) -> Trainer:
  """Compiles the update, reads the model meanwhile, and puts it where training needs it."""
  # In order of the processes, so that each has a run of consecutive samples.
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  mesh = jax.sharding.Mesh(np.array(devices[:plan.num_devices]), (AXIS,))
  replicated = jax.sharding.NamedSharding(mesh, P())
  schedule = DDIMSchedule.create(model.shapes.noise_schedule, cfg.sample.num_steps)
  optimizer = update.make_optimizer(
      cfg.train.learning_rate, cfg.train.adam_beta1, cfg.train.adam_beta2,
      cfg.train.adam_weight_decay, cfg.train.adam_epsilon, cfg.train.max_grad_norm)
  with distributed.failing_together():
    with futures.ThreadPoolExecutor(1) as pool:
      # Into host memory alone, so that kernels are timed on a device that is at rest.
      reading = pool.submit(_read_into_host_memory, model)
      compiled = compile_update(cfg, plan, mesh, schedule, optimizer, model.shapes)
    models = reading.result()
    with host_memory():
      unet = prepare_unet(cfg, models.unet)
  with host_memory():
    graphdef, params, frozen_unet = lora.partition(unet, cfg.use_lora)
    state = update.init_state(params, optimizer, uses_loss_scaling(cfg))
  frozen = place_weights(FrozenModels(frozen_unet, nnx.state(models.vae)), replicated)
  worker = RolloutWorker(
      make_sampling_config(cfg, plan),
      models, graphdef, frozen, schedule, prompt_fn, reward_fns, cfg.seed, mesh)
  tracking_config = cfg.per_prompt_stat_tracking
  return Trainer(
      cfg=cfg, plan=plan, mesh=mesh, worker=worker, frozen_unet=frozen.unet,
      update=compiled, state=jax.device_put(state, replicated),
      stat_tracker=None if tracking_config is None else advantages.PerPromptStatTracker(
          tracking_config.buffer_size, tracking_config.min_count),
      combiner=RewardCombiner(cfg.reward_weights) if cfg.reward_weights else None,
      watch=diagnostics.Watch(cfg))


def open_model(cfg: Config) -> Unread[StableDiffusion]:
  """The pretrained model in the dtype asked for; a hub's is downloaded."""
  return open_pretrained(cfg.pretrained.model, cfg.pretrained.revision,
                         DTYPES[cfg.mixed_precision])


def load_models(cfg: Config) -> StableDiffusion:
  """The pretrained model, with a UNet that is ready to be partitioned."""
  models = open_model(cfg).read()
  prepare_unet(cfg, models.unet)
  return models


def prepare_unet(cfg: Config, unet: UNet2DConditionModel) -> UNet2DConditionModel:
  """Makes what training needs of a pretrained UNet, in place, and returns it."""
  unet.gradient_checkpointing = cfg.train.gradient_checkpointing
  if not cfg.use_lora:
    # What the optimizer changes stays float32; the network computes in its own dtype.
    weights = jax.tree.map(lambda w: w.astype(jnp.float32), nnx.state(unet))
    nnx.update(unet, weights)
    set_compute_dtype(unet, DTYPES[cfg.mixed_precision])
  elif cfg.lora.init_from:
    lora.import_lora(unet, cfg.lora.init_from)
  else:
    key = jax.random.fold_in(jax.random.key(cfg.seed), _LORA_STREAM)
    lora.inject_lora(unet, cfg.lora.rank, key)
  return unet


def _read_into_host_memory(model: Unread[StableDiffusion]) -> StableDiffusion:
  with host_memory():
    return model.read()


def make_sampling_config(cfg: Config, plan: BatchPlan) -> SamplingConfig:
  round_as_update = _must_round_alike(cfg)
  pairs_of_update = plan.train_batch_size * cfg.train.timesteps_per_batch
  at_once = samples_at_once(pairs_of_update if round_as_update else plan.sample_batch_size)
  return SamplingConfig(
      batch_size=plan.sample_batch_size, num_batches=cfg.sample.num_batches_per_epoch,
      guidance_scale=cfg.sample.guidance_scale, eta=cfg.sample.eta, samples_at_once=at_once,
      decode_batch_size=cfg.sample.decode_batch_size, round_as_update=round_as_update)


def make_update_config(cfg: Config, plan: BatchPlan) -> update.UpdateConfig:
  return update.UpdateConfig(
      batch_size=plan.train_batch_size, sample_batch_size=plan.sample_batch_size,
      accumulation_steps=cfg.train.gradient_accumulation_steps,
      num_train_timesteps=plan.num_train_timesteps,
      timesteps_per_batch=cfg.train.timesteps_per_batch,
      guidance_scale=cfg.sample.guidance_scale, eta=cfg.sample.eta,
      clip_range=cfg.train.clip_range, adv_clip_max=cfg.train.adv_clip_max,
      loss_scaling=uses_loss_scaling(cfg),
      recompute_log_probs=_must_round_alike(cfg))


def uses_loss_scaling(cfg: Config) -> bool:
  """Whether gradients could be too small for the numbers that they are computed in."""
  return cfg.mixed_precision == "fp16"


def _must_round_alike(cfg: Config) -> bool:
  """Whether rounding could move ratios by more than PPO's clip range allows (docs/gpu.md)."""
  uses_tf32 = cfg.allow_tf32 and jax.default_backend() == "gpu"
  return cfg.train.recompute_log_probs and (cfg.mixed_precision != "no" or uses_tf32)


def compile_update(cfg: Config, plan: BatchPlan, mesh: jax.sharding.Mesh,
                   schedule: DDIMSchedule, optimizer: optax.GradientTransformation,
                   shapes: StableDiffusion) -> update.Update:
  """Compiles the update for arrays of the shapes that an epoch will have.

  Before anything is sampled, and not beside it: on a processor both would use the same cores
  and hold memory at once; on a GPU the compiler times kernels, which nothing may disturb, and
  the sampler's, compiled later, are those that it has chosen for the update.

  Args:
    cfg: the run's.
    plan: likewise.
    mesh: the devices.
    schedule: the sampler's.
    optimizer: that will be used.
    shapes: the model as it is read, with shapes in the place of its weights.
  """
  unet = nnx.eval_shape(functools.partial(prepare_unet, cfg), shapes.unet)
  graphdef, params, frozen = lora.partition(unet, cfg.use_lora)
  config = make_update_config(cfg, plan)
  state = jax.eval_shape(
      lambda params: update.init_state(params, optimizer, config.loss_scaling), params)
  replicated = jax.sharding.NamedSharding(mesh, P())
  everywhere: Any = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)
  sharded = jax.sharding.NamedSharding(mesh, P(None, AXIS))
  samples = (cfg.sample.num_batches_per_epoch, plan.sample_batch_size * plan.num_devices)
  of_each: Any = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(
      (*samples, *shape), dtype, sharding=sharded)
  embedding = embedding_shape(shapes.text_encoder)
  latent_shape = (*native_size(unet), unet.config.in_channels)
  batch = Batch(
      trajectory=Trajectory(latents=of_each(cfg.sample.num_steps + 1, *latent_shape),
                            log_probs=of_each(cfg.sample.num_steps)),
      text_embeddings=of_each(*embedding.shape[1:], dtype=embedding.dtype),
      negative_embedding=everywhere(embedding), advantages=of_each())
  compiled = update.compile_for(
      update.make_update(config, graphdef, schedule, optimizer, mesh),
      jax.tree.map(everywhere, state), placed_shapes(frozen, replicated), batch,
      jax.random.key(0), jnp.int32(0))
  memory.return_freed_memory()  # the compiler's, or what reading its program took
  return compiled


def resume(trainer: Trainer, run: pathlib.Path) -> int:
  """Restores what a checkpoint holds; returns the epoch to go on with.

  All processes take the same one: the newest that is damaged for none of them. Those that are
  damaged are reported, and stay under another name.
  """
  with distributed.failing_together():
    source, epochs = _checkpoints(trainer.cfg, run)
  epochs = json.loads(distributed.agreed(json.dumps(epochs)))
  if not epochs:
    return 0
  damaged = []
  while isinstance(restored := _restore(trainer, source, epochs[0]), checkpoint.DamagedError):
    damaged.append(epochs.pop(0))
    if not epochs:
      raise restored
    say(f"{restored}; going on from epoch {epochs[0]} and not {damaged[-1]}")
  say(f"Resuming after epoch {restored.epoch + 1} of {source}")
  if source == run.resolve():
    _set_aside(run, damaged)
  trainer.state = restored.state
  if trainer.stat_tracker is not None:
    trainer.stat_tracker.load_state_dict(restored.meta["per_prompt_stats"])
  if trainer.combiner is not None:
    trainer.combiner.load_state_dict(restored.meta["reward_stats"])
  if "watch" in restored.meta:  # not so in earlier checkpoints
    trainer.watch.load_state_dict(restored.meta["watch"])
    trainer.skipped_in_a_row = restored.meta["skipped_in_a_row"]
  return restored.epoch + 1


def _checkpoints(cfg: Config, run: pathlib.Path) -> tuple[pathlib.Path, list[int]]:
  """The run folder to resume from, and the epochs of its checkpoints, the newest first."""
  if cfg.resume_from == "auto":
    return run.resolve(), checkpoint.saved_epochs(run)
  return checkpoint.find_all(cfg.resume_from)


def _restore(trainer: Trainer, run: pathlib.Path, epoch: int
             ) -> checkpoint.Restored | checkpoint.DamagedError:
  """What a checkpoint holds; on every process the error if it is damaged for any of them."""
  damage = None
  with distributed.failing_together():
    try:
      saved = checkpoint.restore_meta(run, epoch)["config"]
      check_continues(trainer.cfg, saved, f"the checkpoint of epoch {epoch}")
      restored = checkpoint.restore(run, epoch, trainer.state)
    except checkpoint.DamagedError as error:
      damage = error
  if not distributed.largest(int(damage is not None)):
    return restored
  return damage or checkpoint.DamagedError(
      f"the checkpoint of epoch {epoch} of {run} is damaged for another process")


def _set_aside(run: pathlib.Path, epochs: Iterable[int]) -> None:
  """Makes room for these epochs' new checkpoints; nothing is deleted."""
  with distributed.failing_together():
    for epoch in epochs if distributed.is_main() else ():
      say(f"Keeping the damaged checkpoint as {checkpoint.set_aside(run, epoch)}")


def checkpoint_of(trainer: Trainer) -> tuple[TrainState, dict]:
  """The state as it is now, safe from the update's donation, and the rest as JSON."""
  of = lambda part: None if part is None else part.state_dict()
  meta = {"config": trainer.cfg.to_dict(), "per_prompt_stats": of(trainer.stat_tracker),
          "reward_stats": of(trainer.combiner), "watch": of(trainer.watch),
          "skipped_in_a_row": trainer.skipped_in_a_row}
  return jax.tree.map(jnp.copy, trainer.state), meta


def run_epochs(trainer: Trainer, tracker: tracking.Tracker,
               checkpointer: checkpoint.Checkpointer, first_epoch: int, stop: Stop,
               started: float) -> None:
  """All that are left, with an evaluation before the first and checkpoints on the way."""
  cfg = trainer.cfg
  if first_epoch == 0:
    evaluate(trainer, tracker, 0)
  for epoch in range(first_epoch, cfg.num_epochs):
    before = checkpoint_of(trainer)
    try:
      run_epoch(trainer, tracker, epoch, stop, started)
    except Exception:
      # An epoch is a pure function of the state before it, so nothing is lost: neither
      # by a signal, nor where a reward fails or training gets no finite numbers.
      if epoch > 0:
        checkpointer.save(epoch - 1, *before)
      raise
    evaluate(trainer, tracker, epoch + 1)
    if (epoch + 1) % cfg.save_freq == 0 or epoch + 1 == cfg.num_epochs:
      checkpointer.save(epoch, *checkpoint_of(trainer))


def run_epoch(trainer: Trainer, tracker: tracking.Tracker, epoch: int, stop: Stop,
              started: float) -> None:
  """Samples, scores, updates, and logs one epoch."""
  first = int(trainer.state.step) == 0
  rollout = trainer.worker.run(trainer.state.params, epoch, before_batch=stop.check)
  rewards = total_rewards(trainer, rollout)
  batch = make_batch(trainer, rollout, rewards)
  training_started = time.perf_counter()
  steps = []
  for step_metrics in optimizer_steps(trainer, batch, epoch, stop):
    steps.append(jax.device_get(step_metrics))
    check_finite(trainer, steps[-1], epoch)
    if first and len(steps) == 1:
      say(f"First optimizer step after {time.perf_counter() - started:.1f} s")
  training_seconds = time.perf_counter() - training_started
  metrics = epoch_metrics(trainer, rollout, rewards, steps, training_seconds)
  with distributed.failing_together():
    tracker.log_epoch(epoch, metrics, rollout.prompts, rewards, rollout.images,
                      rollout.local_indices)
  for warning in trainer.watch.new_warnings(metrics):
    say(warning)


def evaluate(trainer: Trainer, tracker: tracking.Tracker, epochs: int) -> None:
  """Draws the same prompts from the same noise as ever, every `eval_freq` epochs."""
  cfg = trainer.cfg
  if cfg.eval_freq and (epochs % cfg.eval_freq == 0 or epochs == cfg.num_epochs):
    images, prompts = trainer.worker.draw(trainer.state.params, _EVAL_STREAM)
    with distributed.failing_together():
      tracker.log_eval(epochs, images[:_EVAL_IMAGES], prompts[:_EVAL_IMAGES])


def check_finite(trainer: Trainer, metrics: update.UpdateMetrics, epoch: int) -> None:
  """Counts skipped steps; raises FloatingPointError after too many in a row."""
  trainer.skipped_in_a_row = trainer.skipped_in_a_row + 1 if metrics.skipped else 0
  limit = trainer.cfg.train.max_skipped_steps
  if trainer.skipped_in_a_row > limit:
    raise FloatingPointError(
        f"epoch {epoch}: loss or gradient was not finite in the last "
        f"{trainer.skipped_in_a_row} optimizer steps, all of them skipped "
        f"(train.max_skipped_steps={limit}); lower train.learning_rate, or set "
        "mixed_precision='no'")


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
  sharding = jax.sharding.NamedSharding(trainer.mesh, P(None, AXIS))
  everywhere = values.reshape(shape)
  return Batch(trajectory=rollout.trajectory, text_embeddings=rollout.text_embeddings,
               negative_embedding=trainer.worker.negative_embedding,
               advantages=jax.make_array_from_callback(
                   shape, sharding, lambda index: everywhere[index]))


def optimizer_steps(trainer: Trainer, batch: Batch, epoch: int, stop: Stop
                    ) -> Iterator[update.UpdateMetrics]:
  """Takes the epoch's optimizer steps, yielding each one's metrics on the device."""
  memory.return_freed_memory()  # sampling's, and its compiler's
  shuffle = jax.random.fold_in(jax.random.key(trainer.cfg.seed), _SHUFFLE_STREAM)
  shuffle = jax.random.fold_in(shuffle, epoch)
  steps = [(jax.random.fold_in(shuffle, inner), jnp.int32(index))
           for inner in range(trainer.cfg.train.num_inner_epochs)
           for index in range(trainer.plan.steps_per_inner_epoch)]
  for step in _progress(steps, f"Epoch {epoch}: training"):
    stop.check()
    if step is steps[0] and isinstance(trainer.update, update.RescoringUpdate):
      batch, metrics = _first_step(trainer, trainer.update, batch, steps, epoch, stop)
    else:
      trainer.state, metrics = trainer.update(trainer.state, trainer.frozen_unet, batch, *step)
    yield metrics


def _first_step(trainer: Trainer, rescoring: update.RescoringUpdate, batch: Batch,
                steps: Sequence[_Step], epoch: int, stop: Stop
                ) -> tuple[Batch, update.UpdateMetrics]:
  """Takes the first of the steps, and sees to the log-probabilities that the others read."""
  params = jax.tree.map(jnp.copy, trainer.state.params)  # the sampler's; the step donates them
  trainer.state, batch, metrics = rescoring.first_step(
      trainer.state, trainer.frozen_unet, batch, *steps[0])
  count = num_rescored(trainer, float(jax.device_get(metrics.ratio_drift)))
  if count:
    state = dataclasses.replace(trainer.state, params=params)
    for step in _progress(steps[1:1 + count], f"Epoch {epoch}: log-probabilities"):
      stop.check()
      state, batch = rescoring.rescore(state, trainer.frozen_unet, batch, *step)
    trainer.state = dataclasses.replace(state, params=trainer.state.params)
  return batch, metrics


def leaves_sampler(trainer: Trainer, drift: float) -> bool:
  """Whether an epoch's optimizer steps read other log-probabilities than the sampler's.

  Args:
    trainer: whose update may be able to compute them.
    drift: the `ratio_drift` of the epoch's first optimizer step.
  """
  acceptable = drift <= diagnostics.largest_drift(trainer.cfg)  # False where it is not finite
  return not acceptable and isinstance(trainer.update, update.RescoringUpdate)


def num_rescored(trainer: Trainer, drift: float) -> int:
  """For how many of an epoch's optimizer steps they are computed; the first has its own."""
  if not leaves_sampler(trainer, drift):
    return 0
  every_timestep = trainer.plan.num_train_timesteps == trainer.cfg.sample.num_steps
  # Where every timestep is trained, one inner epoch reads all that the others do.
  inner_epochs = 1 if every_timestep else trainer.cfg.train.num_inner_epochs
  return trainer.plan.steps_per_inner_epoch * inner_epochs - 1


def _progress(steps: Sequence[_Step], description: str) -> Iterable[_Step]:
  return tqdm(steps, desc=description, leave=False, dynamic_ncols=True,
              disable=hide_bars(), unit="step")


def epoch_metrics(trainer: Trainer, rollout: Rollout, rewards: np.ndarray,
                  steps: list[update.UpdateMetrics], training_seconds: float
                  ) -> dict[str, float | int | None]:
  """One line of metrics.jsonl.

  `ratio_drift` is from before the first optimizer step, and 0 where log-probabilities were
  computed anew because of `sampler_drift`.
  """
  each = rollout.rewards if trainer.combiner is not None else {}
  mean = lambda name: float(np.mean([getattr(step, name) for step in steps]))
  drift = float(steps[0].ratio_drift)
  return {
      "reward_mean": float(rewards.mean()), "reward_std": float(rewards.std()),
      "reward_min": float(rewards.min()), "reward_max": float(rewards.max()),
      **{f"reward/{name}_mean": float(values.mean()) for name, values in each.items()},
      **{f"reward/{name}_std": float(values.std()) for name, values in each.items()},
      "sampling_seconds": rollout.sampling_seconds,
      "diversity": diagnostics.diversity(rollout.images),
      "reward_seconds": rollout.reward_seconds, "training_seconds": training_seconds,
      "images_per_second": len(rewards) / rollout.sampling_seconds,
      "loss": mean("loss"), "approx_kl": mean("approx_kl"),
      "clipfrac": mean("clipfrac"), "grad_norm": mean("grad_norm"),
      "ratio_drift": 0.0 if leaves_sampler(trainer, drift) else drift,
      "sampler_drift": drift,
      "skipped_steps": int(sum(step.skipped for step in steps)),
      "learning_rate": trainer.cfg.train.learning_rate,
      "optimizer_steps": int(trainer.state.step),
      "peak_memory_bytes": peak_memory_bytes(),
  }


def peak_memory_bytes() -> int | None:
  """The most that any device of this process held, or None where it is not known."""
  stats = [device.memory_stats() for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
  return max(peaks, default=None)


class Stop:
  """Whether a signal has asked the run to stop."""

  def __init__(self) -> None:
    self.signum: int | None = None

  def check(self) -> None:
    """Raises Interrupted if so, on all processes; called where everything is at rest."""
    signum = distributed.largest(self.signum or 0)
    if signum:
      raise Interrupted(signum)


@contextlib.contextmanager
def interruptible() -> Iterator[Stop]:
  """Turns the first SIGTERM or SIGINT into a request; a second one acts as ever."""
  stop = Stop()

  def request(signum: int, _) -> None:
    stop.signum = signum
    for each, handler in previous.items():
      signal.signal(each, handler)

  previous = {each: signal.signal(each, request)
              for each in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield stop
  finally:
    for each, handler in previous.items():
      signal.signal(each, handler)
