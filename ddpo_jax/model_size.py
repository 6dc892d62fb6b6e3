"""How large a model is, by the headers of its files: before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
import pathlib
import re
from typing import Any

from ddpo_jax.config import Config
from ddpo_jax.errors import UserError
from ddpo_jax.model_config import read_json
from ddpo_jax.model_names import is_local
from ddpo_jax.models import hub
from ddpo_jax.models.clip import CLIPTextConfig
from ddpo_jax.models.unet import sample_size
from ddpo_jax.models.vae import VAEConfig
from ddpo_jax.tensor_files import open_tensors

_PROJECTION = re.compile(r"\.attn\d\.to_(q|k|v|out\.0)\.weight$")  # what LoRA is attached to


@dataclasses.dataclass(frozen=True)
class ModelSize:
  """What the headers of a model's files say."""

  weights: int  # numbers in the UNet and the VAE's decoder, which stay on the device
  unet_weights: int
  lora_weights_per_rank: int
  latent_size: int  # numbers in one image's latent
  embedding_size: int  # numbers in one prompt's embedding


def model_size(cfg: Config) -> ModelSize | None:
  """Reads the headers of the model's files, not its weights; None if it is on the hub.

  Raises:
    UserError: if a file is missing, truncated or of another kind.
  """
  model = cfg.pretrained.model
  if not is_local(model):
    return None
  folder = hub.model_folder(model)
  shapes = {part: _shapes(folder / part, stem) for part, stem in hub.WEIGHT_NAMES.items()}
  unet, vae, text = (_read_config(folder / part / "config.json") for part in hub.WEIGHT_NAMES)
  height, width = _sample_size(unet)
  channels = _number(vae, "latent_channels", VAEConfig.latent_channels)
  tokens = _number(text, "max_position_embeddings", CLIPTextConfig.max_position_embeddings)
  count = lambda shapes: sum(map(math.prod, shapes))
  decoder = [shape for name, shape in shapes["vae"].items()
             if not name.startswith(("encoder.", "quant_conv."))]
  unet_weights = count(shapes["unet"].values())
  projections = [shape for name, shape in shapes["unet"].items() if _PROJECTION.search(name)]
  return ModelSize(
      weights=unet_weights + count(decoder), unet_weights=unet_weights,
      lora_weights_per_rank=sum(shape[0] + math.prod(shape[1:]) for shape in projections),
      latent_size=height * width * channels,
      embedding_size=tokens * _number(text, "hidden_size", CLIPTextConfig.hidden_size))


def _shapes(folder: pathlib.Path, stem: str) -> dict[str, tuple[int, ...]]:
  shapes: dict[str, tuple[int, ...]] = {}
  try:
    files = hub.find_weights(folder, stem)
  except UserError as error:
    raise UserError(f"pretrained.model={str(folder.parent)!r}: {error}") from error
  for file in files:
    shapes |= read_header("pretrained.model", file)
  return shapes


def read_header(field: str, file: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """The tensors' shapes; that the file is as long as they need is checked with it."""
  if file.is_dir():
    raise UserError(f"{field}={str(file)!r} is a folder; must be a .safetensors file, such as "
                    "scripts/export_lora.py makes of a run")
  with open_tensors(f"{field}={str(file)!r}", file) as tensors:
    return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    return read_json(path)
  except UserError as error:
    raise UserError(f"pretrained.model: {error}") from error


def _sample_size(unet: Mapping[str, Any]) -> tuple[int, int]:
  """Height and width of the latents that a UNet's config says, else Stable Diffusion 1.5's."""
  size = sample_size(unet)
  if isinstance(size, int):
    return size, size
  if isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size):
    return size[0], size[1]
  return 64, 64


def _number(values: Mapping[str, Any], name: str, default: int) -> int:
  value = values.get(name)
  return value if isinstance(value, int) else default


def trained_weights(cfg: Config, size: ModelSize) -> int:
  """How many numbers training changes."""
  if cfg.use_lora and cfg.lora.init_from:  # a file of whatever rank
    file = pathlib.Path(cfg.lora.init_from).expanduser()
    return sum(map(math.prod, read_header("lora.init_from", file).values()))
  if cfg.use_lora:
    return cfg.lora.rank * size.lora_weights_per_rank
  return size.unet_weights
