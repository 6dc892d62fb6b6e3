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
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Key
import optax

from ddpo_jax import hoisting, ppo
from ddpo_jax.compilation import compile_ahead, compile_meanwhile, compiler_options
from ddpo_jax.devices import AXIS, varying
from ddpo_jax.diffusion import DDIMSchedule
from ddpo_jax.diffusion.ddim import ddim_step, guided_prediction
from ddpo_jax.diffusion.sampler import draw_noise
from ddpo_jax.lora import Split
from ddpo_jax.types import Batch, FirstGradient, TrainState, Trajectory
from ddpo_jax.update import (
  BATCH_SPECS,
  Sums,
  UpdateConfig,
  UpdateMetrics,
  average,
  packing,
  take_step,
)
from ddpo_jax.work import WORK_SPECS, Work, WorkLayout


class Mode(enum.IntEnum):
  """What the program does with each (sample, step) pair.

  From FIRST_STEP on, gradients are added up: their order matters.
  """

  SAMPLE = 0  # take the step: write the next latents and their log-probability
  SCORE = 1  # write the log-probability of the step that was taken
  FIRST_STEP = 2  # the same, and add up the gradient, with that log-probability as the old one
  STEP = 3  # add up the gradient
  SAMPLE_FIRST_STEP = 4  # take the step, and add up the gradient as if its advantage were 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CommonInputs:
  """What is the same for all samples of a call."""

  params: nnx.State
  frozen: nnx.State
  negative_embedding: Float[Array, "1 L D"]  # of the empty prompt
  loss_scale: Float32[Array, ""]


