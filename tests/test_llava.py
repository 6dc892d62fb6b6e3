"""LLaVA rewards against a server that speaks the protocol, well and badly."""

import concurrent.futures
import io
import os
import pickle
import re
import time

import numpy as np
from PIL import Image
import pytest
import servers

from ddpo_jax.errors import UserError
from ddpo_jax.rewards import llava, remote

QUESTIONS = ["How many cats are there in this image?", "What animal is in this image?"]
FAST = {"timeout": 10.0, "time_limit": 20.0, "backoff": 0.01}
COUNTS = [2, 5, 1, 0, 3, 4, 2, 5, 1, 3]
PROMPTS = ["cat" * (i + 1) for i in range(len(COUNTS))]
NOTHING = [{}] * len(COUNTS)
# What the server computes from the image and "The image contains {prompt}".
RECALL = np.float32([n / 8 - (19 + len(p)) / 1000 for n, p in zip(COUNTS, PROMPTS)])


@pytest.fixture
def server():
  with servers.serve(servers.llava) as server:
    yield server


def asked(counts, noun="cat"):
  return [{"questions": QUESTIONS, "answers": [servers.NUMBERS[n], noun]} for n in counts]


def sent(server):
  return [pickle.loads(body) for _, _, body in server.requests]


def bertscore(server, **kwargs):
  """The reward of three images in one request, which is right unless it raises."""
  reward_fn = llava.make_llava_bertscore(url=server.url, **{**FAST, **kwargs})
  rewards, _ = reward_fn(servers.grey_images(COUNTS[:3]), PROMPTS[:3], NOTHING[:3])
  np.testing.assert_allclose(rewards, RECALL[:3], rtol=1e-6)


def test_strict_satisfaction(server):
  reward_fn = llava.make_llava_strict_satisfaction(url=server.url, **FAST)
  metadata = asked(COUNTS)
  metadata[1], metadata[4] = asked([4])[0], asked([3], "dog")[0]  # half right
  rewards, info = reward_fn(servers.grey_images(COUNTS), PROMPTS, metadata)
  assert rewards.tolist() == [1, 0.5, 1, 1, 0.5, 1, 1, 1, 1, 1]
  assert rewards.dtype == np.float32
  assert info["answers"] == [[f"There are {servers.NUMBERS[n]}.", "I see a cat."]
                             for n in COUNTS]


def test_all_or_nothing(server):
  reward_fn = llava.make_llava_strict_satisfaction(url=server.url, all_or_nothing=True,
                                                   **FAST)
  metadata = asked([2, 4]) + asked([0], "dog")
  rewards, _ = reward_fn(servers.grey_images([2, 5, 1]), PROMPTS[:3], metadata)
  assert rewards.tolist() == [1, 0, 0]


def test_bertscore(server):
  reward_fn = llava.make_llava_bertscore(url=server.url, batch_size=3, **FAST)
  rewards, info = reward_fn(servers.grey_images(COUNTS), PROMPTS, NOTHING)
  np.testing.assert_allclose(rewards, RECALL, rtol=1e-6)
  np.testing.assert_allclose(info["precision"], RECALL / 2, rtol=1e-6)
  np.testing.assert_allclose(info["f1"], RECALL / 2, rtol=1e-6)
  assert info["outputs"] == [f"There are {servers.NUMBERS[n]}." for n in COUNTS]
  assert rewards.dtype == info["f1"].dtype == np.float32


def test_requests_are_the_references(server):
  """Batches of 4 and 16 of even size; JPEG files of quality 80; the same keys and texts."""
  images = np.random.default_rng(0).integers(0, 100, (10, 16, 16, 3), np.uint8)
  strict = llava.make_llava_strict_satisfaction(url=server.url, max_parallel=1, **FAST)
  strict(images, PROMPTS, asked(COUNTS))
  assert [len(request["images"]) for request in sent(server)] == [4, 3, 3]
  assert all(request.keys() == {"images", "queries"} for request in sent(server))
  assert sent(server)[0]["queries"] == [QUESTIONS] * 4

  server.requests.clear()
  llava.make_llava_bertscore(url=server.url, **FAST)(images, PROMPTS, NOTHING)
  (request,) = sent(server)
  assert request["queries"] == [["Answer concisely: what is going on in this image?"]] * 10
  assert request["answers"] == [[f"The image contains {prompt}"] for prompt in PROMPTS]
  # Replies are read as they come: a pickle, not a compressed one.
  assert all(headers["Accept-Encoding"] == "identity" for _, headers, _ in server.requests)
  for image, data in zip(images, request["images"]):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=80)
    assert data == buffer.getvalue()


