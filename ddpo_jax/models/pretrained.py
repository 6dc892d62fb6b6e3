"""Stable Diffusion in diffusers' folder format, CLIP in transformers' -> NNX, and back.

A tensor's name in the file and its path in the module differ only by the rules in
`_RENAMES` and `_LEAVES`; what they leave unmatched, on either side, is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import importlib.resources
import json
import os
import pathlib
import re
from typing import Any, Generic, TypeVar

from flax import nnx
import huggingface_hub
from huggingface_hub import errors as hub_errors
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ddpo_jax.diffusion.schedule import NoiseSchedule
from ddpo_jax.models.clip import (
    CLIPConfig,
    CLIPImageConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
)
from ddpo_jax.models.unet import UNet2DConditionModel, UNetConfig
from ddpo_jax.models.vae import AutoencoderKL, VAEConfig
from ddpo_jax.types import UserError

# The model in this package, for machines without any other.
TINY = "tiny"

# Names found in files, and what they are called here. First match of each, in order.
_RENAMES = (
    (r"^text_model\.", ""),  # transformers before version 5
    (r"(mid_block\.attentions\.\d+)\.query\.", r"\1.to_q."),  # diffusers before 0.18
    (r"(mid_block\.attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(mid_block\.attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(mid_block\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
)
_IGNORED = (r"(^|\.)position_ids$",)  # a buffer that counts from 0
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias",
           "class_embedding": "class_embedding", "logit_scale": "logit_scale"}

_WEIGHT_NAMES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
                 "text_encoder": "model"}
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                    "special_tokens_map.json", "added_tokens.json")
# A pipeline's networks, by their folders: the module and its config.
PARTS: dict[str, tuple[Any, Any]] = {
    "unet": (UNet2DConditionModel, UNetConfig), "vae": (AutoencoderKL, VAEConfig),
    "text_encoder": (CLIPTextModel, CLIPTextConfig)}

T = TypeVar("T")

_LISTED = 8  # names shown in a message before "and N more"


@dataclasses.dataclass(frozen=True)
class Unread(Generic[T]):
  """A model whose files are known to hold it, and whose weights are still to be read."""

  shapes: T  # the model, with shapes and dtypes in the place of its weights
  read: Callable[[], T]


@dataclasses.dataclass
class StableDiffusion:
  """The parts of a text-to-image model."""

  unet: UNet2DConditionModel
  vae: AutoencoderKL
  text_encoder: CLIPTextModel
  tokenizer: Any  # transformers' CLIPTokenizer
  noise_schedule: NoiseSchedule

  @property
  def scaling_factor(self) -> float:
    """Latents are the VAE's code times this."""
    return self.vae.config.scaling_factor

  def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
    """Prompts -> int32 [B, L], padded or cut to the L tokens that the encoder takes."""
    return tokenize(self.tokenizer, prompts, self.text_encoder.config.max_position_embeddings)


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> np.ndarray:
  """Prompts -> int32 [B, length], padded or cut."""
  encoded = tokenizer(list(prompts), padding="max_length", truncation=True,
                      max_length=length, return_tensors="np")
  return encoded.input_ids.astype(np.int32)


def load_pretrained(path: str | os.PathLike, revision: str | None = None,
                    dtype: DTypeLike = jnp.float32) -> StableDiffusion:
  """Loads a Stable Diffusion 1.x or 2.x checkpoint.

  Args:
    path: a local folder in diffusers' format, a hub id ("owner/name"), or "tiny" for the
      model in this package.
    revision: branch, tag or commit of a hub id.
    dtype: of the weights and the computation.

  Raises:
    UserError: if the folder, a file or a tensor is missing, misshapen or too many, or if
      a config asks for what is not built here.
  """
  return open_pretrained(path, revision, dtype).read()


