"""Signals: one line and 128 + n wherever they come, in processes of their own."""

import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

from ddpo_jax import cli, interrupt
from ddpo_jax.errors import Interrupted

ROOT = pathlib.Path(__file__).parents[1]
SECONDS = 60  # for what takes one, on a busy machine
BOTH = pytest.mark.parametrize("signum", (signal.SIGINT, signal.SIGTERM))

# For a script to run: sends its own process signals, of which one that Python cannot handle.
SENDING = textwrap.dedent("""\
    import ctypes, os, signal, threading, time

    def swallowed(signum):
      try:
        os.kill(os.getpid(), signum)
        time.sleep(1)
      except BaseException:
        pass

    def send_to_a_thread(signum):  # so that it does not end the main thread's sleep
      time.sleep(0.2)
      signal.pthread_kill(threading.get_ident(), signum)

    def in_a_c_library(signum):
      threading.Thread(target=send_to_a_thread, args=(signum,)).start()
      ctypes.CDLL(None).sleep(600)
    """)


def run(*arguments):
  return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, text=True,
                        capture_output=True, timeout=SECONDS)


def assert_ended_by(done, signum, said_before=""):
  assert (done.returncode, done.stderr) == (128 + signum, f"{said_before}{Interrupted(signum)}\n")
  assert "came back" not in done.stdout


def assert_program_ended_by(signum, program, said_before=""):
  done = run("-c", f"{SENDING}{textwrap.dedent(program)}\nprint('came back')")
  assert_ended_by(done, signum, said_before)
  return done.stdout


@BOTH
@pytest.mark.parametrize("how", ("swallowed", "in_a_c_library"))
def test_a_signal_before_the_run(tmp_path, how, signum):
  """Such as while libraries are imported: here, in the user's config."""
  file = tmp_path / "signalling.py"
  file.write_text(f"{SENDING}def get_config():\n  {how}({int(signum)})\n  print('came back')\n")
  assert_ended_by(run("scripts/train.py", f"--config={file}"), signum)


@BOTH
@pytest.mark.parametrize("script", ("sample", "export_lora"))
def test_a_signal_to_another_script(tmp_path, script, signum):
  file = tmp_path / "signalling.py"
  file.write_text(f"{SENDING}import runpy, sys\nfrom ddpo_jax import export, sample_files\n"
                  f"sample_files.sample_to_files = lambda *args: swallowed({int(signum)})\n"
                  "export.export_run = sample_files.sample_to_files\n"
                  f"runpy.run_path({str(ROOT / 'scripts' / f'{script}.py')!r}, "
                  "run_name='__main__')\n")
  prompts = ["--prompts", "a cat"] if script == "sample" else []
  assert_ended_by(run(file, "--run=x", f"--output={tmp_path / 'x.jpg'}", *prompts), signum)


