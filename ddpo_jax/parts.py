"""Splitting a size, or a batch, into equal parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def ceil_div(size: int, part: int) -> int:
  """In how many parts of at most `part` something of `size` fits: size / part, rounded up."""
  return -(-size // part)


def largest_divisor(size: int, limit: int) -> int:
  """The largest divisor of `size` that is at most `limit`; both are at least 1."""
  return max(n for n in range(1, min(limit, size) + 1) if size % n == 0)


def map_in_parts(function: Callable[..., Any], limit: int, *arguments: jax.Array) -> Any:
  """function(*arguments), one equal part of their first axis after the other.

  `jax.lax.map` with a batch_size would use `vmap`, which adds an axis to every matmul.

  Args:
    function: of arrays that share their first axis.
    limit: the most entries of that axis that a part may have.
    *arguments: the arrays.
  """
  size = len(arguments[0])
  part = largest_divisor(size, limit)
  if part == size:
    return function(*arguments)
  parts = [x.reshape(-1, part, *x.shape[1:]) for x in arguments]
  out = jax.lax.map(lambda part: function(*part), parts)
  return jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), out)
