"""Hoisted networks: the same output, and the same gradients once they are handed on."""

import collections
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import with_weights

from ddpo_jax import hoisting, lora
from ddpo_jax.models import layers
from ddpo_jax.models.unet import UNet2DConditionModel, UNetConfig

# Every kind of block once, with channels enough for each form that convolutions have.
UNET = UNetConfig(
    block_out_channels=(32, 32), layers_per_block=1, attention_head_dim=4,
    cross_attention_dim=32, norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
PROJECTIONS, SELF_ATTENTIONS, CROSS_ATTENTIONS = 32, 4, 4  # of its LoRA
LATENTS = jax.random.normal(jax.random.key(0), (4, 8, 8, 4))
TIMESTEPS = jnp.array([500, 20, 999, 300])
PROMPTS = jax.random.normal(jax.random.key(1), (2, 7, 32))  # each of two latents in a row


def make_unet(dtype):
  return with_weights(functools.partial(UNet2DConditionModel, UNET, dtype=dtype), seed=0)


@pytest.fixture(scope="module")
def network():
  """With LoRA that changes what the network computes."""
  unet = make_unet(jnp.float32)
  lora.inject_lora(unet, rank=3, key=jax.random.key(2))
  for i, (_, linear) in enumerate(lora.attention_projections(unet)):
    key = jax.random.fold_in(jax.random.key(3), i)
    linear.lora_up[...] = 0.1 * jax.random.normal(key, linear.lora_up.shape)
  return lora.partition(unet)


@pytest.fixture(scope="module")
def direct(network):
  """What it computes as it is, and the gradient."""
  return noise_and_gradient(*network)


def noise_and_gradient(graphdef, params, frozen, context=PROMPTS):
  noise = lambda params: nnx.merge(graphdef, params, frozen)(LATENTS, TIMESTEPS, context)
  y, backward = jax.vjp(jax.jit(noise), params)
  return y, backward(2 * y)[0]


def kind(path):
  """The last name in it."""
  return [name for name in path if isinstance(name, str)][-1]


def check_gradient(ours, expected):
  ours, expected = (nnx.to_flat_state(x) for x in (ours, expected))
  assert len(expected) == 2 * PROJECTIONS and list(ours.paths) == list(expected.paths)
  for a, b in zip(ours.leaves, expected.leaves):
    np.testing.assert_allclose(a[...], b[...], rtol=1e-3,
                               atol=1e-4 * float(jnp.abs(b[...]).max()))


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
def test_hoisted_weights(monkeypatch, network, direct, backend):
  graphdef, params, frozen = network
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  hoist = lambda params: hoisting.hoist_weights(lora.Split(graphdef, params, frozen))
  hoisted, weights, rest = hoist(params)
  kinds = collections.Counter(map(kind, nnx.to_flat_state(weights).paths))
  # On a GPU a layer of self-attention has one `down` for three of its four projections, and
  # all keys and values of prompts have one.
  downs = PROJECTIONS - 2 * SELF_ATTENTIONS - (2 * CROSS_ATTENTIONS - 1)
  assert kinds == ({"kernel": PROJECTIONS} if backend == "cpu" else
                   {"lora_down": downs, "lora_up": PROJECTIONS})
  prepared = [path[:-1] for path, _ in nnx.to_flat_state(rest) if path[-1] == "_prepared"]
  upsampling = [path for path in prepared if "upsamplers" in path]
  assert upsampling and (len(prepared) > len(upsampling)) == (backend == "cpu")
  ours, gradient = noise_and_gradient(hoisted, weights, rest)
  np.testing.assert_allclose(ours, direct[0], rtol=1e-4, atol=1e-5)
  check_gradient(jax.vjp(lambda params: hoist(params)[1], params)[1](gradient)[0], direct[1])


def test_a_network_without_prompts_stays_as_it_is():
  """Of which every weight is trained, as LoRA needs attention."""
  config = UNetConfig(block_out_channels=(32,), layers_per_block=1, cross_attention_dim=16,
                      attention_head_dim=4, norm_num_groups=8, mid_block_type=None,
                      down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
  unet = lora.partition(UNet2DConditionModel(config, rngs=nnx.Rngs(0)), use_lora=False)
  hoisted = hoisting.hoist_weights(unet)
  assert hoisting.hoist_prompts(hoisted, PROMPTS) is hoisted


def test_hoisted_prompts(network, direct):
  """The network knows them: it is called with none."""
  graphdef, params, frozen = network

  def hoist(params):
    split = lora.Split(graphdef, params, frozen)
    return hoisting.hoist_prompts(hoisting.hoist_weights(split), PROMPTS)

  hoisted, weights, rest = hoist(params)
  known = [leaf[...] for path, leaf in nnx.to_flat_state(weights) if path[-1] == "output"]
  assert known and all(x.shape[0] == 2 and x.shape[2] == 7 for x in known)
  ours, gradient = noise_and_gradient(hoisted, weights, rest, context=jnp.zeros(()))
  np.testing.assert_allclose(ours, direct[0], rtol=1e-4, atol=1e-5)
  check_gradient(jax.vjp(lambda params: hoist(params)[1], params)[1](gradient)[0], direct[1])


@pytest.fixture(scope="module")
def half_precision():
  unet = make_unet(jnp.bfloat16)
  lora.inject_lora(unet, rank=3, key=jax.random.key(0))
  return lora.partition(unet)


def test_half_precision_keeps_its_matrices(half_precision):
  """LoRA stays beside them, of a padded rank, in float32 until it is rounded once."""
  hoisted = hoisting.hoist_weights(half_precision)
  assert all(ours is given for ours, given in
             zip(hoisting.hoist_prompts(hoisted, PROMPTS), hoisted))
  before, after, rounded = (collections.Counter(
      (kind(path), weight.shape[axis], str(weight.dtype))
      for path, weight in nnx.to_flat_state(trained)
      for axis in [{"lora_down": 1, "lora_up": 0}[kind(path)]])
      for trained in (half_precision[1], hoisted[1], hoisting.cast_lora(hoisted)[1]))
  assert before == {(name, 3, "float32"): PROJECTIONS for name in ("lora_down", "lora_up")}
  joined, of_prompts = 3 * SELF_ATTENTIONS, 2 * CROSS_ATTENTIONS
  shapes = {("lora_down", 8): PROJECTIONS - joined - of_prompts,
            ("lora_down", 24): SELF_ATTENTIONS, ("lora_down", 8 * of_prompts): 1,
            ("lora_up", 8): PROJECTIONS - joined, ("lora_up", 24): joined}
  assert after == {(*key, "float32"): count for key, count in shapes.items()}
  assert rounded == {(*key, "bfloat16"): count for key, count in shapes.items()}


@pytest.mark.parametrize("rank,padded", ((8, 8), (9, 16)))
def test_the_rank_is_padded_no_further_than_needed(rank, padded):
  def trained():
    unet = UNet2DConditionModel(UNET, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    lora.inject_lora(unet, rank, jax.random.key(0))
    return hoisting.hoist_weights(lora.partition(unet)).trained

  ranks = {weight.shape[0] for path, weight in nnx.to_flat_state(jax.eval_shape(trained))
           if kind(path) == "lora_up"}
  assert ranks == {padded, 3 * padded}  # of queries, keys and values together


def test_weights_of_full_finetuning_are_not_rounded():
  """They are float32, whatever the network computes in."""
  def trained():
    unet = UNet2DConditionModel(UNET, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layers.set_compute_dtype(unet, jnp.bfloat16)
    return hoisting.cast_lora(lora.partition(unet, use_lora=False)).trained

  dtypes = {str(weight.dtype) for weight in jax.tree.leaves(jax.eval_shape(trained))}
  assert dtypes == {"float32"}


def test_rounded_lora_computes_the_same(half_precision):
  """To the last bit, as each layer would round it by itself; so are the gradients."""
  rounded = hoisting.cast_lora(half_precision)
  ours, gradient = noise_and_gradient(*rounded)
  expected, expected_gradient = noise_and_gradient(*half_precision)
  np.testing.assert_array_equal(ours, expected)
  jax.tree.map(np.testing.assert_array_equal,
               jax.tree.map(lambda x: x.astype(jnp.float32), gradient), expected_gradient)


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
def test_latents_in_a_row_share_a_prompt(monkeypatch, network, backend):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  noise = jax.jit(lambda prompts: nnx.merge(*network)(LATENTS, TIMESTEPS, prompts))
  repeated = noise(jnp.repeat(PROMPTS, 2, axis=0))
  shared = noise(PROMPTS)
  np.testing.assert_allclose(shared, repeated, rtol=1e-4, atol=1e-5)
  assert not np.allclose(shared, noise(PROMPTS[::-1]), atol=1e-2)
