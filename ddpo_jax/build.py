"""What a run needs, built once: the models, the sampler, the compiled update."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent import futures
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpo_jax import advantages, diagnostics, distributed, files, lora, rng_streams, update
from ddpo_jax.batches import BatchPlan
from ddpo_jax.compilation import compile_ahead
from ddpo_jax.config import Config
from ddpo_jax.console import say
from ddpo_jax.devices import AXIS, host_memory, samples_at_once
from ddpo_jax.diffusion import DDIMSchedule, NoiseSchedule
from ddpo_jax.diffusion.ddim import check_density
from ddpo_jax.diffusion.sampler import native_size
from ddpo_jax.embeddings import embedding_shape
from ddpo_jax.errors import UserError, said_of
from ddpo_jax.generation import (
  FrozenModels,
  Generate,
  GenerateConfig,
  make_generate,
  make_shared_generate,
)
from ddpo_jax.models import LazyModel, StableDiffusion, open_pretrained
from ddpo_jax.models.layers import set_compute_dtype
from ddpo_jax.models.placement import place_weights, placed_shapes, replicate
from ddpo_jax.models.unet import UNet2DConditionModel
from ddpo_jax.rewards.combined import RewardCombiner
from ddpo_jax.rollout import RolloutWorker
from ddpo_jax.shared_program import SharedProgram
from ddpo_jax.types import Batch, PromptFn, RewardFn, TrainState, Trajectory
from ddpo_jax.work import WorkLayout

_MOST_BYTES_OF_GRADIENTS = 2**31  # of samples by themselves, on each device
DTYPES = {"no": jnp.float32, "fp16": jnp.float16, "bf16": jnp.bfloat16}


@dataclasses.dataclass
class Trainer:
  """What a run consists of: programs and models, built once, and what training changes."""

  cfg: Config
  plan: BatchPlan
  mesh: jax.sharding.Mesh
  worker: RolloutWorker
  update: update.Update | SharedProgram
  frozen_unet: nnx.State
  # What changes, and what a checkpoint holds.
  state: TrainState
  stat_tracker: advantages.PerPromptStatTracker | None
  combiner: RewardCombiner | None  # of several reward functions
  watch: diagnostics.Watch
  skipped_in_a_row: int = 0


def build(cfg: Config, plan: BatchPlan, prompt_fn: PromptFn,
          reward_fns: Mapping[str, RewardFn], model: LazyModel[StableDiffusion]) -> Trainer:
  """Compiles the programs, reads the model meanwhile, and puts it where training needs it."""
  mesh = make_mesh(plan)
  replicated = jax.NamedSharding(mesh, jax.P())
  schedule = make_schedule(cfg, model.shapes.noise_schedule)
  optimizer = update.make_optimizer(
      cfg.train.learning_rate, beta1=cfg.train.adam_beta1, beta2=cfg.train.adam_beta2,
      weight_decay=cfg.train.adam_weight_decay, epsilon=cfg.train.adam_epsilon,
      max_grad_norm=cfg.train.max_grad_norm)
  with distributed.raising_together():
    with futures.ThreadPoolExecutor(1) as pool:
      # Into host memory alone, so that kernels are timed on a device that is at rest.
      reading = pool.submit(_read_into_host_memory, model)
      compiled, generate = compile_programs(cfg, plan, mesh, schedule, optimizer, model.shapes)
    models = reading.result()
    models.vae.drop_encoder()
    with host_memory():
      unet = prepare_unet(cfg, models.unet)
    cfg = _with_actual_rank(cfg, unet)
  with host_memory():
    _, params, frozen_unet = lora.partition(unet, cfg.use_lora)
    state = update.init_state(params, optimizer, uses_loss_scaling(cfg))
  frozen = place_weights(FrozenModels(frozen_unet, nnx.state(models.vae)), replicated)
  sampling = make_generate_config(cfg, plan)
  if isinstance(compiled, SharedProgram):
    _warn_of_wasted_samples(plan, compiled.layout)
  worker = RolloutWorker(sampling, models, generate, frozen, prompt_fn, reward_fns, cfg.seed,
                         mesh)
  tracking_config = cfg.per_prompt_stat_tracking
  return Trainer(
      cfg=cfg, plan=plan, mesh=mesh, worker=worker, frozen_unet=frozen.unet,
      update=compiled, state=replicate(state, replicated),
      stat_tracker=None if tracking_config is None else advantages.PerPromptStatTracker(
          tracking_config.buffer_size, tracking_config.min_count),
      combiner=RewardCombiner(cfg.reward_weights) if cfg.reward_weights else None,
      watch=diagnostics.Watch(cfg))


def make_mesh(plan: BatchPlan) -> jax.sharding.Mesh:
  """The devices of all processes along one axis, "data"."""
  # In order of the processes, so that each has a run of consecutive samples.
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  return jax.sharding.Mesh(np.array(devices[:plan.num_devices]), (AXIS,))


def _warn_of_wasted_samples(plan: BatchPlan, layout: WorkLayout) -> None:
  wasted, sharing = layout.wasted_samples(plan.sample_batch_size), plan.devices_per_batch
  if wasted:
    say(f"Warning: sample.batch_size={plan.sample_batch_size * sharing} is not a multiple of "
        f"{layout.rows * sharing}, which train.batch_size and train.timesteps_per_batch make: with "
        f"each sampling batch {wasted * sharing} samples are computed and dropped")


def open_model(cfg: Config) -> LazyModel[StableDiffusion]:
  """The pretrained model in the dtype asked for; a hub's is downloaded."""
  dtype = DTYPES[cfg.mixed_precision]
  # What is trained is kept in float32, and so loses nothing by being read.
  with said_of("pretrained.model", cfg.pretrained.model):
    return open_pretrained(cfg.pretrained.model, cfg.pretrained.revision, dtype,
                           unet_dtype=dtype if cfg.use_lora else jnp.float32)


