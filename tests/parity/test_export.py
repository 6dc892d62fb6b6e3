"""Exported LoRA files, loaded by torch diffusers: the image is ours."""

import dataclasses
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax import lora
from ddpo_jax.diffusion import DDIMSchedule, sample
from ddpo_jax.models.vae import to_uint8

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
pytest.importorskip("peft")

TINY = pathlib.Path(__file__).parents[1] / "golden" / "tiny-sd"
PROMPTS, STEPS, GUIDANCE = ["a cat", "two dogs on a hill"], 5, 4.0
SHAPE = (len(PROMPTS), 4, 16, 16)


@pytest.fixture
def tuned(tiny_sd, golden_lora):
  return dataclasses.replace(tiny_sd, unet=golden_lora("lora_new"))


@pytest.fixture(scope="module")
def latents():
  return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def ours(models, latents):
  nhwc = lambda x: jnp.asarray(np.moveaxis(x.numpy(), -3, -1))
  encode = jax.jit(lambda encoder, ids: encoder(ids))
  generator = torch.Generator().manual_seed(1)
  noise = torch.stack([torch.randn(SHAPE, generator=generator) for _ in range(STEPS)])
  trajectory = sample(
      models.unet, DDIMSchedule.create(models.noise_schedule, STEPS),
      encode(models.text_encoder, models.tokenize(PROMPTS)),
      encode(models.text_encoder, models.tokenize([""])), guidance_scale=GUIDANCE,
      initial_latents=nhwc(latents), step_noise=nhwc(noise))
  decode = jax.jit(lambda vae, latents: to_uint8(vae.decode(latents)))
  return np.asarray(decode(models.vae, trajectory.final_latents / models.scaling_factor),
                    int)


def theirs(latents, *lora_file):
  pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
      str(TINY), local_files_only=True, safety_checker=None)
  pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
  pipeline.set_progress_bar_config(disable=True)
  for file in lora_file:
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
  images = pipeline(PROMPTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, eta=1.0,
                    latents=latents, generator=torch.Generator().manual_seed(1),
                    output_type="np").images
  return np.round(images * 255).astype(int)


@pytest.mark.parametrize("file_format", lora.FORMATS)
def test_diffusers_draws_our_image(tuned, latents, file_format, tmp_path):
  file = tmp_path / "lora.safetensors"
  lora.export_lora(tuned.unet, file, {"base_model": "tiny"}, file_format=file_format)
  expected = theirs(latents, file)
  assert np.abs(ours(tuned, latents) - expected).max() <= 1
  # And the LoRA weights are seen in it:
  assert np.abs(theirs(latents) - expected).max() > 8


@pytest.mark.parametrize("file_format", lora.FORMATS)
def test_what_is_exported_is_imported(tuned, tiny_sd, file_format, tmp_path):
  lora.export_lora(tuned.unet, tmp_path / "lora.safetensors", file_format=file_format)
  unet = nnx.clone(tiny_sd.unet)
  lora.import_lora(unet, tmp_path / "lora.safetensors")
  for a, b in zip(*(jax.tree.leaves(lora.partition(u)[1]) for u in (unet, tuned.unet)),
                  strict=True):
    np.testing.assert_array_equal(a, b)
