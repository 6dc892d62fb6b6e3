"""One epoch's prompts -> trajectories -> images -> rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
import functools
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Key, UInt8
import numpy as np
from tqdm import tqdm

from ddpo_jax import distributed, rng_streams
from ddpo_jax.console import hide_bars
from ddpo_jax.daemon_threads import DaemonThreadPool
from ddpo_jax.devices import AXIS
from ddpo_jax.embeddings import PromptEncoder
from ddpo_jax.generation import FrozenModels, Generate, GenerateConfig, Generation
from ddpo_jax.models import StableDiffusion
from ddpo_jax.prompts import draw_prompts
from ddpo_jax.rewards import call_reward
from ddpo_jax.rewards.info import InfoCollector, RewardInfo
from ddpo_jax.types import FirstGradient, PromptFn, RewardFn, Trajectory

_REWARD_THREADS = 2  # calls of reward functions at a time
_SECONDS_BETWEEN_CHECKS = 1.0  # for signals, while rewards are waited for


@dataclasses.dataclass(frozen=True)
class _Drawn:
  """This process's prompts of a batch."""

  prompts: list[str]
  metadata: list[dict[str, Any]]
  embeddings: np.ndarray  # [local, L, D]


@dataclasses.dataclass(frozen=True)
class _Scored:
  """This process's images of a batch, and by the name of the reward function what it returned."""

  images: np.ndarray  # [local, H, W, 3]
  rewards: dict[str, np.ndarray]
  info: dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Rollout:
  """One epoch's samples. Device arrays are [batches, samples of all devices, …]."""

  trajectory: Trajectory
  gradients: list[Array]  # of the first optimizer step, see `SharedProgram.sample`
  text_embeddings: Float[Array, "batches samples L D"]
  prompts: list[str]  # of every sample of every process, in order of the sample index
  rewards: dict[str, Float32[np.ndarray, " N"]]  # of each reward function, likewise
  images: UInt8[np.ndarray, "local H W 3"]  # of this process's samples
  local_indices: Int[np.ndarray, " local"]  # the sample index of each of `images`
  reward_info: RewardInfo  # what the reward functions returned besides
  sampling_seconds: float
  reward_seconds: float  # waited for rewards after the last image was there


