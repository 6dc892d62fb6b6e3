"""vlm_score against an OpenAI-compatible server, well and badly behaved."""

import base64
import concurrent.futures
import functools
import io
import json
import math
import re
import sys
import time

import numpy as np
from PIL import Image
import pytest
import servers

from ddpo_jax.errors import UserError
from ddpo_jax.rewards import remote
from ddpo_jax.rewards.vlm import has_answer, make_vlm_score, yes_probability

FAST = {"timeout": 10.0, "time_limit": 20.0, "backoff": 0.01}
COUNTS = [2, 5, 1, 0, 3, 4, 2, 5, 1, 3]
PROMPTS = [f"{n} {{red}} cats" for n in COUNTS]
NOTHING = [{}] * len(COUNTS)
# Of the server: P(yes) = 0.09 n, P(no) = 0.9 - P(yes).
SCORES = np.float32(COUNTS) / 10
KEY = "sk-very-secret"


@pytest.fixture
def server(monkeypatch):
  monkeypatch.delenv("OPENAI_API_KEY", raising=False)
  with servers.serve(servers.openai) as server:
    server.on_get = servers.list_models
    yield server


def make(server, **kwargs):
  return make_vlm_score(url=f"{server.url}/v1", **{**FAST, **kwargs})


def score(server, **kwargs):
  """The reward of one image, which is right unless it raises."""
  rewards, _ = make(server, **kwargs)(servers.grey_images([3]), ["cat"], [{}])
  np.testing.assert_allclose(rewards, [0.3], atol=1e-6)


def sent(server):
  return [json.loads(body) for _, _, body in server.requests]


def test_probability_of_yes(server):
  rewards, info = make(server)(servers.grey_images(COUNTS), PROMPTS, NOTHING)
  np.testing.assert_allclose(rewards, SCORES, atol=1e-6)
  np.testing.assert_allclose(info["answer_probability"], 0.9, rtol=1e-6)
  assert rewards.dtype == info["answer_probability"].dtype == np.float32


def test_the_request(server):
  rng = np.random.default_rng(0)
  make(server, max_parallel=1, top_logprobs=7)(
      rng.integers(0, 100, (2, 16, 8, 3), np.uint8), PROMPTS[:2], NOTHING[:2])
  request = sent(server)[1]
  (message,) = request.pop("messages")
  assert request == {"model": "vlm", "max_tokens": 1, "temperature": 0, "logprobs": True,
                     "top_logprobs": 7}
  picture, text = message["content"]
  assert message["role"] == "user" and picture["type"] == "image_url"
  assert text == {"type": "text", "text":
                  "Does this image show 5 {red} cats? Answer Yes or No."}
  assert server.gets == ["/v1/models"]
  assert server.requests[0][1]["Authorization"] == "Bearer none"


def test_images_arrive_as_they_are(server):
  images = np.random.default_rng(0).integers(0, 100, (1, 16, 8, 3), np.uint8)
  make(server)(images, PROMPTS[:1], NOTHING[:1])
  url = sent(server)[0]["messages"][0]["content"][0]["image_url"]["url"]
  with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
    np.testing.assert_array_equal(np.asarray(image), images[0])


def test_own_question_model_and_key(server, monkeypatch):
  monkeypatch.setenv("MY_KEY", KEY)
  score(server, question="{prompt}: yes or no? {prompt}!", model="other", api_key_env="MY_KEY")
  assert sent(server)[0]["model"] == "other"
  assert sent(server)[0]["messages"][0]["content"][1]["text"] == "cat: yes or no? cat!"
  assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"


def test_proxies_are_not_asked_for_this_machine(server, monkeypatch):
  for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
    monkeypatch.setenv(name, servers.closed_url())
  score(server)


