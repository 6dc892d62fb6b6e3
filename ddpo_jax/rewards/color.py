"""Whether a picture of the embedded model has the colours that its prompt names."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float32, UInt8
import numpy as np

from ddpo_jax import tiny_scenes
from ddpo_jax.errors import UserError
from ddpo_jax.messages import shown
from ddpo_jax.rewards.metadata import checks_metadata

_NAMES = list(tiny_scenes.COLORS)
_PALETTE = np.array(list(tiny_scenes.COLORS.values()), np.float32)
_NEAR = 45.0  # RGB distance within which a pixel may be a blend of two colours
_DEEPEST_SHADE = 0.6  # how far most textures go from their colour to their second shade
_LEAST_SHAPE = 0.02  # of the picture's pixels
_RIM = 2  # pixels at the picture's edge, where the shapes never are
_LEAST_RIM = 0.1  # of the rim's pixels have the background's own colour
_LEAST_BACKGROUND = 0.3  # of all pixels


@checks_metadata(lambda metadata: [_colors(data) for data in metadata])
def color_alignment(images: UInt8[np.ndarray, "B H W 3"], prompts: list[str],
                    metadata: list[dict[str, Any]]
                    ) -> tuple[Float32[np.ndarray, " B"], dict[str, Any]]:
  """How much of what stands before the background has the colour that the prompt names.

  A pixel counts for the colour of the palette that it is nearest to. Left out are those
  of the background (its colour, lighter and darker, as textures make it) and those that
  blend background and shape, at its edge. Of the rest the share is taken that has the
  shape's colour. A picture of which less than 30% is background, or of whose rim less than
  10% has the background's colour unshaded, scores proportionally less, so that filling it
  with the shape's colour, or drawing another background, does not pay.

  Args:
    images: of any size.
    prompts: not used.
    metadata: of each image, "color" and "background", as `tiny_shapes` gives them.

  Returns:
    Scores in 0..1, and an empty dict.

  Raises:
    UserError: if the metadata does not name two different colours.
  """
  del prompts
  return np.array([_alignment(image, *_colors(data))
                   for image, data in zip(images, metadata)], np.float32), {}


def _colors(metadata: dict[str, Any]) -> tuple[int, int]:
  names: tuple[Any, Any] = metadata.get("color"), metadata.get("background")
  if names[0] == names[1] or not all(name in _NAMES for name in names):
    raise UserError(
        f"reward_fn='color_alignment' got metadata {shown(metadata)}; must have a 'color' and "
        f"another one, the 'background', among {', '.join(_NAMES)}: use prompt_fn='tiny_shapes'")
  return _NAMES.index(names[0]), _NAMES.index(names[1])


def _alignment(image: np.ndarray, color: int, background: int) -> float:
  pixels = image.reshape(-1, 3).astype(np.float32)
  distances = np.linalg.norm(pixels[:, None] - _PALETTE, axis=-1)
  # The background is its colour in all shades that a texture may give it.
  shade = tiny_scenes.texture_target(_NAMES[background]) - _PALETTE[background]
  distances[:, background] = _to_line(pixels, background, _DEEPEST_SHADE * shade)
  nearest = np.argmin(distances, axis=-1)
  named, behind = nearest == color, nearest == background
  edge = _to_line(pixels, background, _PALETTE[color] - _PALETTE[background]) < _NEAR
  shape = named.sum() + (~(named | behind | edge)).sum()
  if shape < _LEAST_SHAPE * len(pixels):
    return 0.0
  rim = np.ones(image.shape[:2], bool)
  rim[_RIM:-_RIM, _RIM:-_RIM] = False
  pure = np.linalg.norm(pixels - _PALETTE[background], axis=-1) < _NEAR
  room = min(1.0, behind.mean() / _LEAST_BACKGROUND,
             (pure & behind)[rim.ravel()].mean() / _LEAST_RIM)
  return float(room * named.sum() / shape)


def _to_line(pixels: np.ndarray, start: int, direction: np.ndarray) -> np.ndarray:
  """Distance of pixels [N, 3] to the line from a palette colour along `direction`: [N]."""
  along = np.clip((pixels - _PALETTE[start]) @ direction / (direction @ direction), 0.0, 1.0)
  return np.linalg.norm(pixels - _PALETTE[start] - along[:, None] * direction, axis=-1)
