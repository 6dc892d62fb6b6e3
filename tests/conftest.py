"""Shared by all tests: virtual CPU devices, golden files and their model."""

import functools
import os
import pathlib
import types

# Before JAX is imported: eight devices, for the tests that compare numbers of devices.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") +
                           " --xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# Here and not in test_fuzz.py, so that --hypothesis-profile=long finds it.
hypothesis.settings.register_profile("quick", max_examples=100, deadline=None,
                                     derandomize=True, database=None)
hypothesis.settings.register_profile(
    "long", max_examples=20_000, deadline=None, database=None,
    suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile("quick")

# The longest files, so that no worker is left alone with one at the end; between them those
# that sleep more than they compute.
FIRST = ("processes", "precision", "experiments", "vlm", "update", "train", "hoisting", "llava",
         "resume", "inference", "sampler", "faults", "devices")
GOLDEN = pathlib.Path(__file__).parent / "golden"
# Files of others that cannot be in this repository; tests that need one are skipped without it.
SHARED_DATA = pathlib.Path(os.environ.get(
    "DDPO_JAX_TEST_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data"))


def pytest_collection_modifyitems(items):
  place = {f"test_{name}": i for i, name in enumerate(FIRST)}
  items.sort(key=lambda item: place.get(item.path.stem, len(FIRST)))


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  """Programs that several tests compile are compiled once, whichever worker runs them."""
  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent
  jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session")
def golden():
  """Loads a golden file by name: `golden("a_extras")` -> {array name: array}."""
  @functools.cache
  def load(name):
    arrays = dict(np.load(GOLDEN / f"{name}.npz", allow_pickle=False))
    for array in arrays.values():
      array.setflags(write=False)  # all tests share it
    return types.MappingProxyType(arrays)

  return load


@pytest.fixture(scope="session")
def tiny_sd():
  """The golden files' random-weight Stable Diffusion."""
  from ddpo_jax.models import load_pretrained
  return load_pretrained(GOLDEN / "tiny-sd")


@pytest.fixture(scope="session")
def nhwc():
  """[..., C, H, W] numpy -> [..., H, W, C] jax."""
  return lambda x: jnp.asarray(np.moveaxis(x, -3, -1))


@pytest.fixture(scope="session")
def golden_lora(golden, tiny_sd, tmp_path_factory):
  """The tiny UNet with golden LoRA weights, read from a file as a user's would be."""
  from flax import nnx
  from safetensors.numpy import save_file

  from ddpo_jax import lora

  @functools.cache
  def read(group):
    arrays = golden("e_lora_grads")
    tensors = {name.split("/")[1]: np.ascontiguousarray(array)
               for source in ("lora_old", group) for name, array in arrays.items()
               if name.startswith(source + "/")}
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(tensors, path)
    unet = nnx.clone(tiny_sd.unet)
    lora.import_lora(unet, path)
    return unet

  return lambda group: nnx.clone(read(group))
