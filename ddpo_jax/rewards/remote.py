"""What rewards from a server share: parallel requests, retries, limits, and clear errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
import dataclasses
import ipaddress
import itertools
import random
import threading
import time
from typing import Any, TypeVar
import urllib.parse

import requests
import urllib3.exceptions

from ddpo_jax.daemon_threads import DaemonThreadPool
from ddpo_jax.errors import UserError
from ddpo_jax.redaction import redacted
from ddpo_jax.rewards.arguments import check_count

T = TypeVar("T")
R = TypeVar("R")

MAX_REPLY_BYTES = 8 * 2**20  # real ones have a few kilobytes
_MAX_PAUSE = 30.0  # seconds between two attempts
_SHORTEST = 1e-3  # seconds for an attempt; libraries refuse a timeout of 0
_LONGEST = 1e8  # seconds, three years; sockets refuse what no clock of theirs could count
_CHECK_TIMEOUT = 10.0  # seconds for a server to show at the start that it is there
_EXCERPT = 200  # characters of a server's error that are shown


class RewardError(UserError):
  """A server gave no usable reward for some images, and more attempts would not help.

  Those images have no reward: nothing is scored in their place.
  """


class AttemptError(Exception):
  """One attempt failed.

  Attributes:
    status: the HTTP status, if it was that.
    retry_after: seconds that the server asks to wait, or 0.
  """

  def __init__(self, message: str, status: int | None = None, retry_after: float = 0.0):
    super().__init__(message)
    self.status = status
    self.retry_after = retry_after


class TransientError(AttemptError):
  """An attempt failed in a way that may pass: another one is worth it."""


class AttemptTimeout(TransientError):
  """An attempt took too long."""


class ReplyError(AttemptError):
  """The reply cannot be used, and would be the same the next time."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """How a reward may use its server."""

  timeout: float  # seconds for one attempt
  time_limit: float  # seconds for one request with all its attempts and pauses
  backoff: float  # seconds before the second attempt; doubles, up to 30
  max_parallel: int  # requests under way at once

  def __post_init__(self):
    for name in ("timeout", "time_limit", "backoff"):
      value = getattr(self, name)
      if not (_is_number(value) and 0 < value <= _LONGEST):
        raise UserError(f"reward_kwargs.{name}={value!r} must be a number of seconds above 0, and "
                        f"at most {_LONGEST:g}")
    check_count("max_parallel", self.max_parallel)


class Server:
  """A reward's server. May be used by several threads, which share `max_parallel`."""

  def __init__(self, reward: str, url: str, limits: Limits):
    """Does not connect yet.

    Args:
      reward: the name of the reward, for messages.
      url: http:// or https://, as the user gave it.
      limits: for every request.

    Raises:
      UserError: if `url` is not a web address.
    """
    self.url = url
    self.limits = limits
    self._where = f"reward_fn={reward!r}, reward_kwargs.url={redacted(url)!r}"
    try:
      parts = urllib.parse.urlsplit(url)
      right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except (ValueError, TypeError, AttributeError):  # a bad port, or not a string
      right = False
    if not right:
      raise UserError(f"{self._where} must be a web address, such as "
                      "'http://127.0.0.1:8085'")
    self._pool = DaemonThreadPool(limits.max_parallel, reward)

  @property
  def check_timeout(self) -> float:
    """Seconds for the server to show that it is there."""
    return min(self.limits.timeout, _CHECK_TIMEOUT)

  def unreachable(self, cause: object) -> UserError:
    """The error for a server that is not there at the start."""
    return UserError(f"{self._where} cannot be reached ({cause}); must be a server that is "
                     "running: start it, or give its address")

  def check_reachable(self) -> None:
    """Makes sure that an HTTP server answers, be it with an error status.

    Raises:
      UserError: if none does.
    """
    try:
      # Servers that only take POST answer with a status that says so.
      with _session(self.url) as session:
        session.get(self.url, timeout=self.check_timeout, stream=True,
                    allow_redirects=False).close()
    except requests.Timeout:
      raise self.unreachable(f"no answer within {self.check_timeout:g} s") from None
    except (requests.RequestException, ValueError) as error:  # the latter: no name of a host
      raise self.unreachable(root_cause(error)) from None

  def map(self, attempt: Callable[[T, float], R], items: Sequence[T]) -> list[R]:
    """Calls `attempt(item, timeout)` for each item, in parallel; results in order.

    An attempt has `timeout` seconds, and raises TransientError to be called again or
    ReplyError not to be.

    Raises:
      RewardError: as soon as one item has failed for good; the others are given up.
    """
    stop = threading.Event()
    calls = [self._pool.submit(self._call, attempt, item, stop) for item in items]
    try:
      for call in futures.as_completed(calls):
        call.result()
    finally:
      stop.set()
      for call in calls:
        call.cancel()
    return [call.result() for call in calls]

  def _call(self, attempt: Callable[[T, float], R], item: T, stop: threading.Event) -> R:
    start = time.monotonic()
    deadline = start + self.limits.time_limit
    last = None
    for tried in itertools.count(1):
      timeout = min(self.limits.timeout, max(deadline - time.monotonic(), _SHORTEST))
      try:
        return attempt(item, timeout)
      except ReplyError as error:
        raise RewardError(f"{self._where} gave a reply that cannot be used (attempt "
                          f"{tried}): {error}") from error
      except TransientError as error:
        cut_short = isinstance(error, AttemptTimeout) and timeout < self.limits.timeout
        if last is None or not cut_short:  # the time limit explains nothing
          last = error
      pause = max(backoff_pause(self.limits.backoff, tried), last.retry_after)
      if time.monotonic() + pause >= deadline or stop.wait(pause):
        raise RewardError(
            f"{self._where} gave no usable reply in {time.monotonic() - start:.3g} s (attempts: "
            f"{tried}); must answer within reward_kwargs.time_limit="
            f"{self.limits.time_limit:g}; the last failure: {last}") from last
    raise AssertionError("unreachable")