def test_order_and_parallel_requests_from_two_threads(server):
  """The server answers early images late; `max_parallel` holds for both callers together."""
  reward_fn = llava.make_llava_bertscore(url=server.url, batch_size=1, max_parallel=3, **FAST)
  images = servers.grey_images(COUNTS)
  server.wait_for = 3
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    calls = [pool.submit(reward_fn, images, PROMPTS, NOTHING) for _ in range(2)]
    for call in calls:
      np.testing.assert_allclose(call.result()[0], RECALL, rtol=1e-6)
  assert server.most_at_once == 3


def test_proxies_are_not_asked_for_this_machine(server, monkeypatch):
  for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
    monkeypatch.setenv(name, servers.closed_url())
  bertscore(server)


TRANSIENT = {"500": servers.status(500, b"Traceback\nRuntimeError: CUDA out of memory"),
             "503": servers.status(503), "429": servers.status(429), "drop": servers.drop,
             "hang": servers.hang, "truncate": servers.truncate, "trickle": servers.trickle}
SAID = {"500": r"HTTP status 500 \(Traceback RuntimeError: CUDA out of memory\)",
        "503": "HTTP status 503", "429": "HTTP status 429", "drop": "RemoteDisconnected",
        "hang": "no reply within", "truncate": "IncompleteRead", "trickle": "did not end in time"}


@pytest.mark.parametrize("fault", TRANSIENT)
def test_transient_faults_are_tried_again(server, fault):
  server.faults = [TRANSIENT[fault]] * 2
  bertscore(server, timeout=0.6 if fault in ("hang", "trickle") else 10.0)
  assert len(server.requests) == 3


@pytest.mark.parametrize("fault", TRANSIENT)
def test_lasting_faults_end_at_the_time_limit(server, fault):
  server.always = TRANSIENT[fault]
  start = time.monotonic()
  with pytest.raises(remote.RewardError, match=SAID[fault]) as error:
    bertscore(server, timeout=0.15 if fault in ("hang", "trickle") else 10.0, time_limit=0.5)
  assert time.monotonic() - start < 5
  for part in ("'llava_bertscore'", server.url, "time_limit=0.5"):
    assert part in str(error.value)
  # The last attempt may be too short for its request to arrive.
  attempts = int(re.search(r"attempts: (\d+)", str(error.value))[1])
  assert attempts > 1 and len(server.requests) in (attempts - 1, attempts)
  assert "\n" not in str(error.value)


def test_a_server_that_goes_away(server):
  reward_fn = llava.make_llava_bertscore(url=server.url, **{**FAST, "time_limit": 0.3})
  server.shutdown()
  server.server_close()
  with pytest.raises(remote.RewardError, match="Connection refused"):
    reward_fn(servers.grey_images([1]), ["cat"], [{}])


def test_a_server_that_asks_to_wait(server):
  server.faults = [servers.status(429, Retry_After="1")]
  start = time.monotonic()
  bertscore(server)
  assert time.monotonic() - start >= 1
  server.faults = [servers.status(429, Retry_After="60")]
  with pytest.raises(remote.RewardError, match="attempts: 1"):  # not waited for in vain
    bertscore(server)


def test_an_attempt_cut_short_does_not_hide_the_cause(server):
  server.faults, server.always = [servers.status(500)], servers.hang
  with pytest.raises(remote.RewardError, match="attempts: 2.*failure: HTTP status 500"):
    bertscore(server, time_limit=0.8)  # of the second attempt, not the 10 s of its timeout


def test_pauses_double_up_to_a_bound():
  longest = [max(remote.backoff_pause(0.5, tried) for _ in range(300))
             for tried in (1, 2, 3, 5, 50, 5000)]
  np.testing.assert_allclose(longest, [0.5, 1, 2, 8, 30, 30], rtol=0.05)
  assert min(remote.backoff_pause(0.5, 1) for _ in range(300)) >= 0.25


GOOD = {"outputs": [["a"]] * 3, "precision": [[0.5]] * 3, "recall": [[0.5]] * 3,
        "f1": [[0.5]] * 3}


def fixed(**changes):
  return servers.body(pickle.dumps({**GOOD, **changes}))


class Persistent(pickle.Pickler):
  def persistent_id(self, value):
    return "id" if value == GOOD else None


def persistent():
  buffer = io.BytesIO()
  Persistent(buffer).dump([GOOD])
  return buffer.getvalue()


