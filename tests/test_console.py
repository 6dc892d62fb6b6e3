"""The console never stops a run: nobody may read along, or not every character."""

import io
import os
import pathlib
import subprocess
import sys

import pytest

from ddpo_jax import console

ROOT = pathlib.Path(__file__).parents[1]
SUMMARY = "reward 1 ± 2 …"
SAYING = f"from ddpo_jax.console import say\nfor _ in range(3): say({SUMMARY!r})\n"


def start(arguments, **options):
  return subprocess.run([sys.executable, *arguments], cwd=ROOT, timeout=120,
                        stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture
def without_reader():
  """A pipe that nobody reads from."""
  reading, writing = os.pipe()
  os.close(reading)
  yield writing
  os.close(writing)


@pytest.mark.parametrize("arguments", (
    ["-c", SAYING], ["scripts/train.py", "--help"]), ids=("a run", "--help"))
def test_a_reader_that_is_gone(arguments, without_reader):
  """Nor does Python complain at the end, of what it could not write."""
  done = start(arguments, stdout=without_reader)
  assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", (
    ["-c", SAYING], ["scripts/train.py", "--help"]), ids=("a run", "--help"))
def test_characters_that_a_stream_has_not(arguments):
  done = start(arguments, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii"})
  assert (done.returncode, done.stderr) == (0, "")
  assert "?" in done.stdout and done.stdout.isascii()


def test_standard_output_that_is_closed(monkeypatch):
  monkeypatch.setattr(sys, "stdout", None)
  console.say(SUMMARY)
  closed = io.StringIO()
  closed.close()
  monkeypatch.setattr(sys, "stdout", closed)
  console.say(SUMMARY)


def test_a_full_disk(monkeypatch):
  with open("/dev/full", "w") as full:
    monkeypatch.setattr(sys, "stdout", full)
    console.say(SUMMARY)
    console.say(SUMMARY)


def test_an_error_for_nobody_has_its_exit_status(without_reader):
  done = subprocess.run([sys.executable, "scripts/train.py"], cwd=ROOT, timeout=120,
                        stderr=without_reader)
  assert done.returncode == 2


def test_bars_need_standard_error(monkeypatch):
  assert console.hide_bars() is None
  monkeypatch.setattr(sys, "stderr", None)
  assert console.hide_bars() is True


def test_lines_are_as_they_were(capsys):
  console.say(SUMMARY)
  assert capsys.readouterr().out == f"{SUMMARY}\n"
