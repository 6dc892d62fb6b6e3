"""Low-rank adaptation (arXiv:2106.09685) of the UNet's attention projections.

Each of to_q, to_k, to_v and to_out.0 becomes W·x + up·down·x with W frozen. The trained
weights are split from the frozen ones here, by hand; gradients, optimizer state and
checkpoints only ever see the trained ones.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from ddpo_jax.errors import UserError
from ddpo_jax.models import layers
from ddpo_jax.tensor_files import FLOATS, open_tensors, save_tensors

FORMATS = ("diffusers", "kohya")
_PEFT_CONFIG = "lora_adapter_metadata"  # where diffusers keeps it in a file's header, as JSON

# How files in circulation name the same matrix, rewritten to the first, diffusers' own.
_IMPORT_RULES = (
    (r"^unet\.", ""),
    (r"\.lora_down\.weight$", ".lora_A.weight"),  # kohya's
    (r"\.lora_up\.weight$", ".lora_B.weight"),
    (r"\.processor\.(to_\w+)_lora\.(down|up)\.weight$", r".\1.lora.\2.weight"),
    (r"\.to_out\.lora\.", ".to_out.0.lora."),
    (r"\.lora(?:_linear_layer)?\.down\.weight$", ".lora_A.weight"),
    (r"\.lora(?:_linear_layer)?\.up\.weight$", ".lora_B.weight"),
)


def attention_projections(unet: nnx.Module) -> list[tuple[str, layers.Linear]]:
  """Every linear layer that LoRA is attached to, with its dotted path, in path order."""
  found = []
  for path, module in nnx.iter_graph(unet):
    if isinstance(module, layers.Attention):
      prefix = ".".join(map(str, path))
      found += [(f"{prefix}.{name}", getattr(module, name))
                for name in ("to_q", "to_k", "to_v")]
      found.append((f"{prefix}.to_out.0", module.to_out[0]))
  return sorted(found, key=lambda item: item[0])


def adapted(unet: nnx.Module) -> list[layers.Linear]:
  """The linear layers that have LoRA weights."""
  return [linear for _, linear in attention_projections(unet) if linear.lora_down is not None]


def ranks(unet: nnx.Module) -> list[int]:
  """The distinct ranks of its LoRA weights, in ascending order."""
  return sorted({layer.lora_down.shape[1] for layer in adapted(unet)
                 if layer.lora_down is not None})


def inject_lora(unet: nnx.Module, rank: int, key: jax.Array) -> None:
  """Attaches fresh LoRA weights to the UNet, in place; its output does not change.

  Args:
    unet: a `UNet2DConditionModel`.
    rank: of the update, at least 1.
    key: `down` is drawn from it: normal with standard deviation 1/rank. `up` is zero.

  Raises:
    ValueError: if the rank is below 1, or the UNet has no attention to attach to.
  """
  if rank < 1:
    raise ValueError(f"{rank=} must be at least 1")
  projections = attention_projections(unet)
  if not projections:
    raise ValueError("the UNet has no attention projections to attach LoRA to")
  for i, (_, linear) in enumerate(projections):
    down = jax.random.normal(jax.random.fold_in(key, i), (linear.in_features, rank))
    linear.lora_down = nnx.LoRAParam(down / rank)
    linear.lora_up = nnx.LoRAParam(jnp.zeros((rank, linear.out_features)))


class Split(NamedTuple):
  """A network in parts, which `nnx.merge(*split)` puts together again."""

  graphdef: nnx.GraphDef  # its structure
  trained: nnx.State
  frozen: nnx.State


def partition(unet: nnx.Module, use_lora: bool = True) -> Split:
  """Splits the UNet into structure, trained weights and frozen weights.

  Args:
    unet: with LoRA attached, if `use_lora`.
    use_lora: train LoRA's weights only; otherwise every weight.

  Raises:
    ValueError: if there is nothing to train.
  """
  trained_type = nnx.LoRAParam if use_lora else nnx.Param
  graphdef, *states = nnx.split(unet, trained_type, ...)
  trained, frozen = states
  if not jax.tree.leaves(trained):
    raise ValueError("nothing to train: attach LoRA first (inject_lora)")
  return Split(graphdef, trained, frozen)


def export_lora(unet: nnx.Module, path: str | os.PathLike,
                metadata: dict[str, str] | None = None, *,
                file_format: str = "diffusers") -> None:
  """Writes the LoRA weights as one safetensors file, float32.

  Args:
    unet: with LoRA attached.
    path: of the file.
    metadata: goes into the file's header.
    file_format: "diffusers": keys `unet.<module>.lora_A.weight` [rank, in] and
      `….lora_B.weight` [out, rank], what `StableDiffusionPipeline.load_lora_weights`
      reads. "kohya": keys `lora_unet_<module, dots as underscores>.lora_down.weight`,
      `….lora_up.weight` and `….alpha` (the rank, for a scale of 1), what ComfyUI and
      the A1111 web UI read.

  Raises:
    ValueError: if the UNet has no LoRA weights, or the format is unknown.
  """
  if file_format not in FORMATS:
    raise ValueError(f"{file_format=} must be one of {', '.join(FORMATS)}")
  kohya = file_format == "kohya"
  suffixes = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
  tensors: dict[str, np.ndarray] = {}
  for name, linear in attention_projections(unet):
    if linear.lora_down is None or linear.lora_up is None:
      raise ValueError(f"{name} has no LoRA weights to export")
    prefix = _kohya_name(name) if kohya else f"unet.{name}"
    for suffix, weight in zip(suffixes, (linear.lora_down, linear.lora_up)):
      array = np.asarray(weight[...], np.float32)
      tensors[f"{prefix}.{suffix}.weight"] = np.ascontiguousarray(array.T)
    if kohya:
      tensors[f"{prefix}.alpha"] = np.array(linear.lora_down.shape[1], np.float32)
  save_tensors(tensors, path, metadata)


def import_lora(unet: nnx.Module, path: str | os.PathLike) -> None:
  """Reads LoRA weights from a safetensors file into the UNet, in place.

  Takes diffusers' format, with or without the `unet.` prefix, the names of older
  releases (`….processor.to_q_lora.down.weight`), and kohya's. Each matrix has the rank
  that it has in the file; an `alpha`, beside it or in the header, scales the update by alpha/rank.

  Raises:
    UserError: if the file cannot be read, or a weight is missing, unknown or misshapen.
  """
  projections = attention_projections(unet)
  tensors, header_alpha = _read(path, {_kohya_name(name): name for name, _ in projections})
  for name, linear in projections:
    down, up = (_take(tensors, f"{name}.{suffix}.weight", path)
                for suffix in ("lora_A", "lora_B"))
    rank = down.shape[0]
    expected = ((rank, linear.in_features), (linear.out_features, rank))
    if (down.shape, up.shape) != expected or rank == 0:
      raise UserError(f"LoRA file {path}: {name} has shapes {down.shape} and {up.shape}; "
                      f"must be {expected[0]} and {expected[1]} for this model")
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
      raise UserError(f"LoRA file {path}: {name} holds NaN or infinity; must be finite numbers")
    alpha = _alpha(tensors, f"{name}.alpha", rank if header_alpha is None else header_alpha, path)
    linear.lora_down = nnx.LoRAParam(jnp.asarray(down.T, jnp.float32))
    linear.lora_up = nnx.LoRAParam(jnp.asarray(up.T, jnp.float32) * (alpha / rank))
  if tensors:
    raise UserError(f"LoRA file {path}: {len(tensors)} tensors belong to no attention "
                    f"projection of this UNet, such as {min(tensors)!r}")


def _kohya_name(name: str) -> str:
  return "lora_unet_" + name.replace(".", "_")


def _read(path: str | os.PathLike, modules: dict[str, str]
          ) -> tuple[dict[str, Any], float | None]:
  """A file's tensors under diffusers' names, and the alpha in its header, if it has one.

  Args:
    path: of the file.
    modules: kohya's names of the modules, and ours.
  """
  with open_tensors(f"LoRA file {path}", path) as tensors:
    for name in tensors.keys():
      dtype = tensors.get_slice(name).get_dtype()
      if name.endswith("weight") and dtype not in FLOATS:
        raise UserError(f"LoRA file {path}: {name} is {dtype}; must be one of {', '.join(FLOATS)}")
    header = tensors.metadata() or {}
    return ({_canonical(name, modules): tensors.get_tensor(name) for name in tensors.keys()},
            _header_alpha(header.get(_PEFT_CONFIG, "{}"), path))


def _header_alpha(text: str, path: str | os.PathLike) -> float | None:
  """The alpha of all layers in peft's config, which diffusers keeps since 0.34."""
  try:
    config = {name.removeprefix("unet."): value for name, value in json.loads(text).items()}
  except (ValueError, AttributeError) as error:
    raise UserError(f"LoRA file {path}: its header's {_PEFT_CONFIG} cannot be read: {error}; must "
                    "be a JSON object") from error
  for name in ("alpha_pattern", "use_rslora"):
    if config.get(name):
      raise UserError(f"LoRA file {path}: its header's {name}={config[name]!r} is not supported; "
                      "must be absent: one lora_alpha scales every update by lora_alpha/rank")
  alpha = config.get("lora_alpha")
  if not isinstance(alpha, (int, float, type(None))):
    raise UserError(f"LoRA file {path}: its header's lora_alpha is {alpha!r}; must be a number")
  return alpha


def _canonical(name: str, modules: dict[str, str]) -> str:
  module, dot, rest = name.partition(".")
  name = modules.get(module, module) + dot + rest
  for pattern, replacement in _IMPORT_RULES:
    name = re.sub(pattern, replacement, name)
  return name


def _take(tensors: dict[str, Any], name: str, path: str | os.PathLike) -> Any:
  try:
    tensor = tensors.pop(name)
  except KeyError:
    if any(each.startswith("base_model.") for each in tensors):
      raise UserError(f"LoRA file {path} is in peft's format, which has its scale in another file; "
                      "must be in diffusers' (pipeline.save_lora_weights) or kohya's") from None
    raise UserError(f"LoRA file {path} has no {name!r}; was it trained on another "
                    "model?") from None
  if tensor.ndim != 2:
    raise UserError(f"LoRA file {path}: {name} has shape {tensor.shape}; must be a matrix")
  return tensor


def _alpha(tensors: dict[str, Any], name: str, default: float, path: str | os.PathLike) -> float:
  alpha = tensors.pop(name, np.array(default))
  if alpha.size != 1 or not np.isfinite(alpha).all():
    raise UserError(f"LoRA file {path}: {name} is {alpha}; must be one finite number")
  return float(alpha.item())