class RolloutWorker:
  """Samples whole epochs. Rewards are computed in threads while the next batch samples."""

  def __init__(self, config: GenerateConfig, models: StableDiffusion, generate: Generate,
               frozen: FrozenModels, prompt_fn: PromptFn,
               reward_fns: Mapping[str, RewardFn], seed: int, mesh: jax.sharding.Mesh):
    self._config = config
    self._encode = PromptEncoder(models)
    self._frozen = frozen
    self._prompt_fn = prompt_fn
    self._reward_fns = reward_fns
    self._info = InfoCollector()
    self._seed = seed
    self._sharding = jax.NamedSharding(mesh, jax.P(AXIS))
    self._global_batch = config.batch_size * mesh.size
    self._generate = generate
    negative = self._encode([""])
    self.negative_embedding = jax.make_array_from_callback(  # [1, L, D]
        negative.shape, jax.NamedSharding(mesh, jax.P()), lambda index: negative[index])

  @property
  def samples_per_epoch(self) -> int:
    return self._global_batch * self._config.num_batches

  def run(self, params: nnx.State, epoch: int, check_stop: Callable[[], None] = lambda: None,
          loss_scale: Float32[Array, ""] | None = None) -> Rollout:
    """Samples and scores one epoch under the policy `params`.

    Args:
      params: the trained weights.
      epoch: from 0; with the seed it decides prompts and noise.
      check_stop: called before each batch, and again and again while rewards are waited
        for; may raise to stop.
      loss_scale: if the first optimizer step's gradient is to be computed as well.

    Raises:
      UserError: if a reward is not finite, or not one number for each image.
    """
    start = time.perf_counter()
    key = jax.random.fold_in(jax.random.key(self._seed), epoch)
    # All of them before the device begins to sample: it would have to finish a batch first.
    drawn = self._draw_prompts(epoch, range(self._config.num_batches))
    embeddings = [self._put(each.embeddings) for each in drawn]
    with _reward_threads() as pool:
      generations: list[Generation] = []
      pending: list[futures.Future] = []
      with self._bar(f"Epoch {epoch}: sampling") as progress:
        for batch in range(self._config.num_batches):
          check_stop()
          _raise_failures(pending)
          generation = self._launch(params, embeddings[batch], batch, key, loss_scale)
          pending.append(pool.submit(self._score, generation.images, drawn[batch]))
          # Launched is one batch ahead of the images that are done, at most.
          if generations:
            jax.block_until_ready(generations[-1].images)
            progress.update()
          generations.append(generation)
        jax.block_until_ready(generations[-1].images)
        progress.update()
      sampled = time.perf_counter()
      with self._bar(f"Epoch {epoch}: rewards") as progress:
        _wait_for_all(pending, progress, check_stop)
    scored = time.perf_counter()
    return self._assemble(epoch, generations, drawn, embeddings, [x.result() for x in pending],
                          sampling_seconds=sampled - start, reward_seconds=scored - sampled)

  def _bar(self, description: str) -> tqdm:
    return tqdm(desc=description, total=self._config.num_batches, leave=False,
                dynamic_ncols=True, disable=hide_bars(), unit="batch")

  def _assemble(self, epoch: int, generations: Sequence[Generation], drawn: Sequence[_Drawn],
                embeddings: Sequence[jax.Array], scored: Sequence[_Scored],
                **seconds: float) -> Rollout:
    """Joins the batches, and gathers the rewards of all processes."""
    indices = np.stack([self._local_indices(b) for b in range(self._config.num_batches)])
    return Rollout(
        trajectory=_stack([g.trajectory for g in generations]),
        gradients=[gradient for g in generations for gradient in g.gradients],
        text_embeddings=_stack(embeddings),
        prompts=self._prompts_of_all(epoch, drawn),
        rewards={name: distributed.gather_samples(np.stack([each.rewards[name] for each in scored]))
                 for name in self._reward_fns},
        images=np.concatenate([each.images for each in scored]),
        local_indices=indices.reshape(-1),
        reward_info=self._info.collect([each.info for each in scored], indices,
                                       self.samples_per_epoch),
        **seconds)

  def sample_fixed_batch(self, params: nnx.State
                         ) -> tuple[UInt8[np.ndarray, "B H W 3"], list[str]]:
    """Samples one batch without rewards: always the same prompts, from the same noise.

    Returns:
      This process's images and prompts.
    """
    key = jax.random.fold_in(jax.random.key(self._seed), rng_streams.EVALUATION)
    (drawn,) = self._draw_prompts(rng_streams.EVALUATION, [0])
    generation = self._launch(params, self._put(drawn.embeddings), 0, key)
    return _to_host(generation.images), drawn.prompts

  def _draw_prompts(self, epoch: int, batches: Iterable[int]) -> list[_Drawn]:
    with distributed.raising_together():
      drawn = [draw_prompts(self._prompt_fn, self._seed, epoch, self._local_indices(batch))
               for batch in batches]
      return [_Drawn(prompts, metadata, self._encode(prompts)) for prompts, metadata in drawn]

  def _prompts_of_all(self, epoch: int, drawn: Sequence[_Drawn]) -> list[str]:
    if jax.process_count() == 1:
      return [prompt for batch in drawn for prompt in batch.prompts]
    with distributed.raising_together():
      # To draw those of other processes again takes less than to gather them.
      return draw_prompts(self._prompt_fn, self._seed, epoch, range(self.samples_per_epoch))[0]

  def _local_indices(self, batch: int) -> Int[np.ndarray, " local"]:
    """Indices of this process's samples of a batch, among the epoch's."""
    share = self._global_batch // jax.process_count()
    first = batch * self._global_batch + jax.process_index() * share
    return np.arange(first, first + share)

  def _launch(self, params: nnx.State, embeddings: Float[Array, "B L D"], batch: int,
              key: Key[Array, ""], loss_scale: Float32[Array, ""] | None = None) -> Generation:
    """Starts sampling a batch, and may return before it is done."""
    indices = self._local_indices(batch).astype(np.int32)
    generate = functools.partial(self._generate, params, self._frozen, self.negative_embedding,
                                 embeddings, self._put(indices), key)
    return generate() if loss_scale is None else generate(FirstGradient(batch, loss_scale))

  def _put(self, local: np.ndarray) -> jax.Array:
    """This process's share of a batch -> the batch, sharded over its first axis."""
    return jax.make_array_from_process_local_data(self._sharding, local)

  def _score(self, on_device: UInt8[Array, "B H W 3"], drawn: _Drawn) -> _Scored:
    """Runs in a thread: waits for the images, then for their rewards."""
    images = _to_host(on_device)
    rewards, info = {}, {}
    for name, function in self._reward_fns.items():
      rewards[name], info[name] = call_reward(name, function, images, drawn.prompts,
                                              drawn.metadata)
    return _Scored(images, rewards, info)


@contextlib.contextmanager
def _reward_threads() -> Iterator[futures.Executor]:
  """Threads for calls of reward functions.

  If sampling stops, pending calls are cancelled, and running ones are not waited for: retries
  of a server that is gone could delay saving the run, and its end, for minutes.
  """
  pool = DaemonThreadPool(_REWARD_THREADS, "reward")
  try:
    yield pool
  except BaseException:
    pool.shutdown(wait=False, cancel_futures=True)
    raise
  pool.shutdown()


def _raise_failures(pending: Sequence[futures.Future]) -> None:
  """Raises what any of the finished calls raised, on all processes."""
  with distributed.raising_together():
    for future in pending:
      if future.done():
        future.result()


def _wait_for_all(pending: Sequence[futures.Future], progress: tqdm,
                  check: Callable[[], None]) -> None:
  """Waits until all calls of all processes have finished, or one has failed, or `check` raises."""
  while True:
    done, waiting = futures.wait(pending, _SECONDS_BETWEEN_CHECKS, futures.FIRST_EXCEPTION)
    progress.update(len(done) - progress.n)
    check()  # first: Ctrl-C in a terminal also ends the processes that a reward waits for
    _raise_failures(pending)
    if not distributed.max_over_processes(len(waiting)):
      return


def _to_host(images: UInt8[Array, "B H W 3"]) -> UInt8[np.ndarray, "local H W 3"]:
  """This process's share of an array that is sharded over its first axis."""
  shards = sorted(images.addressable_shards, key=lambda s: s.index[0].start or 0)
  return np.concatenate([np.asarray(shard.data) for shard in shards])


@jax.jit
def _stack(trees):
  return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
