"""One optimizer step of DDPO (arXiv:2305.13301, algorithm 1 with importance sampling).

Each device holds the trajectories that it sampled. A step loops over microbatches of
(sample, timestep) pairs, adds up the gradient of the trained weights, sums it over the
devices once, clips it and applies AdamW. `make_update` does that in one program.
Where rounding could move ratios by as much as the clip range, `shared_program.py` takes its place,
which chooses, scores and averages by this module's and PPO's functions.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, Protocol

from flax import nnx
import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float32, Int, Key
import numpy as np
import optax

from ddpo_jax import hoisting, ppo
from ddpo_jax.compilation import compiler_options
from ddpo_jax.devices import AXIS, samples_at_once, varying
from ddpo_jax.diffusion import DDIMSchedule, policy_step
from ddpo_jax.diffusion.ddim import guidance_context
from ddpo_jax.lora import Split
from ddpo_jax.types import Batch, LossScale, TrainState

_BY_SAMPLE: Any = jax.P(None, AXIS)
_EVERYWHERE: Any = jax.P()
BATCH_SPECS = Batch(trajectory=_BY_SAMPLE, text_embeddings=_BY_SAMPLE,
                    negative_embedding=_EVERYWHERE, advantages=_BY_SAMPLE)

_INITIAL_LOSS_SCALE = 2.0**15
_LOSS_SCALE_PERIOD = 1000  # finite steps before the scale doubles
_LARGEST_PACKED = 2**22  # elements of a weight, see `packing`


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
  """What the update needs to know; sizes are per device."""

  batch_size: int  # samples of one microbatch
  accumulation_steps: int  # microbatches of samples in one optimizer step
  num_train_timesteps: int  # of each sample's T
  timesteps_per_batch: int  # of one sample in the same microbatch; divides the above
  guidance_scale: float  # at most 1 for none
  eta: float
  clip_range: float
  adv_clip_max: float
  loss_scaling: bool  # for fp16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpdateMetrics:
  """Over all microbatches of one optimizer step, on all devices."""

  loss: Float32[Array, ""]
  approx_kl: Float32[Array, ""]
  clipfrac: Float32[Array, ""]
  ratio_drift: Float32[Array, ""]  # largest |ratio − 1| to the log-probabilities given
  grad_norm: Float32[Array, ""]  # before clipping
  skipped: Float32[Array, ""]  # 1 if loss or gradient was not finite and nothing was applied


class Update(Protocol):
  """A compiled optimizer step, see `make_update`."""

  def __call__(self, state: TrainState, frozen: nnx.State, batch: Batch, key: Key[Array, ""],
               index: Int[Array, ""]) -> tuple[TrainState, UpdateMetrics]:
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Microbatches:
  """Which (sample, step) pairs each microbatch trains on.

  The M microbatches of a group have the same b samples, t of whose steps each of them visits.
  So what depends on their prompts alone, attention's keys and values, can be computed once for
  the group.
  """

  sample: Int[Array, "groups b"]  # index into this device's samples
  step: Int[Array, "groups M b t"]  # index into the sample's T steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
  """What one device adds up over microbatches."""

  grads: Any  # of the hoisted weights, as `packing` has them, or of the trained ones
  loss: Float32[Array, ""]
  approx_kl: Float32[Array, ""]
  clipfrac: Float32[Array, ""]
  ratio_drift: Float32[Array, ""]  # not a sum: the largest so far

  @classmethod
  def zero(cls, grads: Any) -> Sums:
    """The sums of no microbatch, with gradients of the same shapes as `grads`."""
    zero = varying(jnp.float32(0))
    return cls(jax.tree.map(jnp.zeros_like, grads), zero, zero, zero, zero)

  def add(self, loss: jax.Array, info: ppo.PPOInfo, summed_grads: Any) -> Sums:
    """Adds a microbatch; `summed_grads` is `self.grads` and its gradient, added already."""
    return Sums(grads=summed_grads, loss=self.loss + loss,
                approx_kl=self.approx_kl + info.approx_kl,
                clipfrac=self.clipfrac + info.clipfrac,
                ratio_drift=jnp.maximum(self.ratio_drift, info.ratio_drift))


def make_optimizer(learning_rate: float, *, beta1: float = 0.9, beta2: float = 0.999,
                   weight_decay: float = 1e-4, epsilon: float = 1e-8,
                   max_grad_norm: float = 1.0) -> optax.GradientTransformation:
  """AdamW (arXiv:1711.05101) behind clipping by the global norm."""
  return optax.chain(
      optax.clip_by_global_norm(max_grad_norm),
      optax.adamw(learning_rate, b1=beta1, b2=beta2, eps=epsilon,
                  weight_decay=weight_decay))


def init_state(params: nnx.State, optimizer: optax.GradientTransformation,
               loss_scaling: bool) -> TrainState:
  """A train state before its first step."""
  scale = _INITIAL_LOSS_SCALE if loss_scaling else 1.0
  return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0),
                    loss_scale=LossScale(jnp.float32(scale), jnp.int32(0)))


def make_update(config: UpdateConfig, graphdef: nnx.GraphDef, schedule: DDIMSchedule,
                optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
                ) -> Update:
  """Builds the jitted update for a UNet's graphdef, from `lora.partition`.

  Returns:
    `update(state, frozen, batch, key, index) -> (state, metrics)`: the optimizer step
    number `index` ([] int32) of an inner epoch whose shuffle is drawn from `key`. The
    state given is donated. `batch` has its samples as [batches, samples of all devices,
    …], sharded over the second axis; all else is replicated.
  """
  local = functools.partial(_update, config, graphdef, schedule, optimizer)
  mapped = jax.shard_map(
      local, mesh=mesh, out_specs=_EVERYWHERE,
      in_specs=(_EVERYWHERE, _EVERYWHERE, BATCH_SPECS, _EVERYWHERE, _EVERYWHERE))
  return jax.jit(mapped, donate_argnums=0, compiler_options=compiler_options())


def _update(config: UpdateConfig, graphdef: nnx.GraphDef, schedule: DDIMSchedule,
            optimizer: optax.GradientTransformation, state: TrainState,
            frozen: nnx.State, batch: Batch, key: Key[Array, ""], index: Int[Array, ""]
            ) -> tuple[TrainState, UpdateMetrics]:
  """The part of `make_update`'s program that runs on each device."""
  batches, samples = batch.advantages.shape
  microbatches = choose_microbatches(config, schedule.num_steps, batches, samples, key, index)
  microbatches = _resize_for_cpu(microbatches, batch.text_embeddings.dtype)
  grads, metrics = accumulate_gradients(
      config, graphdef, schedule, state, frozen, flatten_samples(batch), microbatches)
  return take_step(config, optimizer, state, grads, metrics)


