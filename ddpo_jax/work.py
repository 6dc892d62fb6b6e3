"""Which (sample, step) pairs the shared program visits, in which order.

Sampling takes the steps of a sample one after the other; training visits them as the shuffle has
them. Both compute a sample in the same row, lest a kernel rounds by place.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from ddpo_jax.devices import AXIS, samples_at_once
from ddpo_jax.diffusion.sampler import draw_noise, sample_keys
from ddpo_jax.parts import ceil_div
from ddpo_jax.types import Batch, Trajectory
from ddpo_jax.update import UpdateConfig, choose_microbatches, flatten_samples, lay_out_columns


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
  advantages: Float32[Array, " rows"]  # 1 in sampling
  noise_key: Key[Array, " rows"]  # used by sampling only
  batch_index: Int[Array, " rows"]  # of the sample, in the flat batch; read by training only
  row: Int[Array, "microbatches pairs"]
  step: Int[Array, "microbatches pairs"]


_BY_ROW: Any = jax.P(AXIS)
_BY_PAIR: Any = jax.P(None, AXIS)
WORK_SPECS = Work(text_embeddings=_BY_ROW, advantages=_BY_ROW, noise_key=_BY_ROW,
                  batch_index=_BY_ROW, row=_BY_PAIR, step=_BY_PAIR)


class WorkLayout:
  """Lays out work for one device; every array is one device's."""

  def __init__(self, config: UpdateConfig, num_steps: int, latent_shape: tuple[int, ...]):
    """Decides the sizes.

    Args:
      config: of the update.
      num_steps: of the sampler, T.
      latent_shape: of a sample, (h, w, C).
    """
    self._config, self._num_steps, self._latent_shape = config, num_steps, latent_shape
    # Pairs in a microbatch; rows, as many as training has samples in a microbatch, rounded up so
    # that sampling fills whole microbatches; and microbatches in a group of the same samples.
    self.pairs = samples_at_once(config.batch_size * config.timesteps_per_batch)
    self.rows = ceil_div(config.batch_size, self.pairs) * self.pairs
    self.group_size = config.num_train_timesteps * config.batch_size // self.pairs

  def wasted_samples(self, batch_size: int) -> int:
    """How many samples are computed in vain, to fill each part's last microbatch."""
    parts = range(self.num_parts(batch_size))
    microbatches = sum(self.sampling_microbatches(batch_size, part) for part in parts)
    return microbatches // self._num_steps * self.pairs - batch_size

  def num_parts(self, samples: int) -> int:
    """In how many parts the samples of a batch are denoised."""
    return ceil_div(samples, self.rows)

  def sampling_microbatches(self, samples: int, part: int) -> int:
    """How many microbatches denoise a part of a batch of so many samples."""
    rows = ceil_div(samples - part, self.num_parts(samples))  # those after them are padding
    return ceil_div(rows, self.pairs) * self._num_steps

  def find_first_parts(self, batches: int, samples: int) -> frozenset[tuple[int, int]]:
    """Which parts of which batches have the samples of an epoch's first optimizer step.

    There are none if one of these parts has a sample of another step as well, or if a part is
    less or more than one microbatch of samples.
    """
    if self.rows != self.pairs or samples % self.pairs:
      return frozenset()
    columns = self._config.batch_size * self._config.accumulation_steps
    first = set(lay_out_columns(columns, batches, samples)[:, 0].tolist())
    count, found = self.num_parts(samples), set()
    for batch, part in itertools.product(range(batches), range(count)):
      own = set(range(batch * samples + part, (batch + 1) * samples, count))
      if own <= first:
        found.add((batch, part))
      elif own & first:
        return frozenset()
    return frozenset(found)

  def sampling(self, text_embeddings: Float[Array, "B L D"], sample_indices: Int[Array, " B"],
               key: Key[Array, ""], part: Int[Array, ""]) -> tuple[Work, Trajectory]:
    """Lays out a part of the batch's samples for sampling, with their noise.

    In a row of its own a sample is computed as in training (`update.choose_microbatches`). Where
    the batch ends, its first samples fill the rows left.

    With 4 rows, 2 pairs and 3 steps, microbatches 0 to 2 take rows 0 and 1 through steps 0 to 2,
    and microbatches 3 to 5 rows 2 and 3.
    """
    samples = len(sample_indices)
    chosen = (jnp.arange(self.rows) * self.num_parts(samples) + part) % samples
    noise_key = sample_keys(key, sample_indices[chosen])
    noise = draw_noise(noise_key, jnp.int32(0), self._latent_shape)
    steps = self._num_steps
    shape = (self.rows, steps + 1, *self._latent_shape)
    latents = jnp.zeros_like(noise, shape=shape).at[:, 0].set(noise)
    zeros = jnp.zeros_like(chosen)
    grid = self._grid(zeros)
    visit = jnp.arange(len(grid))[:, None]
    work = Work(text_embeddings=text_embeddings[chosen],
                advantages=jnp.ones_like(zeros, jnp.float32), noise_key=noise_key,
                batch_index=zeros, row=grid + visit // steps * self.pairs + jnp.arange(self.pairs),
                step=grid + visit % steps)
    return work, Trajectory(latents, jnp.zeros_like(noise, shape=(self.rows, steps)))

  def training(self, batch: Batch, key: Key[Array, ""], index: Int[Array, ""],
               group: Int[Array, ""], in_order: Bool[Array, ""]) -> tuple[Work, Trajectory]:
    """Lays out what group number `group` of optimizer step `index` trains on."""
    batches, samples = batch.advantages.shape
    chosen = choose_microbatches(self._config, self._num_steps, batches, samples, key, index,
                                 in_order)
    sample, step = chosen.sample[group], chosen.step[group]
    flat = flatten_samples(batch)
    rows = jnp.resize(sample, (self.rows,))
    pairs = (self.group_size, self.pairs)
    row = jnp.broadcast_to(jnp.arange(len(sample))[:, None], step.shape).reshape(pairs)
    grid = self._grid(sample)
    fill = lambda values: grid.at[:len(values)].set(values)
    work = Work(text_embeddings=flat.text_embeddings[rows], advantages=flat.advantages[rows],
                noise_key=sample_keys(key, rows), batch_index=rows, row=fill(row),
                step=fill(step.reshape(pairs)))
    return work, jax.tree.map(lambda x: x[rows], flat.trajectory)

  def _grid(self, like: Int[Array, " B"]) -> Int[Array, "microbatches pairs"]:
    """Zeros for as many microbatches as sampling or training has at most."""
    denoising = self.rows // self.pairs * self._num_steps
    most = max(denoising, self.group_size)
    return jnp.zeros_like(like, shape=(most, self.pairs))

  def keep_log_probs(self, log_probs: Float32[Array, "batches samples T"],
                     new: Float32[Array, "rows T"], batch_index: Int[Array, " rows"]
                     ) -> Float32[Array, "batches samples T"]:
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