def test_strict(server):
  """The server counts in digits and says "Cats.": as right as "three" and "cat"."""
  questions = ["How many cats are there in this image?", "What animal is in this image?"]
  asked = lambda *answers: {"questions": questions[:len(answers)], "answers": list(answers)}
  metadata = [asked("two", "cat"), asked("four", "cat"), asked("one"), asked("zero", "cats"),
              asked("three", "dog"), asked("4", "CAT")]
  rewards, info = make(server, mode="strict")(servers.grey_images(COUNTS[:6]), PROMPTS[:6],
                                              metadata)
  assert rewards.tolist() == [1, 0, 1, 1, 0, 1] and rewards.dtype == np.float32
  assert info["answers"][:3] == [["I count 2.", "Cats."], ["I count 5.", "Cats."],
                                 ["I count 1."]]
  assert all("logprobs" not in request and request["max_tokens"] > 1
             for request in sent(server))
  with pytest.raises(UserError, match="sample 0; must have questions.*'counting'"):
    make(server, mode="strict")(servers.grey_images([1]), PROMPTS[:1], [{}])


@pytest.mark.parametrize("reply,answer,found", [
    ("Three.", "three", True), ("There are 3 cats", "three", True), ("13 cats", "three", False),
    ("Twenty-three? No: thirty", "three", True), ("thirteen", "three", False),
    ("A cat", "cat", True), ("cats", "cat", True), ("a category", "cat", False),
    ("Two wolves!", "wolf", True), ("concatenate", "cat", False), ("", "cat", False),
    ("a polar\nbear", "polar bear", False), ("Polar bears", "polar bear", True),
    ("C++ (code)", "c++", True), ("2026", "twenty", False), ("2026", "six", False),
    ("٣", "three", False), ("three", "3", True), ("There is one cat.", "1", True),
    ("13", "3", False)])
def test_answers_are_words(reply, answer, found):
  assert has_answer(reply, answer) == found


def choice_of(tokens):
  return json.loads(servers.completion("x", tokens))["choices"][0]


def test_yes_and_no_are_summed_over_their_spellings():
  """(0.3 + 0.1 + 0.05) / (0.3 + 0.1 + 0.05 + 0.2 + 0.1) = 0.6"""
  score, mass = yes_probability(choice_of(
      {"Yes": 0.3, " yes": 0.1, "YES\n": 0.05, "No": 0.2, " no": 0.1, "Not": 0.2, "": 0.05}))
  assert math.isclose(score, 0.6) and math.isclose(mass, 0.75)
  assert yes_probability(choice_of({"Yes": 0.5}))[0] == 1.0
  assert yes_probability(choice_of({"no": 0.5, "N": 0.1}))[0] == 0.0


@pytest.mark.parametrize("lowest", ["-Infinity", "-9999.0", "-3.4e38", "-1" + "0" * 400])
def test_impossible_tokens_have_no_probability(lowest):
  choice = choice_of({"Yes": 0.5, "No": 0.25})
  text = json.dumps(choice).replace(str(math.log(0.25)), lowest)
  assert yes_probability(json.loads(text)) == (1.0, pytest.approx(0.5))


def test_order_and_parallel_requests_from_two_threads(server):
  """The server answers early images late; `max_parallel` holds for both callers together."""
  reward_fn = make(server, max_parallel=3)
  images = servers.grey_images(COUNTS)
  server.wait_for = 3
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    calls = [pool.submit(reward_fn, images, PROMPTS, NOTHING) for _ in range(2)]
    for call in calls:
      np.testing.assert_allclose(call.result()[0], SCORES, atol=1e-6)
  assert server.most_at_once == 3


def truncated_error(handler):
  handler.reply(500, b"half", Content_Length="8")
  handler.close_connection = True


TRANSIENT = {"500": servers.status(500, b'{"error": {"message": "out of memory"}}'),
             "503": servers.status(503), "429": servers.status(429), "drop": servers.drop,
             "hang": servers.hang, "truncate": servers.truncate, "trickle": servers.trickle,
             "truncated 500": truncated_error,
             "trickling 500": functools.partial(servers.trickle, code=500),
             "endless 500": functools.partial(servers.endless, code=500)}
SAID = {"500": "HTTP status 500.*out of memory", "503": "HTTP status 503",
        "429": "HTTP status 429", "drop": "RemoteProtocolError", "hang": "no reply within",
        "truncate": "RemoteProtocolError", "trickle": "did not end in time",
        "truncated 500": "HTTP status 500",
        "trickling 500": "HTTP status 500", "endless 500": "HTTP status 500"}


SLOW = ("hang", "trickle", "trickling 500")


