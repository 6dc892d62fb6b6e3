"""Stopping where everything is at rest, when a signal asks for it."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import signal

from ddpo_jax import distributed
from ddpo_jax.types import Interrupted


class Stop:
  """Whether a signal has asked the run to stop."""

  def __init__(self) -> None:
    self.signum: int | None = None

  def check(self) -> None:
    """Raises Interrupted if so, on all processes; called where everything is at rest."""
    signum = distributed.largest(self.signum or 0)
    if signum:
      raise Interrupted(signum)


@contextlib.contextmanager
def interruptible() -> Iterator[Stop]:
  """Turns the first SIGTERM or SIGINT into a request; a second signal acts as it did before."""
  stop = Stop()

  def request(signum: int, _) -> None:
    stop.signum = signum
    for each, handler in previous.items():
      signal.signal(each, handler)

  previous = {each: signal.signal(each, request)
              for each in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield stop
  finally:
    for each, handler in previous.items():
      signal.signal(each, handler)
