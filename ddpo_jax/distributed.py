"""Several processes: who they are, and how they agree.

Every process runs the same program on its own devices. What one of them alone learns (a
signal, a reward that failed) must reach all of them before the next collective operation,
or the others would wait in it for ever.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
import contextlib
import importlib.util
import os
import pathlib
import re
import secrets
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from ddpo_jax.config import DistributedConfig
from ddpo_jax.errors import Interrupted, UserError

_VISIBLE_DEVICES = ("jax_cuda_visible_devices", "jax_rocm_visible_devices")
_RAISED_TOGETHER = "_raised_together"  # an attribute of exceptions


class OtherProcessFailed(RuntimeError):
  """Another process raised; its own message says what."""


def initialize(cfg: DistributedConfig) -> None:
  """Joins the other processes, if there are any. Must come before anything else in JAX.

  Either the config says where process 0 is, or the processes were started by SLURM, by
  Open MPI, or as an Indexed Job of Kubernetes, where JAX finds it by itself.

  Raises:
    UserError: if process 0 is not known or cannot be reached.
  """
  # It would hold back SIGTERM from the start; the loop has its own way to stop.
  jax.config.update("jax_enable_preemption_service", False)
  visible = {name: jax.config.values[name] for name in _VISIBLE_DEVICES}
  explicit: dict[str, Any] = {}
  if cfg.coordinator_address:
    explicit = {"coordinator_address": cfg.coordinator_address,
                "num_processes": cfg.num_processes, "process_id": cfg.process_id}
  elif not (cfg.detect and started_by_cluster(os.environ)):
    return
  try:
    jax.distributed.initialize(**explicit, initialization_timeout=cfg.timeout)
  except ValueError as error:  # JAX does not know this version of the cluster's software
    raise UserError(
        "distributed.detect=True: the cluster does not say where process 0 is "
        f"({error}); set distributed.coordinator_address, num_processes and process_id"
        ) from error
  except RuntimeError as error:
    reason = str(error).partition("\n")[0]
    raise UserError(
        f"distributed.coordinator_address={cfg.coordinator_address!r}: the processes did not "
        f"find each other in {cfg.timeout} s; all of them must be running, and reach that "
        f"address ({reason})") from error
  if alone_on_its_machine(os.environ) or sees_one_gpu(os.environ):
    # To each process of these launchers JAX has given the GPU of its number on the machine.
    for name, devices in visible.items():
      jax.config.update(name, devices)


def started_by_cluster(environment: Mapping[str, str]) -> bool:
  """Whether this is one of several processes of a cluster that JAX can ask for the others."""
  if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
    return importlib.util.find_spec("kubernetes") is not None
  several = lambda count: environment.get(count, "").isdigit() and int(environment[count]) > 1
  in_step = all(name in environment for name in ("SLURM_STEP_NODELIST", "SLURM_PROCID"))
  return (in_step and several("SLURM_NTASKS")) or several("OMPI_COMM_WORLD_SIZE")


def alone_on_its_machine(environment: Mapping[str, str]) -> bool:
  """Whether SLURM or Open MPI has started one process on each machine."""
  if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
    return environment["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
  tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as "8(x2),4"
  return all(re.fullmatch(r"1(\(x\d+\))?", count) for count in tasks.split(","))


def sees_one_gpu(environment: Mapping[str, str]) -> bool:
  """Whether the launcher has given this process a GPU of its own, which is then number 0."""
  lists = [environment.get(name, "") for name in
           ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")]
  return any(devices and "," not in devices for devices in lists)


def check_devices() -> None:
  """Refuses processes with different numbers of devices: each has an equal share of a batch.

  Raises:
    UserError: on all processes.
  """
  counts = collections.Counter(device.process_index for device in jax.devices())
  if len(set(counts.values())) > 1:
    listed = ", ".join(str(counts[process]) for process in sorted(counts))
    raise UserError(f"the {len(counts)} processes have {listed} devices; all must have the same "
                    "number (CUDA_VISIBLE_DEVICES chooses a process's GPUs)")


def is_main() -> bool:
  """Whether this process writes the files and speaks to the user."""
  return jax.process_index() == 0


def max_over_processes(value: int) -> int:
  """The largest of all processes' values. Collective: each process must call it."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.process_allgather(np.int32(value)).max())


def gather_samples(values: np.ndarray) -> np.ndarray:
  """[batches, samples of this process] -> [samples of all] by sample index. Collective."""
  if jax.process_count() == 1:
    return values.reshape(-1)
  everyone = multihost_utils.process_allgather(values)  # [processes, batches, samples]
  return np.concatenate(list(everyone), axis=1).reshape(-1)


def broadcast_from_main(text: str) -> str:
  """Process 0's text, on every process. Collective: each process must call it."""
  if jax.process_count() == 1:
    return text
  encoded = np.frombuffer(text.encode(), np.uint8)
  buffer = np.zeros(max_over_processes(len(encoded)), np.uint8)
  buffer[:len(encoded)] = encoded
  return bytes(multihost_utils.broadcast_one_to_all(buffer)).rstrip(b"\0").decode()


def is_shared(folder: pathlib.Path) -> bool:
  """Whether all processes see the same folder, which process 0 makes. Collective."""
  if not jax.distributed.is_initialized():
    return True
  token = folder / f".shared-{secrets.token_hex(8)}"
  if is_main():
    with contextlib.suppress(OSError):
      folder.mkdir(parents=True, exist_ok=True)
      token.touch()
  token = folder / broadcast_from_main(token.name)  # which is there by now
  shared = not max_over_processes(int(not os.path.exists(token)))
  if is_main():
    with contextlib.suppress(OSError):
      token.unlink()
  return shared


def raised_on_all(error: BaseException) -> bool:
  """Whether the other processes have raised as well, and do not wait for this one.

  So it is with what `raising_together` raises, with signals, which are agreed on, and with
  numbers that are not finite, which all of them have.
  """
  return (jax.process_count() == 1 or hasattr(error, _RAISED_TOGETHER) or
          isinstance(error, (OtherProcessFailed, Interrupted, FloatingPointError)))


@contextlib.contextmanager
def raising_together() -> Iterator[None]:
  """Raises on every process if the block raises on any. Collective.

  The block itself must not call a collective: a process that raised would miss it.

  Raises:
    OtherProcessFailed: where the block itself went well.
  """
  failure = None
  try:
    yield
  except BaseException as error:
    failure = error
  failed = max_over_processes(int(failure is not None))
  if failure is not None:
    failure.__dict__[_RAISED_TOGETHER] = True
    raise failure
  if failed:
    raise OtherProcessFailed("another process failed, and said why; this one stops with it")
