"""Reads the JSON files that describe a model: config.json, scheduler_config.json and their like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import json
import pathlib
from typing import Any, TypeVar

from ddpo_jax.errors import UserError
from ddpo_jax.messages import one_line
from ddpo_jax.ops.activations import ACTIVATIONS

T = TypeVar("T")

_MAX_BYTES = 2**20  # of a JSON file; those that list a large model's tensors have a tenth of it


def check_supported(kind: str, config_class: type, values: Mapping[str, Any],
                    supported: Mapping[str, tuple[Any, ...]],
                    also_read: Iterable[str] = ()) -> None:
  """Refuses a config.json that asks for something the networks here do not build.

  Args:
    kind: what the file describes, for the message.
    config_class: the dataclass whose fields are the names that the network reads.
    values: the file's content.
    supported: for the names it does not read, the values that mean what it builds.
    also_read: further names that the caller looks at by itself.

  Raises:
    UserError: names the field and its value. A name that is in neither list passes
      only while it asks for nothing (null, false).
  """
  fields = _fields(config_class) | set(also_read)
  for name, value in values.items():
    if name in fields or name.startswith("_"):
      continue
    allowed = supported.get(name, (None, False))
    if value not in allowed:
      raise UserError(f"{kind} config: {name}={value!r} is not supported; "
                      f"must be one of {', '.join(map(repr, allowed))}")


def check_activation(kind: str, field: str, name: str) -> None:
  if name not in ACTIVATIONS:
    raise UserError(f"{kind} config: {field}={name!r} is not supported; "
                    f"must be one of {', '.join(ACTIVATIONS)}")


def read_fields(config_class: type[T], values: Mapping[str, Any]) -> T:
  """The dataclass with those of a file's values that are its fields; lists become tuples."""
  fields = _fields(config_class)
  return config_class(**{name: tuple(value) if isinstance(value, list) else value
                         for name, value in values.items() if name in fields})


def _fields(config_class: Any) -> set[str]:
  return {field.name for field in dataclasses.fields(config_class)}


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file of a model folder.

  Raises:
    UserError: if there is none.
  """
  try:
    with open(path, "rb") as file:
      text = file.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
      raise ValueError(f"more than {_MAX_BYTES} bytes")
    content = json.loads(text)
  except FileNotFoundError:
    raise UserError(f"{path} does not exist; a model folder must have it") from None
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read as JSON ({one_line(error)}); must describe a part "
                    "of the model") from error
  if not isinstance(content, dict):
    raise UserError(f"{path} holds a {type(content).__name__}; must be a JSON object")
  return content


def read(path: pathlib.Path, parse: Callable[[Mapping[str, Any]], Any]) -> Any:
  """Reads a JSON file and parses it; values of the wrong kind are the file's fault."""
  values = read_json(path)
  try:
    return parse(values)
  except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
    raise UserError(f"{path} has a value of the wrong kind: {one_line(error)}") from error
