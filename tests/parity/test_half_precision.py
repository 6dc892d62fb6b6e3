"""The policy in half precision is no further from float32 than torch's is.

On a GPU (`JAX_PLATFORMS=cuda pytest tests/parity/test_half_precision.py`) of Stable Diffusion 1.5's
size: tensor cores, flash attention and LoRA as in a run. On a CPU of a small network.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ddpo_jax import lora
from ddpo_jax.benchmark.side import STABLE_DIFFUSION_15
from ddpo_jax.diffusion.ddim import guided_prediction
from ddpo_jax.models.hub import find_weights
from ddpo_jax.models.unet import UNet2DConditionModel, UNetConfig
from ddpo_jax.models.weights import load_module

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

SMALL = dict(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
             attention_head_dim=4, cross_attention_dim=24,
             down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
GUIDANCE, RANK, SAMPLES = 5.0, 4, 2
LOSS_SCALE = 2.0**10  # so that fp16 holds what a backward pass computes on the way


def make_reference(dtype):
  """Torch's UNet in float32, random, with LoRA; `dtype` holds its frozen weights exactly."""
  torch.backends.cudnn.allow_tf32 = False  # by itself torch takes it for float32
  on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
  torch.manual_seed(0)
  with torch.device("cuda" if on_gpu else "cpu"):
    unet = diffusers.UNet2DConditionModel(**STABLE_DIFFUSION_15["unet"] if on_gpu else SMALL)
    unet.to(dtype).float().requires_grad_(False).eval()
    unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=False,
                                     target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
  return unet


def lora_weights(unet):
  """Torch's, by their names in diffusers' files."""
  return {name.replace(".default", ""): parameter for name, parameter in unet.named_parameters()
          if "lora_" in name}


def to_numpy(tensor):
  return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def make_ours(reference, dtype, folder):
  """Our UNet in half precision, with the reference's weights and LoRA weights."""
  save_file({name.replace(".base_layer", ""): to_numpy(value)
             for name, value in reference.state_dict().items() if "lora_" not in name},
            folder / "diffusion_pytorch_model.safetensors")
  save_file({f"unet.{name}": to_numpy(value) for name, value in lora_weights(reference).items()},
            folder / "lora.safetensors")
  config = UNetConfig.from_dict(dict(reference.config))
  unet = load_module(functools.partial(UNet2DConditionModel, config, dtype=dtype),
                     find_weights(folder, "diffusion_pytorch_model"))
  lora.import_lora(unet, folder / "lora.safetensors")
  return unet


def draw_inputs(unet):
  """Latents, timesteps, prompts, empty prompt, and what the prediction is multiplied with."""
  size, width = unet.config.sample_size, unet.config.cross_attention_dim
  normal = functools.partial(torch.randn, device=unet.device)
  latents = normal(SAMPLES, 4, size, size)
  return (latents, torch.tensor([21, 801], device=unet.device), normal(SAMPLES, 77, width),
          normal(1, 77, width), LOSS_SCALE * torch.randn_like(latents) / latents[0].numel())


def evaluate_torch(unet, dtype, latents, timesteps, prompts, negative, weight):
  """The guided prediction, and of its product with `weight` the gradient in LoRA's weights."""
  with torch.autocast(unet.device.type, dtype, enabled=dtype != torch.float32):
    both = unet(torch.cat([latents] * 2), torch.cat([timesteps] * 2),
                torch.cat([negative.expand_as(prompts), prompts])).sample.float()
  empty, prompted = both.chunk(2)
  prediction = empty + GUIDANCE * (prompted - empty)
  parameters = lora_weights(unet)
  gradients = torch.autograd.grad((prediction * weight).sum(), list(parameters.values()))
  return to_numpy(prediction), dict(zip(parameters, map(to_numpy, gradients)))


def evaluate_ours(unet, *inputs):
  """The same of our network, by the same names."""
  latents, timesteps, prompts, negative, weight = map(jnp.asarray, inputs)
  graphdef, params, frozen = lora.partition(unet)

  @jax.jit
  def evaluate(params, frozen):
    def loss(params):
      prediction = guided_prediction(nnx.merge(graphdef, params, frozen), latents, timesteps,
                                     prompts, negative, GUIDANCE)
      return jnp.sum(prediction * weight), prediction

    return jax.grad(loss, has_aux=True)(params)

  gradients, prediction = evaluate(params, frozen)
  nnx.update(unet, gradients)
  named = {}
  for name, linear in lora.attention_projections(unet):
    named[f"{name}.lora_A.weight"] = np.asarray(linear.lora_down[...]).T
    named[f"{name}.lora_B.weight"] = np.asarray(linear.lora_up[...]).T
  return np.moveaxis(np.asarray(prediction), -1, 1), named


def relative_errors(found, expected):
  """Of the prediction, and of all gradients together."""
  (prediction, gradients), (reference, expected_gradients) = found, expected
  assert gradients.keys() == expected_gradients.keys()
  flat = lambda tree: np.concatenate([np.ravel(tree[name]) for name in sorted(tree)])
  return [np.linalg.norm(a - b) / np.linalg.norm(b)
          for a, b in ((prediction, reference), (flat(gradients), flat(expected_gradients)))]


@pytest.mark.parametrize("ours,theirs", ((jnp.float16, torch.float16),
                                         (jnp.bfloat16, torch.bfloat16)))
def test_rounds_no_worse_than_torch(ours, theirs, tmp_path):
  reference = make_reference(theirs)
  inputs = draw_inputs(reference)
  expected = evaluate_torch(reference, torch.float32, *inputs)
  latents, *others, weight = inputs
  nhwc = lambda x: to_numpy(x.permute(0, 2, 3, 1))
  timesteps, *embeddings = others
  found = evaluate_ours(make_ours(reference, ours, tmp_path), nhwc(latents),
                        timesteps.cpu().numpy(), *map(to_numpy, embeddings), nhwc(weight))
  reference.to(theirs)
  for parameter in lora_weights(reference).values():
    parameter.data = parameter.data.float()  # as ddpo-pytorch keeps them
  rounded = relative_errors(evaluate_torch(reference, theirs, *inputs), expected)
  errors = relative_errors(found, expected)
  print(f"prediction, gradients: off by {errors}, torch's by {rounded}")
  assert all(error < 1.5 * limit for error, limit in zip(errors, rounded))
