"""Hoists out of loops what a network would compute anew in every call, of weights and prompts.

Each function takes a network and returns an equivalent one, both as `lora.partition` splits
them. `nnx.LoRAParam` marks what counts as trained.
In the result these may be other arrays than LoRA's, for example W + up·down or precomputed keys
and values. They are computed from the ones given, so `jax.vjp` of the function takes a gradient
that was summed over many calls back to LoRA's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax import lora
from ddpo_jax.lora import Split
from ddpo_jax.models import layers
from ddpo_jax.ops.matmul import matmul, matmul_lora

_TENSOR_CORE = 8  # columns that a matrix product in half precision is padded to


class _PrecomputedProjection(nnx.Module):
  """Takes the place of a linear layer whose input never changes: returns its output."""

  def __init__(self, output: Float[Array, "B S N*H"], num_heads: int):
    split = output.reshape(*output.shape[:2], num_heads, -1)
    # By heads, as attention multiplies it: inside a loop XLA would transpose it each time.
    self.output = nnx.LoRAParam(split.swapaxes(1, 2))

  def __call__(self, inputs: jax.Array) -> Float[Array, "B S N*H"]:
    del inputs
    output = self.output[...].swapaxes(1, 2)
    return output.reshape(*output.shape[:2], -1)


class _ContextProjection(nnx.Module):
  """Several linear layers with LoRA and the same input: three matmuls in place of many."""

  def __init__(self, linears: list[layers.Linear]):
    self.dtype = linears[0].dtype
    self.sizes = tuple(linear.out_features for linear in linears)
    self.kernel = nnx.Param(
        jnp.concatenate([linear.kernel[...] for linear in linears], axis=1))
    self.lora_down = _join([linear.lora_down for linear in linears])
    self.lora_up = nnx.List([_present(linear.lora_up) for linear in linears])

  def __call__(self, context: Float[Array, "B S D"]) -> Sequence[Float[Array, "B S N*H"]]:
    context = context.astype(self.dtype)
    low = matmul_lora(context, self.lora_down[...].astype(self.dtype))
    y = matmul(context.reshape(-1, context.shape[-1]), self.kernel[...])
    y += matmul_lora(low, self._block_diagonal_up()).reshape(y.shape)
    return jax.lax.split(y.reshape(*context.shape[:-1], -1), self.sizes, axis=2)

  def _block_diagonal_up(self) -> Float[Array, "*copies ranks outs"]:
    rows, before = [], 0
    for up, size in zip(self.lora_up, self.sizes, strict=True):
      after = sum(self.sizes) - before - size
      columns = ((0, 0),) * (up.ndim - 1) + ((before, after),)
      rows.append(jnp.pad(up[...].astype(self.dtype), columns))
      before += size
    return jnp.concatenate(rows, axis=-2)


class _ContextPart(nnx.Module):
  """Takes the place of one of these linear layers: picks its part of their joint output."""

  def __init__(self, index: int):
    self.index = index

  def __call__(self, parts: Sequence[jax.Array]) -> jax.Array:
    return parts[self.index]


def with_pullback(function: Callable[..., Split], unet: Split
                  ) -> tuple[Split, Callable[[nnx.State], tuple[nnx.State]]]:
  """Applies a function of this module to a network.

  Returns:
    The hoisted network, and the pullback from its weights' gradient to that of the weights
    given.
  """
  def split(trained: nnx.State) -> tuple[nnx.State, tuple[nnx.GraphDef, nnx.State]]:
    hoisted = function(unet._replace(trained=trained))
    return hoisted.trained, (hoisted.graphdef, hoisted.frozen)

  trained, pullback, (graphdef, frozen) = jax.vjp(split, unet.trained, has_aux=True)
  return Split(graphdef, trained, frozen), pullback


def hoist_weights(unet: Split) -> Split:
  """Brings a network with LoRA in the form that is fastest for many calls.

  On CPUs, in float32:
  - LoRA is added to the matrices that it adapts, and W + up·down is what is trained: matmuls
    with matrices of a few columns are slow there.
  - Convolutions transform their kernels (see `ops/convolution.py`).

  Otherwise, because on GPUs the gradient of a whole matrix would cost more than it saves, and
  half precision would lose what up·down adds:
  - The rank is padded to what tensor cores multiply, which XLA would do in each call.
  - Self-attention multiplies its input by the `down` of queries, keys and values at once.
  - The prompts are multiplied by the key and value matrices of all layers at once.
  - Upsampling combines its kernels (see `ops/upsampling.py`), which take up more than the ones
    given, so that XLA leaves that in the loop.

  Returns:
    An equivalent network; the one given if it has no LoRA.
  """
  model = nnx.merge(*unet)
  adapted = lora.adapted(model)
  if not adapted:
    return unet
  if jax.default_backend() == "cpu" and all(x.dtype == jnp.float32 for x in adapted):
    for linear in adapted:
      _merge_lora(linear)
    for _, module in nnx.iter_graph(model):
      if isinstance(module, layers.Conv):
        module.prepare()
  else:
    for linear in adapted:
      _pad_rank(linear)
    for _, module in nnx.iter_graph(model):
      if isinstance(module, layers.Attention) and not module.takes_context:
        _join_down(module)
      elif isinstance(module, layers.UpsampleConv):
        module.prepare()
    _join_context(model)
  return lora.partition(model)


def cast_lora(unet: Split) -> Split:
  """Casts LoRA's weights to the dtype that their layers compute in, once instead of in each call.

  Gradients of the result have that dtype too: add them up in float32, as the gradient of the
  weights given.
  """
  dtype = nnx.merge(*unet).conv_in.dtype

  def rounded(weight: nnx.Variable) -> nnx.Variable:
    is_lora = isinstance(weight, nnx.LoRAParam)
    return weight.replace(weight[...].astype(dtype)) if is_lora else weight

  is_leaf = lambda node: isinstance(node, nnx.Variable)
  return unet._replace(trained=jax.tree.map(rounded, unet.trained, is_leaf=is_leaf))


def copy_lora(weights: nnx.State, copies: int) -> nnx.State:
  """One copy of LoRA's weights for each sample of a microbatch, along a new first axis.

  The network computes with the first. The gradient is that of each sample by itself.
  """
  return jax.tree.map(lambda weight: jnp.broadcast_to(weight, (copies, *weight.shape)), weights)


def hoist_prompts(unet: Split, context: Float[Array, "B L D"]) -> Split:
  """Specialises a network that `hoist_weights` returned to these prompts.

  Attention's keys and values of the prompts become trained weights in place of the matrices
  that they are computed with. So their gradients are summed over many calls, and multiplied
  with the prompts once.

  Args:
    unet: from `hoist_weights`.
    context: the embeddings that it will be called with.

  Returns:
    A network that ignores the context it is called with; or the one given, unless
    `hoist_weights` made the key and value matrices trained weights.
  """
  model = nnx.merge(*unet)
  to_prompts = _attentions_to_prompts(model)
  if model.context_projection is not None or not to_prompts or not all(
      isinstance(attention.to_k.kernel, nnx.LoRAParam) for attention in to_prompts):
    return unet
  for attention in to_prompts:
    for name in ("to_k", "to_v"):
      output = getattr(attention, name)(context)
      setattr(attention, name, _PrecomputedProjection(output, attention.num_heads))
  return lora.partition(model)


def _join_context(unet: Any) -> None:
  """Joins the key and value matrices of all layers that attend to prompts."""
  to_prompts = _attentions_to_prompts(unet)
  linears = [linear for module in to_prompts for linear in (module.to_k, module.to_v)]
  unet.context_projection = _ContextProjection(linears)
  for i, module in enumerate(to_prompts):
    for j, name in enumerate(("to_k", "to_v")):
      setattr(module, name, _ContextPart(2 * i + j))


def _attentions_to_prompts(unet: nnx.Module) -> list[layers.Attention]:
  return [module for _, module in nnx.iter_graph(unet)
          if isinstance(module, layers.Attention) and module.takes_context]


def _merge_lora(linear: layers.Linear) -> None:
  update = _present(linear.lora_down)[...] @ _present(linear.lora_up)[...]
  linear.kernel = nnx.LoRAParam(linear.kernel[...] + update)
  linear.lora_down = linear.lora_up = None


def _pad_rank(linear: layers.Linear) -> None:
  """Pads the rank with zeros, which change nothing."""
  down, up = _present(linear.lora_down)[...], _present(linear.lora_up)[...]
  missing = -down.shape[1] % _TENSOR_CORE
  linear.lora_down = nnx.LoRAParam(jnp.pad(down, ((0, 0), (0, missing))))
  linear.lora_up = nnx.LoRAParam(jnp.pad(up, ((0, missing), (0, 0))))


def _join_down(attention: layers.Attention) -> None:
  """Joins `down` of queries, keys and values; each `up` gets zero rows for the others' columns."""
  projections = attention.to_q, attention.to_k, attention.to_v
  attention.lora_down = _join([linear.lora_down for linear in projections])
  total, before = attention.lora_down.shape[1], 0
  for linear in projections:
    up = _present(linear.lora_up)[...]
    rank = up.shape[0]
    padding = ((before, total - before - rank), (0, 0))
    linear.lora_up = nnx.LoRAParam(jnp.pad(up, padding))
    linear.lora_down = None
    before += rank


def _join(downs: Sequence[nnx.LoRAParam | None]) -> nnx.LoRAParam:
  """Concatenates the columns of matrices `down`."""
  return nnx.LoRAParam(jnp.concatenate([_present(down)[...] for down in downs], axis=1))


def _present(weight: nnx.LoRAParam | None) -> nnx.LoRAParam:
  assert weight is not None  # of a layer that LoRA adapts
  return weight
