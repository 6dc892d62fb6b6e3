"""Rewards on the size of an image as a JPEG file."""

from __future__ import annotations

import io
from typing import Any

from jaxtyping import Float32, UInt8
import numpy as np
from PIL import Image

_QUALITY = 95


def jpeg_incompressibility(images: UInt8[np.ndarray, "B H W 3"], prompts: list[str],
                           metadata: list[dict[str, Any]]
                           ) -> tuple[Float32[np.ndarray, " B"], dict[str, Any]]:
  """The file's size in kilobytes (1000 bytes), at quality 95; and an empty dict.

  Prompts and metadata are not used.
  """
  del prompts, metadata
  return np.array([_kilobytes(image) for image in images], np.float32), {}


def jpeg_compressibility(images: UInt8[np.ndarray, "B H W 3"], prompts: list[str],
                         metadata: list[dict[str, Any]]
                         ) -> tuple[Float32[np.ndarray, " B"], dict[str, Any]]:
  """The negative of `jpeg_incompressibility`."""
  sizes, info = jpeg_incompressibility(images, prompts, metadata)
  return -sizes, info


def _kilobytes(image: np.ndarray) -> float:
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="JPEG", quality=_QUALITY)
  return buffer.tell() / 1000