def load_models(cfg: Config) -> StableDiffusion:
  """The pretrained model, with a UNet that is ready to be partitioned."""
  models = open_model(cfg).read()
  prepare_unet(cfg, models.unet)
  return models


def make_schedule(cfg: Config, noise_schedule: NoiseSchedule) -> DDIMSchedule:
  """The sampler's steps.

  Raises:
    UserError: if the model's schedule has no such steps, or one without a density.
  """
  try:
    schedule = DDIMSchedule.create(noise_schedule, cfg.sample.num_steps)
    check_density(schedule, cfg.sample.eta)
  except UserError as error:
    raise UserError(f"sample.num_steps={cfg.sample.num_steps} with pretrained.model="
                    f"{cfg.pretrained.model!r}: {error}") from error
  return schedule


def prepare_unet(cfg: Config, unet: UNet2DConditionModel) -> UNet2DConditionModel:
  """Makes what training needs of a pretrained UNet, in place, and returns it."""
  unet.gradient_checkpointing = cfg.train.gradient_checkpointing
  if not cfg.use_lora:
    # What the optimizer changes stays float32; the network computes in its own dtype.
    weights = jax.tree.map(lambda w: w.astype(jnp.float32), nnx.state(unet))
    nnx.update(unet, weights)
    set_compute_dtype(unet, DTYPES[cfg.mixed_precision])
  elif cfg.lora.init_from:
    with said_of("lora.init_from", cfg.lora.init_from):
      lora.import_lora(unet, files.absolute(cfg.lora.init_from))
  else:
    key = jax.random.fold_in(jax.random.key(cfg.seed), rng_streams.LORA)
    lora.inject_lora(unet, cfg.lora.rank, key)
  return unet


def _with_actual_rank(cfg: Config, unet: UNet2DConditionModel) -> Config:
  """The config with the LoRA rank of the file that training starts from."""
  if not (cfg.use_lora and cfg.lora.init_from):
    return cfg
  rank = max(lora.ranks(unet))
  if rank != cfg.lora.rank:
    say(f"lora.init_from={cfg.lora.init_from!r}: its rank of {rank} is taken, not "
        f"lora.rank={cfg.lora.rank}")
  return dataclasses.replace(cfg, lora=dataclasses.replace(cfg.lora, rank=rank))


def _read_into_host_memory(model: LazyModel[StableDiffusion]) -> StableDiffusion:
  with host_memory():
    return model.read()


def make_generate_config(cfg: Config, plan: BatchPlan) -> GenerateConfig:
  return GenerateConfig(
      batch_size=plan.sample_batch_size, num_batches=cfg.sample.num_batches_per_epoch,
      guidance_scale=cfg.sample.guidance_scale, eta=cfg.sample.eta,
      samples_at_once=samples_at_once(plan.sample_batch_size),
      decode_batch_size=cfg.sample.decode_batch_size)


def make_update_config(cfg: Config, plan: BatchPlan) -> update.UpdateConfig:
  return update.UpdateConfig(
      batch_size=plan.train_batch_size,
      accumulation_steps=cfg.train.gradient_accumulation_steps,
      num_train_timesteps=plan.num_train_timesteps,
      timesteps_per_batch=cfg.train.timesteps_per_batch,
      guidance_scale=cfg.sample.guidance_scale, eta=cfg.sample.eta,
      clip_range=cfg.train.clip_range, adv_clip_max=cfg.train.adv_clip_max,
      loss_scaling=uses_loss_scaling(cfg))


def uses_loss_scaling(cfg: Config) -> bool:
  """Whether gradients could be too small for the numbers that they are computed in."""
  return cfg.mixed_precision == "fp16"


