"""One optimizer step of DDPO, as one program over all devices.

Each device holds the trajectories that it sampled. A step scans over microbatches of
(sample, timestep) pairs, adds up the gradient of the trained weights, sums it over the
devices once, clips it and applies AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import enum
import functools
import math
from typing import Any

from flax import nnx
import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int, Key
import optax

from ddpo_jax import folding, ppo
from ddpo_jax.devices import AXIS, compiler_options, samples_at_once
from ddpo_jax.diffusion import DDIMSchedule, policy_step
from ddpo_jax.diffusion.ddim import guidance_context
from ddpo_jax.types import Batch, LossScale, TrainState

P = jax.sharding.PartitionSpec

Update = Callable[..., tuple[TrainState, "UpdateMetrics"]]  # see `make_update`
Program = Callable[..., tuple[TrainState, Float32[Array, "batches samples T"], "UpdateMetrics"]]

_INITIAL_LOSS_SCALE = 2.0**15
_LOSS_SCALE_PERIOD = 1000  # finite steps before the scale doubles
_LARGEST_PACKED = 2**18  # elements of a weight, see `_packing`


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
  """What the update needs to know; sizes are per device."""

  batch_size: int  # samples of one microbatch
  sample_batch_size: int  # samples of one sampling batch, a multiple of batch_size
  accumulation_steps: int  # microbatches of samples in one optimizer step
  num_train_timesteps: int  # of each sample's T
  timesteps_per_batch: int  # of one sample in the same microbatch; divides the above
  guidance_scale: float  # at most 1 for none
  eta: float
  clip_range: float
  adv_clip_max: float
  loss_scaling: bool  # for fp16
  recompute_log_probs: bool = False  # make a `RescoringUpdate`


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Microbatches:
  """Which (sample, step) pairs each microbatch trains on.

  In groups of the same samples: what depends on their prompts alone, the keys and values of
  attention, is computed once for a group.
  """

  sample: Int[Array, "groups b"]  # index into this device's samples
  step: Int[Array, "groups M b t"]  # index into the sample's T steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sums:
  """The scan's carry: added up over microbatches."""

  grads: Any  # of the weights, as `_packing` has them
  loss: Float32[Array, ""]
  approx_kl: Float32[Array, ""]
  clipfrac: Float32[Array, ""]
  ratio_drift: Float32[Array, ""]  # a maximum


class Mode(enum.IntEnum):
  """What a `RescoringUpdate`'s program does."""

  RESCORE = 0  # computes log-probabilities; the state stays as it is
  FIRST_STEP = 1  # an optimizer step whose own log-probabilities are the old ones too
  STEP = 2  # an optimizer step


@dataclasses.dataclass(frozen=True)
class RescoringUpdate:
  """An update that can replace the sampler's log-probabilities by its own.

  Where sampler and update round differently, half precision moves the ratio by as much as
  PPO's clip range. Even a forward pass alone is compiled otherwise than one that a backward
  pass follows. So both come from one program, whose backward pass is behind a condition:
  before the first optimizer step the ratio is 1 to the last bit.
  """

  program: Program  # (state, frozen, batch, key, index, mode [] int32)

  def __call__(self, state: TrainState, frozen: nnx.State, batch: Batch,
               key: Key[Array, ""], index: Int[Array, ""]) -> tuple[TrainState, UpdateMetrics]:
    state, _, metrics = self._run(Mode.STEP, state, frozen, batch, key, index)
    return state, metrics

  def first_step(self, state: TrainState, frozen: nnx.State, batch: Batch,
                 key: Key[Array, ""], index: Int[Array, ""]
                 ) -> tuple[TrainState, Batch, UpdateMetrics]:
    """An epoch's first optimizer step: its policy is the sampler's, and the ratio 1.

    It needs no `rescore`: what it computes are the log-probabilities under that policy.

    Returns:
      The state; the batch with those log-probabilities; the metrics, of which `ratio_drift`
      says how far those of the batch given were from them.
    """
    return self._run(Mode.FIRST_STEP, state, frozen, batch, key, index)

  def rescore(self, state: TrainState, frozen: nnx.State, batch: Batch,
              key: Key[Array, ""], index: Int[Array, ""]) -> tuple[TrainState, Batch]:
    """Replaces the log-probabilities that the update with these arguments will read.

    Returns:
      The state, unchanged but in other buffers (the one given is donated); the batch.
    """
    state, batch, _ = self._run(Mode.RESCORE, state, frozen, batch, key, index)
    return state, batch

  def _run(self, mode: Mode, state: TrainState, frozen: nnx.State, batch: Batch,
           key: Key[Array, ""], index: Int[Array, ""]
           ) -> tuple[TrainState, Batch, UpdateMetrics]:
    state, log_probs, metrics = self.program(state, frozen, batch, key, index,
                                             jnp.int32(mode))
    trajectory = dataclasses.replace(batch.trajectory, log_probs=log_probs)
    return state, dataclasses.replace(batch, trajectory=trajectory), metrics