def take_step(config: UpdateConfig, optimizer: optax.GradientTransformation,
              state: TrainState, grads: nnx.State, metrics: UpdateMetrics
              ) -> tuple[TrainState, UpdateMetrics]:
  """Takes the optimizer's step, unless loss or gradient is not finite."""
  finite = jnp.isfinite(metrics.grad_norm) & jnp.isfinite(metrics.loss)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  stepped = TrainState(params=optax.apply_updates(state.params, updates),
                       opt_state=opt_state, step=state.step + 1,
                       loss_scale=state.loss_scale)
  stepped = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
  if config.loss_scaling:
    stepped = dataclasses.replace(stepped,
                                  loss_scale=_next_loss_scale(state.loss_scale, finite))
  return stepped, dataclasses.replace(metrics, skipped=1.0 - finite.astype(jnp.float32))


def choose_microbatches(config: UpdateConfig, num_steps: int, batches: int, samples: int,
                        key: Key[Array, ""], index: Int[Array, ""],
                        in_order: Bool[Array, ""] | bool = False) -> Microbatches:
  """Draws the microbatches of optimizer step `index` from the inner epoch's shuffle.

  Samples never leave the device that drew them. So the epoch is laid out as a matrix: a column
  for each sample of an optimizer step, a row for each step of the inner epoch, and each column
  is shuffled by itself. Devices own columns, and so do the slots of their microbatches: each
  optimizer step has the same samples, however many devices and microbatches share them, as long as
  the epoch has as many batches.

  With `in_order` columns are not shuffled, and the samples of a step known before they are drawn.
  They are independent and alike, so in an epoch's first inner epoch that is as good a shuffle.
  """
  columns = config.batch_size * config.accumulation_steps
  rows = batches * samples // columns
  first_column = jax.lax.axis_index(AXIS) * columns
  sample_key, time_key = jax.random.split(key)
  del key

  layout = jnp.asarray(lay_out_columns(columns, batches, samples))

  def draw(column: jax.Array) -> jax.Array:  # -> a local sample
    order = jax.random.permutation(jax.random.fold_in(sample_key, first_column + column), rows)
    return layout[column, jnp.where(in_order, index, order[index])]

  def timesteps(sample: jax.Array) -> jax.Array:  # -> [num_train_timesteps]
    batch, place = sample // samples, sample % samples
    place += jax.lax.axis_index(AXIS) * samples
    global_index = batch * samples * jax.lax.axis_size(AXIS) + place
    order = jax.random.permutation(jax.random.fold_in(time_key, global_index), num_steps)
    return order[:config.num_train_timesteps]

  # A slot's columns follow each other, so that its samples follow each other in their batches:
  # the shared program has them in the same slot when it samples.
  chosen = jax.vmap(draw)(jnp.arange(columns)).reshape(config.batch_size, -1).T
  steps = jax.vmap(jax.vmap(timesteps))(chosen)  # [accumulation, batch, timesteps]
  steps = steps.reshape(*chosen.shape, -1, config.timesteps_per_batch)
  return Microbatches(sample=chosen.astype(jnp.int32),
                      step=steps.transpose(0, 2, 1, 3).astype(jnp.int32))


