"""What to change where memory or disk space runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import contextlib
import errno
import functools
import os
import pathlib

import jax

from ddpo_jax import build, checkpoint, files
from ddpo_jax.config import Config
from ddpo_jax.errors import UserError
from ddpo_jax.parts import largest_divisor
from ddpo_jax.rewards import ON_DEVICE, kwargs_by_reward
from ddpo_jax.run_folder import is_named_by_checkpoint, named_by
from ddpo_jax.user_functions import raised_by_user

_FULL = (errno.ENOSPC, errno.EDQUOT)
_MEMORY_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # new, old

_NO_CUDNN = "DNN library initialization failed"
_CUDNN_MAY_NOT_FIT = (
    "cuDNN cannot be used: the errors above say whether its version or the GPU's driver is too "
    "old (those of the extra cuda12 or cuda13 fit; LD_LIBRARY_PATH must not name others). Else ")


def with_advice(cfg: Config) -> contextlib.AbstractContextManager[None]:
  """Turns running out of memory or of disk space, or losing the run's folder, into one line.

  Raises:
    UserError: in the place of these, says what to change; whatever else is raised passes.
  """
  return _explaining(functools.partial(_explain_run, cfg))


def with_sampling_advice(batch_size: int, mixed_precision: str
                         ) -> contextlib.AbstractContextManager[None]:
  """As `with_advice`, for scripts/sample.py: of memory alone, and with its options.

  Raises:
    UserError: likewise.
  """
  return _explaining(functools.partial(_explain_sampling, batch_size, mixed_precision))


@contextlib.contextmanager
def _explaining(explain: Callable[[Exception], str | None]) -> Iterator[None]:
  """Raises UserError with what `explain` says of an error, if it says anything."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # of JAX, NumPy, orbax, the system: each has its own
    line = explain(error)
    if line is None:
      raise
    raise UserError(line) from error


def _explain_run(cfg: Config, error: Exception) -> str | None:
  causes = list(_causes(error))
  # A user's function may have another disk, or its own need of memory, but not another GPU.
  of_run = not any(map(raised_by_user, causes))
  if of_run and any(map(_is_full_disk, causes)):
    return full_disk(cfg)
  if of_run and _is_of_run(error, cfg):
    return (f"{named_by(cfg)}: {error}; must stay readable and writable as long as the run lasts. "
            "Go on with resume_from")
  if any(map(_is_without_room_beside_jax, causes)):
    return _room_beside_jax(causes)
  if any(map(_is_out_of_memory if of_run else _is_out_of_device_memory, causes)):
    return out_of_memory(cfg)
  return None


def _explain_sampling(batch_size: int, mixed_precision: str, error: Exception) -> str | None:
  causes = list(_causes(error))
  if any(map(_is_without_room_beside_jax, causes)):
    return _room_beside_jax(causes)
  if not any(map(_is_out_of_memory, causes)):
    return None
  advice = list(_more_of_the_gpu())
  if batch_size > 1:
    advice.append(f"--batch_size={batch_size // 2}")
  if mixed_precision == "no":
    advice.append("--mixed_precision=fp16")
  advice.append("another device, or this one once no other program (such as a run) uses it")
  return f"out of memory; try, in this order: {'; '.join(advice)}"


def _causes(error: BaseException) -> Iterator[BaseException]:
  """The error and, recursively, its causes and the errors during whose handling it was raised."""
  pending, seen = [error], set()
  while pending:
    each = pending.pop()
    if id(each) not in seen:
      seen.add(id(each))
      yield each
      pending += [cause for cause in (each.__cause__, each.__context__) if cause]


def _is_full_disk(error: BaseException) -> bool:
  if isinstance(error, OSError) and error.errno in _FULL:
    return True
  # Checkpoints are written by a library of C++, whose errors have no number.
  return any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))


def _is_of_run(error: BaseException, cfg: Config) -> bool:
  """Whether a file in the run's folder, or in that of all runs, could not be written or read."""
  if not isinstance(error, OSError) or not isinstance(error.filename, str):
    return False
  folder = checkpoint.run_of(cfg.resume_from) if is_named_by_checkpoint(cfg) else cfg.logdir
  return pathlib.Path(files.absolute(error.filename)).is_relative_to(files.absolute(folder))