def make_optimizer(learning_rate: float, beta1: float, beta2: float, weight_decay: float,
                   epsilon: float, max_grad_norm: float) -> optax.GradientTransformation:
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
  """Builds the jitted update.

  Args:
    config: sizes and coefficients.
    graphdef: of the UNet, from `lora.partition`.
    schedule: the sampler's.
    optimizer: from `make_optimizer`.
    mesh: one axis, "data".

  Returns:
    `update(state, frozen, batch, key, index) -> (state, metrics)`: the optimizer step
    number `index` ([] int32) of an inner epoch whose shuffle is drawn from `key`. The
    state given is donated. `batch` has its samples as [batches, samples of all devices,
    …], sharded over the second axis; all else is replicated. With
    `config.recompute_log_probs` it is a `RescoringUpdate`.
  """
  local = functools.partial(_update, config, graphdef, schedule, optimizer)
  specs: Any = {"trajectory": P(None, AXIS), "text_embeddings": P(None, AXIS),
                "negative_embedding": P(), "advantages": P(None, AXIS)}
  in_specs = (P(), P(), Batch(**specs), P(), P())
  jit = functools.partial(jax.jit, donate_argnums=0, compiler_options=compiler_options())
  if config.recompute_log_probs:
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(*in_specs, P()),
                           out_specs=(P(), P(None, AXIS), P()))
    return RescoringUpdate(jit(mapped))

  def update(*args) -> tuple[TrainState, UpdateMetrics]:
    state, _, metrics = local(*args)
    return state, metrics

  return jit(jax.shard_map(update, mesh=mesh, in_specs=in_specs, out_specs=(P(), P())))


def compile_for(update: Update, *arguments: Any) -> Update:
  """The update compiled for arguments of these shapes, which may be abstract."""
  if isinstance(update, RescoringUpdate):
    program: Any = update.program
    compiled = program.lower(*arguments, jnp.int32(Mode.RESCORE)).compile()
    return dataclasses.replace(update, program=compiled)
  program = update
  return program.lower(*arguments).compile()


def _update(config: UpdateConfig, graphdef: nnx.GraphDef, schedule: DDIMSchedule,
            optimizer: optax.GradientTransformation, state: TrainState,
            frozen: nnx.State, batch: Batch, key: Key[Array, ""], index: Int[Array, ""],
            mode: Int[Array, ""] | None = None
            ) -> tuple[TrainState, Float32[Array, "batches samples T"], UpdateMetrics]:
  """The program of one device; `mode` is a `Mode`, or None for an optimizer step.

  Returns:
    The state; the log-probabilities, those of the microbatches computed anew; the
    metrics.
  """
  shape = batch.trajectory.log_probs.shape
  microbatches = _split(choose_microbatches(config, schedule.num_steps, shape[0], shape[1],
                                            key, index), batch.text_embeddings.dtype)
  batch = flatten_samples(batch)
  grads, metrics, log_probs = accumulate_gradients(
      config, graphdef, schedule, state, frozen, batch, microbatches, mode)
  sample = microbatches.sample[:, None, :, None]
  log_probs = batch.trajectory.log_probs.at[sample, microbatches.step].set(log_probs)
  log_probs = log_probs.reshape(shape)
  finite = jnp.isfinite(metrics.grad_norm) & jnp.isfinite(metrics.loss)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  stepped = TrainState(params=optax.apply_updates(state.params, updates),
                       opt_state=opt_state, step=state.step + 1,
                       loss_scale=state.loss_scale)
  train = True if mode is None else mode != Mode.RESCORE
  taken = finite & train
  stepped = jax.tree.map(lambda new, old: jnp.where(taken, new, old), stepped, state)
  if config.loss_scaling:
    adjusted = jax.tree.map(lambda new, old: jnp.where(train, new, old),
                            _next_loss_scale(state.loss_scale, finite), state.loss_scale)
    stepped = dataclasses.replace(stepped, loss_scale=adjusted)
  skipped = 1.0 - finite.astype(jnp.float32)
  return stepped, log_probs, dataclasses.replace(metrics, skipped=skipped)


