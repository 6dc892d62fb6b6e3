"""Writing files whole, finding where a new one would lie, and images as the bytes of a file."""

from __future__ import annotations

import io
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Replaces a file's text at once: whoever reads it finds all of the old text or of the new.

  That holds as well after the process is killed, which may leave a file NAME.partial.
  """
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)


def nearest_existing(path: pathlib.Path) -> pathlib.Path:
  """The path itself if something is there, else the nearest folder or file above it; absolute.

  A symbolic link is there even if it points to nothing.

  Raises:
    OSError: if the path cannot be looked at, such as for a name that is too long.
    ValueError: if it cannot be a path at all, such as one with a NUL.
  """
  path = path.absolute()
  while not _exists(path):
    path = path.parent
  return path


def _exists(path: pathlib.Path) -> bool:
  try:
    os.lstat(path)
  except (FileNotFoundError, NotADirectoryError):
    return False
  return True


def encode_image(image: np.ndarray, file_format: str, **options: Any) -> bytes:
  """[H, W, 3] uint8 -> the bytes of a file such as "JPEG" or "PNG"; `options` are Pillow's."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format=file_format, **options)
  return buffer.getvalue()
