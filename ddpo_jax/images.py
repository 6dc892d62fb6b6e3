"""Images as files, and grids of images with captions."""

from __future__ import annotations

from collections.abc import Sequence
import io
import math
import textwrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GRID_COLUMNS = 8
_TILE = 192  # pixels; smaller images are enlarged to it
_CAPTION_LINES = 3


def encode_image(image: np.ndarray, file_format: str, **options: Any) -> bytes:
  """[H, W, 3] uint8 -> the bytes of a file such as "JPEG" or "PNG"; `options` are Pillow's."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format=file_format, **options)
  return buffer.getvalue()


def image_grid(images: np.ndarray, captions: Sequence[str]) -> Image.Image:
  """Lays out images with a caption under each.

  Args:
    images: [N, H, W, 3] uint8, N at least 1.
    captions: N lines of text, wrapped to the image's width.
  """
  zoom = max(1, math.ceil(_TILE / images.shape[2]))
  width, height = images.shape[2] * zoom, images.shape[1] * zoom
  font_size = max(12, width // 16)
  font = ImageFont.load_default(size=font_size)
  letters = int(width / font.getlength("n")) - 1
  line_height = math.ceil(font_size * 1.25)
  tile_height = height + _CAPTION_LINES * line_height + 8
  columns = min(_GRID_COLUMNS, len(images))
  rows = math.ceil(len(images) / columns)
  grid = Image.new("RGB", (columns * (width + 4), rows * tile_height), "white")
  pen = ImageDraw.Draw(grid)
  for i, (image, caption) in enumerate(zip(images, captions)):
    left, top = i % columns * (width + 4), i // columns * tile_height
    tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
    grid.paste(tile, (left, top))
    lines = textwrap.wrap(caption, letters, max_lines=_CAPTION_LINES, placeholder="…")
    for row, text in enumerate(lines):
      pen.text((left + 2, top + height + 2 + row * line_height), text, fill="black",
               font=font)
  return grid
