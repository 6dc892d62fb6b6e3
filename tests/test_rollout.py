"""Rewards in threads: what ends an epoch ends it soon, whatever is still to be scored."""

import io
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

from ddpo_jax import rollout
from ddpo_jax.embeddings import PromptEncoder
from ddpo_jax.errors import Interrupted
from ddpo_jax.generation import FrozenModels, GenerateConfig, Generation
from ddpo_jax.prompts import draw_prompts, get_prompt_fn
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


def test_the_bar_counts_each_call_once(monkeypatch):
  monkeypatch.setattr(rollout, "_SECONDS_BETWEEN_CHECKS", 0.01)
  seen = threading.Event()
  progress = tqdm(total=2, file=io.StringIO())
  with rollout._reward_threads() as pool:
    pending = [pool.submit(int), pool.submit(seen.wait)]
    rollout.futures.wait(pending[:1])
    rollout._wait_for_all(pending, progress, seen.set)
  assert progress.n == 2


def test_a_call_that_fails_is_the_last_to_begin(calls):
  def fail():
    raise ConnectionError("the server is gone")

  with pytest.raises(ConnectionError, match="gone"), rollout._reward_threads() as pool:
    pending = [pool.submit(fail), *(pool.submit(calls, i) for i in range(8))]
    wait_for_all(pending)
  assert len(calls.started) <= rollout._REWARD_THREADS
  assert all(future.cancelled() for future in pending[1 + rollout._REWARD_THREADS:])


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


def test_a_reward_that_a_signal_ends_as_well_is_no_failure():
  """Such as Ctrl-C, which a terminal also sends to processes that a reward has started."""
  def check():
    raise Interrupted(2)

  with pytest.raises(Interrupted), rollout._reward_threads() as pool:
    wait_for_all([pool.submit(lambda: 1 / 0)], check)


# ---- whole epochs, of a sampler that draws nothing ----


@pytest.fixture
def make_worker(tiny_sd):
  """A worker of four batches; `worker.launched` has the samples of those it has begun.

  `worker.given` has what they are drawn from; all pixels of an image are its sample's index.
  """
  def make(reward, on_launch=lambda: None):
    launched, given = [], []

    def generate(params, frozen, negative_embedding, text_embeddings, indices, key):
      launched.append(np.asarray(indices).tolist())
      given.append((np.asarray(text_embeddings), tuple(jax.random.key_data(key).tolist())))
      on_launch()
      trajectory = Trajectory(jnp.zeros((2, 3, 4, 4, 4)), jnp.zeros((2, 2)))
      images = np.tile(np.reshape(indices, (2, 1, 1, 1)), (8, 8, 3))
      return Generation(trajectory, jnp.asarray(images, jnp.uint8))

    config = GenerateConfig(batch_size=2, num_batches=4, guidance_scale=1.0, eta=1.0,
                            samples_at_once=2, decode_batch_size=2)
    worker = rollout.RolloutWorker(
        config, tiny_sd, generate, FrozenModels(None, None), get_prompt_fn("simple_animals"),
        {"it": reward}, seed=7, mesh=jax.make_mesh(
            (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]))
    worker.launched, worker.given = launched, given
    return worker

  return make


def brightness(images, prompts, metadata):
  return images.mean(axis=(1, 2, 3)), {}


def test_each_sample_is_drawn_and_scored_by_its_own_prompt(make_worker, tiny_sd):
  scored = []

  def score(images, prompts, metadata):
    scored.append((images[:, 0, 0, 0].tolist(), prompts, metadata))
    return brightness(images, prompts, metadata)

  worker, epoch = make_worker(score), 3
  found = worker.run(None, epoch)
  prompts, metadata = draw_prompts(get_prompt_fn("simple_animals"), 7, epoch, range(8))
  assert found.prompts == prompts
  assert sorted(scored) == [([i, i + 1], prompts[i:i + 2], metadata[i:i + 2])
                            for i in (0, 2, 4, 6)]
  embeddings = PromptEncoder(tiny_sd)(prompts)
  np.testing.assert_array_equal(np.concatenate([each for each, _ in worker.given]), embeddings)
  np.testing.assert_array_equal(np.concatenate(found.text_embeddings), embeddings)
  assert len({key for _, key in worker.given}) == 1  # the index makes the difference
  for values in (found.rewards["it"], found.local_indices, found.images[:, 0, 0, 0]):
    assert values.tolist() == list(range(8))


def test_the_fixed_batch_is_that_of_no_epoch(make_worker):
  worker = make_worker(brightness)
  epoch = worker.run(None, 0)
  images, prompts = worker.sample_fixed_batch(None)
  assert prompts != epoch.prompts[:2]
  worker.run(None, 1)
  again, same_prompts = worker.sample_fixed_batch(None)
  keys = [key for _, key in worker.given]  # four batches, the fixed one, four, and the fixed one
  assert same_prompts == prompts and keys[-1] == keys[4] and len({keys[0], keys[4], keys[5]}) == 3
  assert images[:, 0, 0, 0].tolist() == again[:, 0, 0, 0].tolist() == [0, 1]


def test_at_most_two_batches_are_on_the_device(make_worker, monkeypatch):
  events = []
  wait = jax.block_until_ready
  monkeypatch.setattr(jax, "block_until_ready", lambda x: (events.append(-1), wait(x))[1])
  make_worker(brightness, on_launch=lambda: events.append(1)).run(None, 0)
  assert max(np.cumsum(events)) == 2 and sum(events) == 0


def test_images_are_in_order_of_the_samples():
  """Whatever the order in which the devices are listed."""
  values = np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1)
  mesh = jax.sharding.Mesh(jax.devices()[:4][::-1], ("data",))
  images = jax.device_put(values, jax.NamedSharding(mesh, jax.P("data")))
  np.testing.assert_array_equal(rollout._to_host(images), values)


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
