"""Threads that a process which ends does not wait for."""

import subprocess
import sys
import textwrap
import threading

import pytest

from ddpo_jax.daemon_threads import DaemonThreadPool


def test_calls_return_and_raise_as_of_any_executor():
  pool = DaemonThreadPool(2, "test")
  assert list(pool.map(str, range(5))) == list("01234")
  for error in (ValueError, SystemExit):
    with pytest.raises(error):
      pool.submit(lambda error=error: (_ for _ in ()).throw(error())).result()
  pool.shutdown()


def test_shutdown_waits_for_all_or_cancels_what_has_not_begun():
  pool, over = DaemonThreadPool(1, "test"), threading.Event()
  threading.Timer(0.2, over.set).start()
  calls = [pool.submit(over.wait) for _ in range(3)]
  pool.shutdown()
  assert all(call.done() for call in calls)

  pool, over = DaemonThreadPool(1, "test"), threading.Event()
  running, waiting = pool.submit(over.wait), pool.submit(over.wait)
  while not running.running():
    pass
  pool.shutdown(wait=False, cancel_futures=True)
  assert waiting.cancelled() and not running.done()
  over.set()
  assert running.result(timeout=10)


@pytest.mark.parametrize("before_exit", ("", "pool.shutdown(wait=False, cancel_futures=True)"))
def test_a_call_that_hangs_does_not_keep_python_from_exiting(before_exit):
  program = textwrap.dedent(f"""
      import sys, time
      from ddpo_jax import daemon_threads
      daemon_threads._PATIENCE = 0.1
      pool = daemon_threads.DaemonThreadPool(1, "test")
      calls = [pool.submit(time.sleep, 600) for _ in range(2)]
      {before_exit}
      sys.exit(7)
      """)
  assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 7


def test_at_exit_a_short_call_is_waited_for():
  program = textwrap.dedent("""
      import time
      from ddpo_jax.daemon_threads import DaemonThreadPool
      pool = DaemonThreadPool(1, "test")
      pool.submit(lambda: (time.sleep(0.3), print("done", flush=True)))
      time.sleep(0.1)
      """)
  done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True,
                        text=True)
  assert (done.returncode, done.stdout) == (0, "done\n")
