"""Convolutions and attention as CPUs compute them, with their gradients, against torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.ops import attention, convolution, upsampling
from ddpo_jax.ops.cpu import attention as cpu_attention
from ddpo_jax.ops.cpu import convolution as cpu_convolution
from ddpo_jax.ops.cpu.matmul import matmul

torch = pytest.importorskip("torch")
functional = torch.nn.functional

# float32 against float64: Winograd's sums and differences cost a digit.
TOLERANCE = 5e-6


def check(ours, theirs, *inputs, dtype=np.float32, tolerance=TOLERANCE):
  """The same values, and the same gradients of a weighted sum of them."""
  arrays = [jnp.asarray(x, dtype) for x in inputs]
  tensors = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in arrays]
  expected = theirs(*tensors)
  grad = np.random.default_rng(1).normal(size=expected.shape)
  expected.backward(torch.from_numpy(grad))
  actual, backward = jax.vjp(jax.jit(ours), *arrays)
  pairs = [(actual, expected), *zip(backward(jnp.asarray(grad, actual.dtype)),
                                    (tensor.grad for tensor in tensors))]
  for a, b in pairs:
    assert (a.shape, a.dtype) == (b.shape, dtype)
    b = b.detach().numpy()
    assert np.abs(np.asarray(a, np.float64) - b).max() < tolerance * np.abs(b).max()


def torch_convolution(x, kernel, stride=1):
  return functional.conv2d(x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1), stride=stride,
                           padding=1).permute(0, 2, 3, 1)


def draw(*shapes):
  rng = np.random.default_rng(0)
  return [rng.normal(size=shape) for shape in shapes]


def num_convolutions(function, *inputs, dtype=np.float32):
  """XLA's, in the traced program."""
  program = jax.make_jaxpr(function)(*(jnp.asarray(x, dtype) for x in inputs))
  return str(program).count("conv_general_dilated")


def gradients_of(function):
  return jax.grad(lambda x, kernel: function(x, kernel).sum(), (0, 1))


@pytest.mark.parametrize("size,channels,as_products", [
    ((2, 2), (32, 48), True), ((4, 4), (40, 32), True), ((2, 6), (32, 32), True),
    ((1, 1), (32, 32), True), ((2, 2), (8, 6), True), ((1, 3), (8, 6), True),
    ((5, 7), (8, 3), True), ((2, 4), (32, 2), True),
    ((2, 3), (8, 6), False), ((4, 4), (4, 32), False), ((8, 8), (32, 32), False),
    ((3, 4), (32, 32), False), ((4, 3), (32, 32), False), ((5, 6), (16, 12), False),
    ((6, 5), (16, 12), False)])
def test_convolution(size, channels, as_products):
  x, kernel = draw((3, *size, channels[0]), (3, 3, *channels))
  prepared = cpu_convolution.prepare(jnp.float32(kernel))
  for convolve in (cpu_convolution.convolve,
                   lambda x, kernel: cpu_convolution.convolve(x, kernel, prepared)):
    check(convolve, torch_convolution, x, kernel)
    assert (num_convolutions(convolve, x, kernel) > 0) != as_products


@pytest.mark.parametrize("size,channels,as_products", [
    ((4, 6), (96, 100), True), ((4, 6), (96, 95), False), ((8, 8), (256, 256), True)])
def test_convolution_of_many_channels(size, channels, as_products):
  """As products only where what depends on the kernel has been computed before."""
  x, kernel = draw((2, *size, channels[0]), (3, 3, *channels))
  prepared = cpu_convolution.prepare(jnp.float32(kernel))
  convolve = lambda x, kernel: cpu_convolution.convolve(x, kernel, prepared)
  check(convolve, torch_convolution, x, kernel)
  for function, expected in ((convolve, not as_products), (cpu_convolution.convolve, True)):
    assert (num_convolutions(function, x, kernel) > 0) == expected


@pytest.mark.parametrize("size,channels,as_products", [
    ((2, 3), (256, 260), True), ((4, 4), (260, 256), True), ((6, 8), (256, 256), True),
    ((5, 40), (256, 256), True), ((6, 8), (256, 255), False), ((6, 8), (255, 256), False),
    ((10, 21), (256, 256), False)])
