"""Keys, tokens and passwords in what users give: found by their names, and not written down."""

from __future__ import annotations

from collections.abc import Mapping
import re
from typing import Any

_REDACTED = "***"
# "api_key" and "token", not "api_key_env", which names a variable, nor "tokenizer".
_SECRET_NAME = re.compile(
    r"(^|[_-])(api_?key|key|token|secret|password|passwd|passphrase|credentials?|"
    r"authorization|bearer)$", re.IGNORECASE)
_SECRETS_IN_URLS = (
    re.compile(r"(\w://[^/@:\s]*:)[^/@\s]+(?=@)"),
    re.compile(r"([?&](?:api_?key|key|token|secret|password|sig|signature)=)[^&#\s]+",
               re.IGNORECASE))


def is_secret(name: str) -> bool:
  """Whether values of this name are keys, tokens or passwords."""
  return _SECRET_NAME.search(name) is not None


def redacted(value: Any) -> Any:
  """A value as it may be written down: keys, tokens and passwords in it become "***"."""
  if isinstance(value, Mapping):
    return {name: _REDACTED if is_secret(str(name)) and item else redacted(item)
            for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(map(redacted, value))
  if isinstance(value, str):
    for pattern in _SECRETS_IN_URLS:
      value = pattern.sub(rf"\g<1>{_REDACTED}", value)
  return value
