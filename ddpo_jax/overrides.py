"""`--config.FIELD=VALUE`: what the command line changes in a config.

Not by `ml_collections.config_flags`, which ends with a traceback at the first problem: here all of
them are said at once, a line each. And a new prompt or reward function drops the old one's
arguments.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
import dataclasses
import re
import shlex
from typing import Any

import ml_collections

from ddpo_jax.config import field_type
from ddpo_jax.errors import UserError
from ddpo_jax.messages import shown
from ddpo_jax.redaction import redacted

_FUNCTIONS = {"prompt_fn": "prompt_fn_kwargs", "reward_fn": "reward_kwargs"}
_CONSTANTS = {"true": True, "false": False, "none": None}
# What a shell makes of {'a': 1.0} without quotes, and of {'a':1.0,'b':2.0}: two arguments.
_UNQUOTED = re.compile(r"\{.*|.+:[-+]?[\d.]+(e[-+]?\d+)?", re.DOTALL)
_FLAGS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def override(config: ml_collections.ConfigDict, arguments: Sequence[tuple[str, str]]
             ) -> tuple[dict[str, Any], list[str]]:
  """Changes a config's fields.

  A prompt or reward function other than the config's own does not get the keyword arguments
  that the config has for that one; it gets those among `arguments`, in whatever order.

  Args:
    config: as a config file returns it; changed in place.
    arguments: fields and their values as text, such as ("sample.eta", "0.5").

  Returns:
    The config's values as plain dicts, in which a text that is not of its field's type is
    left for `config.inspect_config` to refuse; and what it cannot see, a line for each problem.
  """
  problems: list[str] = []
  functions, kwargs = [], []
  with config.unlocked(), config.ignore_type():
    for path, text in arguments:
      group, *names = path.split(".")
      if path in _FUNCTIONS:
        functions.append((path, text))
      elif group in _FUNCTIONS.values():
        kwargs.append((group, names, text))
      else:
        problems += _set(config, path, text)
  values = config.to_dict()
  problems += _set_functions(values, functions)
  for group, names, text in kwargs:
    value = literal(text)
    if not names and isinstance(value, str) and value.startswith("{"):
      problems.append(f"{group} is not a dict; {unquoted(group)}")
    else:
      _set_kwarg(values, group, names, value)
  return values, problems


def parse(kind: Any, text: str) -> Any:
  """A text as a value of a field's type; what cannot be one stays text.

  Args:
    kind: from `config.field_type`.
    text: from the command line.
  """
  if dataclasses.is_dataclass(kind):
    return literal(text)
  if kind is bool:
    return _FLAGS.get(text.lower(), text)
  if kind not in (int, float):
    return text
  try:
    return kind(text)
  except ValueError:
    return _integral(text) if kind is int else text


def literal(text: str) -> Any:
  """A text as Python reads it, true, false and none in any case too; else the text itself."""
  if text.lower() in _CONSTANTS:
    return _CONSTANTS[text.lower()]
  try:
    return ast.literal_eval(text)
  except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
    return text


def redacted_command(argv: Sequence[str]) -> str:
  """A command as it may be written down: `redacted`, of its --name=value and --name value."""
  safe_words, before = [], ""
  for argument in argv:
    is_option = argument.startswith("--")
    name, equals, text = argument.partition("=") if is_option else (before, "", argument)
    value = literal(text)
    (safe,) = redacted({name.rpartition(".")[2]: value}).values()
    if safe != value:
      argument = f"{name}={safe}" if is_option else str(safe)
    safe_words.append(argument)
    before = name if is_option and not equals else ""
  return shlex.join(safe_words)


def unquoted(field: str) -> str:
  """What to say of a field that should have been a dict, and whose quotes a shell took away."""
  return f"must be quoted for the shell: --config.{field}=\"{{'name': 1.0}}\""


def _integral(text: str) -> int | str:
  """1e3 as an integer; what is none stays text."""
  try:
    number = float(text)
  except ValueError:
    return text
  return int(number) if number.is_integer() else text


def _set(config: ml_collections.ConfigDict, path: str, value: Any) -> list[str]:
  """Sets a field, or of a group the fields that a dict names; returns the problems."""
  try:
    kind = field_type(path)
  except UserError as error:
    return [str(error)]
  value = parse(kind, value) if isinstance(value, str) else value
  if dataclasses.is_dataclass(kind) and isinstance(value, str) and value.startswith("{"):
    return [f"{path}={shown(value)} is not a dict; {unquoted(path)}"]
  if dataclasses.is_dataclass(kind) and isinstance(value, Mapping) and value:
    return [problem for name, each in value.items()
            for problem in _set(config, f"{path}.{name}", each)]
  *groups, name = path.split(".")
  for group in groups:
    if not isinstance(config.get(group), ml_collections.ConfigDict):
      config[group] = ml_collections.ConfigDict(type_safe=False)
    config = config[group]
  config[name] = value
  return []


def _set_functions(values: dict[str, Any], functions: Sequence[tuple[str, str]]) -> list[str]:
  """Sets the names of functions; returns the problems."""
  problems = []
  before = {field: values.get(field) for field in _FUNCTIONS}
  for field, text in functions:
    value = literal(text)
    if field == "reward_fn" and isinstance(value, str) and _UNQUOTED.fullmatch(value):
      problems.append(f"{field}={shown(value)} is not a dict; {unquoted(field)}")
    values[field] = value if field == "reward_fn" and isinstance(value, dict) else text
  for field, group in _FUNCTIONS.items():
    if values.get(field) != before[field]:
      values[group] = _still_meant(before[field], values[field], values.get(group))
  return problems


def _still_meant(before: Any, now: Any, kwargs: Any) -> Any:
  """Of a config's keyword arguments those of functions that are still there."""
  if all(isinstance(x, Mapping) for x in (before, now, kwargs)):
    return {name: value for name, value in kwargs.items() if name in now}
  return {}


def _set_kwarg(values: dict[str, Any], group: str, names: Sequence[str], value: Any) -> None:
  if not names:
    values[group] = {} if value is None else value
    return
  if group == "reward_kwargs" and isinstance(values.get("reward_fn"), Mapping):
    names = _with_whole_name(names, values["reward_fn"])
  values[group] = _with(values.get(group), names, value)


def _with_whole_name(names: Sequence[str], functions: Mapping[str, Any]) -> Sequence[str]:
  """Puts the name of a reward together that has dots itself: "my.rewards:redness"."""
  for count in range(len(names), 1, -1):
    if ".".join(names[:count]) in functions:
      return [".".join(names[:count]), *names[count:]]
  return names


def _with(values: Any, names: Sequence[str], value: Any) -> dict[str, Any]:
  """Nested dicts with one value changed."""
  first, *rest = names
  values = dict(values) if isinstance(values, Mapping) else {}
  return {**values, first: _with(values.get(first), rest, value) if rest else value}