class SharedProgram:
  """The compiled program, as a sampler and as an update.

  An optimizer step is `accumulate`, then `finish`. Of an epoch's first, `sample` may have computed
  the gradient, and `first_step` takes the place of `accumulate`.

  Arrays that its methods take and return are those of all devices.
  """

  def __init__(self, config: UpdateConfig, graphdef: nnx.GraphDef, schedule: DDIMSchedule,
               optimizer: optax.GradientTransformation, latent_shape: tuple[int, ...],
               mesh: jax.sharding.Mesh, epoch_sizes: tuple[int, int] | None = None):
    """Builds the program; nothing is compiled yet.

    Args:
      config: of the update.
      graphdef: of the UNet, from `lora.partition`.
      schedule: the sampler's.
      optimizer: from `make_optimizer`.
      latent_shape: of a sample, (h, w, C).
      mesh: one axis, "data".
      epoch_sizes: how many batches an epoch has, and of how many samples on each device. With
        them, if all trained weights are LoRA's, the first optimizer step's gradient may be
        computed while its samples are drawn: its policy is the sampler's, so both have the same
        forward pass.
    """
    self._config, self._schedule, self._optimizer = config, schedule, optimizer
    self._graphdef, self._mesh = graphdef, mesh
    self.layout = layout = WorkLayout(config, schedule.num_steps, latent_shape)
    self._first_parts = (
        layout.find_first_parts(*epoch_sizes) if epoch_sizes else frozenset())
    by_batch, by_row, replicated = jax.P(None, AXIS), jax.P(AXIS), jax.P()
    # `_visit` is `_visit_on_device` mapped over the devices and compiled; so are the others.
    self._visit = self._jit(
        self._visit_on_device, (replicated, WORK_SPECS, replicated, replicated, by_row, by_row),
        by_row, donate_argnums=(4, 5))
    self._zero_sums = self._jit(self._zero_sums_on_device, (replicated, replicated), by_row)
    self._lay_out_sampling = self._jit(
        layout.sampling, (by_row, by_row, replicated, replicated), (WORK_SPECS, by_row))
    self._lay_out_training = self._jit(
        layout.training, (BATCH_SPECS, *[replicated] * 4), (WORK_SPECS, by_row))
    self._keep_log_probs = self._jit(layout.keep_log_probs, (by_batch, by_row, by_row), by_batch)
    self._pull_back = self._jit(self._pull_back_on_device, (replicated, replicated, by_row), by_row)
    self._pull_back_each = self._jit(
        self._pull_back_each_on_device, (replicated, replicated, by_row), by_row)
    self._weigh = self._jit(self._weigh_on_device, (replicated, by_row, by_batch, by_row), by_row)
    self._largest = jax.jit(jnp.max, out_shardings=jax.NamedSharding(mesh, jax.P()))
    self._finish = self._jit(self._finish_on_device, (replicated, by_row), replicated,
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
    rows = self.layout.rows * self._mesh.size
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
        placed, (WORK_SPECS, jax.P(AXIS), jax.P(AXIS), jax.P(), jax.P()),
        (work, trajectory, sums, scale, number))
    common = CommonInputs(state.params, frozen, embedding, scale)
    self._visit = compile_ahead(self._visit, common, work, number, number, sums, trajectory)
    # Kernels of these are not timed, so sampling may run beside; on a CPU they would share cores.
    if jax.default_backend() != "cpu":
      if self._first_parts:
        self._pull_back_each = compile_meanwhile(
            self._pull_back_each, state.params, frozen, sums.grads)
      pulled_back = placed(jax.P(AXIS), jax.eval_shape(self._pull_back, state.params, frozen, sums))
      self._pull_back = compile_meanwhile(self._pull_back, state.params, frozen, sums)
      self._finish = compile_meanwhile(self._finish, state, pulled_back)

  def sample(self, params: nnx.State, frozen: nnx.State,
             negative_embedding: Float[Array, "1 L D"],
             text_embeddings: Float[Array, "B L D"], sample_indices: Int[Array, " B"],
             key: Key[Array, ""], first_gradient: FirstGradient | None = None
             ) -> tuple[list[Trajectory], list[Array]]:
    """Samples a batch, one microbatch of samples after the other.

    Args:
      params: the trained weights.
      frozen: the UNet's other weights.
      negative_embedding: of the empty prompt.
      text_embeddings: of the prompts, sharded over devices.
      sample_indices: in the epoch, sharded likewise; they decide each sample's noise.
      key: the epoch's.
      first_gradient: if gradients are wanted.

    Returns:
      The trajectories in parts, for `join_parts`; and of those that the first optimizer step
      trains on, what `first_step` is to be given.
    """
    batch, scale = ((first_gradient.batch, first_gradient.loss_scale) if first_gradient
                    else (None, jnp.float32(1)))
    common = CommonInputs(params, frozen, negative_embedding, scale)
    sums, parts, gradients = self._zero_sums(params, frozen), [], []
    samples = len(sample_indices) // self._mesh.size
    for part in range(self.layout.num_parts(samples)):
      is_first_step = (batch, part) in self._first_parts
      work, trajectory = self._lay_out_sampling(text_embeddings, sample_indices, key,
                                                jnp.int32(part))
      sums, trajectory = self._visit(
          common, work, jnp.int32(self.layout.sampling_microbatches(samples, part)),
          jnp.int32(Mode.SAMPLE_FIRST_STEP if is_first_step else Mode.SAMPLE), sums, trajectory)
      parts.append(trajectory)
      if is_first_step:
        gradients.append(self._pull_back_each(params, frozen, sums.grads))
        sums = self._zero_sums(params, frozen)
    return parts, gradients

  @property
  def samples_first_step(self) -> bool:
    """Whether `sample` returns gradients of the first optimizer step, of all its samples."""
    return bool(self._first_parts)

  def first_step(self, gradients: Sequence[Array], state: TrainState, frozen: nnx.State,
                 batch: Batch, key: Key[Array, ""],
                 check_stop: Callable[[], None] = lambda: None) -> Sums:
    """What an epoch's first optimizer step adds up, of what `sample` has returned.

    Only a few microbatches are visited, one of each group of the next step, to see how far the
    sampler's log-probabilities are from the update's.

    Args:
      gradients: of each batch in turn.
      state: read, and not changed since.
      frozen: the UNet's other weights.
      batch: the epoch's.
      key: of the first inner epoch's shuffle.
      check_stop: called before each microbatch; may raise to stop.

    Returns:
      What `finish` is to be given.
    """
    common = CommonInputs(state.params, frozen, batch.negative_embedding, state.loss_scale.scale)
    sums, groups = self._zero_sums(state.params, frozen), self._config.accumulation_steps
    of_step = self._config.batch_size * groups * self._mesh.size
    index = jnp.int32(batch.advantages.size > of_step)  # the same, where there is no other
    before: Any = batch.advantages
    for group in map(jnp.int32, range(groups)):
      check_stop()
      work, trajectory = self._lay_out_training(batch, key, index, group, True)
      sums, trajectory = self._visit(common, work, jnp.int32(1), jnp.int32(Mode.SCORE), sums,
                                     trajectory)
      jax.block_until_ready(before)  # as in `accumulate`
      before = trajectory.log_probs
    return self._weigh(state.params, tuple(gradients), batch.advantages, sums.ratio_drift)

  def accumulate(self, mode: Mode, state: TrainState, frozen: nnx.State, batch: Batch,
                 key: Key[Array, ""], index: Int[Array, ""],
                 check_stop: Callable[[], None] = lambda: None, in_order: bool = False
                 ) -> tuple[Sums, Batch]:
    """Visits all pairs of an optimizer step; the arguments are those of `update.make_update`.

    Args:
      mode: any but those that sample.
      state: read, and not changed.
      frozen: the UNet's other weights.
      batch: the epoch's.
      key: of the inner epoch's shuffle.
      index: of the step in the inner epoch.
      check_stop: called before each group of microbatches; may raise to stop.
      in_order: see `update.choose_microbatches`.

    Returns:
      What `finish` is to be given, and the batch with the log-probabilities that the mode writes.
    """
    common = CommonInputs(state.params, frozen, batch.negative_embedding,
                          state.loss_scale.scale)
    sums, log_probs = self._zero_sums(state.params, frozen), batch.trajectory.log_probs
    before = log_probs
    for group in map(jnp.int32, range(self._config.accumulation_steps)):
      check_stop()
      work, trajectory = self._lay_out_training(batch, key, index, group, in_order)
      sums, trajectory = self._visit(common, work, jnp.int32(self.layout.group_size),
                                     jnp.int32(mode), sums, trajectory)
      if mode != Mode.STEP:
        log_probs = self._keep_log_probs(log_probs, trajectory.log_probs, work.batch_index)
      # One group ahead of the device at most, so that there is something left to stop.
      jax.block_until_ready(before)
      before = trajectory.log_probs
    if mode != Mode.SCORE:
      sums = self._pull_back(state.params, frozen, sums)
    trajectory = dataclasses.replace(batch.trajectory, log_probs=log_probs)
    return sums, dataclasses.replace(batch, trajectory=trajectory)

  def finish(self, state: TrainState, sums: Sums) -> tuple[TrainState, UpdateMetrics]:
    """Takes the optimizer step for which `accumulate` has added up; the state is donated."""
    return self._finish(state, sums)

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
    pack = self._pack(hoisted.trained)

    def visit(i: jax.Array, carry: tuple[Sums, Trajectory]) -> tuple[Sums, Trajectory]:
      sums, trajectory = carry
      row, step = work.row[i], work.step[i]

      def loss_fn(weights: nnx.State) -> tuple[jax.Array, Any]:
        unet = nnx.merge(graphdef, weights, rest)
        loss, *others = self._visit_microbatch(unet, common.negative_embedding, work,
                                               trajectory, row, step, mode)
        return loss * common.loss_scale, (loss, *others)

      # Copied in here, where XLA sees that it need not multiply with a slice of something.
      scaled, backward, (loss, info, trajectory) = jax.vjp(
          loss_fn, self._copy(weights), has_aux=True)

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
    takes_step = (mode == Mode.SAMPLE) | (mode == Mode.SAMPLE_FIRST_STEP)
    visited = put(trajectory.latents, step + 1, jnp.where(takes_step, drawn, after))
    # Even steps just taken are read back and scored, so that all modes do the same arithmetic.
    _, log_prob = take(prev_latents=get(visited, step + 1))
    new, stored = jax.lax.stop_gradient(log_prob), get(trajectory.log_probs, step)
    old_log_prob = jnp.where(mode == Mode.STEP, stored, new)
    loss, info = ppo.ppo_loss(log_prob, old_log_prob, work.advantages[row], config.clip_range,
                              config.adv_clip_max)
    drift = jnp.max(ppo.ratio_deviation(log_prob, stored))
    log_probs = put(trajectory.log_probs, step, jnp.where(mode == Mode.STEP, stored, new))
    return loss, dataclasses.replace(info, ratio_drift=drift), Trajectory(visited, log_probs)

  def _varying_unet(self, params: nnx.State, frozen: nnx.State) -> Split:
    return Split(self._graphdef, *varying((params, frozen)))

  def _zero_sums_on_device(self, params: nnx.State, frozen: nnx.State) -> Sums:
    weights = hoisting.hoist_weights(self._varying_unet(params, frozen)).trained
    return _by_device(Sums.zero(self._pack(weights)(self._copy(weights))))

  def _copy(self, weights: nnx.State) -> nnx.State:
    """The weights, once for each pair of a microbatch if their gradients are wanted."""
    return hoisting.copy_lora(weights, self.layout.pairs) if self._first_parts else weights

  def _pack(self, weights: nnx.State) -> Callable[[nnx.State], Any]:
    """`packing`'s first, for gradients of `_copy(weights)`."""
    pack, _ = packing(weights)
    return jax.vmap(pack) if self._first_parts else pack

  def _pullback(self, params: nnx.State, frozen: nnx.State) -> Callable[[Any], nnx.State]:
    """From a packed gradient of the hoisted weights to that of the trained ones."""
    hoisted, pullback = hoisting.with_pullback(
        hoisting.hoist_weights, self._varying_unet(params, frozen))
    _, unpack = packing(hoisted.trained)
    return lambda packed: pullback(unpack(packed))[0]

  def _pull_back_on_device(self, params: nnx.State, frozen: nnx.State, sums: Sums) -> Sums:
    """Sums with the gradient of the trained weights, over all samples."""
    sums = _of_device(sums)
    total = jax.tree.map(lambda x: x.sum(0), sums.grads) if self._first_parts else sums.grads
    return _by_device(dataclasses.replace(sums, grads=self._pullback(params, frozen)(total)))

  def _pull_back_each_on_device(self, params: nnx.State, frozen: nnx.State, grads: Any
                                ) -> Float32[Array, "1 pairs parameters"]:
    """The gradient of the trained weights, of each sample by itself."""
    pullback = self._pullback(params, frozen)
    return jax.vmap(lambda packed: ravel_pytree(pullback(packed))[0])(_of_device(grads))[None]

  def _weigh_on_device(self, params: nnx.State, gradients: tuple[jax.Array, ...],
                       advantages: Float32[Array, "batches samples"],
                       ratio_drift: Float32[Array, " 1"]) -> Sums:
    """Adds up each sample's gradient times its advantage."""
    limit = self._config.adv_clip_max
    clipped = jnp.clip(advantages, -limit, limit)
    count = self.layout.num_parts(advantages.shape[1])
    flat, unravel = ravel_pytree(varying(params))
    total, loss = jnp.zeros_like(flat), varying(jnp.float32(0))
    for (batch, part), each in zip(sorted(self._first_parts), gradients, strict=True):
      own = clipped[batch, part::count]
      # While they were drawn, their advantage was 1, which is clipped as well.
      total += jnp.matmul(own / min(1.0, limit), each[0], precision="highest")
      loss -= own.sum()
    zero = jnp.zeros_like(loss)
    return _by_device(Sums(grads=unravel(total), approx_kl=zero, clipfrac=zero,
                           loss=loss * self._schedule.num_steps / self.layout.pairs,
                           ratio_drift=ratio_drift[0]))

  def _finish_on_device(self, state: TrainState, sums: Sums) -> tuple[TrainState, UpdateMetrics]:
    """Averages what all devices added up, and takes the optimizer's step."""
    microbatches = self._config.accumulation_steps * self.layout.group_size
    grads, metrics = average(_of_device(sums), microbatches, state.loss_scale.scale)
    return take_step(self._config, self._optimizer, state, grads, metrics)


def _by_device(sums: Sums) -> Sums:
  """Adds an axis for the devices, over which the sums are sharded."""
  return jax.tree.map(lambda x: x[None], sums)


def _of_device(sums: Any) -> Any:
  """Removes that axis again."""
  return jax.tree.map(lambda x: x[0], sums)
