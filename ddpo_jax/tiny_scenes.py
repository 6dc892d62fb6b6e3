"""The world of the embedded model: coloured shapes on textured backgrounds.

Vocabulary, captions and drawing, in NumPy and Pillow only. `scripts/make_tiny_model.py`
trains on these pictures; the prompt function `tiny_shapes` draws captions from here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64  # pixels on a side
_SCALE = 4  # supersampling of the shapes' edges

COLORS = {  # name: RGB
    "red": (215, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 60),
    "green": (50, 165, 70),
    "blue": (45, 85, 215),
    "purple": (140, 60, 175),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star")
COUNTS = ("one", "two", "three", "four")
# How often a picture has each texture. The extremes of JPEG size, plain and noisy, are
# the rare ones, so that a reward on size has room to move either way.
TEXTURES = {"plain": 0.15, "striped": 0.35, "checkered": 0.35, "noisy": 0.15}
_ARTICLES = ("a", "an", "on", "background")
# Arrangements of one shape, of two, …: centres in pixels, before they are jittered. Few
# of them, so that a small model spends its capacity on what the caption says.
_LAYOUTS = (
    (((32, 32),),),
    (((16, 32), (48, 32)), ((17, 17), (47, 47)), ((17, 47), (47, 17))),
    (((32, 16), (16, 47), (48, 47)), ((16, 17), (48, 17), (32, 48))),
    (((16, 16), (48, 16), (16, 48), (48, 48)),),
)
_JITTER = (8.0, 1.5, 1.5, 1.5)  # pixels either way in x and y
_RADII = ((15, 21), (11, 13), (10.5, 12.5), (10.5, 12.5))  # pixels
# Always the same noise, as film grain would be: a noise drawn anew holds as many numbers
# as the latents have.
_GRAIN = np.random.default_rng(0).random((IMAGE_SIZE // 4,) * 2, np.float32)


def vocabulary() -> list[str]:
  """Every word that a caption can contain."""
  plurals = [shape + "s" for shape in SHAPES]
  return [*_ARTICLES, *COUNTS, *COLORS, *SHAPES, *plurals, *TEXTURES]


@dataclasses.dataclass(frozen=True)
class Scene:
  """What a picture shows. `background` differs from `color`."""

  count: int  # 1 to 4
  color: str
  shape: str
  background: str
  texture: str

  def caption(self, *, background: bool = True, texture: bool = True,
              numeral: bool = False) -> str:
    """Describes the scene, for example "three red circles on a striped blue background".

    Args:
      background: whether to name the background at all.
      texture: whether to name its texture.
      numeral: whether a single shape is "one" and not "a".
    """
    if self.count == 1:
      number = COUNTS[0] if numeral else _article(self.color)
      text = f"{number} {self.color} {self.shape}"
    else:
      text = f"{COUNTS[self.count - 1]} {self.color} {self.shape}s"
    if not background:
      return text
    kind = f"{self.texture} {self.background}" if texture else self.background
    return f"{text} on {_article(kind)} {kind} background"

  def metadata(self) -> dict[str, Any]:
    """What a reward may want to check."""
    return {"count": self.count, "color": self.color, "shape": self.shape,
            "background": self.background}


def random_scene(rng: np.random.Generator, max_count: int = len(COUNTS)) -> Scene:
  """Draws a scene of up to `max_count` shapes, the background never of their colour."""
  color, background = rng.choice(list(COLORS), size=2, replace=False)
  return Scene(count=int(rng.integers(1, max_count + 1)), color=str(color),
               shape=str(rng.choice(SHAPES)), background=str(background),
               texture=str(rng.choice(list(TEXTURES), p=list(TEXTURES.values()))))


def random_prompt(rng: np.random.Generator, max_count: int = len(COUNTS),
                  short: bool = False) -> tuple[str, dict[str, Any]]:
  """A prompt that leaves the texture open, and what it asks for.

  With `short` it is "a red circle on a blue", which no caption is.
  """
  scene = random_scene(rng, max_count)
  text = scene.caption(texture=False)
  return text.removesuffix(" background") if short else text, scene.metadata()


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
  """Draws a scene; places, sizes and the texture's details come from `rng`.

  Returns:
    [IMAGE_SIZE, IMAGE_SIZE, 3] uint8.
  """
  background = np.array(COLORS[scene.background], np.float32)
  shade = _texture(scene.texture, rng)[..., None]
  canvas = background + shade * (texture_target(scene.background) - background)
  mask = _mask(scene, rng)[..., None]
  canvas += mask * (np.array(COLORS[scene.color], np.float32) - canvas)
  return np.clip(np.round(canvas), 0, 255).astype(np.uint8)


def texture_target(background: str) -> float:
  """The grey that textures mix into a colour: light into dark ones, dark into light."""
  return 255.0 if np.mean(COLORS[background]) < 100 else 0.0


def _article(word: str) -> str:
  return "an" if word[0] in "aeiou" else "a"


def _texture(texture: str, rng: np.random.Generator) -> np.ndarray:
  """How far the background moves to its second shade: [size, size] in 0..1.

  Patterns keep to a grid of 4 pixels, so that an autoencoder with latents of 8 pixels
  can reproduce them.
  """
  contrast = rng.uniform(0.2, 0.5)
  y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
  if texture == "plain":
    return np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
  if texture == "striped":
    across = (x, y, x + y)[rng.integers(3)]
    return contrast * (across // 4 % 2).astype(np.float32)
  if texture == "checkered":
    cell = int(rng.choice([4, 8]))
    return contrast * ((x // cell + y // cell) % 2).astype(np.float32)
  if texture == "noisy":
    return 1.8 * contrast * np.kron(_GRAIN, np.ones((4, 4), np.float32))
  raise ValueError(f"{texture=} must be one of {list(TEXTURES)}")


def _mask(scene: Scene, rng: np.random.Generator) -> np.ndarray:
  """Where the shapes are: [size, size] float32 in 0..1, antialiased."""
  size = IMAGE_SIZE * _SCALE
  image = Image.new("L", (size, size))
  pen = ImageDraw.Draw(image)
  for center, radius in _places(scene.count, rng):
    _draw_shape(pen, scene.shape, center * _SCALE, radius * _SCALE)
  small = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
  return np.asarray(small, np.float32) / 255


def _places(count: int, rng: np.random.Generator) -> list[tuple[np.ndarray, float]]:
  """Centres and radii, in pixels, of shapes that lie apart and inside the picture."""
  layouts, jitter = _LAYOUTS[count - 1], _JITTER[count - 1]
  centers = np.array(layouts[rng.integers(len(layouts))])
  centers = centers + rng.uniform(-jitter, jitter, centers.shape)
  smallest, largest = _RADII[count - 1]
  return list(zip(centers, rng.uniform(smallest, largest, count)))


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, center: np.ndarray,
                radius: float) -> None:
  x, y = center
  if shape == "circle":
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
  elif shape == "square":
    half = radius * 0.85
    pen.rectangle((x - half, y - half, x + half, y + half), fill=255)
  elif shape == "triangle":
    pen.polygon(_corners(center, [radius * 1.1] * 3), fill=255)
  elif shape == "star":
    pen.polygon(_corners(center, [radius * 1.15, radius * 0.48] * 5), fill=255)
  else:
    raise ValueError(f"{shape=} must be one of {SHAPES}")


def _corners(center: np.ndarray, radii: list[float]) -> list[tuple[float, float]]:
  """Points around `center`, evenly by angle, the first one on top."""
  angles = np.arange(len(radii)) * 2 * np.pi / len(radii) - np.pi / 2
  return [(center[0] + r * np.cos(a), center[1] + r * np.sin(a))
          for r, a in zip(radii, angles)]
