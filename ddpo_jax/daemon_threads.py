"""Threads for calls that may take minutes, and that a process that ends does not wait for."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from concurrent import futures
import queue
import threading
from typing import Any

_PATIENCE = 5.0  # seconds, because a call that computes with JAX crashes where JAX ends before it


class DaemonThreadPool(futures.Executor):
  """As `ThreadPoolExecutor`, which lets Python exit only once its last call has returned.

  A request to a server that is gone can take until its time limit. Here a running call is waited
  for at exit for a few seconds, and then given up.
  """

  def __init__(self, threads: int, name: str):
    """Starts the threads; `name` is for debuggers."""
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._calls: set[futures.Future] = set()  # those that are not done
    self._threads = [threading.Thread(target=self._work, name=f"{name}_{i}", daemon=True)
                     for i in range(threads)]
    for thread in self._threads:
      thread.start()
    atexit.register(self._at_exit)

  def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any
             ) -> futures.Future:
    call: futures.Future = futures.Future()
    self._calls.add(call)
    call.add_done_callback(self._calls.discard)
    self._queue.put((call, function, args, kwargs))
    return call

  def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
    if cancel_futures:
      self._cancel()
    if wait:
      futures.wait(set(self._calls))
      atexit.unregister(self._at_exit)
    for _ in self._threads:
      self._queue.put(None)

  def _cancel(self) -> None:
    for call in list(self._calls):
      call.cancel()

  def _at_exit(self) -> None:
    self._cancel()
    futures.wait(set(self._calls), timeout=_PATIENCE)

  def _work(self) -> None:
    while (item := self._queue.get()) is not None:
      call, function, args, kwargs = item
      if call.set_running_or_notify_cancel():
        try:
          call.set_result(function(*args, **kwargs))
        except BaseException as error:  # for whoever waits for the call
          call.set_exception(error)
      del item, call
