"""Pictures of a run's or a base model's images, as scripts/sample.py writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import os
import pathlib
import re
from typing import Any

from jax.typing import DTypeLike
import numpy as np
from PIL import Image

from ddpo_jax import build
from ddpo_jax.config import Config
from ddpo_jax.console import say
from ddpo_jax.devices import configure_jax_for_base_model, first_device, host_memory
from ddpo_jax.errors import UserError, said_of
from ddpo_jax.files import check_output, expand_home
from ddpo_jax.images import image_grid
from ddpo_jax.inference import ImageGenerator, SamplingOptions, load_base_unet, load_run
from ddpo_jax.messages import counted, is_utf8, shown
from ddpo_jax.model_names import TINY
from ddpo_jax.models import StableDiffusion, load_pretrained
from ddpo_jax.models.hub import DIFFUSERS_REPOSITORY, model_folder
from ddpo_jax.prompts import load_lines
from ddpo_jax.resource_errors import with_sampling_advice

_PICTURES = (".jpg", ".jpeg", ".png")

_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda x: 0 <= x < 2**31, "must be in [0, 2147483648)"),
    "num_steps": (lambda x: 1 <= x <= 1000, "must be in [1, 1000]"),
    "guidance_scale": (lambda x: 0 <= x < math.inf, "must be a finite number, at least 0"),
    "eta": (lambda x: 0 <= x <= 1, "must be in [0, 1]"),
    "batch_size": (lambda x: 1 <= x <= 10_000, "must be in [1, 10000]"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRequest:
  """The options of scripts/sample.py.

  Raises:
    UserError: if one of them is out of range, or they do not fit together.
  """

  output: str | os.PathLike[str]  # a folder wherever it ends in a slash
  run: str | None = None  # this or the next
  model: str | None = None
  base_model: str | None = None  # of the run; None: where it was
  prompts: Sequence[str] = ()
  prompts_file: str | None = None
  compare: bool = False
  seed: int = 0
  num_steps: int | None = None  # None, here and below: as in the run
  guidance_scale: float | None = None
  eta: float | None = None
  batch_size: int = 8
  mixed_precision: str | None = None

  def __post_init__(self) -> None:
    if self.run is None and self.model is None:
      raise UserError("--run or --model is missing; one of them must name what to draw with")
    if self.base_model is not None and self.run is None:
      raise UserError("--base_model needs --run, whose base model it is")
    if self.compare and self.run is None:
      raise UserError("--compare needs --run: a fine-tuned model to compare with its base")
    if not os.fspath(self.output):
      raise UserError("--output is empty; must be a picture's name, or a folder's")
    for name, (is_right, text) in _RULES.items():
      value = getattr(self, name)
      if value is not None and not is_right(value):
        raise UserError(f"--{name}={value} {text}")
    for prompt in self.prompts:
      if not is_utf8(prompt):
        raise UserError(f"--prompts has {shown(prompt)}; must be text in UTF-8")

  @property
  def is_grid(self) -> bool:
    """Whether the output is one picture, by what it ends in; else it is a folder."""
    return not self.is_surely_folder and pathlib.Path(self.output).suffix.lower() in _PICTURES

  @property
  def is_surely_folder(self) -> bool:
    return os.fspath(self.output).endswith(("/", os.sep))

  def sampling_options(self, cfg: Config | None) -> SamplingOptions:
    """What is given, and else what the run was sampled with, if it is one."""
    names = ("num_steps", "guidance_scale", "eta")
    of_run = {} if cfg is None else {name: getattr(cfg.sample, name) for name in names}
    given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
    return SamplingOptions(seed=self.seed, batch_size=self.batch_size, **{**of_run, **given})


def sample_to_files(request: SampleRequest) -> None:
  """What scripts/sample.py does.

  Raises:
    UserError: if there is no prompt, or the run, the model or the output cannot be used.
  """
  prompts = [*request.prompts,
             *(load_lines(request.prompts_file) if request.prompts_file else [])]
  if not prompts:
    raise UserError("--prompts is empty; give prompts there or with --prompts_file")
  output = expand_home(request.output)
  _check_picture_output(request, output)
  try:
    columns = _columns(request, prompts)
  except FloatingPointError as error:
    raise UserError(_not_finite(request, error)) from error
  images = np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])
  captions = prompts
  if request.compare:
    captions = [f"{which}: {prompt}" for prompt in prompts for which in ("before", "after")]
  _write(images, captions, output, is_grid=request.is_grid)
  say(f"Wrote {output}" if request.is_grid else
      f"Wrote {counted(len(images), 'image')} to {output}{os.sep}")


def _not_finite(request: SampleRequest, error: FloatingPointError) -> str:
  source = f"--model={request.model}" if request.run is None else f"--run={request.run}"
  return (f"{source}: {error}; the weights or the precision are to blame: must be weights without "
          "NaN, in a precision that they do not overflow, such as --mixed_precision=no")


def _columns(request: SampleRequest, prompts: Sequence[str]) -> list[np.ndarray]:
  """The prompts' images of each of the models asked for."""
  first_device()  # if there is none, that is said in one line
  say(f"Reading the model of {request.run or request.model}")
  at_once = min(request.batch_size, len(prompts))
  if request.run is None:
    assert request.model is not None  # checked by the request
    configure_jax_for_base_model()
    with host_memory():
      models = _load_base(request.model, build.DTYPES[request.mixed_precision or "no"])
    with with_sampling_advice(at_once, request.mixed_precision or "no"):
      generate = _generator(models, request.sampling_options(None), len(prompts))
      return [generate(models.unet, prompts, "Base model")]
  tuned = load_run(request.run, request.mixed_precision, request.base_model)
  options = request.sampling_options(tuned.cfg)
  with with_sampling_advice(at_once, tuned.cfg.mixed_precision):
    generate = _generator(tuned.models, options, len(prompts) * (2 if request.compare else 1))
    columns = [generate(load_base_unet(tuned), prompts, "Base model")] if request.compare else []
    return [*columns, generate(tuned.models.unet, prompts, "Fine-tuned model")]


