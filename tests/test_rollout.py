"""Rewards in threads: what ends an epoch ends it soon, whatever is still to be scored."""

import threading

import pytest
from tqdm import tqdm

from ddpo_jax import rollout
from ddpo_jax.errors import Interrupted


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
