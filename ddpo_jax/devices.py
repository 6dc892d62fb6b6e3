"""JAX on the devices there are: its settings, and how large a part of a batch each takes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import threading
from typing import Any

import jax
import numpy as np

from ddpo_jax import distributed
from ddpo_jax.batches import BatchPlan
from ddpo_jax.config import Config, automatic_cache_folder
from ddpo_jax.console import say
from ddpo_jax.errors import UserError
from ddpo_jax.messages import one_line
from ddpo_jax.parts import largest_divisor

AXIS = "data"  # of the mesh, over every device of every process
# With fewer samples of a microbatch a core does not gain what its copy of the weights takes.
_LEAST_SAMPLES = 8
# On a CPU more samples at a time are no faster, and take more memory.
_MOST_SAMPLES_AT_ONCE = 16


def configure_devices() -> None:
  """Makes each core of the CPU a device, because XLA uses one core for much of a program.

  Must come before JAX's first use of a device, and after `distributed.initialize`. Does nothing
  where there are several processes, or where XLA_FLAGS or JAX_NUM_CPU_DEVICES say how many
  devices the CPU is.
  """
  if not _number_is_given():
    with contextlib.suppress(RuntimeError):  # the number of devices has been settled
      jax.config.update("jax_num_cpu_devices", usable_cores())


def open_in_background() -> None:
  """Opens this process's devices in a thread: that takes a GPU's driver seconds.

  Must come after `configure_devices`. Code that needs a device before then waits for it, and gets
  the error if there is one.
  """
  def touch() -> None:
    with contextlib.suppress(RuntimeError):
      jax.block_until_ready(jax.device_put([np.zeros(())] * jax.local_device_count(),
                                           jax.local_devices()))

  threading.Thread(target=touch).start()


def configure_jax(cfg: Config) -> None:
  """Settings of JAX itself: the compilation cache, and types of numbers. Collective."""
  folder = cfg.compilation_cache_folder()
  if folder is not None and not distributed.is_shared(folder):
    # On GPUs XLA tunes a program in all processes together, or waits for those that have it.
    say(f"Not using compilation_cache={cfg.compilation_cache!r}, because {folder} is not the same "
        "folder for all processes; one that is would make the next start quicker")
    folder = None
  if folder is not None:
    _keep_programs(folder)
  if jax.distributed.is_initialized():
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # for the same reason
  _configure_numbers(cfg.allow_tf32)


def configure_jax_for_base_model() -> None:
  """As `configure_jax` with the defaults of configs/base.py, where there is no config."""
  folder = automatic_cache_folder()
  if folder is not None and jax.config.values["jax_compilation_cache_dir"] is None:
    _keep_programs(folder)  # else the environment says where
  _configure_numbers(allow_tf32=True)


def _keep_programs(folder: pathlib.Path) -> None:
  # Absolute, because a reward may change the working folder.
  jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _configure_numbers(allow_tf32: bool) -> None:
  precision = "tensorfloat32" if allow_tf32 else "highest"
  jax.config.update("jax_default_matmul_precision", precision)
  jax.config.update("jax_enable_x64", False)  # the environment may: JAX then draws otherwise


def plan_batches(cfg: Config) -> BatchPlan:
  """The batch arithmetic of a run on the devices there are.

  Without a GPU the CPU is one device to the config. If `configure_devices` has made each core a
  device, all of them take equal parts of its batches; the results are the same to rounding.

  Raises:
    UserError: if JAX finds no device.
  """
  device = first_device()
  cores = _cores_as_devices()
  smallest = math.gcd(cfg.sample.batch_size, cfg.train.batch_size)
  parts = largest_divisor(smallest, max(1, min(cores, smallest // _LEAST_SAMPLES)))
  plan = BatchPlan.create(cfg, parts if cores > 1 else jax.device_count(), parts)
  return dataclasses.replace(plan, device=_name(device))


def first_device() -> jax.Device:
  """The first of those that JAX computes on.

  Raises:
    UserError: if JAX finds none.
  """
  try:
    return jax.devices()[0]
  except (RuntimeError, AssertionError) as error:  # which of them, depends
    platforms = os.environ.get("JAX_PLATFORMS", "")
    reason = f" ({one_line(error)})" if str(error) else ""
    raise UserError(f"JAX finds no device of JAX_PLATFORMS={platforms!r}{reason}; must be "
                    "unset, 'cpu', or the platform of a device that this machine has") from error


def _name(device: jax.Device) -> str:
  """Such as "NVIDIA H100 80GB HBM3 (gpu)"."""
  kind, platform = device.device_kind, device.platform
  return kind if kind == platform else f"{kind} ({platform})"


def host_memory() -> contextlib.AbstractContextManager:
  """A context in which new arrays are in host memory, if JAX is allowed to use the CPU.

  Weights that are read in this context, and then placed, take up the device's memory once. Without
  it they would do so twice for a while.
  """
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    return contextlib.nullcontext()


def varying(tree: Any) -> Any:
  """Arrays that all devices have, marked as differing between them.

  So a backward pass does not sum each microbatch's gradient over the devices: that is done once,
  at the end of the optimizer step. To be called within `jax.shard_map`.
  """
  return jax.lax.pcast(tree, AXIS, to="varying")


def samples_at_once(batch_size: int) -> int:
  """How many samples of a batch a device of the default backend had best compute at a time."""
  on_cpu = jax.default_backend() == "cpu"
  return largest_divisor(batch_size, _MOST_SAMPLES_AT_ONCE) if on_cpu else batch_size


def _cores_as_devices() -> int:
  """How many devices are a core each; 1 where devices are something else."""
  if _number_is_given() or jax.config.values["jax_num_cpu_devices"] != usable_cores():
    return 1
  return jax.device_count() if jax.default_backend() == "cpu" else 1


def _number_is_given() -> bool:
  """Whether the user, or the processes' arrangement, says how many devices the CPU is."""
  forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
  return forced or "JAX_NUM_CPU_DEVICES" in os.environ or jax.distributed.is_initialized()


def usable_cores() -> int:
  """How many cores this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def peak_memory_bytes() -> int | None:
  """The most that any device of this process held, or None where it is not known."""
  stats = [device.memory_stats() for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
  return max(peaks, default=None)