@pytest.mark.parametrize("fault", TRANSIENT)
def test_transient_faults_are_tried_again(server, fault):
  server.faults = [TRANSIENT[fault]] * 2
  score(server, timeout=0.6 if fault in SLOW else 10.0)
  assert len(server.requests) == 3


@pytest.mark.parametrize("fault", TRANSIENT)
def test_lasting_faults_end_at_the_time_limit(server, fault):
  server.always = TRANSIENT[fault]
  start = time.monotonic()
  with pytest.raises(remote.RewardError, match=SAID[fault]) as error:
    score(server, timeout=0.15 if fault in SLOW else 10.0, time_limit=0.5)
  assert time.monotonic() - start < 5
  for part in ("'vlm_score'", server.url, "time_limit=0.5"):
    assert part in str(error.value)
  # The last attempt may be too short for its request to arrive.
  attempts = int(re.search(r"attempts: (\d+)", str(error.value))[1])
  assert attempts > 1 and len(server.requests) in (attempts - 1, attempts)
  assert "\n" not in str(error.value)


def chat(*choices):
  return servers.body(json.dumps({"choices": choices}).encode())


def logprobs(content):
  return chat({"logprobs": content, "message": {"role": "assistant", "content": "Yes"}})


def top(*entries):
  return logprobs({"content": [{"token": "x", "logprob": 0.0, "top_logprobs": entries}]})


UNUSABLE = {
    "404": (servers.status(404, b'{"detail": "no model x"}'), "HTTP status 404.*no model x"),
    "302": (servers.status(302, Location="http://127.0.0.1:9/"), "HTTP status 302"),
    "not json": (servers.body(b"<html>"), "it is not JSON"),
    "cut": (servers.body(servers.completion("Yes", {"Yes": 1.0})[:-9]), "it is not JSON"),
    "not text": (servers.body(b"\xff\xfe\x00"), "it is not JSON"),
    "deep": (servers.body(b"[" * 100_000), "it is not JSON"),
    "empty": (servers.body(b""), "it is not JSON"),
    "list": (servers.body(b"[]"), "choices.0 is missing"),
    "null": (servers.body(b"null"), "choices.0 is missing"),
    "no choice": (chat(), "choices.0 is missing"),
    "text as choice": (chat("Yes"), "choices.0 is missing or not a dict"),
    "no logprobs": (servers.body(servers.completion("Yes", None)), "has no log-probabilities"),
    "no content": (logprobs({"content": None}), "logprobs.content.0.top_logprobs is missing"),
    "no tokens": (logprobs({"content": []}), "logprobs.content.0.top_logprobs is missing"),
    "no top": (top(), r"first tokens are \[\]; must have a yes"),
    "text as top": (logprobs({"content": [{"top_logprobs": "Yes"}]}), "not a list"),
    "neither": (top({"token": "<think>", "logprob": -0.1}, {"token": "Maybe", "logprob": -3}),
                r"first tokens are \['<think>', 'Maybe'\]; must have a yes"),
    "token": (top({"token": 1, "logprob": -0.1}), "token is missing or not a str"),
    "bool": (top({"token": "Yes", "logprob": False}), "logprob is missing or not a number"),
    "text": (top({"token": "Yes", "logprob": "-1"}), "logprob is missing or not a number"),
    "nan": (top({"token": "Yes", "logprob": math.nan}), "not a number of 0 or less"),
    "positive": (top({"token": "Yes", "logprob": 0.5}), "not a number of 0 or less"),
    "large": (servers.body(b" " * 9 * 2**20), "more than 8388608 bytes"),
    "endless": (servers.endless, "more than 8388608 bytes"),
}


@pytest.mark.parametrize("fault", UNUSABLE)
def test_unusable_replies_are_not_asked_for_again(server, fault):
  server.always, message = UNUSABLE[fault]
  with pytest.raises(remote.RewardError, match=message) as error:
    score(server)
  assert len(server.requests) == 1
  assert "'vlm_score'" in str(error.value) and server.url in str(error.value)
  assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_an_error_of_another_kind_is_no_broken_connection(server, monkeypatch):
  reward_fn = make(server)

  def fails(chunks, deadline):
    raise ZeroDivisionError

  monkeypatch.setattr(remote, "read_reply", fails)
  with pytest.raises(ZeroDivisionError):
    reward_fn(servers.grey_images([1]), ["cat"], [{}])


