"""Images as files, and grids of images with captions."""

from __future__ import annotations

from collections.abc import Sequence
import io
import math
import pathlib
import textwrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GRID_COLUMNS = 8
_TILE = 192  # pixels; smaller images are enlarged to it
_CAPTION_LINES = 3
_MAX_SIDE = 65_500  # pixels of a JPEG file


def encode_image(image: np.ndarray, file_format: str, **options: Any) -> bytes:
  """[H, W, 3] uint8 -> the bytes of a file such as "JPEG" or "PNG"; `options` are Pillow's."""
  buffer = io.BytesIO()
  Image.fromarray(np.asarray(image)).save(buffer, format=file_format, **options)
  return buffer.getvalue()


def number_of(picture: pathlib.Path) -> int:
  """The epoch in a picture's name, such as epoch_0001.jpg; -1 if there is none."""
  digits = picture.stem.rpartition("_")[2]
  return int(digits) if digits.isdecimal() else -1


def image_grid(images: np.ndarray, captions: Sequence[str]) -> Image.Image:
  """Lays out images with a caption under each.

  Args:
    images: [N, H, W, 3] uint8, N at least 1.
    captions: N lines of text, wrapped to the image's width.
  """
  zoom = max(1, math.ceil(_TILE / images.shape[2]))
  width, height = images.shape[2] * zoom, images.shape[1] * zoom
  font_size = max(12, width // 16)
  font = _font(captions, font_size)
  letters = int(width / font.getlength("n")) - 1
  line_height = math.ceil(font_size * 1.25)
  tile_height = height + _CAPTION_LINES * line_height + 8
  most_rows = _MAX_SIDE // tile_height
  columns = min(max(_GRID_COLUMNS, math.ceil(len(images) / most_rows)), len(images))
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


def _font(captions: Sequence[str], size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
  if all(caption.isascii() for caption in captions):
    return ImageFont.load_default(size=size)
  # Pillow's has no accents; the one that comes with matplotlib also has Greek and Cyrillic.
  import matplotlib  # slow
  fonts = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
  return ImageFont.truetype(fonts / "DejaVuSans.ttf", size)