def test_convolution_in_half_precision(monkeypatch, size, channels, as_products):
  """Of all pixels at once, or of some rows at a time: two, or one where that is too long."""
  for name, value in (("_HALF_MAX_PIXELS_AT_ONCE", 16), ("_HALF_MAX_PIXELS_IN_PARTS", 200),
                      ("_MAX_PIXELS_OF_PART", 16)):
    monkeypatch.setattr(cpu_convolution, name, value)
  x, kernel = draw((2, *size, channels[0]), (3, 3, *channels))
  for dtype, tolerance in ((jnp.bfloat16, 1e-2), (jnp.float16, 1e-3)):
    check(cpu_convolution.convolve, torch_convolution, x, kernel, dtype=dtype, tolerance=tolerance)
    found = num_convolutions(cpu_convolution.convolve, x, kernel, dtype=dtype)
    assert (found > 0) != as_products


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
@pytest.mark.parametrize("size", ((1, 1), (2, 2), (4, 6), (5, 7)))
def test_strided_convolution(monkeypatch, size, backend):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  x, kernel = draw((3, *size, 8), (3, 3, 8, 6))
  strided = functools.partial(convolution.convolve, stride=2)
  check(strided, functools.partial(torch_convolution, stride=2), x, kernel)
  assert (num_convolutions(gradients_of(strided), x, kernel) > 0) == (backend == "gpu")


@pytest.mark.parametrize("function", (cpu_convolution.convolve, upsampling.upsample_and_convolve))
def test_gradient_in_the_kernel_is_a_product(function):
  """XLA's convolution for it, with a kernel as large as the image, takes 50 times as long."""
  x, kernel = draw((2, 8, 8, 32), (3, 3, 32, 40))
  forward = num_convolutions(function, x, kernel)
  assert num_convolutions(gradients_of(function), x, kernel) == 2 * forward > 0


@pytest.mark.parametrize("size", ((2, 2), (4, 4)))
def test_gradient_in_the_input_is_products_as_the_convolution_is(size):
  x, kernel = draw((2, *size, 32), (3, 3, 32, 40))
  assert num_convolutions(gradients_of(cpu_convolution.convolve), x, kernel) == 0


def convolution_of_doubled(x, kernel):
  return torch_convolution(x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2), kernel)


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
@pytest.mark.parametrize("size", ((1, 1), (2, 3), (4, 4), (5, 7)))
def test_convolution_of_a_doubled_image(monkeypatch, size, backend):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  x, kernel = draw((3, *size, 8), (3, 3, 8, 6))
  check(upsampling.upsample_and_convolve, convolution_of_doubled, x, kernel)
  prepared = upsampling.prepare(jnp.float32(kernel))
  check(lambda x, kernel: upsampling.upsample_and_convolve(x, kernel, prepared),
        convolution_of_doubled, x, kernel)
  half = {"dtype": jnp.float16, "tolerance": 2e-3}
  check(upsampling.upsample_and_convolve, convolution_of_doubled, x, kernel, **half)


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
@pytest.mark.parametrize("size", ((2, 3), (5, 7)))
def test_kernels_that_are_prepared_are_not_computed_anew(monkeypatch, size, backend):
  """Forward and for the gradient in the input: seen by kernels prepared that are twice as large."""
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  x, kernel = map(jnp.float32, draw((3, *size, 8), (3, 3, 8, 6)))
  twice = upsampling.prepare(2 * kernel)
  y, backward = jax.vjp(lambda x: upsampling.upsample_and_convolve(x, kernel, twice), x)
  expected, expected_backward = jax.vjp(
      lambda x: upsampling.upsample_and_convolve(x, 2 * kernel), x)
  np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(*(pull(y)[0] for pull in (backward, expected_backward)), rtol=1e-6,
                             atol=1e-4)


@pytest.mark.parametrize("size,as_products", (((4, 4), True), ((4, 5), False)))
def test_doubled_images_of_few_pixels_are_products(size, as_products):
  x, kernel = draw((3, *size, 8), (3, 3, 8, 6))
  for function in (upsampling.upsample_and_convolve,
                   gradients_of(upsampling.upsample_and_convolve)):
    assert (num_convolutions(function, x, kernel) > 0) != as_products


