"""What the program for a GPU is made of, as far as it can be run without one."""

import functools
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.models import layers, norms

P = jax.sharding.PartitionSpec
attend = functools.partial(jax.nn.dot_product_attention, implementation="xla")


def draw(query_length, key_length, heads=2, features=8):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = [(2, length, heads, features) for length in (query_length, key_length, key_length)]
  return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def check_same(other, query, key, value):
  """Values and gradients are those of plain attention."""
  def loss(attention, *args):
    return jnp.sin(attention(*args)).sum()

  expected, expected_grads = jax.value_and_grad(functools.partial(loss, attend),
                                                argnums=(0, 1, 2))(query, key, value)
  actual, grads = jax.value_and_grad(functools.partial(loss, other),
                                     argnums=(0, 1, 2))(query, key, value)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  for a, b in zip(grads, expected_grads):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("length", (64, 60, 61))
@pytest.mark.parametrize("max_scores", (10, 1000, 10_000))
def test_attention_in_chunks(length, max_scores):
  query, key, value = draw(length, 48)
  check_same(lambda *args: layers.attend_in_chunks(attend, *args, max_scores),
             query, key, value)


@pytest.mark.parametrize("max_scores,shape", [
    (12288, (2, 64, 2, 8)), (6144, (1, 64, 2, 8)), (3072, (1, 64, 1, 8)), (768, (1, 16, 1, 8))])
def test_attention_in_parts(max_scores, shape):
  """All at once, a sample, a head, a quarter of its queries."""
  seen = []

  def spy(query, key, value):
    seen.append(query.shape)
    return attend(query, key, value)

  query, key, value = draw(64, 48)
  check_same(lambda *args: layers.attend_in_parts(spy, *args, max_scores, max_scores),
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
  check_same(functools.partial(layers.attend_to_even, spy), query, key, value)
  assert {n % 8 for n in seen} == {0}


@pytest.mark.parametrize("layer", (
    functools.partial(norms.GroupNorm(64, 8, epsilon=1e-5, dtype=jnp.bfloat16,
                                      rngs=nnx.Rngs(0)), act=jax.nn.silu),
    norms.LayerNorm(64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), layers.gated_gelu))
def test_the_backward_pass_keeps_the_input_alone(layer):
  """Where log-probabilities are recomputed XLA keeps all that it is told to."""
  x = jnp.ones((2, 32, 32, 64), jnp.bfloat16)
  _, backward = jax.vjp(layer, x)
  kept = sum(array.nbytes for array in jax.tree.leaves(backward))
  # With a row's mean and deviation, two float32 numbers.
  assert x.nbytes <= kept < x.nbytes * (1 + 2 * 4 / 128 + 0.02)


def test_long_attention_holds_no_square():
  """4096 tokens of the VAE's single head of 512, forward and backward."""
  tokens = 4096
  x = jax.ShapeDtypeStruct((1, tokens, 64), jnp.float32)
  square = 4 * tokens**2

  def temporaries(function):
    compiled = jax.jit(jax.grad(lambda x: function(x).sum())).lower(x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  plain = lambda x: attend(x[:, :, None], x[:, :, None], x[:, :, None])
  assert temporaries(plain) > square
  chunked = lambda x: layers.multi_head_attention(x, x, x, 1)
  assert temporaries(chunked) < square


@pytest.mark.parametrize("shape,dtype,capability,expected", [
    ((2, 4096, 8, 40), jnp.bfloat16, "9.0", "cudnn"),
    ((2, 1024, 8, 80), jnp.float16, "8.6", "cudnn"),
    ((2, 1024, 8, 80), jnp.float16, "12.0", "cudnn"),
    ((2, 256, 8, 160), jnp.bfloat16, "9.0", "xla"),  # refused before Hopper
    ((2, 77, 12, 64), jnp.bfloat16, "9.0", "xla"),  # an odd number of queries
    ((2, 4096, 8, 40), jnp.float32, "9.0", "xla"),
    ((2, 4096, 8, 40), jnp.float16, "7.5", "xla"),  # a T4: cuDNN has no plan for it
    ((2, 4096, 8, 40), jnp.bfloat16, "gfx942", "xla"),  # not CUDA
    ((2, 4096, 8, 40), jnp.bfloat16, None, "xla")])
def test_implementation(monkeypatch, shape, dtype, capability, expected):
  """Of a GPU with this compute capability; None is a processor."""
  device = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu" if capability is None else "gpu")
  assert layers.attention_implementation(jax.ShapeDtypeStruct(shape, dtype)) == expected


@pytest.fixture(scope="module")
def convolution():
  """A scanned convolution on two devices, its kernel, a matrix, and its input."""
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,),
                       devices=jax.devices()[:2])
  weights = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 8, 8)),
             "matrix": jax.random.normal(jax.random.key(1), (1, 1, 8, 8))}
  x = jax.device_put(jax.random.normal(jax.random.key(2), (4, 8, 8, 8)),
                     jax.sharding.NamedSharding(mesh, P("data")))

  def program(weights, x):
    def body(x, _):
      x = jax.lax.conv_general_dilated(x, weights["kernel"], (1, 1), "SAME",
                                       dimension_numbers=("NHWC", "HWIO", "NHWC"))
      return x @ weights["matrix"][0, 0], None
    return jax.lax.scan(body, x, length=3)[0]

  mapped = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=(P(), P("data")),
                                 out_specs=P("data")))
  return mapped, weights, x, jax.sharding.NamedSharding(mesh, P())


def test_kernels_lie_output_first(convolution):
  program, weights, x, replicated = convolution
  placed = layers.place_weights(weights, replicated, output_first=True)
  assert placed["kernel"].format.layout.major_to_minor == (3, 0, 1, 2)
  assert placed["matrix"].format.layout.major_to_minor == (0, 1, 2, 3)
  for name, weight in weights.items():
    assert placed[name].sharding == replicated
    np.testing.assert_array_equal(placed[name], weight)
  # The program is compiled for them as they lie.
  assert "f32[3,3,8,8]{2,1,0,3}" in program.lower(placed, x).compile().as_text().split("\n")[0]
  np.testing.assert_allclose(program(placed, x), program(weights, x), rtol=1e-5)


def test_a_program_compiled_for_shapes_takes_the_weights_as_they_lie(convolution):
  """The update is compiled while its weights are still in files."""
  program, weights, x, replicated = convolution
  abstract = layers.placed_shapes(jax.eval_shape(lambda: weights), replicated,
                                  output_first=True)
  compiled = program.lower(abstract, x).compile()
  placed = layers.place_weights(weights, replicated, output_first=True)
  np.testing.assert_array_equal(compiled(placed, x), program(placed, x))
  with pytest.raises(ValueError, match="layout"):
    compiled(layers.place_weights(weights, replicated), x)


def test_kernels_stay_as_they_are_on_a_cpu(convolution):
  _, weights, _, replicated = convolution
  placed = layers.place_weights(weights, replicated)
  assert placed["kernel"].format.layout.major_to_minor == (0, 1, 2, 3)
