"""Rewards in threads: what ends an epoch ends it soon, whatever is still to be scored."""

import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

from ddpo_jax import rollout
from ddpo_jax.errors import Interrupted
from ddpo_jax.generation import FrozenModels, GenerateConfig, Generation
from ddpo_jax.prompts import get_prompt_fn
from ddpo_jax.types import Trajectory


@pytest.fixture
def calls():
  """Eight calls of a reward, each of which hangs until the test is over."""
  over, started = threading.Event(), []

  def call(i):
    started.append(i)
    over.wait()

  call.started = started
  yield call
  over.set()


def wait_for_all(pending, check=lambda: None):
  rollout._wait_for_all(pending, tqdm(total=len(pending), disable=True), check)


def test_all_are_waited_for():
  with rollout._reward_threads() as pool:
    pending = [pool.submit(int, i) for i in range(8)]
    wait_for_all(pending)
  assert [future.result() for future in pending] == list(range(8))


def test_a_call_that_fails_is_the_last_to_begin(calls):
  def fail():
    raise ConnectionError("the server is gone")

  with pytest.raises(ConnectionError, match="gone"), rollout._reward_threads() as pool:
    wait_for_all([pool.submit(fail), *(pool.submit(calls, i) for i in range(8))])
  assert len(calls.started) <= rollout._REWARD_THREADS


def test_a_failure_is_seen_while_others_are_sampled(calls):
  pool = rollout.futures.ThreadPoolExecutor(1)
  failed = pool.submit(lambda: 1 / 0)
  rollout.futures.wait([failed])
  with pytest.raises(ZeroDivisionError):
    rollout._raise_failures([pool.submit(calls, 0), failed])


def test_a_signal_is_heeded_while_rewards_are_waited_for(monkeypatch, calls):
  monkeypatch.setattr(rollout, "_SECONDS_BETWEEN_CHECKS", 0.01)

  def check():
    raise Interrupted(15)

  with pytest.raises(Interrupted), rollout._reward_threads() as pool:
    wait_for_all([pool.submit(calls, i) for i in range(8)], check)
  assert len(calls.started) == rollout._REWARD_THREADS


# ---- whole epochs, of a sampler that draws nothing ----


@pytest.fixture
def make_worker(tiny_sd):
  """A worker of four batches; `worker.launched` has the samples of those it has begun."""
  def make(reward, on_launch=lambda: None):
    launched = []

    def generate(params, frozen, negative_embedding, text_embeddings, indices, key):
      launched.append(np.asarray(indices).tolist())
      on_launch()
      trajectory = Trajectory(jnp.zeros((2, 3, 4, 4, 4)), jnp.zeros((2, 2)))
      return Generation(trajectory, jnp.zeros((2, 8, 8, 3), jnp.uint8))

    config = GenerateConfig(batch_size=2, num_batches=4, guidance_scale=1.0, eta=1.0,
                            samples_at_once=2, decode_batch_size=2)
    worker = rollout.RolloutWorker(
        config, tiny_sd, generate, FrozenModels(None, None), get_prompt_fn("simple_animals"),
        {"it": reward}, seed=0, mesh=jax.make_mesh(
            (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]))
    worker.launched = launched
    return worker

  return make


def brightness(images, prompts, metadata):
  return images.mean(axis=(1, 2, 3)), {}


def test_a_signal_stops_sampling_before_the_next_batch(make_worker):
  checks = iter((None, Interrupted(15)))

  def check_stop():
    if error := next(checks, None):
      raise error

  worker = make_worker(brightness)
  with pytest.raises(Interrupted):
    worker.run(None, 0, check_stop)
  assert worker.launched == [[0, 1]]


def test_a_reward_that_fails_stops_sampling(make_worker, monkeypatch):
  def fail(*_):
    raise ConnectionError("the server is gone")

  raise_failures = rollout._raise_failures
  monkeypatch.setattr(rollout, "_raise_failures", lambda pending: (
      rollout.futures.wait(pending) and raise_failures(pending)))  # by then it has failed
  worker = make_worker(fail)
  with pytest.raises(ConnectionError, match="gone"):
    worker.run(None, 0)
  assert worker.launched == [[0, 1]]


def test_waiting_for_rewards_is_not_sampling(make_worker, monkeypatch):
  """By a clock that each of four batches moves by a second, and each of their rewards by ten."""
  clock, waiting, lock = types.SimpleNamespace(seconds=0.0), threading.Event(), threading.Lock()

  def move(seconds):
    with lock:
      clock.seconds += seconds

  def score(*arguments):
    assert waiting.wait(timeout=60)
    move(10.0)
    return brightness(*arguments)

  def wait(*arguments):
    waiting.set()
    wait_for_all(*arguments)

  wait_for_all = rollout._wait_for_all
  monkeypatch.setattr(rollout, "_wait_for_all", wait)
  monkeypatch.setattr(rollout, "time", types.SimpleNamespace(perf_counter=lambda: clock.seconds))
  found = make_worker(score, on_launch=lambda: move(1.0)).run(None, 0)
  assert (found.sampling_seconds, found.reward_seconds) == (4.0, 40.0)
