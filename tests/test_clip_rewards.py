"""Rewards from CLIP: against torch, from threads, in batches, and their arguments."""

from concurrent import futures
import json
import pathlib
import re
import shutil
import unittest.mock

import conftest
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from ddpo_jax.errors import UserError
from ddpo_jax.models import load_clip
from ddpo_jax.rewards import check_rewards
from ddpo_jax.rewards import clip as clip_rewards
from ddpo_jax.rewards.clip import make_aesthetic_score, make_clip_score, make_pick_score

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tiny_clip = pytest.importorskip("tiny_clip")

PUBLIC_HEAD = conftest.SHARED_DATA / "sac+logos+ava1-l14-linearMSE.pth"
PROMPTS = ["a cat", "", "two dogs on a hill", "a cat " * 100, "A CAT!", "é 🐈"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny_clip.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def reference(folder):
  return transformers.CLIPModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def images():
  """Smooth and noisy, not square."""
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (3, 5, 7, 3)).astype(np.uint8)
  smooth = [np.asarray(Image.fromarray(x).resize((70, 50))) for x in coarse]
  return np.stack([*smooth, *rng.integers(0, 256, (3, 50, 70, 3)).astype(np.uint8)])


@pytest.fixture(scope="module")
def head(tmp_path_factory):
  return tiny_clip.make_head(tmp_path_factory.mktemp("head") / "head.pth")


def embed(reference, folder, images, prompts):
  """Normalised embeddings of images and prompts by transformers alone."""
  processor = tiny_clip.ImageProcessor.from_pretrained(folder)
  tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
  pixels = processor(images=[Image.fromarray(x) for x in images], return_tensors="pt")
  # As transformers' own users call it: padded to the longest, with an attention mask.
  tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77,
                     return_tensors="pt")
  with torch.no_grad():
    output = reference(**tokens, **pixels)
  return output.image_embeds, output.text_embeds


def test_aesthetic_score(folder, reference, images, head):
  kwargs, layers = head
  expected = layers(embed(reference, folder, images, PROMPTS)[0])[:, 0].detach().numpy()
  reward_fn = make_aesthetic_score(model=str(folder), **kwargs)
  rewards, info = reward_fn(images, PROMPTS, [{}] * 6)
  assert rewards.shape == (6,) and rewards.dtype == np.float32 and info == {}
  error = np.abs(rewards - expected).max()
  print(f"aesthetic_score: largest error {error:.1e}, scores differ by {np.ptp(expected)}")
  assert error < 1e-5 and np.ptp(expected) > 0.01


def test_aesthetic_score_leaves_the_text_tower_off_the_device(folder, head, monkeypatch):
  """A third of the weights."""
  given, program = [], clip_rewards._Program

  def spy(score, images, networks, *rest):
    given.extend(vars(networks[0]))
    return program(score, images, networks, *rest)

  monkeypatch.setattr(clip_rewards, "_Program", spy)
  make_aesthetic_score(model=str(folder), **head[0])
  assert "vision_model" in given and not any(name.startswith("text_") for name in given)


@pytest.mark.slow
@pytest.mark.skipif(not PUBLIC_HEAD.is_file(), reason=f"needs the head's file {PUBLIC_HEAD}")
def test_aesthetic_score_of_full_size(tmp_path):
  """ViT-L/14's shapes, the public head, images of 512×512; random weights."""
  torch.manual_seed(0)
  vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                num_attention_heads=16, patch_size=14)
  text = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1)  # not used
  model = transformers.CLIPModel(transformers.CLIPConfig(
      text_config=text, vision_config=vision, projection_dim=768)).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim > 1:
        parameter *= 2
  model.save_pretrained(tmp_path)
  images = np.random.default_rng(0).integers(0, 256, (3, 512, 512, 3)).astype(np.uint8)
  images[1] = images[1] // 64 * 64
  images[2, :, :, 1:] = 40
  pixels = tiny_clip.ImageProcessor()(images=list(images), return_tensors="pt")
  layers = torch.load(PUBLIC_HEAD, map_location="cpu", weights_only=True)
  with torch.no_grad():
    x = model.visual_projection(model.vision_model(pixels.pixel_values).pooler_output)
    x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    for i in (0, 2, 4, 6, 7):
      x = x @ layers[f"layers.{i}.weight"].T + layers[f"layers.{i}.bias"]
  del model
  expected = x[:, 0].numpy()
  errors = {}
  for dtype in ("float32", "bfloat16", "float16"):
    reward_fn = make_aesthetic_score(model=str(tmp_path), head=str(PUBLIC_HEAD), dtype=dtype)
    errors[dtype] = float(np.abs(reward_fn(images, ["x"] * 3, [])[0] - expected).max())
  print(f"aesthetic_score of full size: {expected}, largest errors {errors}")
  assert errors["float32"] < 0.01 and np.ptp(expected) > 0.01
  assert max(errors.values()) < 0.5


