"""SIGTERM, SIGINT and SIGHUP: a run stops where the devices are idle, anything else at once.

Imports nothing slow, so that scripts can call `end_at_signals` before anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import sys
import threading
from typing import NoReturn

from ddpo_jax.errors import Interrupted

# A terminal that closes sends SIGHUP, unless nohup has it ignored.
_SIGNALS = (signal.SIGTERM, signal.SIGINT,
            *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []))
_STANDARD_ERROR = 2
_PATIENCE = 10.0  # seconds for what is done at exit, more than `daemon_threads` waits for
_STOPPING = (b"\nStopping once the devices are at rest, and saving the finished epochs; a second "
             b"signal ends at once\n")

_ending = threading.Lock()
_last_actions: list[Callable[[], None]] = []  # of `ending_with`


class Stop:
  """Whether a signal has asked the run to stop."""

  def __init__(self) -> None:
    self.signum: int | None = None

  def check(self) -> None:
    """Raises Interrupted if so, on all processes; called where the devices are idle. Collective."""
    from ddpo_jax import distributed  # imports JAX, which is there already in a run
    signum = distributed.max_over_processes(self.signum or 0)
    if signum:
      raise Interrupted(signum)


@contextlib.contextmanager
def interruptible() -> Iterator[Stop]:
  """Turns the first of these signals into a request; a second signal acts as it did before."""
  stop, run = Stop(), os.getpid()

  def request(signum: int, _) -> None:
    if os.getpid() != run:  # a worker that a reward forked: its pool waits for it to end
      signal.signal(signum, signal.SIG_DFL)
      os.kill(os.getpid(), signum)
      return
    stop.signum = signum
    restore()
    with contextlib.suppress(OSError):
      os.write(_STANDARD_ERROR, _STOPPING)

  def restore() -> None:
    for each, handler in previous.items():
      signal.signal(each, handler)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

  wakeup = signal.set_wakeup_fd(-1)  # the first signal is not for `_watch`
  previous = {each: signal.getsignal(each) for each in _SIGNALS}
  for each in _SIGNALS:
    signal.signal(each, request)
  try:
    yield stop
  finally:
    restore()


def end_at_signals() -> None:
  """From now on these signals end the process at once: with a line, and 128 + the signal.

  For scripts, before anything slow is imported. What Python does by itself, to raise
  KeyboardInterrupt, ends in a long traceback, or in a library that catches everything.
  """
  while (spare := os.open(os.devnull, os.O_RDWR)) <= _STANDARD_ERROR:
    pass  # in the place of a closed standard stream, or libraries would write into the pipe
  os.close(spare)
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  for each in _SIGNALS:
    signal.signal(each, _end)
  os.register_at_fork(after_in_child=_leave_to_parent)
  threading.Thread(target=_watch, args=(reading,), daemon=True).start()


def _leave_to_parent() -> None:
  """In a process that a reward forked: its signals end it alone, and at once.

  It has the parent's pipe, so that the SIGTERM by which a pool ends it would end the parent too.
  """
  signal.set_wakeup_fd(-1)
  for each in _SIGNALS:
    if signal.getsignal(each) is _end:
      signal.signal(each, signal.SIG_DFL)


@contextlib.contextmanager
def ending_with(action: Callable[[], None]) -> Iterator[None]:
  """Meanwhile `action` is called before a signal ends the process; it must be quick."""
  _last_actions.append(action)
  try:
    yield
  finally:
    _last_actions.remove(action)


def leave(status: int) -> NoReturn:
  """Ends the process; unless all went well, without threads that a hanging reward has started.

  Python waits for threads that are no daemons, such as those of a ThreadPoolExecutor.
  """
  if status:
    given_up = threading.Timer(_PATIENCE, _end_now, (status,))
    given_up.daemon = True
    given_up.start()
  sys.exit(status)


def _end_now(status: int) -> None:
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(Exception):
      stream.flush()
  os._exit(status)


def _watch(reading: int) -> None:
  """Ends the process also while the main thread, which handles signals, is in a C library."""
  while True:
    (signum,) = os.read(reading, 1)
    if signum in _SIGNALS and signal.getsignal(signum) is _end:
      _end(signum, None)


def _end(signum: int, _) -> None:
  if _ending.acquire(blocking=False):  # else the other thread is about to
    for action in reversed(_last_actions):
      with contextlib.suppress(Exception):
        action()
    with contextlib.suppress(OSError):
      os.write(_STANDARD_ERROR, f"stopped by signal {signum}\n".encode())
    os._exit(128 + signum)
