"""Reading and writing safetensors files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import os
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ddpo_jax.errors import UserError
from ddpo_jax.messages import one_line

# What weights may be, as safetensors calls it; those of 8 bits mean nothing without their scales.
FLOATS = ("F64", "F32", "F16", "BF16")
_LFS = b"version https://git-lfs"  # what stands in the place of a file


@contextlib.contextmanager
def open_tensors(named: str, path: str | os.PathLike) -> Iterator[Any]:
  """Opens a file, of which tensors are read when they are asked for.

  Args:
    named: the file as the message is to call it.
    path: of the file.

  Raises:
    UserError: if it is missing, truncated or of another kind, now or while it is open.
  """
  try:
    with safe_open(path, framework="numpy") as tensors:
      yield tensors
  except (OSError, SafetensorError) as error:
    reason = ("it is a pointer of Git LFS, whose file `git lfs pull` fetches" if _is_lfs(path)
              else f"{one_line(error)}; must be a whole .safetensors file")
    raise UserError(f"{named} cannot be read as safetensors: {reason}") from error


def save_tensors(tensors: dict[str, np.ndarray], path: str | os.PathLike,
                 metadata: Mapping[str, str] | None = None) -> None:
  """Writes a file that torch's libraries read, and others than its owner may."""
  save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
  mask = os.umask(0)
  os.umask(mask)
  os.chmod(path, 0o666 & ~mask)  # the library leaves it to the owner alone


def _is_lfs(path: str | os.PathLike) -> bool:
  """Whether a repository was cloned without its large files."""
  try:
    with open(path, "rb") as file:
      return file.read(len(_LFS)) == _LFS
  except OSError:
    return False