@pytest.mark.parametrize("make", (make_clip_score, make_pick_score))
def test_score_of_image_and_prompt(make, folder, reference, images):
  image, text = embed(reference, folder, images, PROMPTS)
  cosine = (image * text).sum(1).numpy()
  assert (cosine < 0).any() and (cosine > 0).any()
  scale = float(reference.logit_scale.exp().detach())
  assert scale == pytest.approx(14.285, abs=0.01)
  expected = (np.maximum(100 * cosine, 0) if make is make_clip_score else scale * cosine)
  rewards, info = make(model=str(folder))(images, PROMPTS, [{}] * 6)
  assert rewards.shape == (6,) and rewards.dtype == np.float32 and info == {}
  error = np.abs(rewards - expected).max()
  print(f"{make.__name__}: largest error {error:.1e}, scores {expected}")
  assert error < 1e-3
  np.testing.assert_array_equal(check_rewards("f", rewards, PROMPTS), rewards)


@pytest.mark.parametrize("dtype,tolerance", [("bfloat16", 0.5), ("float16", 0.05)])
def test_half_precision(dtype, tolerance, folder, images):
  """In the dtype asked for, weights too; the score stays float32."""
  full = make_pick_score(model=str(folder))(images, PROMPTS, [])[0]
  half = make_pick_score(model=str(folder), dtype=dtype)(images, PROMPTS, [])[0]
  print(f"pick_score in {dtype}: largest difference {np.abs(half - full).max():.1e}")
  assert half.dtype == np.float32 and 0 < np.abs(half - full).max() < tolerance


def test_computes_in_the_dtype_asked_for(folder, images):
  """No product of the program is of numbers of another type."""
  for dtype, name in (("float32", "f32"), ("bfloat16", "bf16")):
    products = []

    def score(model, pixels, products=products):
      program = jax.jit(model.embed_images).lower(jax.ShapeDtypeStruct(
          pixels.shape, pixels.dtype)).as_text()
      for types in re.findall(r"(?:dot_general|convolution)\b.*: \((.*)\) ->", program):
        products += re.findall(r"x([a-z]+\d+)>", types)
      return jnp.zeros(len(pixels))

    clip = load_clip(folder, dtype=jnp.dtype(dtype))
    clip_rewards._Program(score, clip.images, clip.model, dtype, 8)(images)
    assert len(products) > 10 and set(products) == {name}


@pytest.mark.parametrize("dtype,expected", (("float32", "highest"), ("bfloat16", "default")))
def test_float32_is_not_rounded_to_tf32(folder, images, dtype, expected):
  """As the run's own products are with allow_tf32: scores do not depend on its settings."""
  seen = []

  def score(model, pixels):
    seen.append(jax.config.jax_default_matmul_precision)
    return pixels.mean((1, 2, 3))

  clip = load_clip(folder, dtype=jnp.dtype(dtype))
  with jax.default_matmul_precision("tensorfloat32"):
    clip_rewards._Program(score, clip.images, clip.model, dtype, 8)(images)
  assert seen == [expected]


@pytest.mark.parametrize("batch_size,sizes", [(1, [1] * 6), (4, [3, 3]), (5, [3, 3]),
                                              (16, [6])])
def test_batches_have_one_size_and_change_nothing(batch_size, sizes, folder, images):
  expected = make_clip_score(model=str(folder))(images, PROMPTS, [])[0]
  reward_fn = make_clip_score(model=str(folder), batch_size=batch_size)
  seen = []
  normalise = clip_rewards.normalise_pixels
  noted = lambda x, config: seen.append(len(x)) or normalise(x, config)
  with unittest.mock.patch.object(clip_rewards, "normalise_pixels", noted):
    rewards = reward_fn(images, PROMPTS, [])[0]
  assert seen == sizes[:1]  # compiled once
  np.testing.assert_allclose(rewards, expected, atol=1e-4)


