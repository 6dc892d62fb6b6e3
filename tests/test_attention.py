"""Attention's ways of being computed: which is taken where, and that they agree."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.ops import attention
from ddpo_jax.ops.chunked_attention import attend_in_chunks
from ddpo_jax.ops.cpu.attention import attend_in_blocks

P = jax.sharding.PartitionSpec
attend = functools.partial(jax.nn.dot_product_attention, implementation="xla")


def draw(query_length, key_length, heads=2, features=8):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = [(2, length, heads, features) for length in (query_length, key_length, key_length)]
  return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def check_same(other, query, key, value):
  """Values and gradients are those of plain attention."""
  def value_and_grads(attention):
    loss = lambda *args: jnp.sin(attention(*args)).sum()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(query, key, value)

  expected, expected_grads = value_and_grads(attend)
  actual, grads = value_and_grads(other)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  for a, b in zip(grads, expected_grads):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("length", (64, 60, 61))
@pytest.mark.parametrize("max_scores", (10, 1000, 10_000))
def test_attention_in_chunks(length, max_scores):
  query, key, value = draw(length, 48)
  check_same(lambda *args: attend_in_chunks(attend, *args, max_scores),
             query, key, value)


def test_gradients_of_chunks_are_added_up_in_float32():
  """Of 64 chunks; in half precision each addition would round."""
  query, key, value = draw(256, 48)
  loss = lambda attention, *args: jnp.sin(attention(*args).astype(jnp.float32)).sum()
  gradients = lambda attention, dtype: jax.grad(functools.partial(loss, attention), (1, 2))(
      *(x.astype(dtype) for x in (query, key, value)))
  wide = lambda *args: attend(*(x.astype(jnp.float32) for x in args)).astype(args[0].dtype)
  chunked = lambda *args: attend_in_chunks(wide, *args, max_scores=4 * 48)
  for ours, whole, exact in zip(gradients(chunked, jnp.bfloat16), gradients(wide, jnp.bfloat16),
                                gradients(attend, jnp.float32)):
    error = lambda x: np.linalg.norm(np.float32(x) - exact)
    assert error(ours) < 1.5 * error(whole)


def test_chunks_keep_what_they_were_given_for_the_backward_pass():
  """Not in float32 as well, which would take twice as much."""
  inputs = [x.astype(jnp.bfloat16) for x in draw(256, 48)]
  _, backward = jax.vjp(lambda *args: attend_in_chunks(attend, *args, 4 * 48), *inputs)
  kept = sum(x.nbytes for x in jax.tree.leaves(backward))
  assert kept == sum(x.nbytes for x in inputs)


@pytest.mark.parametrize("max_scores,shape", [
    (12288, (2, 64, 2, 8)), (6144, (1, 64, 2, 8)), (3072, (1, 64, 1, 8)), (768, (1, 16, 1, 8))])
def test_attention_in_blocks(max_scores, shape):
  """All at once, a sample, a head, a quarter of its queries."""
  seen = []

  def spy(query, key, value):
    seen.append(query.shape)
    return attend(query, key, value)

  query, key, value = draw(64, 48)
  check_same(lambda *args: attend_in_blocks(spy, *args, max_scores, max_scores),
             query, key, value)
  assert set(seen) == {shape}


@pytest.mark.parametrize("length", (77, 1, 80))
def test_attention_to_an_odd_number_of_keys(length):
  """The padding that cuDNN needs, before another implementation of the same function."""
  seen = []

  def spy(query, key, value, **kwargs):
    seen.append(key.shape[1])
    return attend(query, key, value, **kwargs)

  query, key, value = draw(16, length)
  check_same(functools.partial(attention.attend_with_padded_keys, spy), query, key, value)
  assert {n % 8 for n in seen} == {0}


def temporaries(function, *shape):
  """Bytes of temporary memory, forward and backward."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  compiled = jax.jit(jax.grad(lambda x: function(x).sum())).lower(x).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_long_attention_holds_no_square():
  """4096 tokens of the VAE's single head of 512, forward and backward."""
  tokens = 4096
  square = 4 * tokens**2
  plain = lambda x: attend(x[:, :, None], x[:, :, None], x[:, :, None])
  assert temporaries(plain, 1, tokens, 64) > square
  chunked = lambda x: attention.multi_head_attention(x, x, x, 1)
  assert temporaries(chunked, 1, tokens, 64) < square