def open_pretrained(path: str | os.PathLike, revision: str | None = None,
                    dtype: DTypeLike = jnp.float32) -> Unread[StableDiffusion]:
  """`load_pretrained` without the weights: downloads and checks, so that only these are left.

  Its arguments are the same, and what it raises.
  """
  folder = resolve(path, revision)
  _check_pipeline(folder)
  configs = {name: _read_config(folder / name / "config.json", config_cls.from_dict)
             for name, (_, config_cls) in PARTS.items()}
  noise_schedule = _read_config(folder / "scheduler" / "scheduler_config.json",
                                NoiseSchedule.from_config)
  files = {name: find_weights(folder / name, stem)
           for name, stem in _WEIGHT_NAMES.items()}
  tokenizer = _load_tokenizer(folder / "tokenizer")
  _check_parts_fit(folder, **configs, tokens=len(tokenizer))
  parts = {name: open_module(functools.partial(cls, configs[name], dtype=dtype), files[name])
           for name, (cls, _) in PARTS.items()}

  def model(modules: dict[str, Any]) -> StableDiffusion:
    return StableDiffusion(tokenizer=tokenizer, noise_schedule=noise_schedule, **modules)

  return Unread(shapes=model({name: part.shapes for name, part in parts.items()}),
                read=lambda: model({name: part.read() for name, part in parts.items()}))


@dataclasses.dataclass
class CLIP:
  """A CLIP model, and what its folder says of the images that it takes."""

  model: CLIPModel
  images: CLIPImageConfig
  folder: pathlib.Path  # where it was read from


def load_clip(path: str | os.PathLike, revision: str | None = None,
              dtype: DTypeLike = jnp.float32) -> CLIP:
  """Loads a CLIP checkpoint: both towers and their projections.

  Args:
    path: a local folder in transformers' format, or a hub id ("owner/name").
    revision: branch, tag or commit of a hub id.
    dtype: of the weights and the computation; the logit scale is float32 always.

  Raises:
    UserError: if the folder, a file or a tensor is missing, misshapen or too many, or if
      a config asks for what is not built here.
  """
  folder = resolve(path, revision, CLIP_REPOSITORY)
  config = _read_config(folder / "config.json", CLIPConfig.from_dict)
  images = _read_image_config(folder, config.vision_config.image_size)
  # The rules for the names of Stable Diffusion's parts would take a prefix away.
  model: Any = load_module(functools.partial(CLIPModel, config, dtype=dtype),
                      find_weights(folder, "model", CLIP_REPOSITORY.weights_class),
                      renames=())
  return CLIP(model, images, folder)


def load_clip_tokenizer(path: str | os.PathLike, revision: str | None = None):
  """The tokenizer of a CLIP folder or hub id.

  Raises:
    UserError: if there is none.
  """
  folder = resolve(path, revision, TOKENIZER_REPOSITORY)
  return _load_tokenizer(folder)


def _read_image_config(folder: pathlib.Path, image_size: int) -> CLIPImageConfig:
  parse = functools.partial(CLIPImageConfig.from_dict, image_size=image_size)
  if (folder / "preprocessor_config.json").is_file():
    return _read_config(folder / "preprocessor_config.json", parse)
  if (folder / "processor_config.json").is_file():  # transformers 5
    return _read_config(folder / "processor_config.json",
                        lambda values: parse(values.get("image_processor", {})))
  return parse({})


@dataclasses.dataclass(frozen=True)
class Repository:
  """A kind of model folder: what messages call it, and which of its files are needed."""

  field: str  # of the config, that names it
  formats: str  # what the field may hold
  probe: tuple[str, ...]  # files of which each has one, to find it in the hub's cache
  weights_class: str  # that converts pickled weights
  choose: Callable[[Sequence[str]], list[str]]  # of all its files, those to download

  @property
  def revision_field(self) -> str:
    return f"{self.field.rpartition('.')[0]}.revision"


