"""CLIP's towers and image preprocessing against transformers, seeded weights."""

import json
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw
import pytest

from ddpo_jax.errors import UserError
from ddpo_jax.models import load_clip
from ddpo_jax.models.clip import (
  CLIPConfig,
  CLIPImageConfig,
  CLIPModel,
  CLIPTextConfig,
  CLIPTextModel,
)
from ddpo_jax.models.weights import save_module
from ddpo_jax.rewards.clip import normalise_pixels, resize_and_crop

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tiny_clip = pytest.importorskip("tiny_clip")

TOLERANCE = 1e-4

TEXT = dict(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=12, eos_token_id=99,
            bos_token_id=98, pad_token_id=99)
VISION = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2,
              num_attention_heads=3, image_size=32, patch_size=8)
VIT_L_14 = dict(
    projection_dim=768,
    text_config=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                     num_attention_heads=12),
    vision_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                       num_attention_heads=16, patch_size=14))


def make_clip(folder, projection_dim=24, **changes):
  """A seeded CLIPModel of transformers, and its folder."""
  torch.manual_seed(0)
  config = {"text_config": TEXT, "vision_config": VISION, **changes}
  reference = transformers.CLIPModel(
      transformers.CLIPConfig(projection_dim=projection_dim, **config)).eval()
  with torch.no_grad():
    for parameter in reference.parameters():
      if parameter.ndim == 1:  # norms and biases, off their ones and zeros
        parameter += 0.1 * torch.randn_like(parameter)
  reference.save_pretrained(folder)
  return reference


def relative_error(ours, reference):
  """The larger of two: of the norm over all elements, and of the largest element."""
  reference = reference.detach().numpy()
  assert ours.shape == reference.shape
  difference = np.asarray(ours, np.float32) - reference
  return max(np.linalg.norm(difference) / np.linalg.norm(reference),
             np.abs(difference).max() / np.abs(reference).max())


def errors_of(model, reference, pixels, ids):
  """Relative errors of each tower's states, pooled states and projection."""
  with torch.no_grad():
    image = reference.vision_model(pixels)
    text = reference.text_model(ids)
    expected = (image.last_hidden_state, image.pooler_output,
                reference.visual_projection(image.pooler_output),
                text.last_hidden_state, text.pooler_output,
                reference.text_projection(text.pooler_output))

  def run(model, pixels, ids):
    states, text_states = model.vision_model(pixels), model.text_model(ids)
    return (states, model.vision_model.pool(states), model.embed_images(pixels),
            text_states, model.text_model.pool(text_states, ids), model.embed_texts(ids))

  ours = jax.jit(run)(model, jnp.asarray(pixels.permute(0, 2, 3, 1).numpy()),
                      jnp.asarray(ids.numpy().astype(np.int32)))
  return [relative_error(a, b) for a, b in zip(ours, expected, strict=True)]


