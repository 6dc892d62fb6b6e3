"""UNet, VAE and text encoder against torch: diffusers and transformers, seeded weights."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from safetensors.numpy import load_file

from ddpo_jax.benchmark import flops
from ddpo_jax.models import layers
from ddpo_jax.models.clip import CLIPTextConfig, CLIPTextModel
from ddpo_jax.models.hub import find_weights
from ddpo_jax.models.unet import GRADIENT_CHECKPOINTING, UNet2DConditionModel, UNetConfig
from ddpo_jax.models.vae import AutoencoderKL, VAEConfig
from ddpo_jax.models.weights import load_module, save_module
from ddpo_jax.ops import activations, normalization

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
    "no-attention-mish": dict(block_out_channels=(32, 64), layers_per_block=1,
                              cross_attention_dim=16, mid_block_type=None, act_fn="mish",
                              down_block_types=("DownBlock2D",) * 2,
                              up_block_types=("UpBlock2D",) * 2),
    "narrowing": dict(block_out_channels=(64, 32), layers_per_block=1,
                      cross_attention_dim=16, in_channels=3, out_channels=3,
                      norm_num_groups=16, norm_eps=1e-3,
                      down_block_types=("CrossAttnDownBlock2D",) * 2,
                      up_block_types=("CrossAttnUpBlock2D",) * 2),
    "four-levels": dict(block_out_channels=(16, 32, 48, 64), layers_per_block=1,
                        attention_head_dim=(2, 4, 6, 8), cross_attention_dim=16),
    "one-level": dict(block_out_channels=(32,), layers_per_block=1,
                      cross_attention_dim=16,
                      down_block_types=("CrossAttnDownBlock2D",),
                      up_block_types=("CrossAttnUpBlock2D",)),
}
SD15_UNET = dict(block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
                 attention_head_dim=8, cross_attention_dim=768, norm_num_groups=32)
VAES = {
    "sd": dict(block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8,
               down_block_types=("DownEncoderBlock2D",) * 3,
               up_block_types=("UpDecoderBlock2D",) * 3),
    "one-level-gelu": dict(block_out_channels=(16,), layers_per_block=2, act_fn="gelu",
                           norm_num_groups=4, latent_channels=8),
}
SD15_VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4)
TEXT = dict(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=77, eos_token_id=99)
SD15_TEXT = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072,
                 num_hidden_layers=12, num_attention_heads=12,
                 max_position_embeddings=77)


def relative_error(ours, reference):
  """The larger of two: of the norm over all elements, and of the largest element."""
  reference = reference.detach().numpy()
  assert ours.shape == reference.shape
  difference = np.asarray(ours) - reference
  return max(np.linalg.norm(difference) / np.linalg.norm(reference),
             np.abs(difference).max() / np.abs(reference).max())


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


def make_unets(config, tmp_path, size):
  """Torch's UNet, ours with its weights, and inputs of two samples."""
  torch.manual_seed(0)
  reference = perturb(diffusers.UNet2DConditionModel(**{"norm_num_groups": 8, **config}))
  unet = ours_from(reference, UNet2DConditionModel, UNetConfig, tmp_path,
                   "diffusion_pytorch_model")
  latents = torch.randn(2, reference.config.in_channels, *size)
  text = torch.randn(2, 7, config["cross_attention_dim"])
  return reference, unet, (latents, torch.tensor([1, 801]), text)


def as_ours(latents, timesteps, text):
  return (jnp.asarray(latents.permute(0, 2, 3, 1).numpy()),
          jnp.asarray(timesteps.numpy()), jnp.asarray(text.numpy()))


def check_unet(config, tmp_path, size):
  reference, unet, inputs = make_unets(config, tmp_path, size)
  with torch.no_grad():
    expected = reference(*inputs).sample.permute(0, 2, 3, 1)
  del reference
  ours = jax.jit(lambda unet, *args: unet(*args))(unet, *as_ours(*inputs))
  error = relative_error(ours, expected)
  print(f"UNet: relative error {error:.2e}")
  assert error < TOLERANCE


@pytest.mark.parametrize("name", UNETS)
def test_unet(name, tmp_path):
  check_unet(UNETS[name], tmp_path, (8, 16))


def test_unet_with_odd_latents(tmp_path):
  """Where halving rounds up, the way up must crop to the way down."""
  check_unet(UNETS["sd1"], tmp_path, (10, 13))