def resolve(path: str | os.PathLike, revision: str | None = None,
            repository: Repository | None = None) -> pathlib.Path:
  """The local folder of a model, downloaded if `path` is a hub id.

  Args:
    path: a folder, a hub id, or (of Stable Diffusion only) "tiny".
    revision: branch, tag or commit of a hub id.
    repository: the kind of folder; Stable Diffusion's if absent.

  Raises:
    UserError: if there is no such folder and no such repository.
  """
  repository = DIFFUSERS_REPOSITORY if repository is None else repository
  if str(path) == TINY and repository is DIFFUSERS_REPOSITORY:
    return pathlib.Path(str(importlib.resources.files("ddpo_jax") / "assets/tiny_sd"))
  folder = pathlib.Path(path).expanduser()
  if str(path) and folder.is_dir():
    return folder
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
    raise UserError(f"{repository.field}={str(path)!r} does not exist; must be "
                    f"{repository.formats}")
  return _download(str(path), revision, repository)


def find_weights(folder: pathlib.Path, stem: str,
                 weights_class: str = "diffusers: DiffusionPipeline"
                 ) -> list[pathlib.Path]:
  """The safetensors files of one part: plain before `.fp16`, whole before sharded.

  Raises:
    UserError: if there are none, or an index names a file that is absent or elsewhere.
  """
  for variant in ("", ".fp16"):
    whole = folder / f"{stem}{variant}.safetensors"
    if whole.is_file():
      return [whole]
    index = folder / f"{stem}.safetensors.index{variant}.json"
    if index.is_file():
      return _shards(index)
  if list(folder.glob("*.bin")) or list(folder.glob("*.ckpt")):
    raise UserError(f"{folder} has only pickled weights, which can run code when read; "
                    f"convert them to safetensors, for example with {weights_class}"
                    ".from_pretrained(folder).save_pretrained(new_folder)")
  raise UserError(f"{folder / stem}.safetensors does not exist; must hold the weights of "
                  f"{folder.name}")


def load_module(build: Callable[..., nnx.Module], files: Sequence[pathlib.Path],
                renames: Sequence[tuple[str, str]] = _RENAMES) -> nnx.Module:
  """Builds a module straight from its weights, one tensor at a time.

  Args:
    build: called as `build(rngs=…)`; only its shapes and dtypes are used.
    files: safetensors files that together hold each of its tensors once.
    renames: patterns found in the files' names of tensors, and what replaces them.

  Raises:
    UserError: lists tensors that are missing, unknown, there twice, or of another shape;
      or says why the config describes no network.
  """
  return open_module(build, files, renames).read()


def open_module(build: Callable[..., nnx.Module], files: Sequence[pathlib.Path],
                renames: Sequence[tuple[str, str]] = _RENAMES) -> Unread[nnx.Module]:
  """`load_module` without the weights: of the files it reads what tensors they hold."""
  shapes = _abstract(build, files[0].parent)
  graphdef, state = nnx.split(shapes)
  sources = _find_tensors(state, files, renames)

  def read() -> nnx.Module:
    loaded = []
    for file, found in sources.items():
      with _open(file) as tensors:
        for source in found:
          shape, dtype = source.variable.shape, source.variable.dtype
          tensor = tensors.get_tensor(source.name).transpose(source.axes).reshape(shape)
          loaded.append((source.path, source.variable.replace(jnp.asarray(tensor, dtype))))
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))

  return Unread(shapes, read)


@dataclasses.dataclass(frozen=True)
class _Source:
  """Where a variable of a module is found in a file, and what it is there."""

  path: tuple[Any, ...]  # in the module
  variable: nnx.Variable
  name: str  # in the file
  axes: tuple[int, ...]  # in the order in which the module has them


