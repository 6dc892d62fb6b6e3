"""A reward from any vision-language model behind an OpenAI-compatible server."""

from __future__ import annotations

import base64
from collections.abc import Callable
import functools
import json
import math
import os
import re
import time
from typing import Any

import numpy as np

from ddpo_jax import english
from ddpo_jax.errors import UserError
from ddpo_jax.images import encode_image
from ddpo_jax.redaction import redacted
from ddpo_jax.rewards import remote
from ddpo_jax.rewards.arguments import check_count
from ddpo_jax.rewards.metadata import checks_metadata, questions_and_answers
from ddpo_jax.types import RewardFn

_NAME = "vlm_score"
_MODES = ("probability", "strict")
_ANSWER_TOKENS = 64  # of a reply to a question in mode "strict"
_NO_KEY = "none"  # servers of one's own take any; the client insists on one
_LOWEST_LOGPROB = -1e4  # e to this is 0; servers have even lower ones, as for -inf
_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2")


def make_vlm_score(
    *, url: str = "http://127.0.0.1:8000/v1", model: str | None = None,
    api_key_env: str = "OPENAI_API_KEY", mode: str = "probability",
    question: str = "Does this image show {prompt}? Answer Yes or No.",
    max_parallel: int = 8, timeout: float = 60.0, time_limit: float = 300.0,
    backoff: float = 1.0, top_logprobs: int = 20) -> RewardFn:
  """Makes a reward that asks a vision-language model about the image.

  In mode "probability" it is P(yes) / (P(yes) + P(no)), 0 to 1, over the most likely first
  tokens of the answer to `question` (VQAScore, arXiv:2404.01291); the info has P(yes) +
  P(no) as `answer_probability`, [B] float32: if that is small, the model answers otherwise.
  In mode "strict" it is 1 if the model's answer to each question of the prompt's metadata
  has the right one in it, else 0: as a word in any case, singular or plural, numbers in
  words or digits. The info has the `answers`, [B][questions].

  Images are sent as PNG files. The client is the `openai` package.

  Args:
    url: of the server, up to and including "/v1".
    model: its name there; the first that the server lists if not given.
    api_key_env: the name of an environment variable that holds the key, if one is needed.
    mode: "probability" or "strict".
    question: for mode "probability", with "{prompt}" in it.
    max_parallel: requests under way at once; one request is one question on one image.
    timeout: seconds for one attempt.
    time_limit: seconds for one request with all its attempts.
    backoff: seconds before the second attempt; doubles, with some randomness, up to 30.
    top_logprobs: how many tokens to look for yes and no in; servers allow 20 or fewer.

  Raises:
    UserError: if an argument is not right, the client is not installed, or the server
      cannot be reached. The reward raises it in mode "strict" for metadata without
      questions, and RewardError if the server fails.
  """
  if mode not in _MODES:
    raise UserError(f"reward_kwargs.mode={mode!r} must be one of {', '.join(_MODES)}")
  if "{prompt}" not in question:
    raise UserError(f"reward_kwargs.question={question!r} must have {{prompt}} in it")
  check_count("top_logprobs", top_logprobs)
  server = remote.Server(_NAME, url,
                         remote.Limits(timeout, time_limit, backoff, max_parallel))
  client = _Client(server, _read_key(api_key_env) or _NO_KEY)
  model = client.find_model(model, api_key_env)

  if mode == "probability":
    return _make_probability(server, client, model, question, top_logprobs)
  return _make_strict(server, client, model)


def _read_key(variable: str) -> str:
  """The API key in an environment variable, or "".

  Raises:
    UserError: if an HTTP header cannot hold it, without showing it.
  """
  key = os.environ.get(variable, "").strip()  # files of secrets end in a newline
  if not (key.isascii() and key.isprintable()):
    raise UserError(f"reward_kwargs.api_key_env={variable!r}: the key in it has characters that "
                    "no key has; must be printable ASCII")
  return key