def backoff_pause(backoff: float, tried: int) -> float:
  """Seconds to wait after attempt `tried`, from 1: doubles each time, half of it random.

  Random, so that requests which failed together do not all come back together.
  """
  longest = min(backoff * 2.0 ** min(tried - 1, 60), _MAX_PAUSE)
  return longest * random.uniform(0.5, 1.0)


def post(url: str, body: bytes, timeout: float) -> bytes:
  """Sends `body` and returns the reply's, of at most MAX_REPLY_BYTES.

  Raises:
    TransientError: if the connection failed or broke, the reply took more than `timeout`
      seconds, or its status is 429 or 5xx.
    ReplyError: for any other status but success, or if the reply is too large.
  """
  deadline = time.monotonic() + timeout
  try:
    with _session(url) as session, session.post(
        url, data=body, timeout=timeout, stream=True, allow_redirects=False) as response:
      # Not iter_content, which waits for a whole chunk however slowly it trickles in.
      chunks = iter(lambda: response.raw.read1(2**16, decode_content=False), b"")
      reply = read_reply(chunks, deadline)
  except (requests.Timeout, urllib3.exceptions.TimeoutError):
    raise timed_out(timeout) from None
  except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
    raise broken(error) from error
  if not 200 <= response.status_code < 300:
    raise status_error(response.status_code, response.headers.get("Retry-After"),
                       reply.decode(errors="replace"))
  return reply


def read_reply(chunks: Iterable[bytes], deadline: float) -> bytes:
  """Joins a reply's chunks as they arrive.

  Raises:
    ReplyError: as soon as there are more than MAX_REPLY_BYTES.
    AttemptTimeout: if a chunk arrives after `deadline`, of `time.monotonic()`.
  """
  reply = bytearray()
  for chunk in chunks:
    reply += chunk
    if len(reply) > MAX_REPLY_BYTES:
      raise ReplyError(f"it has more than {MAX_REPLY_BYTES} bytes; must be the answers only")
    if time.monotonic() > deadline:
      raise AttemptTimeout("a reply that did not end in time")
  return bytes(reply)


def timed_out(timeout: float) -> AttemptTimeout:
  """The error for a reply that did not come."""
  return AttemptTimeout(f"no reply within {timeout:.3g} s")


def broken(error: BaseException) -> TransientError:
  """The error for a connection that failed."""
  return TransientError(f"a broken connection ({root_cause(error)})")


def status_error(status: int, retry_after: str | None, body: str) -> AttemptError:
  """The error for a reply whose status is not success, with the end of what it says."""
  message = f"HTTP status {status}"
  # Printable and short: the body is whatever the server likes to send.
  text = "".join(c if c.isprintable() else "?" for c in " ".join(body.split())[-_EXCERPT:])
  if text:
    message += f" ({text})"
  if status != 429 and status < 500:
    return ReplyError(f"{message}; must be a server that takes this request at this address",
                      status)
  seconds = retry_after or ""
  return TransientError(message, status, float(seconds) if seconds.isdecimal() else 0.0)


def root_cause(error: BaseException) -> str:
  """What lies under the layers that libraries wrap around an error of the network."""
  while (below := error.__cause__ or error.__context__) is not None:
    error = below
  return f"{type(error).__name__}: {' '.join(str(error).split())[:_EXCERPT]}"


def is_loopback(url: str) -> bool:
  """Whether `url` is on this machine: a proxy from the environment cannot reach it."""
  host = urllib.parse.urlsplit(url).hostname or ""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


def _session(url: str) -> requests.Session:
  """For one request: sessions must not be shared between threads."""
  session = requests.Session()
  session.trust_env = not is_loopback(url)
  session.headers["Accept-Encoding"] = "identity"
  return session


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)
