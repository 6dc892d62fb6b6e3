"""What the program for a GPU is made of, as far as it can be run without one."""

import functools
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.compilation import compile_ahead, compile_meanwhile
from ddpo_jax.models import layers, placement
from ddpo_jax.ops.activations import geglu

P = jax.sharding.PartitionSpec


@pytest.mark.parametrize("layer", (
    functools.partial(layers.GroupNorm(64, 8, epsilon=1e-5, dtype=jnp.bfloat16,
                                       rngs=nnx.Rngs(0)), act=jax.nn.silu),
    layers.LayerNorm(64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), geglu))
def test_the_backward_pass_keeps_the_input_alone(layer):
  """Where log-probabilities are recomputed XLA keeps all that it is told to."""
  x = jnp.ones((2, 32, 32, 64), jnp.bfloat16)
  _, backward = jax.vjp(layer, x)
  kept = sum(array.nbytes for array in jax.tree.leaves(backward))
  # With a row's mean and deviation, two float32 numbers.
  assert x.nbytes <= kept < x.nbytes * (1 + 2 * 4 / 128 + 0.02)


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
  weights = weights | {"bias": jnp.ones(8), "dense": jnp.ones((8, 8))}  # have no order of their own
  placed = placement.place_weights(weights, replicated, output_first=True)
  assert placed["kernel"].format.layout.major_to_minor == (3, 0, 1, 2)
  assert placed["matrix"].format.layout.major_to_minor == (0, 1, 2, 3)
  for name, weight in weights.items():
    assert placed[name].sharding == replicated
    np.testing.assert_array_equal(placed[name], weight)
  # The program is compiled for them as they lie.
  assert "f32[3,3,8,8]{2,1,0,3}" in program.lower(placed, x).compile().as_text().split("\n")[0]
  np.testing.assert_allclose(program(placed, x), program(weights, x), rtol=1e-5)


def test_few_kernels_at_a_time_are_there_twice(convolution, monkeypatch):
  *_, replicated = convolution
  weights = {str(i): np.full((3, 3, 8, 8), i, np.float32) for i in range(8)}
  size, before = weights["0"].nbytes, set(map(id, jax.live_arrays()))
  most, jit = [], jax.jit

  def measured(function, **options):
    def call(kernels):
      results = jit(function, **options)(kernels)
      most.append(sum(x.nbytes for x in jax.live_arrays() if id(x) not in before))
      return results

    return call

  monkeypatch.setattr(jax, "jit", measured)
  monkeypatch.setattr(placement, "_REORDERED_AT_ONCE", 2 * size)
  placed = placement.place_weights(weights, replicated, output_first=True)
  assert max(most) <= (8 + 2) * size
  assert len(most) <= 8 / 2 + 1  # programs, each of which takes seconds to compile
  for name, weight in weights.items():
    assert placed[name].format.layout.major_to_minor == (3, 0, 1, 2)
    np.testing.assert_array_equal(placed[name], weight)


def test_a_program_compiled_for_shapes_takes_the_weights_as_they_lie(convolution):
  """The update is compiled while its weights are still in files."""
  program, weights, x, replicated = convolution
  abstract = placement.placed_shapes(jax.eval_shape(lambda: weights), replicated,
                                     output_first=True)
  compiled = program.lower(abstract, x).compile()
  placed = placement.place_weights(weights, replicated, output_first=True)
  np.testing.assert_array_equal(compiled(placed, x), program(placed, x))
  with pytest.raises(ValueError, match="layout"):
    compiled(placement.place_weights(weights, replicated), x)


def test_kernels_stay_as_they_are_on_a_cpu(convolution):
  _, weights, _, replicated = convolution
  placed = placement.place_weights(weights, replicated)
  assert placed["kernel"].format.layout.major_to_minor == (0, 1, 2, 3)


def test_kernels_lie_output_first_on_a_gpu():
  class OnGpu(jax.sharding.NamedSharding):
    device_set = (types.SimpleNamespace(platform="gpu"),)

  sharding = OnGpu(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), P())
  kernel = jax.ShapeDtypeStruct((3, 3, 8, 8), jnp.float32)
  assert placement._format(kernel, sharding, None).layout.major_to_minor == (3, 0, 1, 2)
  assert placement._format(kernel, sharding, False) is sharding


def test_a_program_compiled_ahead():
  x = jnp.ones(4)
  double, triple = jax.jit(lambda x: 2 * x), jax.jit(lambda x: 3 * x)
  np.testing.assert_array_equal(triple(x), 3)
  compiled = compile_ahead(double, jax.ShapeDtypeStruct(x.shape, x.dtype))
  np.testing.assert_array_equal(compiled(x), 2)
  assert double._cache_size() == triple._cache_size() == 0  # tracing them is forgotten
  np.testing.assert_array_equal(triple(x), 3)


def test_a_program_compiled_meanwhile():
  x = jnp.ones(4)
  double = compile_meanwhile(jax.jit(lambda x: 2 * x, donate_argnums=0),
                             jax.ShapeDtypeStruct(x.shape, x.dtype))
  np.testing.assert_array_equal(double(double(x)), 4)

  def fail(x):
    raise ValueError("not a program")

  failing = compile_meanwhile(jax.jit(fail), x)
  with pytest.raises(ValueError, match="not a program"):
    failing(x)
