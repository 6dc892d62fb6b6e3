"""How many floating-point operations the networks take, counted in two ways."""

from __future__ import annotations

import math
from typing import Any

from flax import nnx
import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp

from ddpo_jax import lora
from ddpo_jax.diffusion.sampler import native_size
from ddpo_jax.models import StableDiffusion

# JAX's calls of cuDNN, of queries and keys [B, T, N, H]: how many matrix products each stands
# for, without the scores that the backward pass computes anew.
_FLASH_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 4}


def count(function, *args) -> int:
  """Twice the multiplications of every matrix product and convolution that its result needs.

  Both branches of a condition count; the body of a loop counts as often as it runs.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return _count(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _count(jaxpr) -> int:
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
      total += 2 * math.prod(out) * math.prod(left[i] for i in contracted)
    elif name == "conv_general_dilated":
      kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
      features = kernel[params["dimension_numbers"].rhs_spec[0]]
      # A dilated input is mostly zeros (the gradient of a strided convolution).
      total += (2 * math.prod(out) * math.prod(kernel) // features
                // math.prod(params["lhs_dilation"]))
    elif name in _FLASH_ATTENTION:
      query, key = equation.invars[0].aval.shape, equation.invars[1].aval.shape
      total += _FLASH_ATTENTION[name] * 2 * math.prod(query) * key[1]
    times = params.get("length", 1) if name == "scan" else 1
    for inner in _inner(params):
      total += times * _count(inner)
  return total


def _inner(params: dict[str, Any]):
  for value in params.values():
    for each in value if isinstance(value, (tuple, list)) else (value,):
      each = getattr(each, "jaxpr", each)  # of a closed one
      if hasattr(each, "eqns"):
        yield each


def compiled(function, *args) -> float | None:
  """What the compiler says of its program; None where it does not."""
  cost = jax.jit(function).lower(*args).compile().cost_analysis()
  return None if cost is None else float(cost.get("flops", 0)) or None


def of_models(models: StableDiffusion, guided: bool, use_lora: bool) -> dict[str, Any]:
  """FLOP of one sample, for each part of an epoch, without what is recomputed.

  Args:
    models: with LoRA attached to the UNet, if `use_lora`.
    guided: classifier-free guidance takes two evaluations per step.
    use_lora: whether LoRA's weights alone are trained.

  Returns:
    For "denoising_step", "training_timestep" (forward and backward), "decode" and
    "text_encoder": {"counted": int, "compiled": float or None}.
  """
  config = models.unet.config
  branches = 2 if guided else 1
  latents = jnp.ones((1, *native_size(models.unet), config.in_channels))
  timesteps = jnp.zeros(1, jnp.int32)
  tokens = jnp.zeros((1, models.text_encoder.config.max_position_embeddings), jnp.int32)
  context = jnp.ones((branches, tokens.shape[1], config.cross_attention_dim))
  remat, models.unet.gradient_checkpointing = models.unet.gradient_checkpointing, "none"
  graphdef, params, frozen = lora.partition(models.unet, use_lora)
  models.unet.gradient_checkpointing = remat

  def denoise(params, frozen):
    unet = nnx.merge(graphdef, params, frozen)
    return unet.predict_branches(latents, timesteps, context, branches)

  def train(params, frozen):
    return jax.grad(lambda p: denoise(p, frozen).astype(jnp.float32).sum())(params)

  parts = {
      "denoising_step": (denoise, params, frozen),
      "training_timestep": (train, params, frozen),
      "decode": (_call("decode", models.vae), nnx.state(models.vae), latents),
      "text_encoder": (_call("__call__", models.text_encoder),
                       nnx.state(models.text_encoder), tokens)}
  return {name: {"counted": count(*part), "compiled": compiled(*part)}
          for name, part in parts.items()}


def _call(method: str, module: nnx.Module):
  graphdef = nnx.graphdef(module)
  return lambda state, x: getattr(nnx.merge(graphdef, state), method)(x)
