"""Lets the sampler's network round as the update's does.

How a compiler fuses a network depends on what comes after it, and in half precision that
decides how its numbers are rounded: differently in each layer, until the ratio of two
programs' log-probabilities is off by as much as PPO's clip range. The update's network keeps
what a backward pass will need. One that keeps the same, for a backward pass that never runs,
becomes the same kernels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainedPolicy:
  """A `Policy` that is compiled as the update compiles it.

  The same calls have to come in the same shapes; then no further pass is needed to know the
  update's own log-probabilities (`update.RescoringUpdate`).
  """

  graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
  trained: nnx.State
  frozen: nnx.State
  never: Bool[Array, ""]  # false, which the compiler must not know

  @property
  def config(self) -> Any:
    return self._network(self.trained).config

  def __call__(self, latents: Float[Array, "B h w C"], timesteps: Int[Array, " B"],
               text_embeddings: Float[Array, "B L D"]) -> Float32[Array, "B h w C"]:
    def predict(trained: nnx.State) -> jax.Array:
      return self._network(trained)(latents, timesteps, text_embeddings)

    prediction, backward = jax.vjp(predict, self.trained)
    zero = jnp.zeros_like(prediction, jnp.float32, shape=())

    def run(backward: Any) -> Float32[Array, ""]:  # every gradient counts, or XLA drops it
      (grads,) = backward(jnp.ones_like(prediction))
      return sum((jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(grads)), zero)

    # Added in float32: in the network's own dtype XLA would do it within a convolution.
    return prediction.astype(jnp.float32) + jax.lax.cond(
        self.never, run, lambda _: zero, backward)

  def _network(self, trained: nnx.State) -> Any:
    return nnx.merge(self.graphdef, trained, self.frozen)
