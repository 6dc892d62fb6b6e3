"""Functions that a config names: found here or imported, and their arguments checked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
import contextlib
import importlib
import inspect
import re
import types
import typing
from typing import Any

from ddpo_jax.errors import UserError
from ddpo_jax.messages import one_line, place, shown, with_type
from ddpo_jax.redaction import redacted

_MODULE = re.compile(r"\w+(\.\w+)*")
# What is checked of arguments, where a function says that they are nothing else.
_TYPES: dict[Any, str] = {bool: "bool", int: "int", float: "float", str: "str",
                          type(None): "None"}
_RAISED_BY = "raised by "


def resolve_function(field: str, name: str, known: dict[str, Callable],
                     also: Sequence[str] = ()) -> Callable:
  """A function by its name here, or imported from "package.module:function".

  `also` are names that the caller knows besides; for the message.
  """
  if name in known:
    return known[name]
  module_name, colon, function_name = name.partition(":")
  if not colon:
    raise UserError(f"{field}={name!r} is not known; must be one of "
                    f"{', '.join([*known, *also])}, "
                    "or your own as 'package.module:function'")
  is_module = _MODULE.fullmatch(module_name) is not None and not module_name.endswith(".py")
  if not is_module or not function_name.isidentifier():
    meant = module_name.removesuffix(".py").replace("/", ".").strip(".")
    example = (f"{meant if _MODULE.fullmatch(meant) else 'package.module'}:"
               f"{function_name if function_name.isidentifier() else 'function'}")
    wrong = (f"{function_name!r} is not a function's name" if is_module else
             f"{module_name!r} is not a module's name")
    raise UserError(f"{field}={name!r} cannot be imported: {wrong}; must be such as {example!r}")
  try:
    function = getattr(importlib.import_module(module_name), function_name)
  except (Exception, SystemExit) as error:  # the module is the user's own code
    raise UserError(f"{field}={name!r} cannot be imported: "
                    f"{_import_problem(module_name, error)}") from error
  if not callable(function):
    raise UserError(f"{field}={name!r} is a {type(function).__name__}; must be a function")
  return function


class calling:
  """A context for calls of a user's function: notes in its errors that it raised them.

  Raises:
    RuntimeError: in place of SystemExit, which would end the run as if it were done; of
      CancelledError; and of StopIteration, which would end an iterator around the call.
  """

  def __init__(self, what: str):
    self._what = what

  def __enter__(self) -> None:
    pass

  # Not by `contextlib.contextmanager`, which sets an attribute of errors: some refuse that.
  def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
    if isinstance(error, (SystemExit, StopIteration, asyncio.CancelledError)):
      raise RuntimeError(f"{self._what} raised {error!r}") from error
    if isinstance(error, Exception):
      with contextlib.suppress(Exception):
        error.add_note(_RAISED_BY + self._what)


def raised_by_user(error: BaseException) -> bool:
  """Whether an error comes out of a call of a user's function."""
  return any(note.startswith(_RAISED_BY) for note in getattr(error, "__notes__", ()))


def _import_problem(module_name: str, error: BaseException) -> str:
  if isinstance(error, ModuleNotFoundError) and error.name in (
      module_name, module_name.partition(".")[0]):
    return f"{one_line(error)} (PYTHONPATH=. finds modules in this folder)"
  where = place(error)
  return f"{with_type(error) if where else one_line(error)}{where}"


def check_kwargs(field: str, name: str, function: Callable, positional: Sequence[str],
                 kwargs: dict[str, Any], arguments: str) -> None:
  """Refuses keyword arguments that the function does not take, or lacks, or of another type.

  Args:
    field: that names the function.
    name: its name there.
    function: itself.
    positional: what it is always given, by position.
    kwargs: what it is to be given by name.
    arguments: the field that has them.
  """
  signature = _signature(function)
  if signature is None:
    return
  if not _takes_first(signature, positional, kwargs):
    raise UserError(f"{field}={name!r} takes {_parameters(signature)}; must take "
                    f"({', '.join(positional)}) first")
  try:
    signature.bind(*positional, **kwargs)
  except TypeError as error:
    taken = [p.name for p in list(signature.parameters.values())[len(positional):]
             if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    raise UserError(f"{field}={name!r} with {arguments}={shown(redacted(kwargs))}: {error}; it "
                    f"takes: {', '.join(taken) or 'none'}") from None
  for key, value in kwargs.items():
    wanted = _wanted(signature.parameters.get(key), value)
    if wanted:
      raise UserError(f"{arguments}.{key}={shown(redacted({key: value})[key])} must be of type "
                      f"{wanted} ({field}={name!r})")


def _signature(function: Callable) -> inspect.Signature | None:
  """Of a function; None for some of those that are written in C."""
  for eval_str in (True, False):
    try:
      return inspect.signature(function, eval_str=eval_str)
    except Exception:  # annotations are any code, and may name what is not there
      continue
  return None


def _takes_first(signature: inspect.Signature, positional: Sequence[str],
                 kwargs: dict[str, Any]) -> bool:
  """Whether a function takes what it is always given, by position, beside its `kwargs`."""
  try:
    bound = signature.bind_partial(*positional)
  except TypeError:
    return False
  # One that is given by name as well is not in its place: f(images, prompts, factor).
  twice = {key for key in bound.arguments if key in kwargs and key not in positional}
  return all(signature.parameters[key].kind != inspect.Parameter.POSITIONAL_OR_KEYWORD
             for key in twice)


def _parameters(signature: inspect.Signature) -> str:
  """Such as "(images, *, factor)"."""
  bare = [parameter.replace(annotation=parameter.empty, default=parameter.empty)
          for parameter in signature.parameters.values()]
  return str(inspect.Signature(bare))


def _wanted(parameter: inspect.Parameter | None, value: Any) -> str:
  """The type that an argument must have, by annotation or default; "" if nothing contradicts it."""
  if parameter is None:  # of **kwargs
    return ""
  annotation, default = parameter.annotation, parameter.default
  if annotation is parameter.empty:  # then a default says no more than that it is no text
    is_wrong = isinstance(value, str) and isinstance(default, (bool, int, float))
    return _TYPES[type(default)] if is_wrong else ""
  is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
  kinds = typing.get_args(annotation) if is_union else (annotation,)
  is_checked = all(isinstance(kind, type) and kind in _TYPES for kind in kinds)
  if (value is None and default is None) or not is_checked:
    return ""
  if any(_is_of(value, kind) for kind in kinds):
    return ""
  return " or ".join(_TYPES[kind] for kind in kinds)


def _is_of(value: Any, kind: Any) -> bool:
  """As for a config's fields: an integer is a float, and a bool is neither."""
  kinds = (int, float) if kind is float else kind
  return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