def test_last_batch_is_padded(folder, images):
  """Five in batches of at most two: the sixth is padding, and not returned."""
  reward_fn = make_pick_score(model=str(folder), batch_size=2)
  whole = reward_fn(images, PROMPTS, [])[0]
  np.testing.assert_allclose(reward_fn(images[:5], PROMPTS[:5], [])[0], whole[:5], atol=1e-5)


def test_threads_get_their_own_scores(folder, images):
  """Images of three sizes and their prompts, scored by eight threads at once."""
  reward_fn = make_pick_score(model=str(folder), batch_size=4)
  rng = np.random.default_rng(0)
  jobs = [(images[order][:, :size], [PROMPTS[i] for i in order])
          for size in (50, 40, 33) for order in (rng.permutation(6) for _ in range(4))]
  with futures.ThreadPoolExecutor(8) as pool:
    together = list(pool.map(lambda job: reward_fn(*job, [])[0], jobs))
  for job, rewards in zip(jobs, together):
    np.testing.assert_array_equal(rewards, reward_fn(*job, [])[0])


def test_runs_on_one_local_device(folder, images):
  clip = load_clip(folder)
  program = clip_rewards._Program(lambda model, pixels: pixels.mean((1, 2, 3)), clip.images,
                                  clip.model, "float32", 4)
  leaves = jax.tree.leaves(program._networks)
  assert len(jax.local_devices()) > 1
  assert {device for x in leaves for device in x.devices()} == {jax.local_devices()[0]}
  assert program(images).shape == (6,)


def test_only_images_go_to_the_device(folder, images):
  """The weights stay there: nothing crosses but what is asked to."""
  reward_fn = make_pick_score(model=str(folder))
  first = reward_fn(images, PROMPTS, [])[0]
  with jax.transfer_guard("disallow"):
    np.testing.assert_array_equal(reward_fn(images, PROMPTS, [])[0], first)


def test_head_must_fit_the_model(folder, tmp_path):
  kwargs, _ = tiny_clip.make_head(tmp_path / "head.pth", (tiny_clip.PROJECTION + 1, 1))
  with pytest.raises(UserError, match="embeddings of 24 numbers; must be 25"):
    make_aesthetic_score(model=str(folder), **kwargs)


def test_head_is_the_public_one_unless_told_otherwise(folder, head):
  kwargs, _ = head
  with pytest.raises(UserError, match="reward_kwargs.head=.*must be 21dd590f"):
    make_aesthetic_score(model=str(folder), head=kwargs["head"])


@pytest.mark.parametrize("make", (make_clip_score, make_pick_score))
@pytest.mark.parametrize("kwargs,message", [
    (dict(model="no_such_folder"), "reward_kwargs.model='no_such_folder' does not exist"),
    (dict(model="tiny"), "reward_kwargs.model='tiny' does not exist"),
    (dict(tokenizer="no_such_folder"), "reward_kwargs.tokenizer='no_such_folder'"),
    (dict(dtype="int8"), "reward_kwargs.dtype='int8'"),
    (dict(dtype=jnp.float32), "reward_kwargs.dtype="),
    (dict(batch_size=0), "reward_kwargs.batch_size=0"),
    (dict(batch_size=2.5), "reward_kwargs.batch_size=2.5"),
])
def test_wrong_arguments(make, kwargs, message, folder):
  with pytest.raises(UserError, match=message) as error:
    make(**{"model": str(folder), **kwargs})
  assert "\n" not in str(error.value)


@pytest.fixture
def copy(folder, tmp_path):
  """A copy of the folder that a test may damage."""
  return pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))


def test_tokenizer_from_elsewhere(copy, folder, images):
  for path in copy.glob("*token*"):
    path.unlink()
  for name in ("vocab.json", "merges.txt"):
    (copy / name).unlink(missing_ok=True)
  with pytest.raises(UserError, match="vocab.json does not exist"):
    make_pick_score(model=str(copy))
  rewards = make_pick_score(model=str(copy), tokenizer=str(folder))(images, PROMPTS, [])[0]
  expected = make_pick_score(model=str(folder))(images, PROMPTS, [])[0]
  np.testing.assert_array_equal(rewards, expected)