UNUSABLE = {
    "404": (servers.status(404, b"no such page"), r"HTTP status 404 \(no such page\)"),
    "redirect": (servers.status(302, Location="/other"), "HTTP status 302"),
    "terminal": (servers.status(400, b"a\x1b[31mb"), r"\(a\?\[31mb\)"),
    "too few images": (fixed(recall=[[0.5]] * 2), "recall has 2 entries; must have 3"),
    "too many": (fixed(outputs=[["a"]] * 4), "outputs has 4 entries"),
    "no answer": (fixed(outputs=[["a"], [], ["a"]]), r"outputs\[1\] has 0 entries; must have 1"),
    "flat": (fixed(recall=[0.5] * 3), r"recall\[0\] is a float; must be a list"),
    "texts": (fixed(recall=[["0.5"]] * 3), r"recall\[0\] holds a str; must be a number"),
    "bools": (fixed(recall=[[True]] * 3), "holds a bool"),
    "none": (fixed(f1=[[None]] * 3), "holds a NoneType"),
    "nan": (fixed(recall=[[0.5], [float("nan")], [0.5]]), r"recall\[1\] is not a finite"),
    "inf": (fixed(recall=[[float("-inf")]] * 3), "not a finite number"),
    "huge": (fixed(recall=[[10**2000]] * 3), "not a finite number"),
    "numbers": (fixed(outputs=[[1]] * 3), r"outputs\[0\] holds a int; must be a string"),
    "no recall": (servers.body(pickle.dumps({"outputs": [["a"]] * 3})), "has no 'precision'"),
    "list": (servers.body(pickle.dumps([GOOD])), "it is a list; must be a dict"),
    "array": (fixed(recall=np.full((3, 1), 0.5)), r"asks for 'numpy.*\.tolist\(\) before"),
    "scalar": (fixed(recall=[[np.float32(0.5)]] * 3), r"asks for 'numpy.*\.tolist\(\) before"),
    "tuple": (fixed(recall=((0.5,),) * 3), "opcode TUPLE1, and only dicts, lists, strings"),
    "bytes": (fixed(outputs=[[b"a"]] * 3), "opcode SHORT_BINBYTES"),
    "set": (fixed(extra={1, 2}), "opcode EMPTY_SET"),
    "persistent": (servers.body(persistent()), "opcode BINPERSID"),
    "page": (servers.body(b"<html>hello</html>"), "not a whole pickle"),
    "cut": (servers.body(pickle.dumps(GOOD)[:-5]), "not a whole pickle"),
    "empty": (servers.body(b""), "not a whole pickle"),
    "no memo": (servers.body(b"\x80\x04h\x05."), "not a whole pickle"),
    "memo": (servers.body(b"\x80\x02]r\xff\xff\xff\xff."), "memo index of 4294967295"),
    "list as key": (servers.body(b"\x80\x02}]K\x01s."), "not a whole pickle"),
    "large": (servers.body(pickle.dumps("x" * 9 * 2**20)), "more than 8388608 bytes"),
    "endless": (servers.endless, "more than 8388608 bytes"),
}


@pytest.mark.parametrize("fault", UNUSABLE)
def test_unusable_replies_are_not_asked_for_again(server, fault):
  server.always, message = UNUSABLE[fault]
  with pytest.raises(remote.RewardError, match=message) as error:
    bertscore(server)
  assert len(server.requests) == 1
  assert "'llava_bertscore'" in str(error.value) and server.url in str(error.value)
  assert "\n" not in str(error.value) and len(str(error.value)) < 600


class Hostile:
  """Runs a command when it is unpickled."""

  def __init__(self, marker):
    self.marker = marker

  def __reduce__(self):
    return os.system, (f"touch {self.marker}",)


def hostile_pickles(marker):
  for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    yield f"protocol {protocol}", pickle.dumps(Hostile(marker), protocol)
    yield f"hidden {protocol}", pickle.dumps({**GOOD, "x": [Hostile(marker)]}, protocol)
  command = f"touch {marker}".encode()
  yield "INST", b"(S'" + command + b"'\nios\nsystem\n."
  yield "OBJ", b"(cos\nsystem\nS'" + command + b"'\no."
  yield "after its end", pickle.dumps(GOOD) + pickle.dumps(Hostile(marker))


