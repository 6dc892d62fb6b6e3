"""Reading and writing small files: whole or not at all, and line by line."""

from __future__ import annotations

from collections.abc import Mapping
import json
import os
import pathlib
from typing import Any

from ddpo_jax.errors import UserError


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Replaces a file's text at once: whoever reads it finds all of the old text or of the new.

  That holds as well after the process is killed, which may leave a file NAME.partial.
  """
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
  """The objects of a file with one JSON object for each epoch; none if it is absent.

  Lines that are not objects with an epoch, such as one that was cut off, are skipped.
  """
  if not path.exists():
    return []
  objects = []
  for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
    try:
      found = json.loads(line)
    except ValueError:
      continue
    if isinstance(found, dict) and isinstance(found.get("epoch"), int):
      objects.append(found)
  return objects


def append_jsonl(path: pathlib.Path, line: Mapping[str, Any]) -> None:
  """Adds one JSON object to such a file."""
  with open(path, "a", encoding="utf-8") as file:
    file.write(json.dumps(line) + "\n")


def absolute(path: str | os.PathLike[str]) -> str:
  """A user's path as an absolute one, links not followed; "" stays "", which means none."""
  path = os.fspath(path)
  return os.path.abspath(os.path.expanduser(path)) if path else path


def expand_home(path: str | os.PathLike[str]) -> pathlib.Path:
  """A user's path, with a home folder for ~; of a user who is not known it stays as it is.

  `pathlib.Path.expanduser` would raise; so there is no such file, and that is said.
  """
  return pathlib.Path(os.path.expanduser(path))


def nearest_existing(path: pathlib.Path) -> pathlib.Path:
  """The path itself if something is there, else the nearest folder or file above it; absolute.

  A symbolic link is there even if it points to nothing.

  Raises:
    OSError: if the path cannot be looked at, such as for a name that is too long.
    ValueError: if it cannot be a path at all, such as one with a NUL.
  """
  path = path.absolute()
  while not _exists(path):
    path = path.parent
  return path


def check_output(named: str, path: pathlib.Path, *, is_folder: bool) -> None:
  """Refuses a path where no file, or no folder of files, can be written; makes nothing.

  Args:
    named: the option or field and its value, for the message.
    path: where folders that are missing will be made.
    is_folder: whether it is to be a folder.

  Raises:
    UserError: if it is of the other kind, or cannot be written to.
  """
  must = "must be a folder, or a path where one can be made" if is_folder else (
      "must be a file's path, in a folder that can be written to")
  if path.parts and path.parts[0].startswith("~"):  # left by `expand_home`
    raise UserError(f"{named} begins with the home folder of a user who is not known here; {must}")
  try:
    there = nearest_existing(path)
  except (OSError, ValueError) as error:  # a name that is too long, a NUL
    raise UserError(f"{named} cannot be a path: {error}; {must}") from error
  if there.is_dir() != (is_folder or there != path.absolute()):
    kind = "a folder" if there.is_dir() else "not a folder"
    raise UserError(f"{named}: {there} is {kind}; {must}")
  if not os.access(there, os.W_OK | (os.X_OK if there.is_dir() else 0)):
    raise UserError(f"{named}: {there} cannot be written to; {must}")


def _exists(path: pathlib.Path) -> bool:
  try:
    os.lstat(path)
  except (FileNotFoundError, NotADirectoryError):
    return False
  return True
