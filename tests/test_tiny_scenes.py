"""The embedded model's world: captions, pictures, and the tokens of the words."""

import dataclasses
import pathlib

import numpy as np
import pytest
import scipy.ndimage

from ddpo_jax import rewards, tiny_scenes

SCRIPTS = pathlib.Path(__file__).parent.parent / "scripts"
SCENE = tiny_scenes.Scene(count=3, color="red", shape="circle", background="blue",
                          texture="striped")


def scenes(number, **fixed):
  rng = np.random.default_rng(0)
  return [dataclasses.replace(tiny_scenes.random_scene(rng), **fixed) for _ in range(number)]


def draw(scene, seed=0):
  return tiny_scenes.draw(scene, np.random.default_rng(seed))


def foreground(scene, image):
  """Where a picture without texture is nearer to the shapes' colour than to the other."""
  distance = {name: np.linalg.norm(image - np.array(tiny_scenes.COLORS[name], float), axis=-1)
              for name in (scene.color, scene.background)}
  return distance[scene.color] < distance[scene.background]


@pytest.mark.parametrize("scene, told, caption", [
    (SCENE, {}, "three red circles on a striped blue background"),
    (SCENE, {"texture": False}, "three red circles on a blue background"),
    (SCENE, {"background": False}, "three red circles"),
    (dataclasses.replace(SCENE, count=1, color="orange", background="orange"),
     {"texture": False}, "an orange circle on an orange background"),
    (dataclasses.replace(SCENE, count=1), {"numeral": True},
     "one red circle on a striped blue background"),
])
def test_caption(scene, told, caption):
  assert scene.caption(**told) == caption


def test_captions_keep_to_the_vocabulary():
  captions = [scene.caption(numeral=numeral) for scene in scenes(300)
              for numeral in (False, True)]
  words = {word for caption in captions for word in caption.split()}
  assert words == set(tiny_scenes.vocabulary())


def test_scenes_cover_the_world_and_never_hide_their_shapes():
  drawn = scenes(300)
  assert all(scene.color != scene.background for scene in drawn)
  for field, values in (("count", {1, 2, 3, 4}), ("color", set(tiny_scenes.COLORS)),
                        ("shape", set(tiny_scenes.SHAPES)), ("texture", set(tiny_scenes.TEXTURES)),
                        ("background", set(tiny_scenes.COLORS))):
    assert {getattr(scene, field) for scene in drawn} == values


def test_prompts_leave_the_texture_open():
  rng = np.random.default_rng(0)
  for _ in range(100):
    prompt, metadata = tiny_scenes.random_prompt(rng)
    assert not set(prompt.split()) & set(tiny_scenes.TEXTURES)
    assert prompt == tiny_scenes.Scene(**metadata, texture="plain").caption(texture=False)


@pytest.mark.parametrize("texture", tiny_scenes.TEXTURES)
def test_drawing_is_a_function_of_scene_and_generator(texture):
  scene = dataclasses.replace(SCENE, texture=texture)
  image = draw(scene)
  assert image.shape == (tiny_scenes.IMAGE_SIZE, tiny_scenes.IMAGE_SIZE, 3)
  assert image.dtype == np.uint8
  np.testing.assert_array_equal(image, draw(scene))
  assert np.any(image != draw(scene, seed=1))


def test_unknown_texture_and_shape_are_refused():
  with pytest.raises(ValueError, match="texture='dotted' must be one of"):
    draw(dataclasses.replace(SCENE, texture="dotted"))
  with pytest.raises(ValueError, match="shape='heart' must be one of"):
    draw(dataclasses.replace(SCENE, shape="heart"))


def test_pictures_have_the_colours_asked_for():
  for seed, scene in enumerate(scenes(50, texture="plain")):
    colors, areas = np.unique(draw(scene, seed).reshape(-1, 3), axis=0, return_counts=True)
    two_largest = {tuple(map(int, colors[i])) for i in np.argsort(areas)[-2:]}
    assert two_largest == {tiny_scenes.COLORS[scene.color], tiny_scenes.COLORS[scene.background]}