def test_replies_to_questions_are_texts(server):
  server.always = chat({"message": {"content": None}})
  metadata = [{"questions": ["How many?"], "answers": ["one"]}]
  with pytest.raises(remote.RewardError, match="message.content is missing or not a str"):
    make(server, mode="strict")(servers.grey_images([1]), ["cat"], metadata)


def test_one_failure_gives_up_the_other_requests_at_once(server):
  reward_fn = make(server)
  server.faults, server.always = [servers.hang, servers.status(403)], servers.hang
  start = time.monotonic()
  with pytest.raises(remote.RewardError, match="HTTP status 403"):
    reward_fn(servers.grey_images(COUNTS), PROMPTS, NOTHING)
  assert time.monotonic() - start < 5


def test_the_key_is_never_shown(server, monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  quoting = f'{{"error": "wrong key: {KEY}"}}'.encode()
  server.always = servers.status(400, quoting)
  with pytest.raises(remote.RewardError, match=r"wrong key: \*\*\*") as error:
    score(server)
  server.on_get = servers.status(401, quoting)
  with pytest.raises(UserError, match="api_key_env='OPENAI_API_KEY'.*refused the key") as start:
    score(server, model="vlm")
  for shown in (error, start):
    while shown is not None:
      shown = getattr(shown, "value", shown)
      assert KEY not in str(shown)
      shown = shown.__cause__


@pytest.mark.parametrize("status", (401, 403))
def test_a_key_that_is_refused_is_said_at_the_start(server, status):
  server.on_get = servers.status(status)
  with pytest.raises(UserError, match="api_key_env='OPENAI_API_KEY': .* refused the key"):
    make(server, model="vlm")


@pytest.mark.parametrize("key", ("sk-secret\n", " sk-secret "))
def test_a_key_from_a_file_ends_in_a_newline(server, monkeypatch, key):
  monkeypatch.setenv("OPENAI_API_KEY", key)
  score(server)


@pytest.mark.parametrize("key", ("sk-sécret", "sk-secret\nsk-other", "sk-\x01secret"))
def test_a_key_that_is_none_is_refused_unseen(server, monkeypatch, key):
  monkeypatch.setenv("OPENAI_API_KEY", key)
  with pytest.raises(UserError, match="^reward_kwargs.api_key_env='OPENAI_API_KEY'") as error:
    score(server)
  assert "cret" not in str(error.value)


def test_unreachable_servers_are_said_so_at_once(server):
  url = f"{servers.closed_url()}/v1"
  with pytest.raises(UserError, match="cannot be reached.*Connection refused") as error:
    make_vlm_score(url=url)
  assert f"reward_kwargs.url='{url}'" in str(error.value)
  server.on_get = servers.hang
  with pytest.raises(UserError, match="cannot be reached.*no reply within 0.2 s"):
    make(server, timeout=0.2)
  server.on_get = servers.drop
  with pytest.raises(UserError, match="cannot be reached.*RemoteProtocolError"):
    make(server, model="vlm")


@pytest.mark.parametrize("listed", [
    servers.status(404), servers.status(500), servers.body(b'{"data": []}'),
    servers.body(b"hello"), servers.body(b'{"data": [{"id": 3}]}')])
def test_servers_that_list_no_model(server, listed):
  server.on_get = listed
  with pytest.raises(UserError, match="reward_kwargs.model=None.*must be the name of one"):
    make(server)
  score(server, model="vlm")


@pytest.mark.parametrize("kwargs", [
    {"url": "127.0.0.1:8000/v1"}, {"url": None}, {"mode": "exact"}, {"top_logprobs": 0},
    {"question": "Is it good?"}, {"max_parallel": 1.5}, {"timeout": -1}, {"time_limit": 0},
    {"timeout": 1e10}])
def test_arguments_are_checked(kwargs):
  (name,) = kwargs
  with pytest.raises(UserError, match=f"reward_kwargs.{name}="):
    make_vlm_score(**kwargs)


def test_without_the_client(monkeypatch):
  monkeypatch.setitem(sys.modules, "openai", None)
  with pytest.raises(UserError, match=r"pip install -e '\.\[vlm\]'"):
    make_vlm_score()
