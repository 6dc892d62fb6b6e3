"""The policy in half precision: no further from float32 than torch's own half precision is.

On a GPU (`JAX_PLATFORMS=cuda pytest tests/parity/test_half_precision.py`) of Stable Diffusion 1.5's
size: tensor cores, flash attention and LoRA as in a run. On a CPU of a small network.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
LOSS_SCALE = 2.0**10  # so that fp16 holds the gradients' intermediate values
DTYPES = {"fp16": (jnp.float16, torch.float16), "bf16": (jnp.bfloat16, torch.bfloat16)}


@pytest.fixture(params=DTYPES)
def precision(request):
  return DTYPES[request.param]


@pytest.fixture
def reference(precision):
  """A random UNet in float32 whose weights half precision holds exactly, with LoRA."""
  on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
  torch.backends.cudnn.allow_tf32 = False  # in torch's own float32 it is on
  torch.manual_seed(0)
  with torch.device("cuda" if on_gpu else "cpu"):
    unet = diffusers.UNet2DConditionModel(**STABLE_DIFFUSION_15["unet"] if on_gpu else SMALL)
    unet.to(precision[1]).float().requires_grad_(False).eval()
    unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=False,
                                     target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
  return unet


def lora_weights(unet):
  """Torch's, by their names in diffusers' files."""
  return {name.replace(".default", ""): parameter for name, parameter in unet.named_parameters()
          if "lora_" in name}


def draw(unet):
  """Latents, timesteps, prompts, empty prompt, and what the prediction is multiplied with."""
  size, width = unet.config.sample_size, unet.config.cross_attention_dim
  normal = functools.partial(torch.randn, device=unet.device)
  latents = normal(SAMPLES, 4, size, size)
  timesteps = torch.tensor([21, 801], device=unet.device)
  return (latents, timesteps, normal(SAMPLES, 77, width), normal(1, 77, width),
          LOSS_SCALE * torch.randn_like(latents) / latents[0].numel())


def torchs(unet, dtype, latents, timesteps, prompts, negative, weight):
  """Guided prediction and the gradient of its product with `weight`, as ddpo-pytorch's."""
  with torch.autocast(unet.device.type, dtype, enabled=dtype != torch.float32):
    both = unet(torch.cat([latents] * 2), torch.cat([timesteps] * 2),
                torch.cat([negative.expand_as(prompts), prompts])).sample.float()
  empty, prompted = both.chunk(2)
  prediction = empty + GUIDANCE * (prompted - empty)
  parameters = lora_weights(unet)
  gradients = torch.autograd.grad((prediction * weight).sum(), list(parameters.values()))
  host = lambda x: x.detach().cpu().numpy()
  return host(prediction), {name: host(g) for name, g in zip(parameters, gradients)}


def ours(unet, inputs):
  graphdef, params, frozen = lora.partition(unet)
  latents, timesteps, prompts, negative, weight = inputs

  @jax.jit
  def predict(params, frozen):
    def loss(params):
      prediction = guided_prediction(nnx.merge(graphdef, params, frozen), latents, timesteps,
                                     prompts, negative, GUIDANCE)
      return jnp.sum(prediction * weight), prediction

    return jax.grad(loss, has_aux=True)(params)

  gradients, prediction = predict(params, frozen)
  nnx.update(unet, gradients)
  named = {}
  for name, linear in lora.attention_projections(unet):
    named[f"{name}.lora_A.weight"] = np.asarray(linear.lora_down[...]).T
    named[f"{name}.lora_B.weight"] = np.asarray(linear.lora_up[...]).T
  return np.moveaxis(np.asarray(prediction), -1, -3), named


def as_ours(unet, dtype, folder):
  """Our UNet in half precision, with the weights and the LoRA weights of torch's."""
  adapters = lora_weights(unet)
  state = {name.replace(".base_layer", ""): parameter.to(dtype) for name, parameter
           in unet.state_dict().items() if "lora_" not in name}
  from safetensors.torch import save_file
  save_file({name: value.cpu().contiguous() for name, value in state.items()},
            folder / "diffusion_pytorch_model.safetensors")
  config = UNetConfig.from_dict(dict(unet.config))
  half = {torch.float16: jnp.float16, torch.bfloat16: jnp.bfloat16}[dtype]
  loaded = load_module(functools.partial(UNet2DConditionModel, config, dtype=half),
                       find_weights(folder, "diffusion_pytorch_model"))
  save_file({f"unet.{name}": value.detach().cpu().contiguous() for name, value in adapters.items()},
            folder / "lora.safetensors")
  lora.import_lora(loaded, folder / "lora.safetensors")
  return loaded


def to_jax(latents, timesteps, prompts, negative, weight):
  nhwc = lambda x: jnp.asarray(x.permute(0, 2, 3, 1).cpu().numpy())
  flat = lambda x: jnp.asarray(x.cpu().numpy())
  return nhwc(latents), flat(timesteps), flat(prompts), flat(negative), nhwc(weight)


def error(values, expected):
  """Relative, by the norm over all of them."""
  flat = lambda tree: np.concatenate([np.ravel(tree[name]) for name in sorted(expected)])
  return float(np.linalg.norm(flat(values) - flat(expected)) / np.linalg.norm(flat(expected)))


def test_rounds_no_worse_than_torch(reference, precision, tmp_path):
  inputs = draw(reference)
  unet = as_ours(reference, precision[1], tmp_path)
  expected, expected_gradients = torchs(reference, torch.float32, *inputs)
  prediction, gradients = ours(unet, to_jax(*inputs))
  del unet
  half = reference.to(precision[1])
  for parameter in lora_weights(half).values():
    parameter.data = parameter.data.float()
  theirs, their_gradients = torchs(half, precision[1], *inputs)
  assert set(gradients) == set(expected_gradients)
  rounded = {"prediction": error({"": theirs}, {"": expected}),
             "gradients": error(their_gradients, expected_gradients)}
  found = {"prediction": error({"": prediction}, {"": expected}),
           "gradients": error(gradients, expected_gradients)}
  print(f"relative errors: ours {found}, torch's {rounded}")
  assert found["prediction"] < 1.5 * rounded["prediction"]
  assert found["gradients"] < 1.5 * rounded["gradients"]