def _make_probability(server: remote.Server, client: _Client, model: str, question: str,
                      top_logprobs: int) -> RewardFn:

  def probability(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
                  ) -> tuple[np.ndarray, dict[str, Any]]:
    del metadata

    def ask(i: int, timeout: float) -> tuple[float, float]:
      choice = client.ask(model, images[i], question.replace("{prompt}", prompts[i]),
                          timeout, max_tokens=1, logprobs=True, top_logprobs=top_logprobs)
      return yes_probability(choice)

    scores, masses = np.array(server.map(ask, range(len(images))), np.float32).T
    return scores, {"answer_probability": masses}

  return probability


def _make_strict(server: remote.Server, client: _Client, model: str) -> RewardFn:

  @checks_metadata(functools.partial(questions_and_answers, _NAME))
  def strict(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
             ) -> tuple[np.ndarray, dict[str, Any]]:
    del prompts
    pairs = questions_and_answers(_NAME, metadata)
    items = [(i, text) for i, (questions, _) in enumerate(pairs) for text in questions]

    def ask(item: tuple[int, str], timeout: float) -> str:
      i, text = item
      choice = client.ask(model, images[i], text, timeout, max_tokens=_ANSWER_TOKENS)
      return _get(choice, str, "message", "content")

    replies = iter(server.map(ask, items))
    outputs = [[next(replies) for _ in questions] for questions, _ in pairs]
    scores = [all(map(has_answer, given, answers))
              for given, (_, answers) in zip(outputs, pairs)]
    return np.array(scores, np.float32), {"answers": outputs}

  return strict


def yes_probability(choice: dict[str, Any]) -> tuple[float, float]:
  """P(yes) / (P(yes) + P(no)) and P(yes) + P(no), for the answer's first token.

  Args:
    choice: of a chat completion, with log-probabilities.

  Raises:
    ReplyError: if it has none, or neither yes nor no is among the likely tokens.
  """
  if not isinstance(choice.get("logprobs"), dict):
    raise remote.ReplyError("it has no log-probabilities; must be a server and model that "
                            "give them (logprobs, top_logprobs), or mode='strict'")
  probabilities = {"yes": 0.0, "no": 0.0}
  seen = []
  for entry in _get(choice, list, "logprobs", "content", 0, "top_logprobs"):
    token, logprob = _get(entry, str, "token"), _get(entry, (int, float), "logprob")
    if not logprob < 0.01:  # NaN too; rounding may end a little above 0
      raise remote.ReplyError("it has a log-probability that is not a number of 0 or less; "
                              "must have those of the tokens")
    seen.append(token)
    word = token.strip().lower()
    if word in probabilities:
      probabilities[word] += math.exp(max(logprob, _LOWEST_LOGPROB))
  total = sum(probabilities.values())
  if not total:
    raise remote.ReplyError(f"its likely first tokens are {seen[:20]}; must have a yes or a "
                            "no among them: ask another question, or another model")
  return probabilities["yes"] / total, total


def has_answer(reply: str, answer: str) -> bool:
  """Whether `answer` is in `reply` as a word, singular or plural, whatever the case.

  Numbers from 0 to 99 in digits count as words too.
  """
  # No larger ones: the two threads that score share inflect, which keeps the place of the
  # digits in itself.
  in_words = lambda text: re.sub(r"\b[0-9]{1,2}\b", lambda m: english.number(m[0]), text)
  answers = {answer, in_words(answer)}
  forms = "|".join(re.escape(form) for each in answers for form in (each, english.plural(each)))
  return any(re.search(rf"(?<!\w)(?:{forms})(?!\w)", text, re.IGNORECASE)
             for text in (reply, in_words(reply)))