def choose_microbatches(config: UpdateConfig, num_steps: int, batches: int, samples: int,
                        key: Key[Array, ""], index: Int[Array, ""]) -> Microbatches:
  """Draws the microbatches of optimizer step `index` from the inner epoch's shuffle.

  Samples never leave the device that drew them. So the epoch is laid out as a matrix:
  a column for each slot of the training batch over all devices, and each column is
  shuffled by itself. Devices own columns; the layout, and with it the samples of each
  optimizer step, is the same however many devices share the columns.
  """
  per_slot = config.sample_batch_size // config.batch_size  # samples of a batch in a column
  first_column = jax.lax.axis_index(AXIS) * config.batch_size
  sample_key, time_key = jax.random.split(key)
  del key

  def column(slot: jax.Array) -> jax.Array:  # -> [accumulation_steps] local samples
    order = jax.random.permutation(
        jax.random.fold_in(sample_key, first_column + slot), batches * per_slot)
    rows = jax.lax.dynamic_slice_in_dim(order, index * config.accumulation_steps,
                                        config.accumulation_steps)
    return rows // per_slot * samples + slot * per_slot + rows % per_slot

  def timesteps(sample: jax.Array) -> jax.Array:  # -> [num_train_timesteps]
    batch, position = sample // samples, sample % samples
    position += jax.lax.axis_index(AXIS) * samples
    everywhere = batch * samples * jax.lax.axis_size(AXIS) + position
    order = jax.random.permutation(jax.random.fold_in(time_key, everywhere), num_steps)
    return order[:config.num_train_timesteps]

  chosen = jax.vmap(column, out_axes=1)(jnp.arange(config.batch_size))
  steps = jax.vmap(jax.vmap(timesteps))(chosen)  # [accumulation, batch, timesteps]
  steps = steps.reshape(*chosen.shape, -1, config.timesteps_per_batch)
  return Microbatches(sample=chosen.astype(jnp.int32),
                      step=steps.transpose(0, 2, 1, 3).astype(jnp.int32))


