"""Where a device's time goes: a part of some work, seen by `jax.profiler`."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from concurrent import futures
import pathlib
import re
import tempfile
import time
from typing import Any
import warnings

import jax

_LONGEST = 2.0  # seconds; in them a GPU runs a hundred thousand kernels
_LISTED = 40
_CONTROL_FLOW = ("while", "call", "conditional")  # whose time is that of what is inside


def during(work: Callable[[], Any], seconds: float) -> dict[str, Any]:
  """Does the work, and looks at a part of it from its middle.

  Args:
    work: does nothing for the first time, so that nothing is compiled.
    seconds: that it takes, about.

  Returns:
    "seconds": of the part; "busy_seconds": of all operations in it, on one GPU or on all of a
    CPU's threads; "operations": (name, seconds, count) of each kind, the longest first.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with tempfile.TemporaryDirectory() as folder, futures.ThreadPoolExecutor(1) as pool:
    done = pool.submit(work)
    time.sleep(seconds / 3)
    with jax.profiler.trace(folder, profiler_options=options):
      started = time.perf_counter()
      time.sleep(min(_LONGEST, seconds / 3))
      traced = time.perf_counter() - started
    done.result()
    (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
    with warnings.catch_warnings():
      # Python's, of a type in JAX's extension. JAX crashes where warnings are errors.
      warnings.simplefilter("ignore", DeprecationWarning)
      operations = list(_operations(jax.profiler.ProfileData.from_file(str(file))))
  return {"seconds": traced, **summarize(operations)}


def summarize(operations: list[tuple[str, float]]) -> dict[str, Any]:
  """Adds up operations, (name, seconds) each, whose names differ by a number at their end."""
  kinds: dict[str, list[float]] = collections.defaultdict(list)
  for name, seconds in operations:
    kind = re.sub(r"([._]\d+)+$", "", name)
    if kind not in _CONTROL_FLOW:
      kinds[kind].append(seconds)
  rows = [(kind, sum(each), len(each)) for kind, each in kinds.items()]
  rows.sort(key=lambda row: row[1], reverse=True)
  return {"busy_seconds": sum(row[1] for row in rows), "operations": rows[:_LISTED]}


def _operations(profile: jax.profiler.ProfileData) -> Iterator[tuple[str, float]]:
  """Those of the first GPU, or of the CPU: name and seconds."""
  planes = {plane.name: plane for plane in profile.planes}
  gpus = [plane for name, plane in planes.items() if name.startswith("/device:GPU:0")]
  for plane in gpus or planes.values():
    for line in plane.lines:
      for event in line.events:
        if any(key == "hlo_op" for key, _ in event.stats):
          yield event.name, event.duration_ns * 1e-9