def _generator(models: StableDiffusion, options: SamplingOptions, count: int) -> ImageGenerator:
  """Says what takes long from here on, and makes the generator."""
  say(f"Compiling, and sampling {counted(count, 'image')} in {options.num_steps} steps")
  return ImageGenerator(models, options)


def _load_base(model: str, dtype: DTypeLike) -> StableDiffusion:
  if model == TINY:
    return load_pretrained(model, dtype=dtype)
  named = dataclasses.replace(DIFFUSERS_REPOSITORY, field="--model")  # in its messages
  with said_of("--model", model):
    return load_pretrained(model_folder(model, repository=named), dtype=dtype)


def _check_picture_output(request: SampleRequest, output: pathlib.Path) -> None:
  """Refuses, before anything is loaded, what could not be written."""
  is_folder = request.is_surely_folder or not request.is_grid and (
      output.suffix.lower() not in Image.registered_extensions() or output.is_dir())
  if not (is_folder or request.is_grid):
    raise UserError(f"--output={output} must end in {', '.join(_PICTURES)} for one grid, or "
                    "be the name of a folder for single files")
  check_output(f"--output={output!s:.200}", output, is_folder=not request.is_grid)


def _write(images: np.ndarray, captions: Sequence[str], output: pathlib.Path, *,
           is_grid: bool) -> None:
  """One grid, or a folder of single PNG files."""
  try:
    if is_grid:
      output.parent.mkdir(parents=True, exist_ok=True)
      image_grid(images, captions).save(output, quality=95)
      return
    output.mkdir(parents=True, exist_ok=True)
    for i, (image, caption) in enumerate(zip(images, captions)):
      words = re.sub(r"[^\w-]+", "_", caption)[:60].strip("_")
      stem = f"{i:04d}_{words}".rstrip("_")
      Image.fromarray(image).save(output / f"{stem}.png")
  except OSError as error:
    raise UserError(f"--output={output} cannot be written: {error}") from error