@pytest.mark.parametrize("shape", tiny_scenes.SHAPES)
@pytest.mark.parametrize("count", range(1, len(tiny_scenes.COUNTS) + 1))
def test_pictures_have_the_number_of_shapes_asked_for(shape, count):
  for seed, scene in enumerate(scenes(10, shape=shape, count=count, texture="plain")):
    parts, found = scipy.ndimage.label(foreground(scene, draw(scene, seed)))
    areas = np.bincount(parts.ravel(), minlength=found + 1)[1:]
    # The tip of a star can come apart from it, by a pixel or two.
    assert (areas > 8).sum() == count, scene.caption()


def test_jpeg_size_depends_on_the_texture():
  sizes = {}
  for texture in tiny_scenes.TEXTURES:
    images = np.stack([draw(scene, seed) for seed, scene in
                       enumerate(scenes(100, texture=texture))])
    sizes[texture], _ = rewards.get_reward("jpeg_incompressibility")(images, [], [])
  means = {texture: size.mean() for texture, size in sizes.items()}
  assert means["plain"] < 0.85 * means["checkered"]
  assert means["plain"] < 0.85 * means["striped"]
  assert max(means, key=means.get) == "noisy"
  # Room to move, in standard deviations of what an untrained model would draw.
  weights = np.repeat([*tiny_scenes.TEXTURES.values()], 100)
  every = np.concatenate([sizes[texture] for texture in tiny_scenes.TEXTURES])
  mean = np.average(every, weights=weights)
  spread = np.average((every - mean) ** 2, weights=weights) ** 0.5
  assert every.min() < mean - 1.5 * spread
  assert every.max() > mean + 1.5 * spread


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  transformers = pytest.importorskip("transformers")
  folder = tmp_path_factory.mktemp("tiny")
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(SCRIPTS)
    import make_tiny_model
    make_tiny_model.write_configs(folder)
  return transformers.CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))


def test_each_word_is_one_token(tokenizer):
  words = tiny_scenes.vocabulary()
  ids = tokenizer(words, add_special_tokens=False).input_ids
  assert [len(i) for i in ids] == [1] * len(words)
  assert len({i for [i] in ids}) == len(words)


def test_tokenizer_frames_and_pads_as_clip_does(tokenizer):
  assert tokenizer.model_max_length == 77
  caption = SCENE.caption()
  ids = tokenizer(caption, padding="max_length").input_ids
  assert len(ids) == 77
  assert ids[0] == tokenizer.bos_token_id
  words = len(caption.split())
  assert tokenizer.decode(ids[1:1 + words]).strip() == caption
  assert set(ids[1 + words:]) == {tokenizer.eos_token_id}


def test_words_outside_the_vocabulary_become_letters(tokenizer):
  ids = tokenizer("zebra", add_special_tokens=False).input_ids
  assert 1 < len(ids) <= 5
  assert tokenizer.decode(ids).strip() == "zebra"


def texture_alone(texture, background, seed):
  """A background without shapes: how its pixels differ from its colour."""
  shade = tiny_scenes._texture(texture, np.random.default_rng(seed))[..., None]
  color = np.array(tiny_scenes.COLORS[background], float)
  return shade * (tiny_scenes.texture_target(background) - color)


@pytest.mark.parametrize("background", tiny_scenes.COLORS)
@pytest.mark.parametrize("texture", ("striped", "checkered", "noisy"))
def test_textures_show_on_every_background(texture, background):
  for seed in range(10):
    assert np.ptp(texture_alone(texture, background, seed), axis=(0, 1)).max() > 30


@pytest.mark.parametrize("texture", ("checkered", "noisy"))
def test_textures_keep_to_a_grid_of_4_pixels(texture):
  """An autoencoder with latents of 8 pixels can reproduce those."""
  for seed in range(10):
    cells = tiny_scenes._texture(texture, np.random.default_rng(seed)).reshape(16, 4, 16, 4)
    assert (np.ptp(cells, axis=(1, 3)) == 0).all()


def test_stripes_are_4_pixels_wide():
  for seed in range(10):
    shade = tiny_scenes._texture("striped", np.random.default_rng(seed))
    for one in (shade, shade.T):
      np.testing.assert_array_equal(one[8:], one[:-8])
      assert (one[4:] != one[:-4]).all() or (one[4:] == one[:-4]).all()
