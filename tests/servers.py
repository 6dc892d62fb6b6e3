"""HTTP servers for the rewards that ask one; they can be told to misbehave."""

from __future__ import annotations

import base64
from collections.abc import Callable
import contextlib
import http.server
import io
import json
import math
import pickle
import sys
import threading
import time

import numpy as np
from PIL import Image

NUMBERS = ("zero", "one", "two", "three", "four", "five")
LEVEL = 40  # of grey, between images that show one thing more


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers a POST with `server.answer(path, body)`, or as `server.faults` say."""

  protocol_version = "HTTP/1.1"

  def do_GET(self):
    self.server.gets.append(self.path)
    self.server.on_get(self)

  def do_POST(self):
    server = self.server
    body = self.rfile.read(int(self.headers["Content-Length"]))
    with server.lock:
      server.requests.append((self.path, self.headers, body))
      fault = server.faults.pop(0) if server.faults else server.always
      server.under_way += 1
      server.most_at_once = max(server.most_at_once, server.under_way)
    try:
      if fault:
        fault(self)
        answer = None
      else:
        while server.most_at_once < server.wait_for and not server.stopping.wait(0.01):
          pass
        answer = server.answer(self.path, body)
    except ConnectionError:  # the client has given up
      self.close_connection = True
      answer = None
    finally:  # before the answer goes out, after which the next request may be here at once
      with server.lock:
        server.under_way -= 1
    if answer is not None:
      with contextlib.suppress(ConnectionError):
        self.reply(200, answer)

  def reply(self, status: int, body: bytes, **headers: str):
    self.send_response(status)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *args):
    pass


class Server(http.server.ThreadingHTTPServer):
  """On a free port of this machine."""

  def __init__(self, answer: Callable[[str, bytes], bytes]):
    super().__init__(("127.0.0.1", 0), Handler)
    self.answer = answer
    self.on_get = lambda handler: handler.reply(405, b"POST only")
    self.faults = []  # of the next requests
    self.always = None  # the fault of all the others
    self.requests, self.gets = [], []
    self.under_way = self.most_at_once = 0
    self.wait_for = 0  # requests at once, before any is answered
    self.lock = threading.Lock()
    self.stopping = threading.Event()

  def handle_error(self, request, client_address):
    """Clients hang up on faults, as they should; anything else is shown."""
    if not isinstance(sys.exc_info()[1], ConnectionError):
      super().handle_error(request, client_address)

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def serve(answer: Callable[[str, bytes], bytes]):
  """Runs a server while the block runs."""
  server = Server(answer)
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield server
  finally:
    server.stopping.set()
    server.shutdown()
    server.server_close()
    thread.join()


def closed_url() -> str:
  """An address at which nothing listens."""
  with Server(None) as server:
    return server.url


# ---- faults ----


def status(code: int, body: bytes = b"", **headers: str):
  return lambda handler: handler.reply(code, body, **headers)


def body(content: bytes):
  return status(200, content)


def drop(handler: Handler):
  """Closes the connection without a word."""
  handler.close_connection = True


def hang(handler: Handler):
  handler.server.stopping.wait(30)
  handler.close_connection = True


def truncate(handler: Handler):
  """Closes the connection in the middle of the body."""
  handler.reply(200, b"half", Content_Length="8")
  handler.close_connection = True


def trickle(handler: Handler, code: int = 200):
  """Sends a byte at a time, each well before any timeout of one read."""
  handler.reply(code, b"", Content_Length="1000000")
  while not handler.server.stopping.wait(0.02):
    handler.wfile.write(b"x")
  handler.close_connection = True


def endless(handler: Handler, code: int = 200):
  """Sends without end, in chunks, without saying how much."""
  handler.send_response(code)
  handler.send_header("Transfer-Encoding", "chunked")
  handler.end_headers()
  while not handler.server.stopping.is_set():
    handler.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")


# ---- what they answer ----


def shown(image: Image.Image) -> int:
  """How many things an image of `grey_images` shows."""
  return round(float(np.asarray(image).mean()) / LEVEL)


def grey_images(counts: list[int], size: int = 8) -> np.ndarray:
  """Images that `shown` counts; [N, size, size, 3] uint8."""
  return np.full((len(counts), size, size, 3), LEVEL, np.uint8) * np.uint8(counts).reshape(
      -1, 1, 1, 1)


def llava(path: str, request: bytes) -> bytes:
  """As a LLaVA-server: looks at the JPEG files, and says what they show.

  The earlier an image's request would be expected back, the later it answers. Recall is
  count / 8 less a thousandth for each letter of the answer, precision its half.
  """
  data = pickle.loads(request)
  images = [Image.open(io.BytesIO(d), formats=["JPEG"]) for d in data["images"]]
  counts = [shown(image) for image in images]
  time.sleep(0.005 * (len(NUMBERS) - counts[0]))
  animal = lambda question: "I see a cat." if "animal" in question else None
  outputs = [[animal(q) or f"There are {NUMBERS[n]}." for q in queries]
             for n, queries in zip(counts, data["queries"])]
  reply = {"outputs": outputs}
  if "answers" in data:
    recall = [[n / 8 - len(a) / 1000 for a in answers]
              for n, answers in zip(counts, data["answers"])]
    half = [[r / 2 for r in row] for row in recall]
    reply |= {"recall": recall, "precision": half, "f1": half}
  return pickle.dumps(reply)


def completion(text: str, probabilities: dict[str, float] | None) -> bytes:
  """A chat completion; `probabilities` of the tokens that may stand first."""
  choice = {"index": 0, "finish_reason": "length", "logprobs": None,
            "message": {"role": "assistant", "content": text}}
  if probabilities is not None:
    top = [{"token": token, "logprob": math.log(p), "bytes": None}
           for token, p in probabilities.items()]
    choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
  return json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "vlm",
                     "choices": [choice]}).encode()


def openai(path: str, request: bytes) -> bytes:
  """As an OpenAI-compatible server, for PNG files.

  P(yes) is 0.09 times the count of what the image shows, 0.9 of that as "Yes" and 0.1 as
  " yes"; P(no) is what is missing to 0.9; the rest is "Maybe".
  """
  assert path == "/v1/chat/completions"
  data = json.loads(request)
  picture, text = data["messages"][0]["content"]
  prefix, _, encoded = picture["image_url"]["url"].partition(",")
  assert prefix == "data:image/png;base64"
  count = shown(Image.open(io.BytesIO(base64.b64decode(encoded)), formats=["PNG"]))
  time.sleep(0.005 * (len(NUMBERS) - count))
  if not data.get("logprobs"):
    return completion("Cats." if "animal" in text["text"] else f"I count {count}.", None)
  yes = 0.09 * count
  tokens = {"Maybe": 0.1, "Yes": 0.9 * yes + 1e-9, " yes": 0.1 * yes + 1e-9, "No": 0.9 - yes}
  return completion("Maybe", tokens)


def list_models(handler: Handler):
  """What an OpenAI-compatible server answers to GET."""
  handler.reply(200, json.dumps({"object": "list", "data": [
      {"id": "vlm", "object": "model", "created": 1, "owned_by": "us"}]}).encode())
