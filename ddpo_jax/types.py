"""The data that passes between the parts of the program, and the functions that users give it."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

from flax import nnx
import jax
from jaxtyping import Array, Float, Float32, Int, UInt8
import numpy as np
import optax


class RewardFn(Protocol):
  """Scores images."""

  def __call__(
      self,
      images: UInt8[np.ndarray, "B H W 3"],
      prompts: list[str],
      metadata: list[dict[str, Any]],
  ) -> tuple[Float[np.ndarray, " B"], dict[str, Any]]:  # and what else to log
    ...


class PromptFn(Protocol):
  """Draws one prompt, and what a reward may want to know about it."""

  def __call__(self, rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
    ...


class Denoiser(Protocol):
  """The policy's network: predicts noise (or velocity, or the clean sample).

  Row i of `latents` and `timesteps` belongs to `text_embeddings[i // n]`. n is 1 in sampling; in
  training several timesteps of a sample may share a microbatch.
  """

  def __call__(
      self,
      latents: Float[Array, "n*B h w C"],
      timesteps: Int[Array, " n*B"],  # in the model's own 0..999
      text_embeddings: Float[Array, "B L D"],
  ) -> Float[Array, "n*B h w C"]:
    ...


@runtime_checkable
class BranchingDenoiser(Denoiser, Protocol):
  """A denoiser that computes once what the branches of guidance have in common."""

  def predict_branches(
      self,
      latents: Float[Array, "n*B h w C"],
      timesteps: Int[Array, " n*B"],
      text_embeddings: Float[Array, "branches*B L D"],
      branches: int,
  ) -> Float[Array, "branches*n*B h w C"]:
    ...


class Policy(Denoiser, Protocol):
  """A denoiser that knows the shape of its latents."""

  @property
  def config(self) -> Any:  # with `sample_size` (int, (h, w) or None) and `in_channels`
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
  """The latents that the sampler visited, and how likely each of its T steps was.

  `*batch` is (B,) as the sampler returns it, and (batches, samples) for a whole epoch.
  """

  latents: Float32[Array, "*batch T+1 h w C"]  # from the initial noise to the clean latents
  log_probs: Float32[Array, "*batch T"]  # of latents t+1 given latents t, mean over h·w·C

  def __post_init__(self):
    latents, log_probs = (getattr(x, "shape", None) for x in (self.latents, self.log_probs))
    if latents is None or log_probs is None or len(latents) < 4:
      return  # a tree of something else, of shardings or of sums for example
    *batch, visited = latents[:-3]
    if (*batch, visited - 1) != tuple(log_probs):
      raise ValueError(f"latents {latents} must be [*batch, T+1, h, w, C] for log_probs of "
                       f"shape {log_probs}, [*batch, T]")

  @property
  def final_latents(self) -> Float32[Array, "*batch h w C"]:
    """The last, clean latents."""
    return self.latents[..., -1, :, :, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """One epoch's samples, as the update reads them.

  `*batch` is (batches, samples of all devices), sharded over the second axis; or (N,), one
  device's samples in a row.
  """

  trajectory: Trajectory
  text_embeddings: Float[Array, "*batch L D"]  # of each sample's prompt
  negative_embedding: Float[Array, "1 L D"]  # of the empty prompt, replicated
  advantages: Float32[Array, "*batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
  """Dynamic loss scaling for fp16, where small gradients would round to zero."""

  scale: Float32[Array, ""]
  good_steps: Int[Array, ""]  # finite steps since the scale last changed


@dataclasses.dataclass(frozen=True)
class FirstGradient:
  """Asks the sampler for the first optimizer step's gradient; see `SharedProgram.sample`."""

  batch: int  # which one of the epoch is sampled
  loss_scale: Float32[Array, ""]  # the optimizer step's


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that training changes, and all that a checkpoint must keep of it."""

  params: nnx.State  # the trained weights only: LoRA's, or the whole UNet's
  opt_state: optax.OptState
  step: Int[Array, ""]  # optimizer steps taken
  loss_scale: LossScale
