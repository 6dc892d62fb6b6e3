"""Sampler and update as one compiled program, so that they round alike in half precision.

Two programs of the same network round differently: the compiler fuses and tunes each by itself.
In half precision one number in thousands then rounds the other way, a few layers later all of
them do, and the log-probabilities of the two differ by as much as PPO's clip range.

So the network is compiled once, in a loop over microbatches of (sample, step) pairs. The loop
either takes the steps or scores steps that were taken, and its backward pass is behind a
condition. An epoch's first ratio is then exactly 1, provided that the device's kernels are
deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import enum
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Key
import optax

from ddpo_jax import hoisting, ppo
from ddpo_jax.compilation import compile_ahead, compile_meanwhile, compiler_options
from ddpo_jax.devices import AXIS, samples_at_once, varying
from ddpo_jax.diffusion import DDIMSchedule
from ddpo_jax.diffusion.ddim import ddim_step, guided_prediction
from ddpo_jax.diffusion.sampler import draw_noise, sample_keys
from ddpo_jax.lora import Split
from ddpo_jax.parts import ceil_div
from ddpo_jax.types import Batch, TrainState, Trajectory
from ddpo_jax.update import (
  BATCH_SPECS,
  Sums,
  UpdateConfig,
  UpdateMetrics,
  average,
  choose_microbatches,
  flatten_samples,
  packing,
  take_step,
)


class Mode(enum.IntEnum):
  """What the program does with each (sample, step) pair."""

  SAMPLE = 0  # take the step: write the next latents and their log-probability
  SCORE = 1  # write the log-probability of the step that was taken
  FIRST_STEP = 2  # the same, and add up the gradient, with that log-probability as the old one
  STEP = 3  # add up the gradient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CommonInputs:
  """What is the same for all samples of a call."""

  params: nnx.State
  frozen: nnx.State
  negative_embedding: Float[Array, "1 L D"]  # of the empty prompt
  loss_scale: Float32[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
  """The samples of one call of the program, and the order in which it visits their steps.

  There is a row for each sample, here and in the `Trajectory` that goes with it. Pair p of
  microbatch m is step `step[m, p]` of the sample in row `row[m, p]`. Only the first microbatches,
  as many as the call says, are visited; rows beyond its samples are padding, and what is computed
  for them is dropped.
  """

  text_embeddings: Float[Array, "rows L D"]
  advantages: Float32[Array, " rows"]  # read by training only
  noise_key: Key[Array, " rows"]  # read by sampling only
  batch_index: Int[Array, " rows"]  # of the sample, in the flat batch; read by training only
  row: Int[Array, "microbatches pairs"]
  step: Int[Array, "microbatches pairs"]


_BY_ROW: Any = jax.P(AXIS)
_BY_PAIR: Any = jax.P(None, AXIS)
_WORK_SPECS = Work(text_embeddings=_BY_ROW, advantages=_BY_ROW, noise_key=_BY_ROW,
                   batch_index=_BY_ROW, row=_BY_PAIR, step=_BY_PAIR)


class SharedProgram:
  """The compiled program, as a sampler and as an update: `accumulate`, then `finish`.

  Arrays that its methods take and return are those of all devices.
  """

  def __init__(self, config: UpdateConfig, graphdef: nnx.GraphDef, schedule: DDIMSchedule,
               optimizer: optax.GradientTransformation, latent_shape: tuple[int, ...],
               mesh: jax.sharding.Mesh):
    """Builds the program; nothing is compiled yet.

    Args:
      config: of the update.
      graphdef: of the UNet, from `lora.partition`.
      schedule: the sampler's.
      optimizer: from `make_optimizer`.
      latent_shape: of a sample, (h, w, C).
      mesh: one axis, "data".
    """
    self._config, self._schedule, self._optimizer = config, schedule, optimizer
    self._graphdef, self._latent_shape, self._mesh = graphdef, latent_shape, mesh
    # On each device: pairs in a microbatch; rows, as many as training has samples in a
    # microbatch, rounded up so that sampling fills whole microbatches; and microbatches in a
    # group of the same samples.
    self._pairs = samples_at_once(config.batch_size * config.timesteps_per_batch)
    self._rows = ceil_div(config.batch_size, self._pairs) * self._pairs
    self._group_size = config.num_train_timesteps * config.batch_size // self._pairs
    by_batch, by_row, replicated = jax.P(None, AXIS), jax.P(AXIS), jax.P()
    # `_visit` is `_visit_on_device` mapped over the devices and compiled; so are the others.
    self._visit = self._jit(
        self._visit_on_device, (replicated, _WORK_SPECS, replicated, replicated, by_row, by_row),
        by_row, donate_argnums=(4, 5))
    self._zero_sums = self._jit(self._zero_sums_on_device, (replicated, replicated), by_row)
    self._lay_out_sampling = self._jit(
        self._lay_out_sampling_on_device, (by_row, by_row, replicated, replicated),
        (_WORK_SPECS, by_row))
    self._lay_out_training = self._jit(
        self._lay_out_training_on_device, (BATCH_SPECS, *[replicated] * 3), (_WORK_SPECS, by_row))
    self._keep_log_probs = self._jit(
        self._keep_log_probs_on_device, (by_batch, by_row, by_row), by_batch)
    self._largest = jax.jit(jnp.max, out_shardings=jax.NamedSharding(mesh, jax.P()))
    self._finish = self._jit(self._finish_on_device, (replicated, replicated, by_row), replicated,
                             donate_argnums=0)

  def _jit(self, function: Any, in_specs: Any, out_specs: Any, **options: Any) -> Any:
    mapped = jax.shard_map(function, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs)
    return jax.jit(mapped, compiler_options=compiler_options(), **options)

  def compile(self, state: Any, frozen: Any, embedding: Any) -> None:
    """Compiles the program for arrays like these.

    Args:
      state: shapes and shardings of the train state.
      frozen: those of the UNet's weights that are not trained.
      embedding: those of one prompt's embedding, [1, L, D].
    """
    rows = self._rows * self._mesh.size
    prompts = jax.ShapeDtypeStruct((rows, *embedding.shape[1:]), embedding.dtype)
    indices = jax.ShapeDtypeStruct((rows,), jnp.int32)
    key, number = jax.random.key(0), jax.ShapeDtypeStruct((), jnp.int32)
    work, trajectory = jax.eval_shape(self._lay_out_sampling, prompts, indices, key, number)
    sums = jax.eval_shape(self._zero_sums, state.params, frozen)
    scale: Any = jax.ShapeDtypeStruct((), jnp.float32)

    def placed(spec: jax.P, tree: Any) -> Any:
      sharding = jax.NamedSharding(self._mesh, spec)
      return jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    work, trajectory, sums, scale, number = jax.tree.map(
        placed, (_WORK_SPECS, jax.P(AXIS), jax.P(AXIS), jax.P(), jax.P()),
        (work, trajectory, sums, scale, number))
    common = CommonInputs(state.params, frozen, embedding, scale)
    self._visit = compile_ahead(self._visit, common, work, number, number, sums, trajectory)
    # Its kernels are not timed, so sampling may run beside it; on a CPU they would share cores.
    if jax.default_backend() != "cpu":
      self._finish = compile_meanwhile(self._finish, state, frozen, sums)

  def wasted_samples(self, batch_size: int) -> int:
    """How many samples each device computes in vain, to fill a sampling batch's last microbatch."""
    return -batch_size % self._pairs

  def sample(self, params: nnx.State, frozen: nnx.State,
             negative_embedding: Float[Array, "1 L D"],
             text_embeddings: Float[Array, "B L D"], sample_indices: Int[Array, " B"],
             key: Key[Array, ""]) -> list[Trajectory]:
    """Samples a batch, one microbatch of samples after the other.

    Args:
      params: the trained weights.
      frozen: the UNet's other weights.
      negative_embedding: of the empty prompt.
      text_embeddings: of the prompts, sharded over devices.
      sample_indices: in the epoch, sharded likewise; they decide each sample's noise.
      key: the epoch's.

    Returns:
      The trajectories in parts, for `join_parts`.
    """
    common = CommonInputs(params, frozen, negative_embedding, jnp.float32(1))
    sums, parts = self._zero_sums(params, frozen), []
    samples = len(sample_indices) // self._mesh.size
    count = self._num_parts(samples)
    for part in range(count):
      work, trajectory = self._lay_out_sampling(text_embeddings, sample_indices, key,
                                                jnp.int32(part))
      rows = ceil_div(samples - part, count)  # those after them are padding
      microbatches = ceil_div(rows, self._pairs)
      sums, trajectory = self._visit(
          common, work, jnp.int32(microbatches * self._schedule.num_steps),
          jnp.int32(Mode.SAMPLE), sums, trajectory)
      parts.append(trajectory)
    return parts

  def _num_parts(self, samples: int) -> int:
    """In how many parts a device's samples of a batch are denoised."""
    return ceil_div(samples, self._rows)

  def accumulate(self, mode: Mode, state: TrainState, frozen: nnx.State, batch: Batch,
                 key: Key[Array, ""], index: Int[Array, ""],
                 check_stop: Callable[[], None] = lambda: None) -> tuple[Sums, Batch]:
    """Visits all pairs of an optimizer step; the arguments are those of `update.make_update`.

    Args:
      mode: any but `Mode.SAMPLE`.
      state: read, and not changed.
      frozen: the UNet's other weights.
      batch: the epoch's.
      key: of the inner epoch's shuffle.
      index: of the step in the inner epoch.
      check_stop: called before each group of microbatches; may raise to stop.

    Returns:
      What `finish` is to be given, and the batch with the log-probabilities that the mode writes.
    """
    common = CommonInputs(state.params, frozen, batch.negative_embedding,
                          state.loss_scale.scale)
    sums, log_probs = self._zero_sums(state.params, frozen), batch.trajectory.log_probs
    before = log_probs
    for group in map(jnp.int32, range(self._config.accumulation_steps)):
      check_stop()
      work, trajectory = self._lay_out_training(batch, key, index, group)
      sums, trajectory = self._visit(common, work, jnp.int32(self._group_size),
                                     jnp.int32(mode), sums, trajectory)
      if mode != Mode.STEP:
        log_probs = self._keep_log_probs(log_probs, trajectory.log_probs, work.batch_index)
      # One group ahead of the device at most, so that there is something left to stop.
      jax.block_until_ready(before)
      before = trajectory.log_probs
    trajectory = dataclasses.replace(batch.trajectory, log_probs=log_probs)
    return sums, dataclasses.replace(batch, trajectory=trajectory)

  def finish(self, state: TrainState, frozen: nnx.State, sums: Sums
             ) -> tuple[TrainState, UpdateMetrics]:
    """Takes the optimizer step for which `accumulate` has added up; the state is donated."""
    return self._finish(state, frozen, sums)

  def largest_drift(self, sums: Sums) -> Float32[Array, ""]:
    """Over all devices: how far from 1 the ratio to the log-probabilities given was at most."""
    return self._largest(sums.ratio_drift)

  # What follows runs on each device: arrays are one device's.

  def _visit_on_device(self, common: CommonInputs, work: Work, count: Int[Array, ""],
                       mode: Int[Array, ""], sums: Sums, trajectory: Trajectory
                       ) -> tuple[Sums, Trajectory]:
    """Visits the first `count` microbatches."""
    hoisted = hoisting.hoist_weights(self._varying_unet(common.params, common.frozen))
    graphdef, weights, rest = hoisting.cast_lora(hoisted)
    pack, _ = packing(hoisted.trained)

    def visit(i: jax.Array, carry: tuple[Sums, Trajectory]) -> tuple[Sums, Trajectory]:
      sums, trajectory = carry
      row, step = work.row[i], work.step[i]

      def loss_fn(weights: nnx.State) -> tuple[jax.Array, Any]:
        unet = nnx.merge(graphdef, weights, rest)
        loss, *others = self._visit_microbatch(unet, common.negative_embedding, work,
                                               trajectory, row, step, mode)
        return loss * common.loss_scale, (loss, *others)

      scaled, backward, (loss, info, trajectory) = jax.vjp(loss_fn, weights, has_aux=True)

      def add_gradient(grads: Any, backward: Any) -> Any:
        return jax.tree.map(jnp.add, grads, pack(backward(jnp.ones_like(scaled))[0]))

      grads = jax.lax.cond(mode >= Mode.FIRST_STEP, add_gradient, lambda grads, _: grads,
                           sums.grads, backward)
      return sums.add(loss, info, grads), trajectory

    sums, trajectory = jax.lax.fori_loop(0, count, visit, (_of_device(sums), trajectory))
    return _by_device(sums), trajectory

  def _visit_microbatch(self, unet: nnx.Module, negative_embedding: Float[Array, "1 L D"],
                        work: Work, trajectory: Trajectory, row: Int[Array, " pairs"],
                        step: Int[Array, " pairs"], mode: Int[Array, ""]
                        ) -> tuple[Float32[Array, ""], ppo.PPOInfo, Trajectory]:
    """Visits one microbatch.

    Returns:
      PPO's loss and metrics, and the trajectory with what the mode writes into it.
    """
    config = self._config
    get = lambda array, step: array[row, step]
    put = lambda array, step, new: array.at[row, step].set(new, unique_indices=True)
    latents, after = get(trajectory.latents, step), get(trajectory.latents, step + 1)
    prediction = guided_prediction(
        unet, latents, self._schedule.timesteps[step], work.text_embeddings[row],
        negative_embedding, config.guidance_scale)
    take = functools.partial(ddim_step, self._schedule, prediction, step, latents, config.eta)
    drawn, _ = take(noise=draw_noise(work.noise_key[row], step + 1, latents.shape[1:]))
    visited = put(trajectory.latents, step + 1, jnp.where(mode == Mode.SAMPLE, drawn, after))
    # Even steps just taken are read back and scored, so that all modes do the same arithmetic.
    _, log_prob = take(prev_latents=get(visited, step + 1))
    new, stored = jax.lax.stop_gradient(log_prob), get(trajectory.log_probs, step)
    old_log_prob = jnp.where(mode == Mode.FIRST_STEP, new, stored)
    loss, info = ppo.ppo_loss(log_prob, old_log_prob, work.advantages[row], config.clip_range,
                              config.adv_clip_max)
    drift = jnp.max(ppo.ratio_deviation(log_prob, stored))
    log_probs = put(trajectory.log_probs, step, jnp.where(mode == Mode.STEP, stored, new))
    return loss, dataclasses.replace(info, ratio_drift=drift), Trajectory(visited, log_probs)

  def _varying_unet(self, params: nnx.State, frozen: nnx.State) -> Split:
    return Split(self._graphdef, *varying((params, frozen)))

  def _zero_sums_on_device(self, params: nnx.State, frozen: nnx.State) -> Sums:
    weights = hoisting.hoist_weights(self._varying_unet(params, frozen)).trained
    pack, _ = packing(weights)
    return _by_device(Sums.zero(pack(weights)))

  def _finish_on_device(self, state: TrainState, frozen: nnx.State, sums: Sums
                        ) -> tuple[TrainState, UpdateMetrics]:
    """Averages what all devices added up, and takes the optimizer's step."""
    hoisted, pullback = hoisting.with_pullback(
        hoisting.hoist_weights, self._varying_unet(state.params, frozen))
    _, unpack = packing(hoisted.trained)
    sums = _of_device(sums)
    (grads,) = pullback(unpack(sums.grads))
    grads, metrics = average(dataclasses.replace(sums, grads=grads),
                             self._config.accumulation_steps * self._group_size,
                             state.loss_scale.scale)
    return take_step(self._config, self._optimizer, state, grads, metrics)

  def _lay_out_sampling_on_device(
      self, text_embeddings: Float[Array, "B L D"], sample_indices: Int[Array, " B"],
      key: Key[Array, ""], part: Int[Array, ""]) -> tuple[Work, Trajectory]:
    """Lays out a part of the batch's samples for sampling, with their noise; see `sample`.

    In a row of its own a sample is computed as in training (`update.choose_microbatches`),
    lest a kernel rounds by place. Where the batch ends, its first samples fill the rows left.

    With 4 rows, 2 pairs and 3 steps, microbatches 0 to 2 take rows 0 and 1 through steps 0 to 2,
    and microbatches 3 to 5 rows 2 and 3.
    """
    samples = len(sample_indices)
    chosen = (jnp.arange(self._rows) * self._num_parts(samples) + part) % samples
    noise_key = sample_keys(key, sample_indices[chosen])
    noise = draw_noise(noise_key, jnp.int32(0), self._latent_shape)
    steps = self._schedule.num_steps
    shape = (self._rows, steps + 1, *self._latent_shape)
    latents = jnp.zeros_like(noise, shape=shape).at[:, 0].set(noise)
    zeros = jnp.zeros_like(chosen)
    grid = self._grid(zeros)
    visit = jnp.arange(len(grid))[:, None]
    work = Work(text_embeddings=text_embeddings[chosen],
                advantages=zeros.astype(jnp.float32), noise_key=noise_key, batch_index=zeros,
                row=grid + visit // steps * self._pairs + jnp.arange(self._pairs),
                step=grid + visit % steps)
    return work, Trajectory(latents, jnp.zeros_like(noise, shape=(self._rows, steps)))

  def _lay_out_training_on_device(
      self, batch: Batch, key: Key[Array, ""], index: Int[Array, ""], group: Int[Array, ""]
      ) -> tuple[Work, Trajectory]:
    """Lays out what group number `group` of optimizer step `index` trains on."""
    batches, samples = batch.advantages.shape
    chosen = choose_microbatches(self._config, self._schedule.num_steps, batches, samples, key,
                                 index)
    sample, step = chosen.sample[group], chosen.step[group]
    flat = flatten_samples(batch)
    rows = jnp.resize(sample, (self._rows,))
    pairs = (self._group_size, self._pairs)
    row = jnp.broadcast_to(jnp.arange(len(sample))[:, None], step.shape).reshape(pairs)
    grid = self._grid(sample)
    fill = lambda values: grid.at[:len(values)].set(values)
    work = Work(text_embeddings=flat.text_embeddings[rows], advantages=flat.advantages[rows],
                noise_key=sample_keys(key, rows), batch_index=rows, row=fill(row),
                step=fill(step.reshape(pairs)))
    return work, jax.tree.map(lambda x: x[rows], flat.trajectory)

  def _grid(self, like: Int[Array, " B"]) -> Int[Array, "microbatches pairs"]:
    """Zeros for as many microbatches as sampling or training has at most."""
    denoising = self._rows // self._pairs * self._schedule.num_steps
    most = max(denoising, self._group_size)
    return jnp.zeros_like(like, shape=(most, self._pairs))

  def _keep_log_probs_on_device(
      self, log_probs: Float32[Array, "batches samples T"], new: Float32[Array, "rows T"],
      batch_index: Int[Array, " rows"]) -> Float32[Array, "batches samples T"]:
    """Writes the log-probabilities of a group's rows back into the batch's."""
    own = self._config.batch_size  # rows after these are padding
    flat = log_probs.reshape(-1, log_probs.shape[-1])
    return flat.at[batch_index[:own]].set(new[:own]).reshape(log_probs.shape)


def join_parts(parts: Sequence[Trajectory], samples: int) -> Trajectory:
  """Puts together the parts that `SharedProgram.sample` returned, on each device.

  Args:
    parts: N of them; row r of part n is sample r·N + n of the device, or padding.
    samples: that the device has in the batch.
  """
  def join(*parts: jax.Array) -> jax.Array:
    in_order = jnp.stack(parts, axis=1)
    return in_order.reshape(-1, *in_order.shape[2:])[:samples]

  return jax.tree.map(join, *parts)


def _by_device(sums: Sums) -> Sums:
  """Adds an axis for the devices, over which the sums are sharded."""
  return jax.tree.map(lambda x: x[None], sums)


def _of_device(sums: Sums) -> Sums:
  """Removes that axis again."""
  return jax.tree.map(lambda x: x[0], sums)