def branches_of(inputs):
  """For two prompts a sample: what torch is called with, and what ours is."""
  latents, timesteps, text = inputs
  text = torch.cat([text, text.flip(2)])
  return (latents.repeat(2, 1, 1, 1), timesteps.repeat(2), text), (latents, timesteps, text)


@pytest.mark.parametrize("name", UNETS)
def test_branches_of_guidance(name, tmp_path):
  """What they share is computed once, wherever the first attention to the prompt is."""
  reference, unet, inputs = make_unets(UNETS[name], tmp_path, (8, 16))
  twice, once = branches_of(inputs)
  with torch.no_grad():
    expected = reference(*twice).sample.permute(0, 2, 3, 1)
  ours = jax.jit(lambda unet, *args: unet.predict_branches(*args, 2))(unet, *as_ours(*once))
  assert relative_error(ours, expected) < TOLERANCE
  assert (flops.count(lambda *args: unet.predict_branches(*args, 2), *as_ours(*once))
          < flops.count(unet, *as_ours(*twice)))


@pytest.mark.parametrize("dtype,tolerance", [("bfloat16", 3e-2), ("float16", 4e-3)])
def test_unet_in_half_precision(dtype, tolerance, tmp_path):
  """As near to torch's float32 as the rounding of weights and activations allows."""
  reference, _, inputs = make_unets(UNETS["one-level"], tmp_path, (8, 8))
  with torch.no_grad():
    expected = reference(*inputs).sample.permute(0, 2, 3, 1)
  config = UNetConfig.from_dict(dict(reference.config))
  unet = load_module(functools.partial(UNet2DConditionModel, config, dtype=dtype),
                     find_weights(tmp_path, "diffusion_pytorch_model"))
  ours = jax.jit(lambda unet, *args: unet(*args))(unet, *as_ours(*inputs))
  assert ours.dtype == dtype
  error = relative_error(ours.astype(jnp.float32), expected)
  print(f"UNet in {dtype}: relative error {error:.2e}")
  assert error < tolerance


@pytest.mark.parametrize("branches", (1, 2))
@pytest.mark.parametrize("mode", GRADIENT_CHECKPOINTING)
def test_gradient_of_every_unet_weight(mode, branches, tmp_path):
  """However much of the forward pass is kept for the backward one."""
  reference, unet, inputs = make_unets(UNETS["one-level"], tmp_path, (8, 8))
  theirs, inputs = branches_of(inputs) if branches == 2 else (inputs, inputs)
  reference(*theirs).sample.square().sum().backward()
  expected = {name: p.grad for name, p in reference.named_parameters()}

  unet.gradient_checkpointing = mode
  graphdef, state = nnx.split(unet)
  inputs = as_ours(*inputs)
  loss = lambda state: jnp.square(
      nnx.merge(graphdef, state).predict_branches(*inputs, branches)).sum()
  gradient = nnx.merge(graphdef, jax.jit(jax.grad(loss))(state))
  # Written as weights are, so that names and layouts are torch's.
  save_module(gradient, tmp_path / "gradient.safetensors")
  ours = load_file(tmp_path / "gradient.safetensors")
  assert ours.keys() == expected.keys()
  errors = {name: relative_error(ours[name], expected[name]) for name in expected}
  assert max(errors.values()) < 1e-3, max(errors, key=errors.get)


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


@pytest.mark.parametrize("name", VAES)
def test_vae(name, tmp_path):
  check_vae(VAES[name], tmp_path, (32, 48) if name == "sd" else (8, 12))


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


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_activation_and_its_derivative(name):
  """Mapped over a device too, as in training: there JAX 0.12.0 fails on erf's derivative."""
  x = torch.linspace(-8, 8, 401, requires_grad=True)
  theirs = {"quick_gelu": transformers.activations.ACT2FN["quick_gelu"],
            "swish": torch.nn.functional.silu}.get(name) or getattr(torch.nn.functional, name)
  expected = theirs(x)
  expected.sum().backward()
  ours = activations.ACTIVATIONS[name]
  mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
  derivative = jax.shard_map(jax.vmap(jax.grad(ours)), mesh=mesh, in_specs=P("data"),
                             out_specs=P("data"))
  values = jnp.asarray(x.detach().numpy())
  assert relative_error(ours(values), expected) < 1e-5  # XLA's tanh: 4e-6
  assert relative_error(jax.jit(derivative)(values), x.grad) < 1e-5  # XLA's tanh: 4e-6