def _find_tensors(state: nnx.State, files: Sequence[pathlib.Path],
                  renames: Sequence[tuple[str, str]]) -> dict[pathlib.Path, list[_Source]]:
  """Which of each file's tensors belongs where; raises UserError if they are not the state's."""
  paths = {_file_name(path): (path, variable) for path, variable in
           nnx.to_flat_state(state)}
  sources: dict[pathlib.Path, list[_Source]] = {file: [] for file in files}
  missing, unknown, twice, misshapen = set(paths), [], [], []
  for file in files:
    with _open(file) as tensors:
      for name in tensors.keys():
        key = _canonical(name, renames)
        if any(re.search(pattern, key) for pattern in _IGNORED):
          continue
        if key not in paths:
          unknown.append(name)
          continue
        if key not in missing:
          twice.append(name)
          continue
        missing.remove(key)
        path, variable = paths[key]
        shape = tensors.get_slice(name).get_shape()
        axes = _axes(str(path[-1]), shape, variable.shape)
        if axes is None:
          misshapen.append(f"{name} {shape}, which does not fit {list(variable.shape)}")
        else:
          sources[file].append(_Source(path, variable, name, axes))
  _refuse(files, {"missing": sorted(missing), "not part of the model": unknown,
                  "there twice": twice, "misshapen": misshapen})
  return sources


def save_module(module: nnx.Module, path: str | os.PathLike, *,
                dtype: DTypeLike | None = None) -> None:
  """Writes a module as one safetensors file that diffusers and transformers read.

  Args:
    module: any of this package's networks, without LoRA.
    path: of the file.
    dtype: to cast to; the weights' own where absent.
  """
  tensors = {}
  for variable_path, variable in nnx.to_flat_state(nnx.state(module)):
    array = np.asarray(variable[...], dtype)
    if variable_path[-1] == "kernel":
      array = array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0))
    tensors[_file_name(variable_path)] = np.asarray(array, order="C")
  save_tensors(tensors, path)


def save_tensors(tensors: dict[str, np.ndarray], path: str | os.PathLike,
                 metadata: Mapping[str, str] | None = None) -> None:
  """Writes a safetensors file that torch's libraries read, and others than its owner may."""
  save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
  mask = os.umask(0)
  os.umask(mask)
  os.chmod(path, 0o666 & ~mask)  # the library leaves it to the owner alone


def _file_name(path: tuple[Any, ...]) -> str:
  """A variable's path in the module -> its tensor's name in the file."""
  *modules, leaf = path
  return ".".join([*map(str, modules), _LEAVES[leaf]])


def _canonical(name: str, renames: Sequence[tuple[str, str]] = _RENAMES) -> str:
  for pattern, replacement in renames:
    name = re.sub(pattern, replacement, name)
  return name


def _axes(leaf: str, found: Sequence[int], wanted: Sequence[int]
          ) -> tuple[int, ...] | None:
  """How to transpose a tensor of shape `found`; None if it then does not fit `wanted`.

  Kernels are stored output first. A linear layer and a 1×1 convolution are the same
  thing in two shapes, and files have either for the same block.
  """
  if leaf != "kernel":
    return tuple(range(len(found))) if tuple(found) == tuple(wanted) else None
  axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(len(found))
  if axes is None:
    return None
  shape = [found[axis] for axis in axes]
  as_convolution = lambda s: [1] * (4 - len(s)) + list(s)
  return axes if as_convolution(shape) == as_convolution(wanted) else None


class ConstantRngs:
  """In the place of `nnx.Rngs`, whose counter takes seconds to trace in a large module."""

  def params(self) -> jax.Array:
    return jax.random.key(0)


def _abstract(build: Callable[..., nnx.Module], folder: pathlib.Path) -> nnx.Module:
  """The module with shapes and dtypes in the place of its weights."""
  try:
    return nnx.eval_shape(lambda: build(rngs=ConstantRngs()))
  except (TypeError, ValueError, ZeroDivisionError) as error:
    raise UserError(f"{folder / 'config.json'} describes no network: "
                    f"{_one_line(error)}") from error


