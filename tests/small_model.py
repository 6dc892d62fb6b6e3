"""The smallest model and run that the loop can train: its programs compile in seconds."""

import atexit
import functools
import json
import pathlib
import shutil
import tempfile

from flax import nnx
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import base
from ddpo_jax.models.pretrained import PARTS
from ddpo_jax.models.weights import save_module

GOLDEN_SD = pathlib.Path(__file__).parent / "golden" / "tiny-sd"
UNET = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": [16],
    "layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 32,
    "norm_num_groups": 8, "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": None, "up_block_types": ["CrossAttnUpBlock2D"]}
VAE = {
    "sample_size": 32, "block_out_channels": [8, 16], "layers_per_block": 1,
    "norm_num_groups": 8, "latent_channels": 4, "scaling_factor": 0.18215,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2}


def with_weights(make, seed):
  """A module with weights drawn by NumPy: JAX would compile a program for every shape."""
  graphdef, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
  rng = np.random.default_rng(seed)

  def draw(path, variable):
    if path[-1] in ("bias", "scale"):
      values = np.full(variable.shape, path[-1] == "scale")
    else:
      values = rng.normal(size=variable.shape) / np.sqrt(np.prod(variable.shape[:-1]))
    return variable.replace(jnp.asarray(values, variable.dtype))

  drawn = [(path, draw(path, variable)) for path, variable in nnx.to_flat_state(state)]
  return nnx.merge(graphdef, nnx.from_flat_state(drawn))


@functools.cache
def small_model():
  """A folder with a UNet and a VAE of seeded weights, and the rest of the golden model."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="small_model_"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  shutil.copytree(GOLDEN_SD, folder, dirs_exist_ok=True)
  for i, (part, values) in enumerate((("unet", UNET), ("vae", VAE))):
    (folder / part / "config.json").write_text(json.dumps(values))
    network, config = PARTS[part]
    save_module(with_weights(functools.partial(network, config.from_dict(values)), i),
                folder / part / "diffusion_pytorch_model.safetensors")
  return folder


def small_config(**changes) -> ml_collections.ConfigDict:
  """A run of seconds; wherever the sizes stay as here, its programs are compiled once."""
  config = base.get_config()
  config.pretrained.model, config.mixed_precision = str(small_model()), "no"
  config.compilation_cache = ""
  config.lora.rank = 3
  config.prompt_fn = "simple_animals"
  config.sample.num_steps, config.sample.guidance_scale = 2, 1.0
  config.sample.batch_size, config.sample.num_batches_per_epoch = 4, 1
  config.train.batch_size, config.train.learning_rate = 2, 1e-2
  config.per_prompt_stat_tracking.min_count = 2
  config.update_from_flattened_dict(changes)
  return config