def _is_without_room_beside_jax(error: BaseException) -> bool:
  """Whether the driver, or a library of NVIDIA's, lacks memory that JAX has not taken or cannot.

  XLA's names for it differ; the first is also RESOURCE_EXHAUSTED.
  """
  return type(error).__module__.partition(".")[0] in ("jax", "jaxlib") and any(
      text in str(error) for text in ("instantiate command buffer", "CUDNN_STATUS_ALLOC_FAILED",
                                      _NO_CUDNN, "CUDA_ERROR_OUT_OF_MEMORY"))


def _room_beside_jax(causes: Iterable[BaseException]) -> str:
  """One line: what the user can do. XLA says no more of a cuDNN that does not start."""
  # JAX refuses to have both names set.
  name = next((name for name in _MEMORY_FRACTIONS if name in os.environ), _MEMORY_FRACTIONS[0])
  return ((_CUDNN_MAY_NOT_FIT if any(_NO_CUDNN in str(each) for each in causes) else "")
          + "the GPU has no memory left beside what JAX takes; another program may use it "
          f"(nvidia-smi shows which). Else set {name}=0.65 in the environment, or lower if it is "
          "set already")


def _is_out_of_memory(error: BaseException) -> bool:
  return isinstance(error, MemoryError) or _is_out_of_device_memory(error)


def _is_out_of_device_memory(error: BaseException) -> bool:
  return (type(error).__module__.partition(".")[0] in ("jax", "jaxlib")
          and "RESOURCE_EXHAUSTED" in str(error))


def full_disk(cfg: Config) -> str:
  """One line: what the user can do."""
  return (f"{named_by(cfg)}: the disk is full; all epochs that were saved before are "
          "kept. Free some space, or lower num_checkpoint_limit="
          f"{cfg.num_checkpoint_limit}, and go on with resume_from")


def out_of_memory(cfg: Config) -> str:
  """One line: which settings to change, and to what.

  Only the last ones, from a reward's dtype on, change what is learnt.
  """
  advice = [*_more_of_the_gpu(), *_smaller(cfg)]
  if not advice:
    advice = ["no setting is left to lower; use a device with more memory"]
  return f"out of memory; try, in this order: {'; '.join(advice)}"


def _more_of_the_gpu() -> Iterator[str]:
  if jax.default_backend() == "gpu" and not any(name in os.environ for name in _MEMORY_FRACTIONS):
    yield (f"{_MEMORY_FRACTIONS[0]}=0.9 in the environment, because JAX takes 0.75 of a GPU's "
           "memory by default")


def _smaller(cfg: Config) -> Iterator[str]:
  sample, train = cfg.sample, cfg.train
  if train.timesteps_per_batch > 1:
    yield f"train.timesteps_per_batch={_part(train.timesteps_per_batch)}"
  if train.gradient_checkpointing != "full":
    following = {"none": "blocks", "blocks": "full"}[train.gradient_checkpointing]
    yield f"train.gradient_checkpointing='{following}'"
  if build.may_sample_first_gradient(cfg):
    yield "train.gradient_while_sampling=False"
  if train.batch_size > 1:
    smaller = _part(train.batch_size)
    steps = train.gradient_accumulation_steps * train.batch_size // smaller
    yield f"train.batch_size={smaller} with train.gradient_accumulation_steps={steps}"
  decoded = min(sample.decode_batch_size, sample.batch_size)
  if decoded > 1:
    yield f"sample.decode_batch_size={decoded // 2}"
  if sample.batch_size > train.batch_size:
    smaller = train.batch_size * _part(sample.batch_size // train.batch_size)
    batches = sample.num_batches_per_epoch * sample.batch_size // smaller
    yield f"sample.batch_size={smaller} with sample.num_batches_per_epoch={batches}"
  yield from _smaller_rewards(cfg)
  if cfg.mixed_precision == "no":
    yield "mixed_precision='fp16'"
  if not cfg.use_lora:
    yield "use_lora=True"


def _smaller_rewards(cfg: Config) -> Iterator[str]:
  """Of rewards whose network is on the device."""
  for name, kwargs in kwargs_by_reward(cfg.reward_fn, cfg.reward_kwargs).items():
    if name in ON_DEVICE and kwargs.get("dtype", "float32") == "float32":
      group = "" if isinstance(cfg.reward_fn, str) else f"{name}."
      yield f"reward_kwargs.{group}dtype='float16'"


def _part(count: int) -> int:
  """The largest proper divisor: what the other sizes divided, they still divide."""
  return largest_divisor(count, count // 2)
