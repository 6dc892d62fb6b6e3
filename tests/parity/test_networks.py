"""UNet, VAE and text encoder against torch: diffusers and transformers, seeded weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.models.clip import CLIPTextConfig, CLIPTextModel
from ddpo_jax.models.pretrained import find_weights, load_module
from ddpo_jax.models.unet import UNet2DConditionModel, UNetConfig
from ddpo_jax.models.vae import AutoencoderKL, VAEConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4

UNETS = {
    "sd1": dict(block_out_channels=(32, 64, 64), layers_per_block=1,
                attention_head_dim=8, cross_attention_dim=24,
                down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
                up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2),
    "sd2": dict(block_out_channels=(32, 64), layers_per_block=2,
                attention_head_dim=(2, 4), cross_attention_dim=48,
                use_linear_projection=True, upcast_attention=True,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
    "no-mid-block-gelu": dict(block_out_channels=(32, 64), layers_per_block=(1, 2),
                              attention_head_dim=4, cross_attention_dim=16,
                              mid_block_type=None, act_fn="gelu", flip_sin_to_cos=False,
                              freq_shift=1,
                              down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                              up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
}
SD15_UNET = dict(block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
                 attention_head_dim=8, cross_attention_dim=768, norm_num_groups=32)
VAE = dict(block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8,
           down_block_types=("DownEncoderBlock2D",) * 3,
           up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4)
SD15_VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4)
TEXT = dict(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=77, eos_token_id=99)
SD15_TEXT = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072,
                 num_hidden_layers=12, num_attention_heads=12,
                 max_position_embeddings=77)


def relative_error(ours, reference):
  reference = reference.detach().numpy()
  return np.linalg.norm(np.asarray(ours) - reference) / np.linalg.norm(reference)


def ours_from(reference, cls, config_cls, folder, stem):
  """Our module with a torch module's weights, through the files that torch writes."""
  reference.save_pretrained(folder, safe_serialization=True)
  config = config_cls.from_dict(dict(reference.config if stem.startswith("diff") else
                                     reference.config.to_dict()))
  return load_module(functools.partial(cls, config), find_weights(folder, stem))


def perturb(module):
  """Moves norms and biases off their initial ones and zeros, where bugs would hide."""
  with torch.no_grad():
    for parameter in module.parameters():
      if parameter.ndim == 1:
        parameter += 0.1 * torch.randn_like(parameter)
  return module.eval()


def check_unet(config, tmp_path, size):
  torch.manual_seed(0)
  reference = perturb(diffusers.UNet2DConditionModel(**{"norm_num_groups": 8, **config}))
  unet = ours_from(reference, UNet2DConditionModel, UNetConfig, tmp_path,
                   "diffusion_pytorch_model")
  latents, timesteps = torch.randn(2, 4, *size), torch.tensor([1, 801])
  text = torch.randn(2, 7, config["cross_attention_dim"])
  with torch.no_grad():
    expected = reference(latents, timesteps, text).sample.permute(0, 2, 3, 1)
  del reference
  ours = jax.jit(lambda unet, *args: unet(*args))(
      unet, jnp.asarray(latents.permute(0, 2, 3, 1).numpy()),
      jnp.asarray(timesteps.numpy()), jnp.asarray(text.numpy()))
  error = relative_error(ours, expected)
  print(f"UNet: relative error {error:.2e}")
  assert error < TOLERANCE


@pytest.mark.parametrize("name", UNETS)
def test_unet(name, tmp_path):
  check_unet(UNETS[name], tmp_path, (8, 16))


def test_unet_with_odd_latents(tmp_path):
  """Where halving rounds up, the way up must crop to the way down."""
  check_unet(UNETS["sd1"], tmp_path, (10, 13))


def check_vae(config, tmp_path, size):
  torch.manual_seed(0)
  reference = perturb(diffusers.AutoencoderKL(**config))
  vae = ours_from(reference, AutoencoderKL, VAEConfig, tmp_path,
                  "diffusion_pytorch_model")
  images = torch.rand(1, 3, *size) * 2 - 1
  with torch.no_grad():
    posterior = reference.encode(images).latent_dist
    decoded = reference.decode(posterior.mean).sample
  nhwc = lambda x: x.permute(0, 2, 3, 1)
  mean, log_variance = jax.jit(lambda vae, x: vae.encode(x))(
      vae, jnp.asarray(nhwc(images).numpy()))
  ours = jax.jit(lambda vae, x: vae.decode(x))(
      vae, jnp.asarray(nhwc(posterior.mean).numpy()))
  errors = [relative_error(mean, nhwc(posterior.mean)),
            relative_error(log_variance, nhwc(posterior.logvar)),
            relative_error(ours, nhwc(decoded))]
  print(f"VAE: relative errors {errors}")
  assert max(errors) < TOLERANCE


def test_vae(tmp_path):
  check_vae(VAE, tmp_path, (32, 48))


def check_text(config, tmp_path):
  torch.manual_seed(0)
  reference = perturb(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)))
  encoder = ours_from(reference, CLIPTextModel, CLIPTextConfig, tmp_path, "model")
  ids = torch.randint(0, config["vocab_size"], (2, 77))
  with torch.no_grad():
    expected = reference(ids).last_hidden_state
  ours = jax.jit(lambda encoder, ids: encoder(ids))(encoder, jnp.asarray(ids.numpy()))
  error = relative_error(ours, expected)
  print(f"text encoder: relative error {error:.2e}")
  assert error < TOLERANCE


@pytest.mark.parametrize("act", ("quick_gelu", "gelu"))
def test_text_encoder(act, tmp_path):
  check_text({**TEXT, "hidden_act": act}, tmp_path)


@pytest.mark.slow
def test_full_size_unet(tmp_path):
  check_unet(SD15_UNET, tmp_path, (32, 32))


@pytest.mark.slow
def test_full_size_vae(tmp_path):
  check_vae(SD15_VAE, tmp_path, (128, 128))


@pytest.mark.slow
def test_full_size_text_encoder(tmp_path):
  check_text(SD15_TEXT, tmp_path)
