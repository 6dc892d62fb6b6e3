"""Computes once what a network is asked for many times: of its weights, and of its prompts.

Each function splits the network it returns as `lora.partition` does, into structure, trained
weights and frozen weights. The trained ones of the result depend on those given, so that
`jax.vjp` of the function takes a gradient that was summed over many calls back to them.
"""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax import lora
from ddpo_jax.models import layers

Split = tuple[nnx.GraphDef, nnx.State, nnx.State]  # structure, trained, frozen

_TENSOR_CORE = 8  # columns that a matrix product in half precision is padded to


class _PrecomputedProjection(nnx.Module):
  """Stands for a linear layer whose input never changes: its output, split in heads."""

  def __init__(self, output: Float[Array, "B S N*H"], num_heads: int):
    split = output.reshape(*output.shape[:2], num_heads, -1)
    # As attention multiplies it. XLA leaves a transposition alone inside of a loop.
    self.output = nnx.LoRAParam(split.swapaxes(1, 2))

  def __call__(self, inputs: jax.Array) -> Float[Array, "B S N*H"]:
    del inputs
    output = self.output[...].swapaxes(1, 2)
    return output.reshape(*output.shape[:2], -1)


def fold_weights(graphdef: nnx.GraphDef, trained: nnx.State, frozen: nnx.State) -> Split:
  """Brings a network with LoRA in the form that is quickest for many calls.

  On CPUs, in float32: convolutions compute what depends on their kernels alone, and
  LoRA is added to the matrices that it adapts. What is trained are then the matrices
  W + up·down, because products with matrices of a few columns are slow there. A gradient is
  linear in theirs: it can be summed over microbatches first, and handed on to up and down
  once. On GPUs the gradient of the whole matrix would cost more than it saves, and half
  precision would lose what up·down adds. There the rank is padded to what tensor cores
  multiply, which XLA would do in each call, and self-attention multiplies its input by the
  three matrices `down` of queries, keys and values at once.

  Returns:
    The same network; what was given if it has no LoRA.
  """
  unet = nnx.merge(graphdef, trained, frozen)
  adapted = _adapted(unet)
  if not adapted:
    return graphdef, trained, frozen
  if jax.default_backend() == "cpu" and all(x.dtype == jnp.float32 for x in adapted):
    for linear in adapted:
      _add_lora(linear)
    for _, module in nnx.iter_graph(unet):
      if isinstance(module, layers.Conv):
        module.prepare()
  else:
    for linear in adapted:
      _pad_rank(linear)
    for _, module in nnx.iter_graph(unet):
      if isinstance(module, layers.Attention) and not module.takes_context:
        _join_down(module)
  return lora.partition(unet)


def round_lora(graphdef: nnx.GraphDef, trained: nnx.State, frozen: nnx.State) -> Split:
  """Gives LoRA's weights the dtype that their layers compute in, which these do in each call.

  The gradient of the result is in that dtype too. It has to be added up in float32, and is
  then that of the weights given.
  """
  unet = nnx.merge(graphdef, trained, frozen)
  dtype = next((linear.dtype for _, linear in lora.attention_projections(unet)), None)

  def rounded(weight: nnx.Variable) -> nnx.Variable:
    is_lora = isinstance(weight, nnx.LoRAParam)
    return weight.replace(weight[...].astype(dtype)) if is_lora else weight

  is_leaf = lambda node: isinstance(node, nnx.Variable)
  return graphdef, jax.tree.map(rounded, trained, is_leaf=is_leaf), frozen


def fold_prompts(graphdef: nnx.GraphDef, trained: nnx.State, frozen: nnx.State,
                 context: Float[Array, "B L D"]) -> Split:
  """Makes a network that `fold_weights` has folded one for these prompts only.

  Attention's keys and values of the prompts become trained weights, in place of the matrices
  that they come from: over many calls their gradients are summed, and multiplied with the
  prompts once.

  Args:
    graphdef: the network, as `fold_weights` returns it.
    trained: likewise.
    frozen: likewise.
    context: all that the network will be called with.

  Returns:
    The same network, whatever context it is called with; or what was given, where
    `fold_weights` has left the matrices as they are.
  """
  unet = nnx.merge(graphdef, trained, frozen)
  to_prompts = [module for _, module in nnx.iter_graph(unet)
                if isinstance(module, layers.Attention) and module.takes_context]
  if not all(isinstance(attention.to_k.kernel, nnx.LoRAParam) for attention in to_prompts):
    return graphdef, trained, frozen
  for attention in to_prompts:
    for name in ("to_k", "to_v"):
      output = getattr(attention, name)(context)
      setattr(attention, name, _PrecomputedProjection(output, attention.num_heads))
  return lora.partition(unet)


def _adapted(unet: nnx.Module) -> list[layers.Linear]:
  return [linear for _, linear in lora.attention_projections(unet)
          if linear.lora_down is not None]


def _add_lora(linear: layers.Linear) -> None:
  assert linear.lora_down is not None and linear.lora_up is not None
  update = linear.lora_down[...] @ linear.lora_up[...]
  linear.kernel = nnx.LoRAParam(linear.kernel[...] + update)
  linear.lora_down = linear.lora_up = None


def _pad_rank(linear: layers.Linear) -> None:
  """With zeros, which change nothing."""
  assert linear.lora_down is not None and linear.lora_up is not None
  down, up = linear.lora_down[...], linear.lora_up[...]
  missing = -down.shape[1] % _TENSOR_CORE
  linear.lora_down = nnx.LoRAParam(jnp.pad(down, ((0, 0), (0, missing))))
  linear.lora_up = nnx.LoRAParam(jnp.pad(up, ((0, missing), (0, 0))))


def _join_down(attention: layers.Attention) -> None:
  """Of queries, keys and values; each `up` gets zeros for the columns of the others."""
  projections = attention.to_q, attention.to_k, attention.to_v
  downs = [linear.lora_down[...] for linear in projections if linear.lora_down is not None]
  attention.lora_down = nnx.LoRAParam(jnp.concatenate(downs, axis=1))
  total, before = attention.lora_down.shape[1], 0
  for linear, down in zip(projections, downs):
    assert linear.lora_up is not None
    after = total - before - down.shape[1]
    linear.lora_up = nnx.LoRAParam(jnp.pad(linear.lora_up[...], ((before, after), (0, 0))))
    linear.lora_down = None
    before += down.shape[1]
