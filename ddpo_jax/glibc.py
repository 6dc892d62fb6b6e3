"""Makes the C library (glibc) return freed memory to the operating system."""

from __future__ import annotations

import contextlib
import ctypes
import os

from ddpo_jax.devices import usable_cores

_M_ARENA_MAX = -8  # of mallopt, in glibc's malloc.h


def share_arenas() -> None:
  """Lets threads allocate from as many arenas as there are cores, and one more.

  glibc gives each thread an arena of its own, up to eight for each core, and what is freed
  in one is not used by the others. To be called before there are threads. The environment
  variable MALLOC_ARENA_MAX, where it is set, decides instead.
  """
  if "MALLOC_ARENA_MAX" not in os.environ:
    _call("mallopt", _M_ARENA_MAX, usable_cores() + 1)


def return_freed_memory() -> None:
  """Hands freed memory back to the system; glibc keeps it, and each epoch leaves holes."""
  _call("malloc_trim", 0)


def _call(function: str, *arguments: int) -> None:
  with contextlib.suppress(OSError, AttributeError):  # of another C library
    getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
