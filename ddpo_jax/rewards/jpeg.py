"""Rewards on the size of an image as a JPEG file."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float32, UInt8
import numpy as np

from ddpo_jax.images import encode_image

_QUALITY = 95


def jpeg_incompressibility(images: UInt8[np.ndarray, "B H W 3"], prompts: list[str],
                           metadata: list[dict[str, Any]]
                           ) -> tuple[Float32[np.ndarray, " B"], dict[str, Any]]:
  """The file's size in kilobytes (1000 bytes), at quality 95; and an empty dict.

  Prompts and metadata are not used.
  """
  del prompts, metadata
  sizes = [len(encode_image(image, "JPEG", quality=_QUALITY)) / 1000 for image in images]
  return np.array(sizes, np.float32), {}


def jpeg_compressibility(images: UInt8[np.ndarray, "B H W 3"], prompts: list[str],
                         metadata: list[dict[str, Any]]
                         ) -> tuple[Float32[np.ndarray, " B"], dict[str, Any]]:
  """The negative of `jpeg_incompressibility`."""
  sizes, info = jpeg_incompressibility(images, prompts, metadata)
  return -sizes, info
