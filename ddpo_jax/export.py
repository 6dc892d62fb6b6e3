"""A run's weights, as scripts/export_lora.py writes them for other programs."""

from __future__ import annotations

import pathlib
import shutil

from safetensors import SafetensorError

from ddpo_jax import checkpoint, lora
from ddpo_jax.config import Config
from ddpo_jax.console import say
from ddpo_jax.errors import UserError
from ddpo_jax.files import check_output, expand_home
from ddpo_jax.inference import FineTuned, config_of, load_run
from ddpo_jax.messages import counted
from ddpo_jax.models.hub import WEIGHT_NAMES, find_weights, model_folder
from ddpo_jax.models.weights import save_module

_LORA_FILE = ".safetensors"


def export_run(run: str, output: pathlib.Path, file_format: str = "diffusers",
               base_model: str | None = None) -> None:
  """What scripts/export_lora.py does: a LoRA file, or a folder for a whole UNet.

  Raises:
    UserError: if the run cannot be read or the output cannot be written.
  """
  output = expand_home(output)
  folder, _ = checkpoint.find(run, "--run")
  _check_export(config_of(folder, "no", base_model), output, file_format)
  tuned = load_run(run, mixed_precision="no", base_model=base_model)
  try:
    if tuned.cfg.use_lora:
      output.parent.mkdir(parents=True, exist_ok=True)
      lora.export_lora(tuned.models.unet, output, _metadata(tuned), file_format=file_format)
    else:
      _export_unet(tuned, output)
  except (OSError, SafetensorError) as error:
    raise UserError(f"--output={output} cannot be written: {error}") from error
  say(f"Wrote {output}: {run} after {counted(tuned.epoch + 1, 'epoch')}")


def _check_export(cfg: Config, output: pathlib.Path, file_format: str) -> None:
  """Refuses, before anything is loaded, an output that does not suit the run."""
  if not cfg.use_lora:
    whole = "the run has use_lora=False, so its whole UNet is written, as a diffusers folder"
    if file_format != "diffusers":
      raise UserError(f"--format={file_format}: {whole}; must be diffusers")
    if output.suffix.lower() == _LORA_FILE:
      raise UserError(f"--output={output}: {whole}; must be the name of a folder")
  check_output(f"--output={output!s:.200}", output, is_folder=not cfg.use_lora)
  if cfg.use_lora and output.suffix.lower() != _LORA_FILE:
    raise UserError(f"--output={output} must end in {_LORA_FILE}, which is what is written; "
                    f"such as {output.with_suffix(_LORA_FILE)}")


def _metadata(tuned: FineTuned) -> dict[str, str]:
  """What a reader of the file may want to know of how it was made."""
  cfg = tuned.cfg
  rewards = [cfg.reward_fn] if isinstance(cfg.reward_fn, str) else sorted(cfg.reward_fn)
  # The weights' own: a run that began with lora.init_from has the rank of that file.
  ranks = lora.ranks(tuned.models.unet)
  return {"base_model": cfg.pretrained.model, "base_model_revision": cfg.pretrained.revision,
          "lora_rank": ", ".join(map(str, ranks)), "reward_fn": ", ".join(rewards),
          "epoch": str(tuned.epoch), "seed": str(cfg.seed), "trained_with": "ddpo_jax"}


def _export_unet(tuned: FineTuned, output: pathlib.Path) -> None:
  base = model_folder(tuned.cfg.pretrained.model, tuned.cfg.pretrained.revision) / "unet"
  stem = WEIGHT_NAMES["unet"]
  if output.is_dir() and find_weights(base, stem)[0].parent.samefile(output):
    raise UserError(f"--output={output} is the base model's own folder; choose another")
  output.mkdir(parents=True, exist_ok=True)
  shutil.copyfile(base / "config.json", output / "config.json")
  save_module(tuned.models.unet, output / f"{stem}.safetensors")
