"""Rewards from a LLaVA-server (https://github.com/kvablack/LLaVA-server).

A request is an HTTP POST of a pickled dict: `images`, JPEG files; `queries`, a list of
questions for each image; and for BERTScore `answers` in the same shape. The reply is a
pickled dict with `outputs` in that shape, and `precision`, `recall` and `f1` where there
were answers. Pickles can run code when they are read, so a reply is first searched for
anything but dicts, lists, strings and numbers, and refused if it has any.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import io
import pickle
import pickletools
from typing import Any

import numpy as np

from ddpo_jax.errors import UserError
from ddpo_jax.images import encode_image
from ddpo_jax.parts import ceil_div
from ddpo_jax.rewards import remote
from ddpo_jax.rewards.arguments import check_count
from ddpo_jax.rewards.metadata import checks_metadata, questions_and_answers
from ddpo_jax.types import RewardFn

_QUERY = "Answer concisely: what is going on in this image?"
_JPEG_QUALITY = 80
_PICKLE_PROTOCOL = 4  # every Python 3 that such a server may run on reads it

# All that a pickle of dicts, lists, strings and numbers is made of. Tuples are left out:
# hashing deeply nested ones overflows the stack.
_OPCODES = frozenset("""
    PROTO FRAME STOP MARK
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS
    MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET""".split())
_ADVICE = ("only dicts, lists, strings and numbers are read: on the server, turn arrays and "
           "tensors into lists with .tolist() before pickle.dumps")


def make_llava_strict_satisfaction(
    *, url: str = "http://127.0.0.1:8085", batch_size: int = 4, max_parallel: int = 4,
    timeout: float = 120.0, time_limit: float = 600.0, backoff: float = 1.0,
    all_or_nothing: bool = False) -> RewardFn:
  """Makes a reward that asks LLaVA about the image: the share of its right answers, 0 to 1.

  "Strict" because answers are compared as text, not by BERTScore. Questions and answers are the
  prompt's metadata. An answer is right if it contains the text of the true one. The info has
  LLaVA's `answers`, [B][questions].

  Args:
    url: of the server.
    batch_size: images in one request, at most; requests of one batch are of even size.
    max_parallel: requests under way at once.
    timeout: seconds for one attempt.
    time_limit: seconds for one request with all its attempts.
    backoff: seconds before the second attempt; doubles, with some randomness, up to 30.
    all_or_nothing: reward 1 if all of an image's answers are right and 0 otherwise.

  Raises:
    UserError: if an argument is not right or the server cannot be reached. The reward
      raises it for metadata without questions, and RewardError if the server fails.
  """
  name = "llava_strict_satisfaction"
  server = _connect(name, url, batch_size, max_parallel, timeout, time_limit, backoff)

  @checks_metadata(functools.partial(questions_and_answers, name))
  def reward_fn(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
                ) -> tuple[np.ndarray, dict[str, Any]]:
    del prompts
    questions, answers = zip(*questions_and_answers(name, metadata))
    if len({len(q) for q in questions}) > 1:  # the server lays them out as an array
      raise UserError(f"reward_fn={name!r} got {sorted({len(q) for q in questions})} "
                      "questions for different samples; must be the same number for each")

    def ask(indices: list[int], timeout: float) -> list[list[str]]:
      request = {"images": _jpegs(images, indices),
                 "queries": [questions[i] for i in indices]}
      reply = _post(url, request, timeout)
      return _table(reply, "outputs", _text, len(indices), len(questions[0]))

    outputs = sum(server.map(ask, _batches(len(images), batch_size)), [])
    right = np.array([[answer in output for answer, output in zip(*pair)]
                      for pair in zip(answers, outputs)], np.float32)
    scores = right.min(axis=-1) if all_or_nothing else right.mean(axis=-1)
    return scores, {"answers": outputs}

  return reward_fn


def make_llava_bertscore(
    *, url: str = "http://127.0.0.1:8085", batch_size: int = 16, max_parallel: int = 4,
    timeout: float = 120.0, time_limit: float = 600.0, backoff: float = 1.0) -> RewardFn:
  """Makes a reward that compares LLaVA's description of the image with its prompt.

  It is the recall of BERTScore (arXiv:1904.09675), which the server computes. The info
  has `precision` and `f1`, both [B] float32, and the descriptions, `outputs`.

  Args:
    url: of the server.
    batch_size: images in one request, at most; requests of one batch are of even size.
    max_parallel: requests under way at once.
    timeout: seconds for one attempt.
    time_limit: seconds for one request with all its attempts.
    backoff: seconds before the second attempt; doubles, with some randomness, up to 30.

  Raises:
    UserError: if an argument is not right or the server cannot be reached. The reward
      raises RewardError if the server fails.
  """
  server = _connect("llava_bertscore", url, batch_size, max_parallel, timeout, time_limit,
                    backoff)

  def reward_fn(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
                ) -> tuple[np.ndarray, dict[str, Any]]:
    del metadata

    def ask(indices: list[int], timeout: float) -> list[tuple[str, float, float, float]]:
      request = {"images": _jpegs(images, indices),
                 "queries": [[_QUERY] for _ in indices],
                 "answers": [[f"The image contains {prompts[i]}"] for i in indices]}
      reply = _post(url, request, timeout)
      column = lambda key, check: [row[0] for row in
                                   _table(reply, key, check, len(indices), 1)]
      return list(zip(column("outputs", _text), column("precision", _number),
                      column("recall", _number), column("f1", _number)))

    rows = sum(server.map(ask, _batches(len(images), batch_size)), [])
    outputs, precision, recall, f1 = zip(*rows)
    return np.array(recall, np.float32), {"precision": np.array(precision, np.float32),
                                          "f1": np.array(f1, np.float32),
                                          "outputs": list(outputs)}

  return reward_fn


def read_reply(reply: bytes) -> Any:
  """Reads a pickle of nothing but dicts, lists, strings and numbers; runs nothing.

  Raises:
    ReplyError: if it holds anything else, or is not a whole pickle.
  """
  try:
    for opcode, argument, _ in pickletools.genops(reply):
      if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
        break  # the reader gets no further, and knows the name
      if opcode.name not in _OPCODES:
        raise remote.ReplyError(f"its pickle has the opcode {opcode.name}, and {_ADVICE}")
      # A large index makes the reader allocate a table up to it.
      if opcode.name.endswith("PUT") and (argument or 0) > len(reply):
        raise remote.ReplyError(f"its pickle has a memo index of {argument}")
    return _Reader(io.BytesIO(reply)).load()
  except remote.ReplyError:
    raise
  except Exception as error:  # a broken pickle can raise nearly any
    raise remote.ReplyError(f"it is not a whole pickle ({type(error).__name__}: "
                            f"{str(error)[:100]!r})") from error


class _Reader(pickle.Unpickler):
  """Refuses everything that has to be looked up by name."""

  def find_class(self, module: str, name: str) -> Any:
    raise remote.ReplyError(f"its pickle asks for {f'{module}.{name}'[:100]!r}, which was not "
                            f"loaded; {_ADVICE}")

  def persistent_load(self, pid: Any) -> Any:
    raise remote.ReplyError(f"its pickle has a persistent id, and {_ADVICE}")


def _connect(name: str, url: str, batch_size: int, max_parallel: int, timeout: float,
             time_limit: float, backoff: float) -> remote.Server:
  check_count("batch_size", batch_size)
  server = remote.Server(name, url, remote.Limits(timeout, time_limit, backoff, max_parallel))
  server.check_reachable()
  return server


def _batches(count: int, batch_size: int) -> list[list[int]]:
  """Splits 0..count-1 in as few batches as possible, of even size."""
  return [part.tolist() for part in
          np.array_split(np.arange(count), ceil_div(count, batch_size))]


def _jpegs(images: np.ndarray, indices: list[int]) -> list[bytes]:
  return [encode_image(images[i], "JPEG", quality=_JPEG_QUALITY) for i in indices]


def _post(url: str, request: dict[str, Any], timeout: float) -> Any:
  return read_reply(remote.post(url, pickle.dumps(request, _PICKLE_PROTOCOL), timeout))


def _table(reply: Any, key: str, check: Callable[[Any, str], Any], rows: int, columns: int
           ) -> list[list[Any]]:
  """`reply[key]`, made sure to be lists of checked values, [rows][columns]."""
  if not isinstance(reply, dict):
    raise remote.ReplyError(f"it is a {type(reply).__name__}; must be a dict")
  if key not in reply:
    raise remote.ReplyError(f"it has no {key!r}; must be from a server that computes it")
  _list(reply[key], key, rows, "images")
  for i, row in enumerate(reply[key]):
    _list(row, f"{key}[{i}]", columns, "queries of that image")
  return [[check(value, f"{key}[{i}]") for value in row] for i, row in enumerate(reply[key])]


def _list(value: Any, where: str, length: int, of: str) -> None:
  if not isinstance(value, list):
    raise remote.ReplyError(f"its {where} is a {type(value).__name__}; must be a list")
  if len(value) != length:
    raise remote.ReplyError(f"its {where} has {len(value)} entries; must have {length}, as "
                            f"many as there are {of}")


def _text(value: Any, where: str) -> str:
  if not isinstance(value, str):
    raise remote.ReplyError(f"its {where} holds a {type(value).__name__}; must be a string")
  return value


def _number(value: Any, where: str) -> float:
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise remote.ReplyError(f"its {where} holds a {type(value).__name__}; must be a number")
  if not abs(value) < 1e30:  # NaN too; and Python's integers have no bound of their own
    raise remote.ReplyError(f"its {where} is not a finite number; must be one")
  return float(value)