def test_combined_kernels_are_rounded_once():
  """In half precision; sums of four weights, each of which would round too."""
  kernel = jnp.asarray(draw((3, 3, 8, 6))[0], jnp.bfloat16)
  exact = upsampling.prepare(kernel.astype(jnp.float32))
  jax.tree.map(lambda ours, exact: np.testing.assert_array_equal(ours, exact.astype(jnp.bfloat16)),
               upsampling.prepare(kernel), exact)


def test_two_by_two_pixels_take_nine_products():
  """Where tiles would take sixteen."""
  x, kernel = map(jnp.float32, draw((3, 2, 2, 32), (3, 3, 32, 48)))
  prepared = cpu_convolution.prepare(kernel)
  convolve = lambda x: cpu_convolution.convolve(x, kernel, prepared)
  program = str(jax.make_jaxpr(lambda x: jax.vjp(convolve, x)[1](convolve(x)))(x))
  assert "f32[9,3,48]" in program and "f32[9,3,32]" in program
  assert "f32[16,3," not in program


def test_half_precision_is_not_transformed():
  """It would lose digits that it does not have."""
  x, kernel = draw((3, 4, 4, 32), (3, 3, 32, 32))
  check(cpu_convolution.convolve, torch_convolution, x, kernel, dtype=jnp.bfloat16, tolerance=2e-2)
  by_winograd = lambda dtype: cpu_convolution._by_winograd(x.astype(dtype), kernel.astype(dtype),
                                                           None)
  assert by_winograd(jnp.float32) and not by_winograd(jnp.bfloat16)


def test_doubled_image_of_many_channels_in_half_precision():
  x, kernel = draw((1, 4, 6, 256), (3, 3, 256, 256))
  check(upsampling.upsample_and_convolve, convolution_of_doubled, x, kernel, dtype=jnp.bfloat16,
        tolerance=2e-2)
  assert num_convolutions(upsampling.upsample_and_convolve, x, kernel, dtype=jnp.bfloat16) == 0
  program = jax.make_jaxpr(upsampling.upsample_and_convolve)(
      *(jnp.asarray(each, jnp.bfloat16) for each in (x, kernel)))
  assert str(program).count("preferred_element_type=float32") == 4  # a product for each subpixel


@pytest.mark.parametrize("dtype,tolerance", (("float32", TOLERANCE), ("bfloat16", 1e-2)))
def test_product(dtype, tolerance):
  """In half precision it is asked for with float32 sums, forward and backward."""
  x, y = draw((70, 24), (24, 40))
  check(matmul, torch.matmul, x, y, dtype=jnp.dtype(dtype), tolerance=tolerance)
  gradients = jax.grad(lambda x, y: matmul(x, y).sum().astype(jnp.float32), (0, 1))
  program = str(jax.make_jaxpr(gradients)(jnp.asarray(x, dtype), jnp.asarray(y, dtype)))
  assert program.count("preferred_element_type=float32") == program.count("dot_general") == 3


def torch_attention(query, key, value):
  heads_first = lambda x: x.transpose(1, 2)
  return heads_first(functional.scaled_dot_product_attention(
      *map(heads_first, (query, key, value))))


@pytest.mark.parametrize("query_length,key_length", ((16, 16), (64, 77), (4, 77), (1, 5)))
def test_attention(query_length, key_length):
  shapes = [(2, length, 4, 16) for length in (query_length, key_length, key_length)]
  check(cpu_attention.attend_at_once, torch_attention, *draw(*shapes))


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("queries", (16, 64))
def test_attention_in_half_precision(dtype, queries):
  """All products are asked for with float32 sums, forward and backward."""
  inputs = draw(*((2, length, 32) for length in (queries, 7, 7)))
  split = lambda x: x.reshape(*x.shape[:2], 4, 8)
  attend = lambda *x: attention.multi_head_attention(*x, num_heads=4)
  check(attend, lambda *x: torch_attention(*map(split, x)).reshape(2, queries, 32), *inputs,
        dtype=jnp.dtype(dtype), tolerance=1e-2)
  gradients = jax.grad(lambda *x: attend(*x).sum().astype(jnp.float32), (0, 1, 2))
  program = str(jax.make_jaxpr(gradients)(*(jnp.asarray(x, dtype) for x in inputs)))
  assert program.count("preferred_element_type=float32") == program.count("dot_general") == 6