def _refuse(files: Iterable[pathlib.Path], named: Mapping[str, Sequence[str]]) -> None:
  """Raises UserError if there are names of tensors under any problem."""
  problems = []
  for what, names in named.items():
    if names:
      rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
      problems.append(f"{len(names)} tensors {what}: {', '.join(names[:_LISTED])}{rest}")
  if problems:
    raise UserError(f"{', '.join(map(str, files))}: {'; '.join(problems)}")


def _open(file: pathlib.Path):
  try:
    return safe_open(file, framework="numpy")
  except (OSError, SafetensorError) as error:
    raise UserError(f"{file} cannot be read as safetensors: {error}") from error


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
  """The files that a sharded checkpoint's index names."""
  weight_map = _read_json(index).get("weight_map")
  if not isinstance(weight_map, Mapping):
    raise UserError(f"{index} has no weight_map; must map tensor names to files")
  names = sorted(set(map(str, weight_map.values())))
  for name in names:
    if name != pathlib.PurePath(name).name or not name.endswith(".safetensors"):
      raise UserError(f"{index} names {name!r}; must be a .safetensors file beside it")
    if not os.path.isfile(index.parent / name):  # also False for what is no name at all
      raise UserError(f"{index.parent / name} does not exist, but {index.name} names it")
  return [index.parent / name for name in names]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"{path} does not exist; a model folder must have it") from None
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read as JSON: {error}") from error
  if not isinstance(content, dict):
    raise UserError(f"{path} holds a {type(content).__name__}; must be a JSON object")
  return content


def _read_config(path: pathlib.Path, parse: Callable[[Mapping[str, Any]], Any]) -> Any:
  """Reads a JSON file and parses it; values of the wrong kind are the file's fault."""
  values = _read_json(path)
  try:
    return parse(values)
  except (TypeError, ValueError, ZeroDivisionError) as error:
    raise UserError(f"{path} has a value of the wrong kind: {_one_line(error)}") from error


def _check_parts_fit(folder: pathlib.Path, unet: UNetConfig, vae: VAEConfig,
                     text_encoder: CLIPTextConfig, tokens: int) -> None:
  """Refuses parts of different models in one folder."""
  if text_encoder.hidden_size != unet.cross_attention_dim:
    raise UserError(
        f"{folder}: the text encoder's hidden_size={text_encoder.hidden_size} must equal "
        f"the UNet's cross_attention_dim={unet.cross_attention_dim}")
  if vae.latent_channels != unet.in_channels:
    raise UserError(f"{folder}: the VAE's latent_channels={vae.latent_channels} must "
                    f"equal the UNet's in_channels={unet.in_channels}")
  if tokens > text_encoder.vocab_size:
    raise UserError(f"{folder}: the tokenizer has {tokens} tokens; must be at most the "
                    f"text encoder's vocab_size={text_encoder.vocab_size}")


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())


def _check_pipeline(folder: pathlib.Path) -> None:
  """Refuses a folder that says it is another kind of pipeline."""
  if not (folder / "model_index.json").is_file():
    return
  name = _read_json(folder / "model_index.json").get("_class_name")
  if name not in _PIPELINES:
    raise UserError(f"{folder / 'model_index.json'}: _class_name={name!r} is not "
                    f"supported; must be one of {', '.join(_PIPELINES)}")


def _load_tokenizer(folder: pathlib.Path):
  # Without torch, transformers says that models need it. Here only its tokenizer is read.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  from transformers import CLIPTokenizer  # slow to import, so only where it is needed

  if not (folder / "tokenizer.json").is_file():  # all that transformers 5 writes
    for name in ("vocab.json", "merges.txt"):
      if not (folder / name).is_file():
        raise UserError(f"{folder / name} does not exist; a tokenizer's folder "
                        "must have it")
  try:
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
  except Exception as error:  # the library raises a different type for each damage
    raise UserError(f"{folder} cannot be read as a CLIP tokenizer: "
                    f"{_one_line(error)}") from error


