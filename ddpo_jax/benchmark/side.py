"""A side of the benchmark: a process that does what it is told, and its counterpart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from ddpo_jax.errors import UserError
from ddpo_jax.files import expand_home
from ddpo_jax.messages import one_line, with_type
from ddpo_jax.model_names import TINY, TINY_FOLDER

# What a method of a side does, as it is shown while it does it.
_DOING = {
    "first_step": "starting, up to the first optimizer step",
    "describe": "starting, and looking at the device",
    "epoch": "an epoch of sampling, rewards and training",
    "memory": "how much memory was taken at most",
    "decode": "decoding images",
    "jpeg": "JPEG rewards of 256 images",
    "matmul_peak": "the speed of a large matrix product",
    "flops": "how many operations one sample takes",
    "profile": "which operations take the time of another epoch"}
EPOCH_PARTS = ("sampling", "reward", "training")  # of an epoch
_STARTED = "DDPO_JAX_BENCHMARK_STARTED"  # when a side's process was started
_FAILED = "failed"  # of an answer: why there is no other
# Stable Diffusion 1.5, as its folder says it. `attention_head_dim` is the number of heads.
STABLE_DIFFUSION_15: Mapping[str, Mapping[str, Any]] = {
    "unet": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8,
                 block_out_channels=[320, 640, 1280, 1280], layers_per_block=2),
    "vae": dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, sample_size=512,
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4),
    "text_encoder": dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12,
                         projection_dim=768, eos_token_id=2),
    "scheduler": dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                      steps_offset=1, set_alpha_to_one=False, clip_sample=False),
}


def model_configs(model: str) -> Mapping[str, Mapping[str, Any]]:
  """The config of each part: of a folder or "tiny", else Stable Diffusion 1.5's."""
  folder = TINY_FOLDER if model == TINY else expand_home(model)
  if not folder.is_dir():
    return STABLE_DIFFUSION_15
  names = {part: "config.json" for part in ("unet", "vae", "text_encoder")}
  names["scheduler"] = "scheduler_config.json"
  return {part: json.loads((folder / part / name).read_text(encoding="utf-8"))
          for part, name in names.items()}


def serve(make_side: Callable[[], Any],
          advice: contextlib.AbstractContextManager[None] | None = None) -> None:
  """Answers each line of standard input, a method's name, with its result as JSON.

  What the side raises ends it; the last answer is then what its counterpart is to say.

  Args:
    make_side: whose methods are called.
    advice: raises UserError in the place of errors that the user can do something about.
  """
  replies = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what libraries print must not get among the replies

  def reply(result: Mapping[str, Any]) -> None:
    replies.write(json.dumps(result) + "\n")
    replies.flush()

  try:
    with advice or contextlib.nullcontext():
      side = make_side()
      for line in sys.stdin:
        result = getattr(side, line.strip())()
        if line.strip() == "first_step":
          result["seconds"] = time.time() - float(os.environ[_STARTED])
        reply(result)
  except UserError as error:
    reply({_FAILED: one_line(error)})
    sys.exit(1)  # its counterpart says it
  except Exception as error:
    reply({_FAILED: with_type(error)})
    raise


def peak_rss() -> int:
  """The most memory that this process has held, in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


class Side:
  """Talks to a side's process."""

  def __init__(self, name: str, command: Sequence[str],
               environment: Mapping[str, str] | None = None):
    """Starts it, with the variables of `environment` where the user has not set them."""
    self.name = name
    self._process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**(environment or {}), **os.environ, _STARTED: str(time.time())})
    assert self._process.stdin and self._process.stdout  # both are pipes
    self._calls, self._replies = self._process.stdin, self._process.stdout

  def call(self, method: str) -> dict[str, Any]:
    """Lets the side do something.

    Raises:
      UserError: if it fails, or its process has ended.
    """
    print(f"{self.name}: {_DOING.get(method, method)}", file=sys.stderr, flush=True)
    with contextlib.suppress(BrokenPipeError):  # it may have failed, and said why
      self._calls.write(method + "\n")
      self._calls.flush()
    try:
      result = json.loads(self._replies.readline())
    except json.JSONDecodeError:
      raise UserError(f"{self.name} ended with status {self._process.wait()}; if nothing above "
                      "says why, it may have been ended for lack of memory") from None
    if _FAILED in result:
      raise UserError(f"{self.name} failed: {result[_FAILED]}")
    return result

  def close(self) -> None:
    with contextlib.suppress(BrokenPipeError):
      self._calls.close()
    self._process.wait()


def median_seconds(action: Callable[[], Any], repeats: int = 3, best: bool = False) -> float:
  """Median (or least) time of an action that has been done once before."""
  action()
  times = []
  for _ in range(repeats):
    started = time.perf_counter()
    action()
    times.append(time.perf_counter() - started)
  return min(times) if best else statistics.median(times)
