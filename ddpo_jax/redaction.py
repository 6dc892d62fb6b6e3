"""Keys, tokens and passwords in what users give: found by their names, and not written down."""

from __future__ import annotations

from collections.abc import Mapping
import re
from typing import Any

REDACTED = "***"
# "api_key" and "token", not "api_key_env", which names a variable, nor "tokenizer".
_SECRET_NAME = re.compile(
    r"(^|[_-])(api_?key|key|token|secret|password|passwd|pwd|passphrase|credentials?|"
    r"authorization|auth|bearer|sig|signature)$", re.IGNORECASE)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # accessToken, HFToken
_PASSWORD = re.compile(r"(\w://[^/@:?#\s]*:)[^/?#\s]+(?=@)")
_USER_ALONE = re.compile(r"(https?://)[^/@:?#\s]+(?=@)")  # some servers take a token in its place
_PARAMETER = re.compile(r"([?&;#]([^=&;?#\s]+)=)([^&;?#\s]+)")


def is_secret(name: str) -> bool:
  """Whether values of this name are keys, tokens or passwords."""
  return _SECRET_NAME.search(_CAMEL.sub("_", name)) is not None


def redacted(value: Any) -> Any:
  """A value as it may be written down: keys, tokens and passwords in it become "***"."""
  if isinstance(value, Mapping):
    # A number is none, nor is a switch that is called "auth".
    return {name: REDACTED if item and is_secret(str(name)) and not isinstance(item, (int, float))
            else redacted(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(map(redacted, value))
  if isinstance(value, str):
    for pattern in (_PASSWORD, _USER_ALONE):
      value = pattern.sub(rf"\g<1>{REDACTED}", value)
    return _PARAMETER.sub(_redacted_parameter, value)
  return value


def _redacted_parameter(found: re.Match[str]) -> str:
  """Of a URL: "?name=value". Azure's keys are called a code there."""
  prefix, name, value = found.groups()
  return prefix + (REDACTED if is_secret(name) or name.lower() == "code" else value)
