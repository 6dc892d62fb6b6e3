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
