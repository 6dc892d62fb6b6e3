"""What is written to the terminal: lines, progress, and what is wrong with options."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import NoReturn, TextIO

from tqdm import tqdm

from ddpo_jax.errors import USAGE_ERROR


class ArgumentParser(argparse.ArgumentParser):
  """argparse's, which says in one line what is wrong with the options."""

  def error(self, message: str) -> NoReturn:
    self.exit(USAGE_ERROR, f"{message}; --help describes the options\n")


def say(text: str) -> None:
  """Prints on the main process at once, without tearing a progress bar.

  Never fails: work goes on where nobody reads along.
  """
  from ddpo_jax import distributed  # imports JAX
  if distributed.is_main():
    write(text, sys.stdout)


def write(text: str, stream: TextIO | None) -> None:
  """Writes a line to a standard stream, which may be closed, broken or of a narrow encoding."""
  if stream is None:  # as Python has a stream that was closed when it started
    return
  try:
    tqdm.write(_encodable(text, stream), file=stream)
    stream.flush()  # into a file as well, where a run may be followed
  except (OSError, ValueError):  # ValueError: the stream has been closed since
    _lead_nowhere(stream)


def hide_bars() -> bool | None:
  """tqdm's `disable`: progress is for the main process, and for a terminal."""
  from ddpo_jax import distributed  # imports JAX
  return None if distributed.is_main() and sys.stderr is not None else True


def _encodable(text: str, stream: TextIO) -> str:
  """The text with ? for every character that the stream's encoding lacks."""
  encoding = getattr(stream, "encoding", None) or "utf-8"
  return text.encode(encoding, "replace").decode(encoding)


def _lead_nowhere(stream: TextIO) -> None:
  """Points a broken stream at /dev/null, or Python would fail to flush it at exit."""
  with contextlib.suppress(OSError, ValueError):  # no file of the system's is behind it
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
