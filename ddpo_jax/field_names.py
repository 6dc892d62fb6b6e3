"""Names of a config's fields, and which one was meant by a name that is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import difflib
import typing
from typing import Any

from ddpo_jax.messages import MAX_SHOWN

_NEAR = 0.7  # how alike names are, of 1, where one may have been meant for the other
_SHORTENED = 0.9  # how alike "clip" is to "clip_range"
_MOST_NEAR = 3  # such names in a message


def not_a_field(config: type, path: str, unknown: str, types: Mapping[str, Any]) -> str:
  """One line: which field may have been meant.

  Args:
    config: the dataclass of all fields.
    path: as the user has it.
    unknown: the path or the group in it that is not there.
    types: what is there in the place of `unknown`.
  """
  near = _nearest(config, shortened(path)) or _nearest(config, shortened(unknown))
  advice = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(types)}"
  return f"{shortened(path)} is not a field; {advice}"


def _nearest(config: type, path: str) -> list[str]:
  """The fields whose names are most like that of a path; of several those of its group."""
  likeness = {field: _likeness(path, field) for field in _all_fields(config)}
  best = max(likeness.values())
  if best < _NEAR:
    return []
  near = [field for field, value in likeness.items() if value == best]
  group = path.rpartition(".")[0]
  in_group = [field for field in near if _ratio(group, field.rpartition(".")[0]) >= _NEAR]
  return (in_group or near)[:_MOST_NEAR]


def _likeness(path: str, field: str) -> float:
  """From 0 to 1, by the last names; the groups may be wrong or left out."""
  name, last = path.rpartition(".")[2], field.rpartition(".")[2]
  if path == field.replace(".", "_"):
    return 1.0
  return _SHORTENED if last.startswith(name + "_") else _ratio(name, last)


def _ratio(one: str, other: str) -> float:
  return difflib.SequenceMatcher(None, one.lower(), other.lower()).ratio()


def _all_fields(kind: Any, prefix: str = "") -> Iterator[str]:
  """The full names of fields and groups, such as "sample" and "sample.eta"."""
  for name, each in typing.get_type_hints(kind).items():
    yield prefix + name
    group = group_of(each)
    if group is not None:
      yield from _all_fields(group, f"{prefix}{name}.")


def shortened(path: str) -> str:
  """A name that a user gave, for a line."""
  return " ".join(path.split())[:MAX_SHOWN]


def group_of(kind: Any) -> type | None:
  """The dataclass of a group of fields, be it one that may be None."""
  for choice in (kind, *typing.get_args(kind)):
    if isinstance(choice, type) and dataclasses.is_dataclass(choice):
      return choice
  return None


def with_groups(field: str) -> list[str]:
  """A field's name and those of the groups that it is in."""
  parts = field.split(".")
  return [".".join(parts[:i + 1]) for i in range(len(parts))]
