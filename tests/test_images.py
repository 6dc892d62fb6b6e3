"""Grids of images with captions."""

import numpy as np
import pytest

from ddpo_jax.images import image_grid

BLACK = np.zeros((1, 64, 64, 3), np.uint8)


def test_a_grid_of_many_images_fits_into_a_jpeg(tmp_path):
  grid = image_grid(np.zeros((2200, 64, 64, 3), np.uint8), [""] * 2200)
  assert max(grid.size) <= 65_500
  grid.save(tmp_path / "grid.jpg")


def test_a_few_are_eight_in_a_row():
  wide, tall = (image_grid(np.repeat(BLACK, n, 0), [""] * n) for n in (8, 9))
  assert tall.size == (wide.size[0], 2 * wide.size[1])


@pytest.mark.parametrize("one,other", ("üé", "дя", "λπ"))
def test_captions_have_letters_that_are_not_ascii(one, other):
  """A font without them draws the same box for each."""
  drawn = [np.asarray(image_grid(BLACK, [letter])) for letter in (one, other)]
  assert (drawn[0] != drawn[1]).any()


def test_images_go_row_by_row():
  greys = np.arange(10, 110, 10, dtype=np.uint8)
  images = np.broadcast_to(greys[:, None, None, None], (10, 64, 64, 3))
  grid = np.asarray(image_grid(np.ascontiguousarray(images), [""] * 10))
  height, width = grid.shape[0] // 2, grid.shape[1] // 8
  tops = [grid[row * height, column * width, 0] for row in range(2) for column in range(8)]
  assert tops == [*greys, *[255] * 6]


def test_a_long_caption_has_three_lines_and_no_more():
  """All of them above the next row's images."""
  ink = np.asarray(image_grid(BLACK, ["many " * 100]))[192:].min(axis=(1, 2)) < 128
  assert (np.diff(ink.astype(int)) == 1).sum() == 3 and not ink[-1]
