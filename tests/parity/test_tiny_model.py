"""The embedded model: what is in its folder, what it draws, and torch drawing the same."""

import importlib.resources
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax import tiny_scenes
from ddpo_jax.diffusion import DDIMSchedule, sample
from ddpo_jax.models import load_pretrained
from ddpo_jax.models.vae import to_uint8

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

FOLDER = pathlib.Path(str(importlib.resources.files("ddpo_jax") / "assets/tiny_sd"))
SCRIPTS = pathlib.Path(__file__).parent.parent.parent / "scripts"
PROMPTS = ["three red circles on a blue background", "a green star on a yellow background",
           "two white squares on a checkered black background", "one purple triangle"]
STEPS, GUIDANCE, ETA = 10, 4.0, 1.0


@pytest.fixture(scope="module")
def model():
  return load_pretrained("tiny")


@pytest.fixture(scope="module")
def pipeline():
  pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
      str(FOLDER), local_files_only=True).to(torch.float32)
  pipeline.set_progress_bar_config(disable=True)
  return pipeline


def nhwc(x):
  return jnp.asarray(np.moveaxis(x.numpy(), -3, -1))


def draw(model, prompts, *, steps, guidance_scale, **draw_kwargs):
  """Our sampler and decoder: prompts -> uint8 [B, H, W, 3]."""
  encode = jax.jit(lambda encoder, ids: encoder(ids))
  trajectory = sample(
      model.unet, DDIMSchedule.create(model.noise_schedule, num_steps=steps),
      encode(model.text_encoder, model.tokenize(prompts)),
      encode(model.text_encoder, model.tokenize([""])),
      guidance_scale=guidance_scale, eta=ETA, **draw_kwargs)
  decode = jax.jit(lambda vae, latents: to_uint8(vae.decode(latents)))
  return np.asarray(decode(model.vae, trajectory.final_latents / model.scaling_factor))


def test_folder_is_small_and_holds_no_code():
  files = [file for file in FOLDER.rglob("*") if file.is_file()]
  assert sum(file.stat().st_size for file in files) <= 16e6
  assert {file.suffix for file in files} == {".json", ".txt", ".safetensors"}


def test_script_writes_the_committed_configs(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(SCRIPTS)
  import make_tiny_model

  make_tiny_model.write_configs(tmp_path)
  for written in (file for file in tmp_path.rglob("*") if file.is_file()):
    committed = FOLDER / written.relative_to(tmp_path)
    if written.relative_to(tmp_path) == pathlib.Path("vae/config.json"):
      ours, theirs = (json.loads(f.read_text()) for f in (written, committed))
      # Found in training.
      assert theirs.pop("scaling_factor") != ours.pop("scaling_factor") == 1.0
      assert ours == theirs
    else:
      assert written.read_text() == committed.read_text()


def test_torch_pipeline_draws_the_same(model, pipeline):
  shape = (len(PROMPTS), 4, 8, 8)
  latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
  expected = pipeline(
      PROMPTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, eta=ETA,
      latents=latents, generator=torch.Generator().manual_seed(1), output_type="np").images
  # The pipeline draws one step's noise after the other from its generator.
  generator = torch.Generator().manual_seed(1)
  noise = torch.stack([torch.randn(shape, generator=generator) for _ in range(STEPS)])
  ours = draw(model, PROMPTS, steps=STEPS, guidance_scale=GUIDANCE,
              initial_latents=nhwc(latents), step_noise=nhwc(noise))
  difference = np.abs(ours.astype(int) - np.round(expected * 255).astype(int))
  assert difference.max() <= 1  # of 255: where the two round a half differently
  assert (difference > 0).mean() < 0.01


def test_latents_have_unit_spread(model):
  rng = np.random.default_rng(0)
  images = np.stack([tiny_scenes.draw(tiny_scenes.random_scene(rng), rng) for _ in range(64)])
  encode = jax.jit(lambda vae, images: vae.encode(images)[0])
  latents = model.scaling_factor * encode(model.vae, jnp.asarray(images) / 127.5 - 1)
  assert np.std(latents) == pytest.approx(1, abs=0.1)


def test_autoencoder_keeps_the_picture(model):
  rng = np.random.default_rng(0)
  images = np.stack([tiny_scenes.draw(tiny_scenes.random_scene(rng), rng) for _ in range(64)])
  rebuild = jax.jit(lambda vae, images: vae.decode(vae.encode(images)[0]))
  rebuilt = np.asarray(to_uint8(rebuild(model.vae, jnp.asarray(images) / 127.5 - 1)))
  error = np.abs(rebuilt.astype(float) - images)
  assert error.mean() < 16, error.mean()  # of 255; noise cannot be kept in full


def test_pictures_show_the_colours_asked_for(model):
  rng = np.random.default_rng(0)
  prompts, asked = zip(*(tiny_scenes.random_prompt(rng) for _ in range(32)))
  images = draw(model, list(prompts), steps=20, guidance_scale=3.0, key=jax.random.key(0))
  right = [_shows(image, wanted) for image, wanted in zip(images, asked)]
  assert np.mean(right) >= 0.75, [p for p, r in zip(prompts, right) if not r]


def test_colour_check_itself():
  """`_shows` accepts what the world draws and refuses it under another prompt."""
  rng = np.random.default_rng(0)
  scenes = [tiny_scenes.random_scene(rng) for _ in range(100)]
  images = [tiny_scenes.draw(scene, rng) for scene in scenes]
  right = [_shows(image, scene.metadata()) for image, scene in zip(images, scenes)]
  wrong = [_shows(image, scene.metadata()) for image, scene in zip(images[1:], scenes)]
  assert np.mean(right) > 0.95
  assert np.mean(wrong) < 0.2


def _shows(image, wanted):
  """Whether the shapes' colour fills part of the picture, and the background's the rim."""
  color = np.linalg.norm(image - np.array(tiny_scenes.COLORS[wanted["color"]], float), axis=-1)
  rim = np.concatenate([image[:3].reshape(-1, 3), image[-3:].reshape(-1, 3),
                        image[:, :3].reshape(-1, 3), image[:, -3:].reshape(-1, 3)])
  on_rim = _distance_to_shades(rim, wanted["background"]) < 45
  return 0.02 < (color < 60).mean() < 0.6 and on_rim.mean() > 0.7


def _distance_to_shades(pixels, name):
  """How far pixels [N, 3] are from a background's colour or its texture's second shade."""
  color = np.array(tiny_scenes.COLORS[name], float)
  target = (255.0 if color.mean() < 100 else 0.0) - color
  along = np.clip((pixels - color) @ target / (target @ target), 0, 0.9)
  return np.linalg.norm(pixels - color - along[:, None] * target, axis=-1)