def _download(repo: str, revision: str | None, kind: Repository) -> pathlib.Path:
  """Downloads what is needed of a hub repository, each weight in one variant only."""
  try:
    wanted = kind.choose(huggingface_hub.list_repo_files(repo, revision=revision))
    return pathlib.Path(huggingface_hub.snapshot_download(
        repo, revision=revision, allow_patterns=wanted))
  except hub_errors.GatedRepoError:
    raise UserError(f"{kind.field}={repo!r} is gated: accept its terms on the hub and "
                    "log in with `hf auth login`") from None
  except hub_errors.RevisionNotFoundError:
    raise UserError(f"{kind.revision_field}={revision!r} does not exist in {repo!r}; must "
                    "be a branch, tag or commit") from None
  except hub_errors.RepositoryNotFoundError:
    raise UserError(f"{kind.field}={repo!r} is neither a local folder nor a public "
                    "hub repository; if it is private, run `hf auth login`") from None
  except hub_errors.HFValidationError:
    raise UserError(f"{kind.field}={repo!r} does not exist, and is no hub id such as "
                    "'owner/name'") from None
  except Exception as error:  # no network, in one of the ways of several HTTP libraries
    return _from_cache(repo, revision, kind, error)


def _from_cache(repo: str, revision: str | None, kind: Repository, error: Exception
                ) -> pathlib.Path:
  """What an earlier download left; `snapshot_download` would ask for every file."""
  for name in kind.probe:
    found = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
    if isinstance(found, str):
      return pathlib.Path(found).parents[name.count("/")]
  raise UserError(f"{kind.field}={repo!r} is not a local folder, and cannot be "
                  f"downloaded ({_one_line(error)}); give a folder that holds the model"
                  ) from error


def _choose_files(names: Sequence[str]) -> list[str]:
  """Of a repository's files: configs, tokenizer, and each part's weights once."""
  chosen = [n for n in names if n == "model_index.json" or n in (
      "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in _WEIGHT_NAMES))
            or n.startswith("tokenizer/") and n.endswith((".json", ".txt"))]
  for part, stem in _WEIGHT_NAMES.items():
    chosen += _choose_weights(names, f"{part}/{stem}")
  return chosen


def _choose_clip_files(names: Sequence[str]) -> list[str]:
  """Of a repository's files: configs, tokenizer, and the weights once."""
  configs = ("config.json", "preprocessor_config.json", "processor_config.json")
  return [n for n in names if n in configs + _TOKENIZER_FILES] + _choose_weights(
      names, "model")


def _choose_tokenizer_files(names: Sequence[str]) -> list[str]:
  return [n for n in names if n in _TOKENIZER_FILES]


def _choose_weights(names: Sequence[str], stem: str) -> list[str]:
  """The files that hold one part's weights, plain before `.fp16`."""
  for variant in ("", ".fp16"):
    pattern = (rf"{stem}{variant}(-\d+-of-\d+)?\.safetensors|"
               rf"{stem}\.safetensors\.index{variant}\.json|"
               rf"{stem}-\d+-of-\d+{variant}\.safetensors")
    found = [n for n in names if re.fullmatch(pattern, n)]
    if variant == "":
      found = [n for n in found if ".fp16" not in n]
    if found:
      return found
  return []


DIFFUSERS_REPOSITORY = Repository(
    field="pretrained.model",
    formats="a folder in diffusers' format, a hub id such as 'owner/name', or 'tiny'",
    probe=("unet/config.json",), weights_class="diffusers: DiffusionPipeline",
    choose=_choose_files)
CLIP_REPOSITORY = Repository(
    field="reward_kwargs.model",
    formats="a folder in transformers' format or a hub id such as 'owner/name'",
    probe=("config.json",), weights_class="transformers: CLIPModel",
    choose=_choose_clip_files)
TOKENIZER_REPOSITORY = dataclasses.replace(
    CLIP_REPOSITORY, field="reward_kwargs.tokenizer",
    probe=("tokenizer.json", "vocab.json"), choose=_choose_tokenizer_files)