def lay_out_columns(columns: int, batches: int, samples: int) -> Int[np.ndarray, "columns rows"]:
  """Which of a device's samples, numbered batch by batch, each column of the shuffle has.

  Of two batches, of samples 0 to 3 and 4 to 7, and four columns, these are 0 and 4, 1 and 5,
  2 and 6, 3 and 7.
  """
  place, batch = np.divmod(np.arange(batches * samples, dtype=np.int32), batches)
  return (batch * samples + place).reshape(columns, -1)


def _resize_for_cpu(microbatches: Microbatches, dtype: DTypeLike) -> Microbatches:
  """On a CPU, regroups microbatches to the size that is fastest; the mean gradient is unchanged.

  In float32 it also puts as many steps of the same sample together as fit: attention's matmuls
  over the prompt are fewer and larger then. In half precision they stay as they are, to be
  rounded as the sampler rounds.
  """
  if jax.default_backend() != "cpu":
    return microbatches
  _, count, samples, together = microbatches.step.shape  # [groups, M, b, t]
  size = samples_at_once(samples * together)  # pairs of a new microbatch, b'·t'
  steps_each = math.gcd(count * together if dtype == jnp.float32 else together, size)
  samples_each = size // steps_each
  steps = microbatches.step.swapaxes(1, 2)  # [groups, b, M, t]
  steps = steps.reshape(-1, samples_each, count * together // steps_each, steps_each)
  return Microbatches(sample=microbatches.sample.reshape(-1, samples_each),
                      step=steps.swapaxes(1, 2))  # [groups·b/b', M', b', t']


def flatten_samples(batch: Batch) -> Batch:
  """[batches, samples, …] -> [batches · samples, …] on this device."""
  return _map_samples(lambda x: x.reshape(-1, *x.shape[2:]), batch)


def take_samples(batch: Batch, sample: Int[Array, " b"]) -> Batch:
  """Selects samples of a flat batch by their index."""
  return _map_samples(lambda x: x[sample], batch)


def _map_samples(function: Callable[[jax.Array], jax.Array], batch: Batch) -> Batch:
  """Applies `function` to every array of the batch that has an entry for each sample."""
  trajectory, text_embeddings, advantages = jax.tree.map(
      function, (batch.trajectory, batch.text_embeddings, batch.advantages))
  return Batch(trajectory, text_embeddings, batch.negative_embedding, advantages)


def accumulate_gradients(config: UpdateConfig, graphdef: nnx.GraphDef,
                         schedule: DDIMSchedule, state: TrainState, frozen: nnx.State,
                         batch: Batch, microbatches: Microbatches
                         ) -> tuple[nnx.State, UpdateMetrics]:
  """Computes the gradient of the mean loss over all microbatches of all devices.

  `batch` has this device's samples, flat, and `microbatches` says how it visits them.

  Returns:
    The gradient, and the metrics without `skipped`.
  """
  scale = state.loss_scale.scale
  params, frozen = varying((state.params, frozen))
  # The network computes with weights that are derived from the trained ones. Gradients are
  # added up for the derived weights, and pulled back to the trained ones once.
  hoisted, pullback = hoisting.with_pullback(hoisting.hoist_weights,
                                             Split(graphdef, params, frozen))
  unet = hoisting.cast_lora(hoisted)
  pack, unpack = packing(hoisted.trained)

  def add_group(sums: Sums, group: Microbatches) -> tuple[Sums, None]:
    samples = take_samples(batch, group.sample)
    return _add_group(config, schedule, unet, scale, pack, samples, group.step, sums), None

  sums, _ = jax.lax.scan(add_group, Sums.zero(pack(hoisted.trained)), microbatches)
  (grads,) = pullback(unpack(sums.grads))
  groups, in_group = microbatches.step.shape[:2]
  return average(dataclasses.replace(sums, grads=grads), groups * in_group, scale)


def _add_group(config: UpdateConfig, schedule: DDIMSchedule, unet: Split,
               scale: Float32[Array, ""], pack: Callable[[nnx.State], Any], samples: Batch,
               steps: Int[Array, "M b t"], sums: Sums) -> Sums:
  """Adds the M microbatches of a group, which have the same samples; see `Microbatches`."""
  context = guidance_context(samples.text_embeddings, samples.negative_embedding,
                             config.guidance_scale)
  (graphdef, weights, rest), pullback = hoisting.with_pullback(
      functools.partial(hoisting.hoist_prompts, context=context), unet)

  def loss_fn(weights: nnx.State, step: Int[Array, "b t"]):
    loss, info = microbatch_loss(
        config, nnx.merge(graphdef, weights, rest), schedule, samples, step)
    return loss * scale, (loss, info)

  def add_microbatch(sums: Sums, step: Int[Array, "b t"]) -> tuple[Sums, None]:
    (_, (loss, info)), grads = jax.value_and_grad(loss_fn, has_aux=True)(weights, step)
    return sums.add(loss, info, jax.tree.map(jnp.add, sums.grads, pack(grads))), None

  if graphdef == unet.graphdef:  # nothing was hoisted
    return jax.lax.scan(add_microbatch, sums, steps)[0]
  # The gradient of keys and values has another structure: it is summed by itself, and pulled
  # back once.
  before = sums.grads
  sums = dataclasses.replace(sums, grads=jax.tree.map(jnp.zeros_like, weights))
  sums, _ = jax.lax.scan(add_microbatch, sums, steps)
  grads = jax.tree.map(jnp.add, before, pullback(sums.grads)[0])
  return dataclasses.replace(sums, grads=grads)


def packing(weights: nnx.State) -> tuple[Callable[[nnx.State], Any],
                                         Callable[[Any], nnx.State]]:
  """Chooses the form in which gradients are added up.

  On a GPU those of small weights are concatenated into one vector: each addition is a kernel
  of its own there, and LoRA for Stable Diffusion has 193 weights once it is hoisted.

  Returns:
    `pack(grads)`, and its inverse `unpack`.
  """
  small = all(weight.size <= _LARGEST_PACKED for weight in jax.tree.leaves(weights))
  if jax.default_backend() == "cpu" or not small:
    return lambda grads: grads, lambda grads: grads
  return lambda grads: ravel_pytree(grads)[0], ravel_pytree(weights)[1]


def microbatch_loss(config: UpdateConfig, unet: nnx.Module, schedule: DDIMSchedule,
                    samples: Batch, step: Int[Array, "b t"]
                    ) -> tuple[Float32[Array, ""], ppo.PPOInfo]:
  """PPO's mean loss over t steps of each of b samples, and its metrics."""
  latents, each = samples.trajectory.latents, jnp.arange(len(step))[:, None]
  pairs = lambda x: x.reshape(step.size, *x.shape[2:])  # a sample's steps in a row
  _, log_prob = policy_step(
      unet, schedule, pairs(step), pairs(latents[each, step]), samples.text_embeddings,
      samples.negative_embedding, guidance_scale=config.guidance_scale, eta=config.eta,
      prev_latents=pairs(latents[each, step + 1]))
  log_prob = log_prob.reshape(step.shape)
  old_log_prob = samples.trajectory.log_probs[each, step]
  advantages = jnp.broadcast_to(samples.advantages[:, None], step.shape)
  return ppo.ppo_loss(log_prob, old_log_prob, advantages, config.clip_range, config.adv_clip_max)


def average(sums: Sums, microbatches: int, scale: Float32[Array, ""]
            ) -> tuple[nnx.State, UpdateMetrics]:
  """Sums over devices, and divides by the number of microbatches and by the loss scale.

  Args:
    sums: of this device.
    microbatches: how many it added up.
    scale: that the loss was multiplied by.

  Returns:
    The mean gradient, and the metrics without `skipped`.
  """
  count = microbatches * jax.lax.axis_size(AXIS)
  total = jax.lax.psum((sums.grads, sums.loss, sums.approx_kl, sums.clipfrac), AXIS)
  grads, loss, approx_kl, clipfrac = jax.tree.map(lambda x: x / count, total)
  grads = jax.tree.map(lambda x: x / scale, grads)
  return grads, UpdateMetrics(
      loss=loss, approx_kl=approx_kl, clipfrac=clipfrac,
      ratio_drift=jax.lax.pmax(sums.ratio_drift, AXIS),
      grad_norm=optax.tree.norm(grads), skipped=jnp.float32(0))


def _next_loss_scale(loss_scale: LossScale, finite: jax.Array) -> LossScale:
  """Halves the scale after an overflow, doubles it after a long run without one."""
  good_steps = jnp.where(finite, loss_scale.good_steps + 1, 0)
  grow = good_steps >= _LOSS_SCALE_PERIOD
  factor = jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5)
  return LossScale(scale=jnp.maximum(loss_scale.scale * factor, 1.0),
                   good_steps=jnp.where(grow, 0, good_steps))