@pytest.fixture
def on_a_gpu(monkeypatch):
  """The default backend is a GPU, and its device is of the platform that this returns."""
  device = mock.Mock(platform="gpu", compute_capability="8.6")
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  caches = attention._cudnn_serves, attention._warn_once
  for cached in caches:
    cached.cache_clear()
  yield device
  for cached in caches:
    cached.cache_clear()


@pytest.mark.parametrize("batch,tokens", ((1, 4096), (16, 1024)))
def test_scores_held_at_once_do_not_grow(on_a_gpu, batch, tokens):
  """On a GPU without flash attention, neither with the tokens nor with the batch."""
  at_once = 4 * attention.MAX_SCORES
  assert 4 * batch * 8 * tokens**2 > 8 * at_once
  in_chunks = lambda x: attention.multi_head_attention(x, x, x, 8)
  assert temporaries(in_chunks, batch, tokens, 64) < 5 * at_once


@pytest.mark.parametrize("shape,dtype,expected", [
    ((2, 4096, 8, 40), jnp.bfloat16, "cudnn"),
    ((2, 1024, 8, 80), jnp.float16, "cudnn"),
    ((2, 256, 8, 160), jnp.bfloat16, "xla"),  # refused before Hopper
    ((2, 77, 12, 64), jnp.bfloat16, "xla"),  # an odd number of queries
    ((2, 256, 8, 36), jnp.bfloat16, "xla"),  # features that are no multiple of 8
    ((2, 4096, 8, 40), jnp.float32, "xla")])
@pytest.mark.parametrize("keys", (77, 4096))
def test_cudnn_serves_even_queries_in_half_precision(
    on_a_gpu, monkeypatch, shape, dtype, expected, keys):
  """Where cuDNN has what is asked of it: here attention of another kind stands for its."""
  def flash_attention(*inputs, **kwargs):  # CPUs have no products in half precision
    return attend(*(x.astype(jnp.float32) for x in inputs), **kwargs).astype(dtype)

  monkeypatch.setattr(attention, "_flash_attention", flash_attention)
  query, key = (jax.ShapeDtypeStruct((2, length, *shape[2:]), dtype)
                for length in (shape[1], keys))
  assert attention.implementation(query, key) == expected


@pytest.mark.parametrize("capability,largest", (
    ("8.9", 128), ("9.0", 256), ("10.0", 256), ("gfx942", 128), (None, 128)))
def test_hopper_has_larger_heads(on_a_gpu, monkeypatch, capability, largest):
  """Stable Diffusion's innermost ones have 160 features."""
  monkeypatch.setattr(attention, "_cudnn_serves", lambda *_: True)
  on_a_gpu.compute_capability = capability
  for features in (128, 160, 256, 320):
    x = jax.ShapeDtypeStruct((2, 256, 8, features), jnp.float16)
    assert attention.implementation(x, x) == ("cudnn" if features <= largest else "xla")


def test_a_program_for_a_gpu_that_is_not_here(on_a_gpu):
  """It is compiled for one with cuDNN, although the CPU has none."""
  on_a_gpu.platform = "cpu"
  x = jax.ShapeDtypeStruct((2, 64, 2, 8), jnp.bfloat16)
  assert attention.implementation(x, x) == "cudnn"


def test_a_cpu_has_no_cudnn():
  x = jax.ShapeDtypeStruct((2, 64, 2, 8), jnp.bfloat16)
  assert attention.implementation(x, x) == "xla"


def test_a_gpu_without_flash_attention(on_a_gpu, caplog):
  """It is found while a program is traced, said once, and XLA's attention taken.

  This machine is such a GPU: it has no cuDNN.
  """
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,),
                       devices=jax.devices()[:2])
  query, key, value = (x.reshape(*x.shape[:2], -1).astype(jnp.bfloat16) for x in draw(64, 77))

  def attend_all(*inputs):
    loss = lambda *x: attention.multi_head_attention(*x, num_heads=2).astype(jnp.float32).sum()
    return jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2))(*inputs)

  mapped = jax.jit(jax.shard_map(attend_all, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
  for grad, x in zip(mapped(query, key, value), (query, key, value)):
    assert grad.shape == x.shape and jnp.isfinite(grad).all()
  mapped(query[:, :32], key, value)  # other shapes: asked again
  (said,) = [record.getMessage() for record in caplog.records
             if record.name == attention.__name__]
  assert "cuDNN's flash attention cannot be used here (" in said and "slower" in said
  assert attention._cudnn_serves.cache_info().misses == 2
