"""What `pretrained.model` may be: a folder, an id on the Hugging Face Hub, or "tiny"."""

from __future__ import annotations

import os
import pathlib
import re

from ddpo_jax import files

TINY = "tiny"
TINY_FOLDER = pathlib.Path(__file__).parent / "assets" / "tiny_sd"
FORMATS = f"a folder in diffusers' format, a hub id such as 'owner/name', or {TINY!r}"


def is_hub_id(model: str) -> bool:
  """Whether a name has the form of a hub id, "owner/name"."""
  return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) is not None


def is_local(model: str) -> bool:
  """Whether a model is on this machine, and not on the hub."""
  return model == TINY or os.path.isdir(os.path.expanduser(model))


def is_moved(model: str, before: str) -> bool:
  """Whether a folder that is here can be one that was elsewhere before, as on another machine."""
  return is_local(model) and os.path.isabs(before) and not is_local(before)


def absolute(model: str) -> str:
  """A local model's folder as an absolute path; everything else as it is."""
  return files.absolute(model) if is_local(model) and model != TINY else model