def uses_shared_program(cfg: Config) -> bool:
  """Whether sampler and update are one program, lest rounding moves ratios (docs/gpu.md)."""
  uses_tf32 = cfg.allow_tf32 and jax.default_backend() == "gpu"
  return cfg.train.recompute_log_probs and (cfg.mixed_precision != "no" or uses_tf32)


def compile_programs(cfg: Config, plan: BatchPlan, mesh: jax.sharding.Mesh,
                     schedule: DDIMSchedule, optimizer: optax.GradientTransformation,
                     shapes: StableDiffusion) -> tuple[update.Update | SharedProgram, Generate]:
  """Compiles the update and the sampler for arrays of the shapes that an epoch will have.

  Before anything is sampled, and not beside it: on a CPU both would use the same cores
  and hold memory at once; on a GPU the compiler times kernels, which nothing may disturb.

  `shapes` is the model as it is read, with shapes in the place of its weights.
  """
  unet = nnx.eval_shape(functools.partial(prepare_unet, cfg), shapes.unet)
  vae = nnx.clone(shapes.vae)
  vae.drop_encoder()
  graphdef, params, frozen_unet = lora.partition(unet, cfg.use_lora)
  config, sampling = make_update_config(cfg, plan), make_generate_config(cfg, plan)
  state = jax.eval_shape(
      lambda params: update.init_state(params, optimizer, config.loss_scaling), params)
  replicated = jax.NamedSharding(mesh, jax.P())
  on_all: Any = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)
  state = jax.tree.map(on_all, state)
  frozen = placed_shapes(FrozenModels(frozen_unet, nnx.state(vae)), replicated)
  embedding = on_all(embedding_shape(shapes.text_encoder))
  latent_shape = (*native_size(unet), unet.config.in_channels)
  if uses_shared_program(cfg):
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    epoch_sizes = cfg.sample.num_batches_per_epoch, plan.sample_batch_size
    program = SharedProgram(config, graphdef, schedule, optimizer, latent_shape, mesh,
                            epoch_sizes if first_gradient_bytes(cfg, plan, size) else None)
    program.compile(state, frozen.unet, embedding)
    return program, make_shared_generate(sampling, vae, program, mesh)
  key = jax.random.key(0)
  compiled = compile_ahead(
      update.make_update(config, graphdef, schedule, optimizer, mesh), state, frozen.unet,
      _batch_shapes(cfg, plan, mesh, latent_shape, embedding), key, jnp.int32(0))
  generate = compile_ahead(
      make_generate(sampling, vae, graphdef, schedule, mesh), state.params, frozen, embedding,
      *_prompt_shapes(plan, mesh, embedding), key)
  return compiled, generate


def may_sample_first_gradient(cfg: Config) -> bool:
  """Whether an epoch's first gradient may be computed while sampling: memory decides besides."""
  return (uses_shared_program(cfg) and cfg.train.gradient_while_sampling and cfg.use_lora
          and cfg.num_train_timesteps == cfg.sample.num_steps)


def first_gradient_bytes(cfg: Config, plan: BatchPlan, trained: int) -> int:
  """What gradients of single samples take on each device at most, 0 if there will be none.

  Args:
    cfg: the config.
    plan: its batches.
    trained: bytes of the trained weights.
  """
  samples = plan.train_batch_size_total // plan.num_devices
  # Of the step's samples; and of a microbatch's in a padded form, added up and to be added.
  gradients = samples + 3 * plan.train_batch_size * cfg.train.timesteps_per_batch
  size = gradients * trained
  return size if may_sample_first_gradient(cfg) and size <= _MOST_BYTES_OF_GRADIENTS else 0


def _prompt_shapes(plan: BatchPlan, mesh: jax.sharding.Mesh, embedding: Any) -> tuple[Any, Any]:
  """Of a sampling batch's embeddings and sample indices."""
  sharded = jax.NamedSharding(mesh, jax.P(AXIS))
  samples = plan.sample_batch_size * plan.num_devices
  return (jax.ShapeDtypeStruct((samples, *embedding.shape[1:]), embedding.dtype, sharding=sharded),
          jax.ShapeDtypeStruct((samples,), jnp.int32, sharding=sharded))


def _batch_shapes(cfg: Config, plan: BatchPlan, mesh: jax.sharding.Mesh,
                  latent_shape: tuple[int, ...], embedding: Any) -> Batch:
  """Of an epoch's samples."""
  sharded = jax.NamedSharding(mesh, jax.P(None, AXIS))
  samples = (cfg.sample.num_batches_per_epoch, plan.sample_batch_size * plan.num_devices)
  per_sample: Any = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(
      (*samples, *shape), dtype, sharding=sharded)
  return Batch(
      trajectory=Trajectory(latents=per_sample(cfg.sample.num_steps + 1, *latent_shape),
                            log_probs=per_sample(cfg.sample.num_steps)),
      text_embeddings=per_sample(*embedding.shape[1:], dtype=embedding.dtype),
      negative_embedding=embedding, advantages=per_sample())
