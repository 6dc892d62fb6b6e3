"""Compiling programs before they are called: what XLA is told, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from ddpo_jax import glibc


def compile_ahead(program: Any, *arguments: Any) -> Any:
  """Compiles a jitted function for arguments like these.

  What JAX remembers of tracing it, a hundred megabytes for a UNet and its gradient, is given up
  before the compiler takes memory of its own.
  """
  lowered = program.lower(*arguments)
  jax.clear_caches()
  compiled = lowered.compile()
  glibc.return_freed_memory()  # the compiler's, or what reading its program took
  return compiled


def compile_meanwhile(program: Any, *arguments: Any) -> Callable[..., Any]:
  """Compiles a jitted function in a thread, for arguments like these; a call waits for it."""
  pool = futures.ThreadPoolExecutor(1)
  compiled = pool.submit(lambda: program.lower(*arguments).compile())
  pool.shutdown(wait=False)
  return lambda *arguments: compiled.result()(*arguments)


def compiler_options() -> dict[str, int]:
  """What XLA is told for the default backend's long programs; flags in XLA_FLAGS go first.

  Sampler and update have to be told the same, or half precision rounds differently in them.
  """
  options = {
      # By itself XLA uses half of AVX-512's registers, as is best where nothing else does.
      "cpu": {"xla_cpu_prefer_vector_width": 512},
      # Products with the same activations are joined up to this size of theirs, in MB. Larger
      # ones, such as LoRA's with its matrix's, would only have to be cut apart again.
      # Triton's products are hardly quicker than cuBLAS's, which add residuals on the way.
      "gpu": {"xla_gpu_dot_merger_threshold_mb": 1, "xla_gpu_enable_triton_gemm": False}}
  flags = os.environ.get("XLA_FLAGS", "")
  return {name: value for name, value in options.get(jax.default_backend(), {}).items()
          if name not in flags and _is_known(name, value)}


@functools.cache
def _is_known(option: str, value: int) -> bool:
  """Whether this version of XLA has the option; its options come and go."""
  try:
    jax.jit(lambda: jnp.zeros(()), compiler_options={option: value}).lower().compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True