def _split(microbatches: Microbatches, dtype: DTypeLike) -> Microbatches:
  """As large as a CPU is quick with; the gradient of their mean loss is the same.

  In float32 with as many steps of the same sample as fit: attention's products over its
  prompt are fewer and larger then. Half precision would round otherwise than the sampler.
  """
  if jax.default_backend() != "cpu":
    return microbatches
  groups, count, samples, together = microbatches.step.shape
  size = samples_at_once(samples * together)
  steps_each = math.gcd(count * together if dtype == jnp.float32 else together, size)
  samples_each = size // steps_each
  steps = microbatches.step.swapaxes(1, 2).reshape(groups, -1, samples_each,
                                                   count * together // steps_each, steps_each)
  steps = steps.swapaxes(2, 3)
  return Microbatches(sample=microbatches.sample.reshape(-1, samples_each),
                      step=steps.reshape(-1, *steps.shape[2:]))


def flatten_samples(batch: Batch) -> Batch:
  """[batches, samples, …] -> [batches · samples, …] on this device."""
  return _map_samples(lambda x: x.reshape(-1, *x.shape[2:]), batch)


def take_samples(batch: Batch, sample: Int[Array, " b"]) -> Batch:
  """Those of a flat batch that `sample` says."""
  return _map_samples(lambda x: x[sample], batch)


def _map_samples(function: Callable[[jax.Array], jax.Array], batch: Batch) -> Batch:
  """Of everything that there is one of for each sample."""
  trajectory, text_embeddings, advantages = jax.tree.map(
      function, (batch.trajectory, batch.text_embeddings, batch.advantages))
  return Batch(trajectory, text_embeddings, batch.negative_embedding, advantages)


def accumulate_gradients(config: UpdateConfig, graphdef: nnx.GraphDef,
                         schedule: DDIMSchedule, state: TrainState, frozen: nnx.State,
                         batch: Batch, microbatches: Microbatches,
                         mode: Int[Array, ""] | None = None
                         ) -> tuple[nnx.State, UpdateMetrics, Float32[Array, "groups M b t"]]:
  """The gradient of the mean loss over all microbatches of all devices.

  Args:
    config: sizes and coefficients.
    graphdef: of the UNet.
    schedule: the sampler's.
    state: the policy, and the loss scale.
    frozen: the UNet's other weights.
    batch: this device's samples, flat.
    microbatches: this device's.
    mode: a `Mode`, or None for an optimizer step. To rescore there is no backward pass,
      and the gradient is 0.

  Returns:
    The gradient, the metrics, and this device's log-probabilities.
  """
  scale = state.loss_scale.scale
  # Marked as differing between devices, so that the backward pass does not sum each
  # microbatch's gradient over them: that is done once, below.
  params, frozen = jax.lax.pcast((state.params, frozen), AXIS, to="varying")
  # Gradients are summed for the weights that the network computes with, and pulled back to
  # those that these come from once: for all prompts, and for those of each group.
  folded_weights, pullback = _fold(folding.fold_weights, (graphdef, params, frozen))
  unet = folding.round_lora(*folded_weights)
  pack, unpack = _packing(folded_weights[1])

  def add_group(sums: _Sums, group: Microbatches) -> tuple[_Sums, Float32[Array, "M b t"]]:
    samples = take_samples(batch, group.sample)
    context = guidance_context(samples.text_embeddings, samples.negative_embedding,
                               config.guidance_scale)
    (graphdef, weights, rest), prompts_pullback = _fold(
        functools.partial(folding.fold_prompts, context=context), unet)

    def loss_fn(weights: nnx.State, step: Int[Array, "b t"]):
      loss, info, log_prob = microbatch_loss(
          config, nnx.merge(graphdef, weights, rest), schedule, samples, step, mode)
      return loss * scale, (loss, info, log_prob)

    folded = graphdef != unet[0]  # else the sums go on, without another gradient's memory
    start = sums
    if folded:
      start = dataclasses.replace(sums, grads=jax.tree.map(jnp.zeros_like, weights))
    summed, log_probs = jax.lax.scan(
        functools.partial(_add_microbatch, loss_fn, weights, pack, mode), start, group.step)
    if folded:
      grads = jax.tree.map(jnp.add, sums.grads, prompts_pullback(summed.grads)[0])
      summed = dataclasses.replace(summed, grads=grads)
    return summed, log_probs

  zero = jax.lax.pcast(jnp.float32(0), AXIS, to="varying")
  start = _Sums(grads=jax.tree.map(jnp.zeros_like, pack(folded_weights[1])), loss=zero,
                approx_kl=zero, clipfrac=zero, ratio_drift=zero)
  sums, log_probs = jax.lax.scan(add_group, start, microbatches)
  (grads,) = pullback(unpack(sums.grads))
  grads, metrics = _mean(dataclasses.replace(sums, grads=grads),
                         log_probs.shape[0] * log_probs.shape[1], scale)
  return grads, metrics, log_probs


def _fold(fold: Callable[..., folding.Split], unet: folding.Split
          ) -> tuple[folding.Split, Callable[[nnx.State], tuple[nnx.State]]]:
  """The folded network, and what takes its weights' gradient to those of the one given."""
  graphdef, trained, frozen = unet

  def split(trained: nnx.State) -> tuple[nnx.State, tuple[nnx.GraphDef, nnx.State]]:
    folded, weights, rest = fold(graphdef, trained, frozen)
    return weights, (folded, rest)

  weights, pullback, (folded, rest) = jax.vjp(split, trained, has_aux=True)
  return (folded, weights, rest), pullback


def _packing(weights: nnx.State) -> tuple[Callable[[nnx.State], Any],
                                         Callable[[Any], nnx.State]]:
  """How gradients are added up, and how to get them back.

  Those of small weights as one vector on a GPU, where each addition is a kernel of its own,
  and LoRA's for Stable Diffusion are 224.
  """
  small = all(weight.size <= _LARGEST_PACKED for weight in jax.tree.leaves(weights))
  if jax.default_backend() == "cpu" or not small:
    return lambda grads: grads, lambda grads: grads
  return lambda grads: ravel_pytree(grads)[0], ravel_pytree(weights)[1]


def _add_microbatch(loss_fn: Callable[..., Any], weights: nnx.State,
                    pack: Callable[[nnx.State], Any], mode: Int[Array, ""] | None,
                    sums: _Sums, step: Int[Array, "b t"]
                    ) -> tuple[_Sums, Float32[Array, "b t"]]:
  """Adds a microbatch's gradient and metrics; also returns its log-probabilities."""
  scaled, backward, (loss, info, log_prob) = jax.vjp(
      lambda weights: loss_fn(weights, step), weights, has_aux=True)
  gradient = lambda backward: pack(backward(jnp.ones_like(scaled))[0])
  if mode is None:
    grads = gradient(backward)
  else:
    grads = jax.lax.cond(mode != Mode.RESCORE, gradient,
                         lambda _: jax.tree.map(jnp.zeros_like, pack(weights)), backward)
  return _Sums(grads=jax.tree.map(jnp.add, sums.grads, grads),
               loss=sums.loss + loss,
               approx_kl=sums.approx_kl + info.approx_kl,
               clipfrac=sums.clipfrac + info.clipfrac,
               ratio_drift=jnp.maximum(sums.ratio_drift, info.ratio_drift)), log_prob


def microbatch_loss(config: UpdateConfig, unet: nnx.Module, schedule: DDIMSchedule,
                    samples: Batch, step: Int[Array, "b t"],
                    mode: Int[Array, ""] | None = None
                    ) -> tuple[Float32[Array, ""], ppo.PPOInfo, Float32[Array, "b t"]]:
  """PPO's loss at t steps of each of b samples, what it logs, and the log-probabilities."""
  latents, each = samples.trajectory.latents, jnp.arange(len(step))[:, None]
  pairs = lambda x: x.reshape(step.size, *x.shape[2:])  # a sample's steps in a row
  text_embeddings = samples.text_embeddings
  if mode is not None:  # the sampler's shapes, see `rounding`
    text_embeddings = jnp.repeat(text_embeddings, step.shape[1], axis=0)
  _, log_prob = policy_step(
      unet, schedule, pairs(step), pairs(latents[each, step]), text_embeddings,
      samples.negative_embedding, guidance_scale=config.guidance_scale, eta=config.eta,
      prev_latents=pairs(latents[each, step + 1]))
  log_prob = log_prob.reshape(step.shape)
  given = old_log_prob = samples.trajectory.log_probs[each, step]
  if mode is not None:
    old_log_prob = jnp.where(mode == Mode.FIRST_STEP, jax.lax.stop_gradient(log_prob), given)
  advantages = jnp.broadcast_to(samples.advantages[:, None], step.shape)
  loss, info = ppo.ppo_loss(log_prob, old_log_prob, advantages, config.clip_range,
                            config.adv_clip_max)
  drift = jnp.max(ppo.ratio_deviation(log_prob, given))
  return loss, dataclasses.replace(info, ratio_drift=drift), log_prob


def _mean(sums: _Sums, microbatches: int, scale: Float32[Array, ""]
          ) -> tuple[nnx.State, UpdateMetrics]:
  """What each device added up -> the mean gradient, unscaled, and the metrics."""
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
