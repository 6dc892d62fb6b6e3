"""The smallest model that the loop can train: its programs compile in seconds."""

import atexit
import functools
import json
import pathlib
import shutil
import tempfile

from flax import nnx

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


@functools.cache
def small_model():
  """A folder with a UNet and a VAE of seeded weights, and the rest of the golden model."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="small_model_"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  shutil.copytree(GOLDEN_SD, folder, dirs_exist_ok=True)
  for i, (part, values) in enumerate((("unet", UNET), ("vae", VAE))):
    (folder / part / "config.json").write_text(json.dumps(values))
    network, config = PARTS[part]
    save_module(network(config.from_dict(values), rngs=nnx.Rngs(i)),
                folder / part / "diffusion_pytorch_model.safetensors")
  return folder