def make_inputs(config):
  """Pixels, and ids whose end is followed by padding, at different places."""
  size = config.vision_config.image_size
  length = config.text_config.max_position_embeddings
  ids = torch.randint(0, config.text_config.vocab_size - 3, (3, length))
  for row, end in enumerate((2, length // 2, length - 1)):
    ids[row, end:] = config.text_config.vocab_size - 1
  return torch.randn(3, 3, size, size), ids


@pytest.mark.parametrize("act,eos", [("quick_gelu", 99), ("gelu", 99), ("quick_gelu", 2)])
def test_towers_and_projections(act, eos, tmp_path):
  """With the end of a text found by its token, and as configs of before 2023 have it."""
  reference = make_clip(
      tmp_path, text_config={**TEXT, "hidden_act": act, "eos_token_id": eos},
      vision_config={**VISION, "hidden_act": act})
  errors = errors_of(load_clip(tmp_path).model, reference, *make_inputs(reference.config))
  print(f"CLIP: relative errors {errors}")
  assert max(errors) < TOLERANCE


def test_image_size_that_is_no_multiple_of_the_patch(tmp_path):
  reference = make_clip(tmp_path, vision_config={**VISION, "image_size": 35})
  assert max(errors_of(load_clip(tmp_path).model, reference,
                       *make_inputs(reference.config))) < TOLERANCE


@pytest.mark.parametrize("dtype,tolerance", [("bfloat16", 3e-2), ("float16", 4e-3)])
def test_half_precision(dtype, tolerance, tmp_path):
  reference = make_clip(tmp_path)
  model = load_clip(tmp_path, dtype=jnp.dtype(dtype)).model
  assert model.visual_projection.kernel.dtype == dtype
  assert model.logit_scale.dtype == jnp.float32
  errors = errors_of(model, reference, *make_inputs(reference.config))
  print(f"CLIP in {dtype}: relative errors {errors}")
  assert max(errors) < tolerance


@pytest.mark.parametrize("values,parameters", [
    ({**VIT_L_14, "model_type": "clip"}, 427_616_513),
    (dict(projection_dim=1024,  # laion/CLIP-ViT-H-14-laion2B-s32B-b79K and PickScore
          text_config=dict(hidden_act="gelu", hidden_size=1024, intermediate_size=4096,
                           num_attention_heads=16, num_hidden_layers=24),
          vision_config=dict(hidden_act="gelu", hidden_size=1280, intermediate_size=5120,
                             num_attention_heads=16, num_hidden_layers=32, patch_size=14)),
     986_109_441)])
def test_hub_configs_give_models_of_the_known_size(values, parameters):
  rngs = types.SimpleNamespace(params=lambda: jax.random.key(0))  # fast to trace
  model = nnx.eval_shape(lambda: CLIPModel(CLIPConfig.from_dict(values), rngs=rngs))
  assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == parameters


@pytest.mark.slow
def test_vit_l_14(tmp_path):
  """The shapes of openai/clip-vit-large-patch14."""
  reference = make_clip(tmp_path, **VIT_L_14)
  errors = errors_of(load_clip(tmp_path).model, reference, *make_inputs(reference.config))
  print(f"CLIP ViT-L/14: relative errors {errors}")
  assert max(errors) < TOLERANCE


def test_files_of_older_libraries(tmp_path):
  """Buffers that count from 0 are ignored; half precision and shards are read."""
  from safetensors.torch import load_file, save_file
  reference = make_clip(tmp_path)
  tensors = load_file(tmp_path / "model.safetensors")
  tensors["text_model.embeddings.position_ids"] = torch.arange(12)[None]
  tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
  save_file(tensors, tmp_path / "model.safetensors")
  inputs = make_inputs(reference.config)
  assert max(errors_of(load_clip(tmp_path).model, reference, *inputs)) < TOLERANCE
  reference.half().save_pretrained(tmp_path / "half", max_shard_size="30KB")
  assert len(list((tmp_path / "half").glob("*.safetensors"))) > 2
  model = load_clip(tmp_path / "half").model
  assert max(errors_of(model, reference.float(), *inputs)) < TOLERANCE


def test_configs_of_older_libraries(tmp_path):
  """`text_config_dict` is the one that counts, as in transformers."""
  reference = make_clip(tmp_path)
  path = tmp_path / "config.json"
  values = json.loads(path.read_text())
  values["text_config_dict"] = {**values["text_config"], "model_type": "clip_text_model"}
  values["text_config"] = {**values["text_config"], "hidden_act": "gelu", "top_k": 50}
  values["vision_config_dict"] = None
  path.write_text(json.dumps(values))
  assert transformers.CLIPConfig.from_pretrained(tmp_path).text_config.hidden_act == "quick_gelu"
  assert max(errors_of(load_clip(tmp_path).model, reference,
                       *make_inputs(reference.config))) < TOLERANCE


def test_missing_fields_have_the_defaults_of_transformers():
  ours, reference = CLIPConfig.from_dict({}), transformers.CLIPConfig()
  for part in ("text_config", "vision_config"):
    for field, value in vars(getattr(ours, part)).items():
      assert value == getattr(getattr(reference, part), field), field
  assert ours.projection_dim == reference.projection_dim


def test_transformers_reads_what_we_save(tmp_path):
  reference = make_clip(tmp_path)
  save_module(load_clip(tmp_path).model, tmp_path / "model.safetensors")
  again, info = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(info.values()), info
  for name, tensor in reference.state_dict().items():
    assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("change,message", [
    (dict(model_type="siglip"), "model_type='siglip'"),
    (dict(text_config={**TEXT, "hidden_act": "gelu_new"}), "hidden_act='gelu_new'"),
    (dict(text_config={**TEXT, "eos_token_id": [98, 99]}), "eos_token_id"),
    (dict(text_config=[1]), "text_config"),
    (dict(vision_config={**VISION, "num_channels": 1}), "num_channels=1"),
    (dict(vision_config={**VISION, "image_size": [32, 48]}), "image_size"),
    (dict(vision_config={**VISION, "patch_size": 64}), "patch_size=64"),
    (dict(vision_config={**VISION, "num_attention_heads": 5}), "vision tower.*divide"),
    (dict(vision_config={**VISION, "num_hidden_layers": 3}), "missing.*layers.2"),
    (dict(vision_config={**VISION, "num_hidden_layers": 1}), "not part of the model"),
    (dict(projection_dim=25), "misshapen.*projection"),
])
def test_unusable_configs_are_refused(change, message, tmp_path):
  make_clip(tmp_path)
  path = tmp_path / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
  with pytest.raises(UserError, match=message) as error:
    load_clip(tmp_path)
  assert "\n" not in str(error.value)


def test_pickled_weights_are_refused_with_a_way_out(tmp_path):
  make_clip(tmp_path)
  (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
  with pytest.raises(UserError, match="CLIPModel.from_pretrained"):
    load_clip(tmp_path)


def test_text_tower_of_stable_diffusion_pools_too(tmp_path):
  """The end is found in whichever row it stands; without one, the first token counts."""
  model = nnx.eval_shape(lambda: CLIPTextModel(
      CLIPTextConfig.from_dict(TEXT), rngs=nnx.Rngs(0)))
  states = jnp.arange(2 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 3)
  ids = jnp.array([[1, 99, 99, 99], [1, 2, 3, 4]])
  np.testing.assert_array_equal(model.pool(states, ids), [[3, 4, 5], [12, 13, 14]])


def drawn(height, width):
  """Thin lines, letters and hard edges: what resizing rings and aliases at."""
  image = Image.new("RGB", (width, height), (255, 255, 255))
  draw = ImageDraw.Draw(image)
  for i in range(0, width, 5):
    draw.line((i, 0, width - i, height), fill=(i * 7 % 256, 0, 255 - i % 256))
  draw.ellipse((width // 4, height // 4, width // 2, height // 2), fill=(255, 0, 0))
  draw.text((3, 3), "hello", fill=(0, 0, 0))
  return np.asarray(image)


def pictures(height, width):
  """Noise, extremes of it, a drawing and a smooth gradient: [4, H, W, 3] uint8."""
  rng = np.random.default_rng(height * width)
  y, x = np.mgrid[:height, :width]
  smooth = np.stack([x * 255 / width, y * 255 / height, 128 + 127 * np.sin(x / 9)], -1)
  noise = rng.integers(0, 256, (height, width, 3))
  return np.stack([noise, 255 * (noise > 127), drawn(height, width), smooth]).astype(np.uint8)


def preprocess(images, config):
  return normalise_pixels(jnp.asarray(resize_and_crop(images, config)), config)


@pytest.mark.parametrize("height,width", [
    (512, 512), (256, 256), (64, 64), (224, 224), (300, 224), (17, 40), (225, 226),
    (512, 768), (640, 333), (100, 301), (333, 1000), (512, 256), (500, 100), (1000, 260)])
def test_preprocessing(height, width):
  """Up and down, square and not, odd rests in the crop."""
  images = pictures(height, width)
  processor = tiny_clip.ImageProcessor()
  expected = np.stack(processor(images=[Image.fromarray(x) for x in images]).pixel_values)
  ours = preprocess(images, CLIPImageConfig(224, 224))
  assert ours.shape == (4, 224, 224, 3) and ours.dtype == jnp.float32
  difference = np.abs(np.moveaxis(expected, 1, -1) - ours) * np.float32(processor.image_std)
  print(f"preprocessing {height}x{width}: {difference.max() * 255:.3f}/255")
  assert difference.max() < 0.01 / 255


@pytest.mark.parametrize("values", [
    dict(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    dict(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}),
    dict(size={"height": 80, "width": 33}, crop_size={"height": 32, "width": 32}),
    dict(size={"shortest_edge": 32}, crop_size=32, image_mean=[0.5, 0.4, 0.3],
         image_std=[0.2, 0.25, 0.5]),
])
@pytest.mark.parametrize("saved_by", ("image processor", "processor"))
def test_preprocessing_is_the_folder_s_own(values, saved_by, tmp_path):
  make_clip(tmp_path)
  processor = tiny_clip.ImageProcessor(**values)
  if saved_by == "image processor":
    processor.save_pretrained(tmp_path)
  else:
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": processor.to_dict()}))
  config = load_clip(tmp_path).images
  images = pictures(50, 70)
  expected = np.stack(processor(images=[Image.fromarray(x) for x in images]).pixel_values)
  ours = preprocess(images, config)
  difference = np.abs(np.moveaxis(expected, 1, -1) - ours) * np.float32(processor.image_std)
  assert difference.max() < 0.01 / 255


@pytest.mark.parametrize("images", (np.zeros((1, 8, 8, 3), np.float32),
                                    np.zeros((8, 8, 3), np.uint8),
                                    np.zeros((1, 3, 8, 8), np.uint8)))
def test_images_of_another_kind_are_refused(images):
  with pytest.raises(ValueError, match="must be uint8"):
    resize_and_crop(images, CLIPImageConfig(8, 8))


def test_without_a_file_images_have_the_tower_s_size(tmp_path):
  make_clip(tmp_path)
  assert load_clip(tmp_path).images == CLIPImageConfig(32, 32)
  (tmp_path / "preprocessor_config.json").write_text('{"do_pad": null, "size": 32}')
  assert load_clip(tmp_path).images == CLIPImageConfig(32, 32)


@pytest.mark.parametrize("values,message", [
    (dict(resample=2), "resample=2"), (dict(do_center_crop=False), "do_center_crop=False"),
    (dict(do_resize=None), "do_resize=None"),
    (dict(size={"longest_edge": 32}), "longest_edge"), (dict(size=16), "size=16"),
    (dict(crop_size=16), "crop_size=16"), (dict(rescale_factor=1.0), "rescale_factor=1.0"),
    (dict(image_std=[1, 1, 0]), "image_std"), (dict(image_mean=[1, 1]), "image_mean"),
    (dict(size="big"), "size='big'"), (dict(image_mean=3), "wrong kind")])
def test_unusable_image_processors_are_refused(values, message, tmp_path):
  make_clip(tmp_path)
  (tmp_path / "preprocessor_config.json").write_text(
      json.dumps({"size": 32, "crop_size": 32, **values}))
  with pytest.raises(UserError, match=message):
    load_clip(tmp_path)


def test_an_image_processor_that_is_no_object_is_refused(tmp_path):
  make_clip(tmp_path)
  (tmp_path / "processor_config.json").write_text('{"image_processor": []}')
  with pytest.raises(UserError, match="processor_config.json has a value of the wrong kind"):
    load_clip(tmp_path)
