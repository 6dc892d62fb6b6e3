"""CLIP's towers, preprocessing and scores against transformers, on seeded weights."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from ddpo_jax import shapes
from ddpo_jax.models import load_clip
from ddpo_jax.rewards import clip as rewards
from ddpo_jax.rewards import get_reward
from ddpo_jax.types import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPTS = ["a red circle", "two stars on a blue background", "a cat", ""]
TOWERS = {  # text and vision
    "quick_gelu, as OpenAI's": dict(
        text=dict(hidden_act="quick_gelu", eos_token_id=2),
        vision=dict(hidden_act="quick_gelu", patch_size=8)),
    "gelu, as LAION's": dict(
        text=dict(hidden_act="gelu", hidden_size=48, eos_token_id=529),
        vision=dict(hidden_act="gelu", hidden_size=64, patch_size=14, image_size=56)),
}


def save_clip(folder, tokenizer, text=None, vision=None, projection_dim=24, seed=0):
  """A random CLIP in transformers' format, with the golden files' tokenizer."""
  torch.manual_seed(seed)
  text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
              num_attention_heads=4, vocab_size=530, bos_token_id=528, eos_token_id=529,
              pad_token_id=529, projection_dim=projection_dim) | (text or {})
  vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, image_size=32, patch_size=8,
                projection_dim=projection_dim) | (vision or {})
  model = transformers.CLIPModel(transformers.CLIPConfig(
      text_config=text, vision_config=vision, projection_dim=projection_dim)).eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if weight.ndim > 1 or "class_embedding" in name:
        weight.normal_(std=0.2)
  model.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  size = model.config.vision_config.image_size
  processor = transformers.CLIPImageProcessor(
      size={"shortest_edge": size}, crop_size={"height": size, "width": size})
  processor.save_pretrained(folder)
  return model, processor


@pytest.fixture(scope="module", params=TOWERS, ids=lambda name: name.split(",")[0])
def clips(request, tiny_sd, tmp_path_factory):
  """(folder, transformers' model, its image processor, ours)."""
  folder = tmp_path_factory.mktemp("clip")
  model, processor = save_clip(folder, tiny_sd.tokenizer, **TOWERS[request.param])
  return folder, model, processor, load_clip(folder)


def pictures(height, width):
  """Noise, a smooth gradient, and drawn shapes, of the size asked for."""
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
  y, x = np.mgrid[:height, :width]
  smooth = np.stack([255 * y / height, 255 * x / width, 128 + 0 * x], -1).astype(np.uint8)
  drawn = Image.fromarray(shapes.draw(shapes.random_scene(rng), rng))
  drawn = np.asarray(drawn.resize((width, height), Image.Resampling.NEAREST))
  extreme = (255 * ((x + y) % 2))[..., None].repeat(3, -1).astype(np.uint8)
  return np.stack([noise, smooth, drawn, extreme])


def relative(ours, theirs):
  theirs = theirs.detach().numpy()
  return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


def test_towers(clips):
  _, model, _, ours = clips
  size = ours.model.config.vision.image_size
  images = np.random.default_rng(0).normal(size=(3, size, size, 3)).astype(np.float32)
  ids = ours.tokenize(PROMPTS)
  with torch.no_grad():
    theirs = model(pixel_values=torch.tensor(np.moveaxis(images, -1, 1)),
                   input_ids=torch.tensor(ids).long())
  embed = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  seen = jax.jit(lambda m, x: m.embed_images(x))(ours.model, images)
  said = jax.jit(lambda m, x: m.embed_texts(x))(ours.model, ids)
  assert relative(embed(np.asarray(seen)), theirs.image_embeds) < 1e-5
  assert relative(embed(np.asarray(said)), theirs.text_embeds) < 1e-5


@pytest.mark.parametrize("height,width", [(64, 64), (64, 97), (131, 32), (20, 20), (15, 40),
                                          (512, 512)])
def test_preprocessing(clips, height, width):
  _, _, processor, ours = clips
  images = pictures(height, width)
  theirs = processor([Image.fromarray(i) for i in images], return_tensors="np").pixel_values
  found = jax.jit(lambda x: rewards.preprocess(ours, x))(images)
  to_unit = lambda x: x * np.array(ours.image_std) + np.array(ours.image_mean)
  difference = to_unit(np.asarray(found)) - to_unit(np.moveaxis(theirs, 1, -1))
  assert np.abs(difference).max() <= 2 / 255 + 1e-6


def test_clip_and_pick_score(clips):
  folder, model, processor, ours = clips
  images = pictures(48, 64)
  inputs = processor([Image.fromarray(i) for i in images], return_tensors="pt")
  with torch.no_grad():
    theirs = model(pixel_values=inputs.pixel_values,
                   input_ids=torch.tensor(ours.tokenize(PROMPTS)).long())
  cosine = (theirs.image_embeds * theirs.text_embeds).sum(-1).numpy()
  # 3 at a time: the last batch is filled up.
  score = get_reward("clip_score", model=str(folder), batch_size=3)
  assert score(images, PROMPTS, [{}] * 4)[0] == pytest.approx(
      np.maximum(100 * cosine, 0), abs=0.2)  # preprocessing differs by up to 2/255
  pick = get_reward("pick_score", model=str(folder), batch_size=8)
  scale = model.logit_scale.exp().item()
  assert pick(images, PROMPTS, [{}] * 4)[0] == pytest.approx(scale * cosine, abs=0.2)


def head_file(path, width, dtype=torch.float32):
  """A head as the public one is, for embeddings of `width` numbers."""
  torch.manual_seed(1)
  sizes = (width, 1024, 128, 64, 16, 1)
  layers = torch.nn.ModuleDict({"layers": torch.nn.Sequential(*[
      layer for a, b in zip(sizes, sizes[1:])
      for layer in (torch.nn.Linear(a, b, dtype=dtype), torch.nn.Dropout(0.2))])})
  torch.save(layers.state_dict(), path)
  return layers["layers"].eval()


@pytest.mark.parametrize("dtype,tolerance", [("float32", 0.01), ("bfloat16", 0.05)])
def test_aesthetic_score(clips, tmp_path, dtype, tolerance):
  folder, model, processor, _ = clips
  head = head_file(tmp_path / "head.pth", model.config.projection_dim)
  images = pictures(64, 64)
  inputs = processor([Image.fromarray(i) for i in images], return_tensors="pt")
  with torch.no_grad():
    seen = model.visual_projection(model.vision_model(inputs.pixel_values).pooler_output)
    expected = head(seen / seen.norm(dim=-1, keepdim=True))[:, 0].numpy()
  score = get_reward("aesthetic_score", model=str(folder), head=str(tmp_path / "head.pth"),
                     head_sha256=None, dtype=dtype)
  found, info = score(images, PROMPTS, [{}] * 4)
  assert found.dtype == np.float32 and info == {}
  np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize("kwargs,message", [
    ({"dtype": "fp8"}, "float32, bfloat16"), ({"batch_size": 0}, "batch_size=0"),
    ({"model": "no_such_folder"}, "reward_kwargs.model='no_such_folder'"),
    ({"head": "none.pth"}, "none.pth cannot be read"), ({"rank": 3}, "rank")])
def test_wrong_arguments_are_said_at_once(clips, kwargs, message):
  with pytest.raises(UserError, match=message):
    get_reward("aesthetic_score", **{"model": str(clips[0]), **kwargs})


def test_head_of_another_clip(clips, tmp_path):
  head_file(tmp_path / "head.pth", 768)
  with pytest.raises(UserError, match="768 numbers.*have 24"):
    get_reward("aesthetic_score", model=str(clips[0]), head=str(tmp_path / "head.pth"),
               head_sha256=None)


def test_a_text_encoder_is_no_clip(tiny_sd, tmp_path):
  transformers.CLIPTextModel(transformers.CLIPTextConfig(
      hidden_size=16, num_attention_heads=2, num_hidden_layers=1)).save_pretrained(tmp_path)
  with pytest.raises(UserError, match="model_type='clip_text_model'"):
    load_clip(tmp_path)


@pytest.mark.slow
def test_vit_l_14(tiny_sd, tmp_path):
  """The aesthetic predictor's own shapes: 428 M weights."""
  model, _ = save_clip(
      tmp_path, tiny_sd.tokenizer, projection_dim=768,
      text=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, vocab_size=49408, eos_token_id=2),
      vision=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                  num_attention_heads=16, image_size=224, patch_size=14))
  with torch.no_grad():
    for weight in model.parameters():
      if weight.ndim > 1:
        weight.mul_(0.1)
  model.save_pretrained(tmp_path)
  ours = load_clip(tmp_path)
  images = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
  ids = np.random.default_rng(0).integers(0, 49408, (2, 77))
  with torch.no_grad():
    theirs = model(pixel_values=torch.tensor(np.moveaxis(images, -1, 1)),
                   input_ids=torch.tensor(ids))
  embed = lambda x: np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)
  errors = (relative(embed(ours.model.embed_images(jnp.asarray(images))), theirs.image_embeds),
            relative(embed(ours.model.embed_texts(jnp.asarray(ids))), theirs.text_embeds))
  print("relative errors, image and text:", errors)
  assert max(errors) < 1e-4
