"""What a checkpoint takes on disk."""

import types

from flax import nnx
import jax

from ddpo_jax import checkpoint, lora, update
from ddpo_jax.models.unet import UNet2DConditionModel, UNetConfig

SD15 = UNetConfig(cross_attention_dim=768)


def test_lora_of_stable_diffusion_takes_less_than_15_mb(tmp_path):
  # nnx.Rngs' counter takes long to trace in so large a module.
  rngs = types.SimpleNamespace(params=lambda: jax.random.key(0))

  def make():
    unet = UNet2DConditionModel(SD15, rngs=rngs)
    lora.inject_lora(unet, 4, jax.random.key(0))
    return unet

  params = nnx.state(nnx.eval_shape(make), nnx.LoRAParam)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 797_184
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  # Random, because zeros would be compressed away.
  params = jax.tree.unflatten(treedef, [
      jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)])
  optimizer = update.make_optimizer(3e-4, 0.9, 0.999, 1e-4, 1e-8, 1.0)
  state = update.init_state(params, optimizer, loss_scaling=True)
  noise = lambda x: jax.random.normal(keys[0], x.shape).astype(x.dtype)
  state = jax.tree.map(lambda x: x + noise(x), state)  # Adam's moments too
  checkpointer = checkpoint.Checkpointer(tmp_path, keep=1)
  checkpointer.save(0, state, {"config": {}})
  checkpointer.close()
  size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
  assert 9e6 < size < 15e6, size
