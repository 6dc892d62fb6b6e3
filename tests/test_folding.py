"""Folded networks: the same output, and the same gradients once they are handed on."""

import collections

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax import folding, lora

LATENTS = jax.random.normal(jax.random.key(0), (4, 8, 8, 4))
TIMESTEPS = jnp.array([500, 20, 999, 300])
PROMPTS = jax.random.normal(jax.random.key(1), (2, 7, 32))  # each of two latents in a row


@pytest.fixture
def network(golden_lora):
  return lora.partition(golden_lora("lora_new"))


def noise_and_gradient(graphdef, params, frozen, context=PROMPTS):
  noise = lambda params: nnx.merge(graphdef, params, frozen)(LATENTS, TIMESTEPS, context)
  y, backward = jax.vjp(jax.jit(noise), params)
  return y, backward(2 * y)[0]


def check_gradient(ours, expected):
  ours, expected = (nnx.to_flat_state(x) for x in (ours, expected))
  assert len(expected) == 112 and list(ours.paths) == list(expected.paths)
  for a, b in zip(ours.leaves, expected.leaves):
    np.testing.assert_allclose(a[...], b[...], rtol=1e-3,
                               atol=1e-4 * float(jnp.abs(b[...]).max()))


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
def test_folded_weights(monkeypatch, network, backend):
  graphdef, params, frozen = network
  expected, direct = noise_and_gradient(graphdef, params, frozen)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  fold = lambda params: folding.fold_weights(graphdef, params, frozen)
  folded, weights, rest = fold(params)
  kinds = collections.Counter(path[-1] for path, _ in nnx.to_flat_state(weights))
  # On a GPU a layer of self-attention has one `down` for three of its four projections.
  assert kinds == ({"kernel": 56} if backend == "cpu" else {"lora_down": 42, "lora_up": 56})
  assert ("_prepared" in {path[-1] for path, _ in nnx.to_flat_state(rest)}) == (backend == "cpu")
  ours, gradient = noise_and_gradient(folded, weights, rest)
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
  check_gradient(jax.vjp(lambda params: fold(params)[1], params)[1](gradient)[0], direct)


def test_folded_prompts(network):
  """The network knows them: it is called with none."""
  graphdef, params, frozen = network

  def fold(params):
    return folding.fold_prompts(*folding.fold_weights(graphdef, params, frozen), PROMPTS)

  folded, weights, rest = fold(params)
  known = [leaf[...] for path, leaf in nnx.to_flat_state(weights) if path[-1] == "output"]
  assert known and all(x.shape[0] == 2 and x.shape[2] == 7 for x in known)
  expected, direct = noise_and_gradient(graphdef, params, frozen)
  ours, gradient = noise_and_gradient(folded, weights, rest, context=jnp.zeros(()))
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
  check_gradient(jax.vjp(lambda params: fold(params)[1], params)[1](gradient)[0], direct)


@pytest.fixture
def half_precision(tiny_sd):
  unet = nnx.clone(tiny_sd.unet)
  for _, linear in lora.attention_projections(unet):
    linear.dtype = jnp.bfloat16
  lora.inject_lora(unet, rank=3, key=jax.random.key(0))
  return lora.partition(unet)


def test_half_precision_keeps_its_matrices(half_precision):
  """LoRA stays beside them, of a padded rank, in float32 until it is rounded once."""
  folded = folding.fold_weights(*half_precision)
  assert all(ours is given for ours, given in
             zip(folding.fold_prompts(*folded, PROMPTS), folded))
  before, after, rounded = (collections.Counter(
      (path[-1], weight.shape[axis], str(weight.dtype))
      for path, weight in nnx.to_flat_state(trained)
      for axis in [{"lora_down": 1, "lora_up": 0}[path[-1]]])
      for trained in (half_precision[1], folded[1], folding.round_lora(*folded)[1]))
  assert before == {("lora_down", 3, "float32"): 56, ("lora_up", 3, "float32"): 56}
  shapes = {("lora_down", 8): 35, ("lora_down", 24): 7, ("lora_up", 8): 35, ("lora_up", 24): 21}
  assert after == {(*key, "float32"): count for key, count in shapes.items()}
  assert rounded == {(*key, "bfloat16"): count for key, count in shapes.items()}


def test_rounded_lora_computes_the_same(half_precision):
  """To the last bit, as each layer would round it by itself; so are the gradients."""
  rounded = folding.round_lora(*half_precision)
  ours, gradient = noise_and_gradient(*rounded)
  expected, direct = noise_and_gradient(*half_precision)
  np.testing.assert_array_equal(ours, expected)
  jax.tree.map(np.testing.assert_array_equal,
               jax.tree.map(lambda x: x.astype(jnp.float32), gradient), direct)


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
def test_latents_in_a_row_share_a_prompt(monkeypatch, tiny_sd, backend):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  repeated = tiny_sd.unet(LATENTS, TIMESTEPS, jnp.repeat(PROMPTS, 2, axis=0))
  shared = tiny_sd.unet(LATENTS, TIMESTEPS, PROMPTS)
  np.testing.assert_allclose(shared, repeated, rtol=1e-4, atol=1e-5)
  assert not np.allclose(shared, tiny_sd.unet(LATENTS, TIMESTEPS, PROMPTS[::-1]), atol=1e-2)