@pytest.mark.parametrize("signum", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
@pytest.mark.parametrize("how", ("swallowed", "in_a_c_library"))
def test_the_first_signal_is_a_request_and_the_second_ends_the_process(how, signum):
  said = assert_program_ended_by(signum, f"""
      signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored in the tests as well
      from ddpo_jax import interrupt
      interrupt.end_at_signals()
      with interrupt.interruptible() as stop:
        os.kill(os.getpid(), {int(signum)})
        time.sleep(0.2)
        print(stop.signum, flush=True)
        {how}({int(signum)})
      """, said_before=interrupt._STOPPING.decode())
  assert said == f"{int(signum)}\n"


def test_a_process_that_a_reward_forks_ends_at_once():
  """Its pool ends its workers by SIGTERM, and waits for them."""
  said = assert_program_ended_by(signal.SIGTERM, """
      from ddpo_jax import interrupt
      interrupt.end_at_signals()
      import warnings
      warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, of fork
      with interrupt.interruptible() as stop:
        worker = os.fork()
        if not worker:
          time.sleep(30)
        time.sleep(0.2)
        os.kill(worker, signal.SIGTERM)
        print(os.WTERMSIG(os.waitpid(worker, 0)[1]), stop.signum, flush=True)
      in_a_c_library(signal.SIGTERM)
      """)
  assert said == "15 None\n"


def test_a_process_that_was_forked_before_the_run_ends_alone():
  """As of a pool that a reward's module makes as it is imported."""
  said = assert_program_ended_by(signal.SIGTERM, """
      from ddpo_jax import interrupt
      interrupt.end_at_signals()
      import warnings
      warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, of fork
      with interrupt.ending_with(lambda: print("released", flush=True)):
        worker = os.fork()
        if not worker:
          time.sleep(30)
      time.sleep(0.2)
      os.kill(worker, signal.SIGTERM)
      print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), flush=True)
      time.sleep(0.2)
      print("still here", flush=True)
      in_a_c_library(signal.SIGTERM)
      """)
  assert said == "-15\nstill here\n"


def test_what_is_left_to_do_is_done_before_the_end():
  """As far as it can be."""
  said = assert_program_ended_by(signal.SIGTERM, """
      from ddpo_jax import interrupt
      interrupt.end_at_signals()
      with interrupt.ending_with(lambda: print("not meanwhile")):
        pass
      with interrupt.ending_with(lambda: print("at the end", flush=True)):
        with interrupt.ending_with(lambda: 1 / 0):
          in_a_c_library(signal.SIGTERM)
      """)
  assert said == "at the end\n"


def test_nohup_is_respected():
  said = assert_program_ended_by(signal.SIGTERM, """
      signal.signal(signal.SIGHUP, signal.SIG_IGN)
      from ddpo_jax import interrupt
      interrupt.end_at_signals()
      os.kill(os.getpid(), signal.SIGHUP)
      time.sleep(0.2)
      print("still here", flush=True)
      swallowed(signal.SIGTERM)
      """)
  assert said == "still here\n"


def test_a_handler_of_the_users_own_is_respected():
  said = assert_program_ended_by(signal.SIGINT, """
      from ddpo_jax import interrupt
      interrupt.end_at_signals()
      signal.signal(signal.SIGTERM, lambda *_: print("handled", flush=True))
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.2)
      swallowed(signal.SIGINT)
      """)
  assert said == "handled\n"


def test_after_the_run_a_signal_ends_the_process_again():
  assert_program_ended_by(signal.SIGTERM, """
      from ddpo_jax import interrupt
      interrupt.end_at_signals()
      with interrupt.interruptible():
        pass
      in_a_c_library(signal.SIGTERM)
      """)


def test_a_signal_while_handlers_are_installed_is_a_request(monkeypatch):
  """The second signal's is not yet."""
  install, requests = signal.signal, []

  def install_and_signal(signum, handler):
    before = install(signum, handler)
    if callable(handler) and not requests:
      requests.append(signum)
      handler(signum, None)
    return before

  with monkeypatch.context() as patch:
    patch.setattr(signal, "signal", install_and_signal)
    with interrupt.interruptible() as stop, pytest.raises(Interrupted):
      stop.check()
  assert requests


@pytest.fixture
def python_handles_sigint():
  """As usual, but where a shell started the tests in the background: it is ignored there."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_without_a_script_all_is_as_before(python_handles_sigint):
  """In a notebook, say."""
  before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
  with interrupt.interruptible() as stop:
    signal.raise_signal(signal.SIGINT)
    assert stop.signum == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
  with pytest.raises(Interrupted, match="stopped by signal 2"):
    stop.check()


def test_a_script_that_python_interrupts_says_one_line(capsys):
  def interrupted():
    raise KeyboardInterrupt

  assert cli.exit_status(interrupted) == 130
  assert capsys.readouterr().err == "stopped by signal 2\n"


def test_a_closed_stream_is_not_taken_for_the_signals():
  """What a library writes on standard error is no signal, nor does it reach a file."""
  done = subprocess.run(
      f"{sys.executable} -c 'from ddpo_jax import interrupt; interrupt.end_at_signals(); "
      "import os, time; os.write(2, bytes([15])); time.sleep(0.5)' 0>&- 2>&-",
      shell=True, cwd=ROOT, timeout=SECONDS)
  assert done.returncode == 0


@pytest.mark.parametrize("status,seconds", ((143, 1000), (0, 0.5)))
def test_threads_of_a_hanging_reward_are_given_up(status, seconds):
  """Python would wait for them; where all went well it does."""
  done = run("-c", textwrap.dedent(f"""\
      from concurrent import futures
      import time
      from ddpo_jax import interrupt

      interrupt._PATIENCE = 0.1
      futures.ThreadPoolExecutor(1).submit(lambda: (time.sleep({seconds}), print("done")))
      interrupt.leave({status})
      """))
  assert (done.returncode, done.stdout) == (status, "done\n" if status == 0 else "")