class _Client:
  """The openai client, with the limits and errors of the other servers' rewards."""

  def __init__(self, server: remote.Server, api_key: str):
    try:
      import openai  # an extra
    except ImportError:
      raise UserError(f"reward_fn={_NAME!r} needs the openai client, which is not installed: "
                      "pip install -e '.[vlm]'") from None
    self._openai = openai
    self._server = server
    self._api_key = api_key
    self._client = openai.OpenAI(
        base_url=server.url, api_key=api_key, max_retries=0,
        http_client=openai.DefaultHttpxClient(
            trust_env=not remote.is_loopback(server.url), follow_redirects=False,
            event_hooks={"response": [self._check_status]}))

  def find_model(self, model: str | None, api_key_env: str) -> str:
    """Makes sure that the server answers; returns `model`, or the first that it lists.

    Raises:
      UserError: if it does not answer, wants another key, or lists no model and none is
        given.
    """
    try:
      reply = self._request(self._client.models.with_streaming_response.list,
                            self._server.check_timeout)
      return model or _get(reply, str, "data", 0, "id")
    except remote.AttemptError as error:
      if error.status in (401, 403):
        raise UserError(f"reward_fn={_NAME!r}, reward_kwargs.api_key_env={api_key_env!r}: "
                        f"{redacted(self._server.url)} refused the key; must be the name of an "
                        "environment variable that holds one") from error
      if error.status is None and isinstance(error, remote.TransientError):
        raise self._server.unreachable(error) from error
      if model is None:
        raise UserError(
            f"reward_fn={_NAME!r}, reward_kwargs.model=None: {redacted(self._server.url)} did not "
            f"list its models ({error}); must be the name of one; or reward_kwargs.url must end "
            "in /v1") from error
      return model

  def ask(self, model: str, image: np.ndarray, text: str, timeout: float, **options: Any
          ) -> dict[str, Any]:
    """One chat completion's first choice.

    Args:
      model: its name on the server.
      image: [H, W, 3] uint8.
      text: what to ask about it.
      timeout: seconds.
      **options: of the request.

    Raises:
      TransientError, ReplyError: as for `remote.post`, and if the reply has no choice.
    """
    data = base64.b64encode(encode_image(image, "PNG")).decode()
    content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
               {"type": "text", "text": text}]
    reply = self._request(self._client.chat.completions.with_streaming_response.create,
                          timeout, model=model, temperature=0,
                          messages=[{"role": "user", "content": content}], **options)
    return _get(reply, dict, "choices", 0)

  def _request(self, method: Callable[..., Any], timeout: float, **arguments: Any) -> Any:
    """Calls a method of the client that streams its response; returns the parsed JSON."""
    deadline = time.monotonic() + timeout
    try:
      with method(timeout=timeout, **arguments) as response:
        body = remote.read_reply(response.iter_bytes(), deadline)
    except remote.AttemptError:
      raise
    except self._openai.APITimeoutError:
      raise remote.timed_out(timeout) from None
    except self._openai.APIConnectionError as error:
      if isinstance(error.__cause__, remote.AttemptError):  # of the hook below
        raise error.__cause__ from None
      raise remote.broken(error) from error
    except Exception as error:
      # While it streams, the client lets errors of its HTTP library through.
      if type(error).__module__.partition(".")[0] not in _HTTP_LIBRARIES:
        raise
      raise remote.broken(error) from error
    try:
      return json.loads(body)
    except (ValueError, RecursionError):
      raise remote.ReplyError("it is not JSON; must be from an OpenAI-compatible "
                              "server") from None

  def _check_status(self, response: Any) -> None:
    """Called with each response before its body is read: the client would read it without end."""
    if response.is_success:
      return
    timeout = response.request.extensions["timeout"]["read"]
    try:
      body = remote.read_reply(response.iter_bytes(), time.monotonic() + timeout)
    except Exception:  # the status says more than why the rest did not come
      body = b""
    text = body.decode(errors="replace")
    if self._api_key != _NO_KEY:  # servers have been seen to quote the key that they refuse
      text = text.replace(self._api_key, "***")
    raise remote.status_error(response.status_code, response.headers.get("Retry-After"), text)


def _get(value: Any, kind: type | tuple[type, ...], *path: str | int) -> Any:
  """The entry of nested JSON at `path`, made sure to be of a kind."""
  for step in path:
    try:
      value = value[step]
    except (KeyError, IndexError, TypeError):
      value = None
  if not isinstance(value, kind) or isinstance(value, bool):
    name = "number" if isinstance(kind, tuple) else kind.__name__
    raise remote.ReplyError(f"its {'.'.join(map(str, path))} is missing or not a {name}; must "
                            "be as in an OpenAI-compatible server's")
  return value