@pytest.mark.parametrize("which", [name for name, _ in hostile_pickles("x")])
def test_hostile_pickles_run_nothing(server, tmp_path, which):
  marker = tmp_path / "marker"
  data = dict(hostile_pickles(marker))[which]
  server.always = servers.body(data)
  if which == "after its end":  # never looked at
    reward_fn = llava.make_llava_bertscore(url=server.url, **FAST)
    assert reward_fn(servers.grey_images([1] * 3), PROMPTS[:3], NOTHING)[0].tolist() == [0.5] * 3
  else:
    with pytest.raises(remote.RewardError, match="asks for '.*system'|opcode (INST|STRING)"):
      bertscore(server)
    assert len(server.requests) == 1 and not marker.exists()
    pickle.loads(data)  # what it would have done
    assert marker.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_of_any_protocol_are_read(protocol):
  shared = ["one", "é\n☃"]
  value = {"outputs": [shared, shared], "n": [0, 1, -1, 300, 70000, 2**40, 0.1, True, None],
           "": {}, "long": ["x" * 300]}
  assert llava.read_reply(pickle.dumps(value, protocol)) == value


def test_one_failure_gives_up_the_other_requests_at_once(server):
  """The second of five requests is refused; the others hang."""
  reward_fn = llava.make_llava_bertscore(url=server.url, batch_size=2, **FAST)
  server.faults, server.always = [servers.hang, servers.status(403)], servers.hang
  start = time.monotonic()
  with pytest.raises(remote.RewardError, match="HTTP status 403"):
    reward_fn(servers.grey_images(COUNTS), PROMPTS, NOTHING)
  assert time.monotonic() - start < 5


def test_one_failure_ends_the_attempts_of_all(server):
  """The first of five requests does not come back, and of those that wait one may have begun."""
  reward_fn = llava.make_llava_bertscore(url=server.url, batch_size=2, max_parallel=2,
                                         **{**FAST, "backoff": 0.3})
  server.faults = [servers.status(500), servers.status(403)]
  server.always = servers.hang
  with pytest.raises(remote.RewardError, match="HTTP status 403"):
    reward_fn(servers.grey_images(COUNTS), PROMPTS, NOTHING)
  time.sleep(0.5)
  assert len(server.requests) in (2, 3)


@pytest.mark.parametrize("make", [llava.make_llava_bertscore,
                                  llava.make_llava_strict_satisfaction])
def test_unreachable_servers_are_said_so_at_once(make):
  url = servers.closed_url()
  with pytest.raises(UserError, match="cannot be reached.*Connection refused") as error:
    make(url=url)
  assert f"reward_kwargs.url='{url}'" in str(error.value)
  with servers.serve(servers.llava) as server:
    server.on_get = servers.hang
    with pytest.raises(UserError, match="cannot be reached.*no answer within 0.2 s"):
      make(url=server.url, timeout=0.2)
    server.on_get = servers.drop
    with pytest.raises(UserError, match="cannot be reached.*RemoteDisconnected"):
      make(url=server.url)


@pytest.mark.parametrize("kwargs", [
    {"url": "127.0.0.1:8085"}, {"url": "ftp://host"}, {"url": "http://"}, {"url": 8085},
    {"url": "http://host:port"}, {"batch_size": 0}, {"batch_size": 2.0}, {"max_parallel": 0},
    {"timeout": 0}, {"timeout": "60"}, {"time_limit": -1.0}, {"time_limit": float("nan")},
    {"backoff": float("inf")}, {"max_parallel": True}])
def test_arguments_are_checked(kwargs):
  (name,) = kwargs
  with pytest.raises(UserError, match=f"reward_kwargs.{name}="):
    llava.make_llava_bertscore(**kwargs)


@pytest.mark.parametrize("wrong", [
    {}, {"questions": QUESTIONS}, {"answers": ["one", "cat"]},
    {"questions": QUESTIONS, "answers": ["one"]}, {"questions": [], "answers": []},
    {"questions": "How many?", "answers": "one"}, {"questions": [1], "answers": ["one"]},
    {"questions": ["How many?"], "answers": [""]}])
def test_metadata_without_questions(server, wrong):
  reward_fn = llava.make_llava_strict_satisfaction(url=server.url, **FAST)
  with pytest.raises(UserError, match="sample 1; must have questions.*'counting'"):
    reward_fn(servers.grey_images([1, 2]), PROMPTS[:2], [asked([1])[0], wrong])
  assert not server.requests


def test_different_numbers_of_questions(server):
  reward_fn = llava.make_llava_strict_satisfaction(url=server.url, **FAST)
  other = {"questions": QUESTIONS[:1], "answers": ["two"]}
  with pytest.raises(UserError, match=r"\[1, 2\] questions"):
    reward_fn(servers.grey_images([1, 2]), PROMPTS[:2], [asked([1])[0], other])