@pytest.mark.parametrize("change,message", [
    (dict(vocab_size=529), "530 tokens; must be at most the model's vocab_size=529"),
    (dict(eos_token_id=528), "ends a text with token 529; must be .*eos_token_id=528"),
])
def test_tokenizer_of_another_model(change, message, copy):
  torch.manual_seed(0)
  transformers.CLIPModel(transformers.CLIPConfig(
      text_config={**tiny_clip.TEXT, **change},
      vision_config=tiny_clip.VISION)).save_pretrained(copy)
  with pytest.raises(UserError, match=message):
    make_clip_score(model=str(copy))


def test_legacy_end_of_text(copy, folder, images):
  """Where the config says 2, the end is the largest id: the same place."""
  path = copy / "config.json"
  values = json.loads(path.read_text())
  values["text_config"]["eos_token_id"] = 2
  path.write_text(json.dumps(values))
  np.testing.assert_array_equal(make_clip_score(model=str(copy))(images, PROMPTS, [])[0],
                                make_clip_score(model=str(folder))(images, PROMPTS, [])[0])


@pytest.fixture
def hub(monkeypatch, tmp_path):
  """A hub that cannot be reached, and its empty cache folder."""
  refuse = unittest.mock.Mock(side_effect=ConnectionError("no\nnetwork"))
  monkeypatch.setattr(huggingface_hub, "list_repo_files", refuse)
  monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  return tmp_path / "hub"


def put_in_cache(hub, repository, folder, ignore=None):
  root = hub / f"models--{repository.replace('/', '--')}"
  shutil.copytree(folder, root / "snapshots" / ("0" * 40), ignore=ignore)
  (root / "refs").mkdir()
  (root / "refs" / "main").write_text("0" * 40)


def test_unreachable_hub_is_said_in_one_line(hub, head):
  for make, kwargs, field in (
      (make_aesthetic_score, {}, "reward_kwargs.head: aesthetic-model.pth"),
      (make_aesthetic_score, head[0],
       "reward_kwargs.model='openai/clip-vit-large-patch14'"),
      (make_clip_score, {}, "reward_kwargs.model='openai/clip-vit-large-patch14'"),
      (make_pick_score, {}, "reward_kwargs.model='yuvalkirstain/PickScore_v1'")):
    with pytest.raises(UserError, match=f"{field}.*cannot be downloaded .no network") as error:
      make(**kwargs)
    assert "\n" not in str(error.value)


def test_pickscore_s_tokenizer_is_that_of_its_origin(hub, folder, images):
  """Downloaded before: the checkpoint without a tokenizer, and CLIP-H's repository."""
  put_in_cache(hub, "yuvalkirstain/PickScore_v1", folder,
               shutil.ignore_patterns("*token*", "vocab.json", "merges.txt"))
  with pytest.raises(UserError, match="reward_kwargs.tokenizer='laion/CLIP-ViT-H-14"):
    make_pick_score()
  put_in_cache(hub, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", folder)
  expected = make_pick_score(model=str(folder))(images, PROMPTS, [])[0]
  np.testing.assert_array_equal(make_pick_score()(images, PROMPTS, [])[0], expected)


def test_pickscore_with_a_tokenizer_needs_no_other(hub, folder, images):
  put_in_cache(hub, "yuvalkirstain/PickScore_v1", folder)
  expected = make_pick_score(model=str(folder))(images, PROMPTS, [])[0]
  np.testing.assert_array_equal(make_pick_score()(images, PROMPTS, [])[0], expected)


def test_files_chosen_of_hub_repositories():
  from ddpo_jax.models import hub
  names = ["config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5",
           "flax_model.msgpack", "open_clip_model.safetensors", "vocab.json", "merges.txt",
           "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
           "preprocessor_config.json", "README.md", "onnx/model.safetensors"]
  chosen = hub.CLIP_REPOSITORY.choose(names)
  assert sorted(chosen) == sorted([
      "config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer.json",
      "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json"])
  assert "model.safetensors" not in hub.TOKENIZER_REPOSITORY.choose(names)