@pytest.mark.parametrize("act", ("quick_gelu", "gelu"))
def test_text_encoder(act, tmp_path):
  check_text({**TEXT, "hidden_act": act}, tmp_path)


@pytest.mark.slow
def test_full_size_unet(tmp_path):
  check_unet(SD15_UNET, tmp_path, (64, 64))


@pytest.mark.slow
def test_full_size_vae(tmp_path):
  check_vae(SD15_VAE, tmp_path, (128, 128))


@pytest.mark.slow
def test_full_size_text_encoder(tmp_path):
  check_text(SD15_TEXT, tmp_path)


def as_double(x):
  return torch.tensor(np.asarray(x, np.float64), requires_grad=True)


def torch_group_norm(x, scale, bias):
  normal = torch.nn.functional.group_norm(x.permute(0, 3, 1, 2), 8, scale, bias)
  return torch.nn.functional.silu(normal).permute(0, 2, 3, 1)


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
@pytest.mark.parametrize("dtype,mean,tolerance", [
    ("float32", 3, 1e-6), ("float16", 30, 4e-3), ("bfloat16", 3, 2e-2)])
@pytest.mark.parametrize("kind", ("group", "layer"))
def test_gradient_of_norms(monkeypatch, kind, dtype, mean, tolerance, backend):
  """Their backward pass is written out by hand; against torch's in float64."""
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  common = {"epsilon": 1e-5, "dtype": dtype, "rngs": nnx.Rngs(0)}
  if kind == "group":
    norm, arguments = layers.GroupNorm(32, 8, **common), {"act": jax.nn.silu}
    theirs = torch_group_norm
  else:
    norm, arguments = layers.LayerNorm(32, **common), {}
    theirs = lambda x, *weights: torch.nn.functional.layer_norm(x, (32,), *weights)
  rng = np.random.default_rng(0)
  norm.scale[...], norm.bias[...] = (jnp.asarray(rng.normal(size=32), dtype) for _ in "ab")
  x = jnp.asarray(rng.normal(mean, 1, (2, 6, 5, 32)), dtype)
  grad = jnp.asarray(rng.normal(size=x.shape), dtype)
  graphdef, state = nnx.split(norm)
  y, backward = jax.vjp(jax.jit(lambda state, x: nnx.merge(graphdef, state)(
      x, **arguments)), state, x)
  weights_grad, x_grad = backward(grad)

  inputs = [as_double(a) for a in (x, norm.scale[...], norm.bias[...])]
  expected = theirs(*inputs)
  expected.backward(as_double(grad))
  ours = (y, x_grad, weights_grad["scale"][...], weights_grad["bias"][...])
  for a, b in zip(ours, (expected, *(tensor.grad for tensor in inputs))):
    assert a.dtype == dtype
    assert relative_error(a.astype(jnp.float32), b) < tolerance


def test_norm_of_an_image_of_one_colour():
  """In half precision rounding leaves E[x²] − E[x]² below 0 there."""
  x = jnp.full((1, 7, 9, 32), 1001, jnp.bfloat16)
  ours = normalization.normalize(8, 1e-5, normalization.identity, jnp.bfloat16, x,
                                 jnp.ones(32), jnp.zeros(32))
  np.testing.assert_allclose(np.asarray(ours, np.float32), 0, atol=1)


@pytest.mark.parametrize("dtype,tolerance", [
    ("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_gated_gelu(dtype, tolerance):
  rng = np.random.default_rng(0)
  x, grad = (jnp.asarray(rng.normal(0, 3, shape), dtype) for shape in ((7, 5, 32), (7, 5, 16)))
  y, backward = jax.vjp(jax.jit(activations.geglu), x)
  reference = as_double(x)
  value, gate = reference.chunk(2, dim=-1)
  expected = value * torch.nn.functional.gelu(gate)
  expected.backward(as_double(grad))
  for ours, theirs in zip((y, backward(grad)[0]), (expected, reference.grad)):
    assert ours.dtype == dtype
    assert relative_error(ours.astype(jnp.float32), theirs) < tolerance
