"""Formats users' values, and exceptions of other people's code, for one-line messages."""

from __future__ import annotations

from collections.abc import Callable
import os
import pathlib
import traceback
from typing import Any

MAX_SHOWN = 120  # characters of a value
_MAX_LENGTH = 500  # characters of a library's message
_NOT_USERS = (str(pathlib.Path(__file__).parent) + os.sep,
              str(pathlib.Path(os.__file__).parent) + os.sep)


def one_line(error: BaseException) -> str:
  """What an exception says, or its type if it says nothing."""
  said: object = error.msg if isinstance(error, SyntaxError) else error
  while isinstance(said, (KeyError, AttributeError)) and len(said.args) == 1:
    said = said.args[0]  # a KeyError shows its message's quotes and escapes
  text = " ".join(str(said).split()) or type(error).__name__
  return text if len(text) <= _MAX_LENGTH else text[:_MAX_LENGTH] + "…"


def with_type(error: BaseException) -> str:
  """As `one_line`, after the exception's type: many messages mean little without it."""
  name, text = type(error).__name__, one_line(error)
  return name if text == name else f"{name}: {text}"


def is_users(file: str) -> bool:
  """Whether a file is neither of this package, nor of Python or an installed library."""
  parts = pathlib.Path(file).parts
  return (os.path.isfile(file) and not file.startswith(_NOT_USERS)
          and not {"site-packages", "dist-packages"} & set(parts))


def place(error: BaseException, is_of: Callable[[str], bool] = is_users) -> str:
  """Such as " (my_config.py, line 3)", or "" if the exception came from elsewhere.

  Args:
    error: that was caught.
    is_of: whether a file is one that the user should look at. The innermost call in such a file
      is named, or the line that has the syntax error.
  """
  if isinstance(error, SyntaxError) and error.filename and is_of(error.filename):
    return f" ({error.filename}, line {error.lineno})"
  frames = [frame for frame in traceback.extract_tb(error.__traceback__)
            if is_of(frame.filename)]
  return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def counted(count: int, noun: str) -> str:
  """"1 epoch", "2 epochs"."""
  return f"{count} {noun}{'s' * (count != 1)}"


def shown(value: Any) -> str:
  """A value as part of a line, whatever it is."""
  try:
    text = " ".join(repr(value).split())
  except (ValueError, RecursionError):  # an integer of thousands of digits, a dict in itself
    text = f"<{type(value).__name__}>"
  return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def is_utf8(text: str) -> bool:
  """Whether UTF-8 can encode a text: not if Python made half surrogates of other bytes."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def in_bytes(count: int) -> str:
  """A size of memory or of a file, such as "1.25 GiB"."""
  return f"{count / 2**30:.2f} GiB" if count >= 0.1 * 2**30 else f"{count / 2**20:.1f} MiB"
