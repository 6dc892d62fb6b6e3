"""What half precision does to the ratio, its cure, and dynamic loss scaling."""

import collections
import dataclasses
import functools
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import small_model, with_weights

from configs import base
from ddpo_jax import hoisting, inner_loop, lora, train, update
from ddpo_jax.batches import BatchPlan
from ddpo_jax.compilation import compiler_options
from ddpo_jax.config import resolve
from ddpo_jax.diffusion import DDIMSchedule, sample
from ddpo_jax.diffusion.schedule import NoiseSchedule
from ddpo_jax.errors import Interrupted
from ddpo_jax.interrupt import Stop
from ddpo_jax.models.unet import UNet2DConditionModel, UNetConfig
from ddpo_jax.prompts import get_prompt_fn
from ddpo_jax.rewards import get_rewards
from ddpo_jax.shared_program import Mode, SharedProgram
from ddpo_jax.types import Batch, LossScale, Trajectory
from ddpo_jax.work import join_parts

UNET = dict(sample_size=16, block_out_channels=(32,), layers_per_block=1,
            mid_block_type=None, attention_head_dim=4, cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
P = jax.sharding.PartitionSpec
NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
             num_train_timesteps=1000, steps_offset=1, set_alpha_to_one=False,
             clip_sample=False)
STEPS, TOKENS = 10, 7


@dataclasses.dataclass
class Setup:
  """A policy, and what it sampled."""

  config: update.UpdateConfig
  program: update.Update
  state: object
  frozen: nnx.State
  batch: Batch

  def steps(self):
    return self.batch.advantages.size // self.config.batch_size


def make(dtype, *, samples=8, sample_batch=4, train_batch=2, shared=False,
         unet_config=UNET, num_steps=STEPS, train_steps=STEPS, guidance_scale=5.0,
         prepare=lambda unet: None, loss_scaling=False, checkpointing="none",
         shared_sampler=False, timesteps_per_batch=1, batch=None):
  """Samples in batches of `sample_batch`; the update will take `train_batch` at a time.

  With a batch nothing is sampled. `shared`: the update is a `SharedProgram`, and with
  `shared_sampler` the sampler too.
  """
  unet = with_weights(functools.partial(
      UNet2DConditionModel, UNetConfig.from_dict(unet_config), dtype=dtype,
      gradient_checkpointing=checkpointing), 0)
  lora.inject_lora(unet, 4, jax.random.key(1))
  prepare(unet)
  graphdef, params, frozen = lora.partition(unet)
  schedule = DDIMSchedule.create(NoiseSchedule.from_dict(NOISE), num_steps)
  width = unet.config.cross_attention_dim
  text = jax.random.normal(jax.random.key(2), (samples, TOKENS, width)).astype(dtype)
  negative = jax.random.normal(jax.random.key(3), (1, TOKENS, width)).astype(dtype)
  text = text.reshape(-1, sample_batch, TOKENS, width)
  # Folded and compiled as the trainer's: in registers of another width fp16 rounds otherwise.
  def draw(params, embeddings, key):
    split = hoisting.cast_lora(hoisting.hoist_weights(lora.Split(graphdef, params, frozen)))
    return sample(nnx.merge(*split), schedule, embeddings, negative,
                  guidance_scale=guidance_scale, eta=1.0, key=key)

  draw = jax.jit(draw, compiler_options=compiler_options())
  config = update.UpdateConfig(
      batch_size=train_batch, accumulation_steps=1,
      num_train_timesteps=train_steps, timesteps_per_batch=timesteps_per_batch,
      guidance_scale=guidance_scale, eta=1.0, clip_range=1e-4, adv_clip_max=5.0,
      loss_scaling=loss_scaling)
  optimizer = update.make_optimizer(3e-4)
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,),
                       devices=jax.devices()[:1])
  # Where the trainer has them, and where the update leaves them: one program is enough.
  replicate = functools.partial(jax.device_put, device=jax.sharding.NamedSharding(mesh, P()))
  by_sample = functools.partial(
      jax.device_put, device=jax.sharding.NamedSharding(mesh, P(None, "data")))
  if shared:
    program = SharedProgram(config, graphdef, schedule, optimizer, (16, 16, 4), mesh)
  else:
    program = update.make_update(config, graphdef, schedule, optimizer, mesh)
  place = lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh, P("data")))
  if batch is None:
    trajectories = []
    for i, embeddings in enumerate(text):
      key = jax.random.key(10 + i)
      if shared_sampler:
        parts, _ = program.sample(replicate(params), replicate(frozen), replicate(negative),
                                  place(embeddings), place(jnp.arange(sample_batch)), key)
        trajectories.append(join_parts(parts, sample_batch))
      else:
        trajectories.append(draw(params, embeddings, key))
    batch = Batch(
        trajectory=by_sample(jax.tree.map(lambda *x: jnp.stack(x), *trajectories)),
        text_embeddings=by_sample(text), negative_embedding=replicate(negative),
        advantages=by_sample(jax.random.normal(jax.random.key(4), text.shape[:2])))
  return Setup(config, program, replicate(update.init_state(params, optimizer, loss_scaling)),
               replicate(frozen), batch)


def rescored(setup, key):
  """The setup with the log-probabilities of every optimizer step replaced."""
  batch = setup.batch
  for index in range(setup.steps()):
    _, batch = setup.program.accumulate(Mode.SCORE, setup.state, setup.frozen, batch, key,
                                        jnp.int32(index))
  return dataclasses.replace(setup, batch=batch)


def take_step(setup, key, index=0):
  """Takes an optimizer step, with either kind of program."""
  arguments = setup.state, setup.frozen, setup.batch, key, jnp.int32(index)
  if not isinstance(setup.program, SharedProgram):
    return setup.program(*arguments)
  sums, _ = setup.program.accumulate(Mode.STEP, *arguments)
  return setup.program.finish(setup.state, sums)


def one_batch(sample_batch, train_batch):
  """A config in bf16 whose epoch is one sampling batch."""
  config = base.get_config()
  config.pretrained.model = str(small_model())
  config.mixed_precision = "bf16"
  config.sample.num_steps = 4
  config.sample.batch_size = sample_batch
  config.sample.num_batches_per_epoch = 1
  config.train.batch_size = train_batch
  return config


def copy(tree):
  return jax.tree.map(jnp.copy, tree)


@pytest.fixture(scope="module")
def plain_setup():
  """In float32, with nothing special."""
  return make(jnp.float32)


@pytest.fixture(scope="module")
def plain(plain_setup):
  """State and metrics after one optimizer step of it."""
  return take_step(dataclasses.replace(plain_setup, state=copy(plain_setup.state)),
                    jax.random.key(0))


@pytest.fixture(scope="module")
def half():
  """In bf16, as after a sampler that rounds much otherwise than the update."""
  setup = make(jnp.bfloat16, shared=True)
  trajectory = setup.batch.trajectory
  noise = 1e-3 * jax.random.normal(jax.random.key(5), trajectory.log_probs.shape)
  trajectory = dataclasses.replace(trajectory, log_probs=trajectory.log_probs + noise)
  return dataclasses.replace(setup, batch=dataclasses.replace(setup.batch, trajectory=trajectory))


def test_float32_needs_no_cure(plain):
  assert float(plain[1].ratio_drift) < 1e-5


def test_equal_batches_cure_the_drift_on_a_cpu():
  """In fp16: sampler and update compute the same shapes."""
  setup = make(jnp.float16, sample_batch=4, train_batch=4)
  assert float(take_step(setup, jax.random.key(0))[1].ratio_drift) < 1e-5


@pytest.mark.parametrize("options", (
    {}, {"train_batch": 2, "timesteps_per_batch": 2}, {"train_batch": 4, "timesteps_per_batch": 5},
    {"checkpointing": "blocks"}, {"guidance_scale": 1.0}, {"train_steps": 3}), ids=str)
def test_one_program_has_a_ratio_of_one(options):
  """In bf16, to the last bit; also with more pairs in a microbatch than samples in a batch."""
  setup = make(jnp.bfloat16, shared=True, shared_sampler=True, **{"train_batch": 4} | options)
  metrics = take_step(setup, jax.random.key(0))[1]
  assert float(metrics.ratio_drift) == 0.0
  assert float(metrics.grad_norm) > 0.0


def test_samples_that_are_computed_for_nothing_are_said(capsys):
  """Where more pairs are in a microbatch than samples in a batch."""
  config = one_batch(sample_batch=3, train_batch=3)
  config.train.timesteps_per_batch = 2
  config.train.gradient_accumulation_steps = 1
  cfg = resolve(config)
  trainer = train.build(cfg, BatchPlan.create(cfg, 1), get_prompt_fn("simple_animals"),
                        get_rewards(cfg.reward_fn, {}), train.open_model(cfg))
  said = capsys.readouterr()
  assert ("sample.batch_size=3 is not a multiple of 6, which train.batch_size and "
          "train.timesteps_per_batch make: with each sampling batch 3 samples"
          ) in said.out + said.err
  rollout = trainer.worker.run(trainer.state.params, epoch=0)
  assert rollout.images.shape[0] == 3


def test_the_shared_program_samples_as_the_sampler_does():
  """The same trajectories from the same keys, in float32."""
  setups = [make(jnp.float32, shared=shared, shared_sampler=shared, samples=4)
            for shared in (True, False)]
  ours, expected = (setup.batch.trajectory for setup in setups)
  np.testing.assert_allclose(ours.latents, expected.latents, atol=1e-4)
  np.testing.assert_allclose(ours.log_probs, expected.log_probs, atol=1e-5)
  assert isinstance(ours, Trajectory)


def test_recomputed_log_probs_cure_the_drift(half):
  """To the last bit, in every optimizer step that no other has gone before."""
  key = jax.random.key(0)
  _, metrics = take_step(dataclasses.replace(half, state=copy(half.state)), key)
  assert float(metrics.ratio_drift) > 1e-5  # there is something to cure
  cured = rescored(dataclasses.replace(half, state=copy(half.state)), key)
  for index in range(half.steps()):
    _, metrics = take_step(dataclasses.replace(cured, state=copy(cured.state)), key, index)
    assert float(metrics.ratio_drift) == 0.0
    assert float(metrics.approx_kl) == 0.0


def test_several_steps_of_a_sample_in_a_microbatch_are_rescored_alike(half):
  setup = make(jnp.bfloat16, shared=True, timesteps_per_batch=2, batch=half.batch)
  key = jax.random.key(0)
  _, metrics = take_step(dataclasses.replace(setup, state=copy(setup.state)), key)
  assert float(metrics.ratio_drift) > 1e-5  # there is something to cure
  assert float(take_step(rescored(setup, key), key)[1].ratio_drift) == 0.0


def test_first_step_needs_no_rescoring(half):
  """It does, to the last bit, what it would do after that, and keeps what it computed."""
  key, index = jax.random.key(0), jnp.int32(0)
  sums, batch = half.program.accumulate(
      Mode.FIRST_STEP, half.state, half.frozen, half.batch, key, index)
  drift = half.program.largest_drift(sums)
  state, metrics = half.program.finish(copy(half.state), sums)
  cured = rescored(dataclasses.replace(half, state=copy(half.state)), key)
  expected, expected_metrics = take_step(dataclasses.replace(cured, state=copy(half.state)), key)
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  assert float(drift) == float(metrics.ratio_drift) > 1e-5  # of what was given
  metrics = dataclasses.replace(metrics, ratio_drift=jnp.float32(0))
  jax.tree.map(np.testing.assert_array_equal, metrics, expected_metrics)
  new, old = batch.trajectory.log_probs, half.batch.trajectory.log_probs
  changed = new != old
  assert 0 < changed.sum() <= half.config.batch_size * STEPS  # of this step's samples only
  np.testing.assert_array_equal(new[changed], cured.batch.trajectory.log_probs[changed])


@pytest.mark.parametrize("mode", (Mode.SCORE, Mode.FIRST_STEP, Mode.STEP))
def test_a_step_can_be_stopped_on_its_way(half, mode):
  """A step takes minutes on some GPUs. The state is whole then."""
  def check_stop():
    raise Interrupted(15)

  before = copy(half.state)
  with pytest.raises(Interrupted):
    half.program.accumulate(mode, half.state, half.frozen, half.batch, jax.random.key(0),
                            jnp.int32(0), check_stop)
  jax.tree.map(np.testing.assert_array_equal, before, half.state)


@pytest.mark.parametrize("noise,expected", ((0.0, 0), (1e-3, 1)))
def test_training_recomputes_where_needed(monkeypatch, noise, expected):
  """Through the loop's own functions; as long as the policy stands still the ratio is 1."""
  count = collections.Counter()
  accumulate = SharedProgram.accumulate

  def counted(program, mode, **arguments):
    count[mode] += 1
    return accumulate(program, mode, **arguments)

  monkeypatch.setattr(SharedProgram, "accumulate", counted)
  config = one_batch(sample_batch=4, train_batch=2)
  config.train.learning_rate = 1e-30
  config.per_prompt_stat_tracking.min_count = 2
  cfg = resolve(config)
  trainer = train.build(cfg, BatchPlan.create(cfg, 1), get_prompt_fn("simple_animals"),
                        get_rewards(cfg.reward_fn, {}), train.open_model(cfg))
  rollout = trainer.worker.run(trainer.state.params, epoch=0)
  batch = train.make_batch(trainer, rollout, np.arange(4, dtype=np.float32))
  log_probs = batch.trajectory.log_probs
  log_probs += noise * jax.random.normal(jax.random.key(0), log_probs.shape)
  batch = dataclasses.replace(
      batch, trajectory=dataclasses.replace(batch.trajectory, log_probs=log_probs))
  params = copy(trainer.state.params)
  steps = jax.device_get(list(inner_loop.optimizer_steps(trainer, batch, 0, Stop())))
  largest = cfg.train.clip_range / 10
  assert (steps[0].ratio_drift > largest) == (expected > 0)
  assert steps[1].ratio_drift <= (0.0 if expected else largest)
  assert count == collections.Counter(
      {Mode.FIRST_STEP: 1, Mode.STEP: 1, Mode.SCORE: expected})  # the first step does its own
  assert [float(step.skipped) for step in steps] == [0.0, 0.0]
  assert all(float(step.grad_norm) > 0 for step in steps)
  assert int(trainer.state.step) == 2
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-20),
               trainer.state.params, params)
  metrics = train.epoch_metrics(trainer, rollout, np.arange(4.0), steps, 1.0)
  assert metrics["sampler_drift"] == steps[0].ratio_drift
  assert metrics["ratio_drift"] == (0.0 if expected else metrics["sampler_drift"])
  again = inner_loop.optimizer_steps(trainer, batch, 0, Stop())
  next(again)
  changed = jax.tree.map(lambda weights: weights + 0.01, trainer.state.params)
  trainer.state = dataclasses.replace(trainer.state, params=changed)
  assert float(next(again).ratio_drift) > largest  # by then the policy has changed


@pytest.mark.parametrize("timesteps,inner_epochs,expected", (
    (10, 1, 3), (10, 2, 3), (5, 1, 3), (5, 2, 7)))
def test_what_is_rescored(timesteps, inner_epochs, expected):
  """Each pair of sample and timestep that an epoch trains on; the first step does its own."""
  space = types.SimpleNamespace
  trainer = space(
      update=object.__new__(SharedProgram),
      plan=space(num_train_timesteps=timesteps, steps_per_inner_epoch=4),
      cfg=space(sample=space(num_steps=10),
                train=space(num_inner_epochs=inner_epochs, clip_range=1e-4)))
  assert inner_loop.num_steps_rescored(trainer, drift=1.1e-5) == expected
  assert inner_loop.num_steps_rescored(trainer, drift=float("nan")) == expected
  assert inner_loop.num_steps_rescored(trainer, drift=0.9e-5) == 0
  trainer.plan.steps_per_inner_epoch = 1
  assert inner_loop.num_steps_rescored(trainer, drift=1.1e-5) == expected // 4
  assert inner_loop.needs_rescoring(trainer, drift=1.1e-5)  # with a single step as well
  trainer.update = lambda *_: None
  assert inner_loop.num_steps_rescored(trainer, drift=1.1e-5) == 0


def test_an_epoch_recomputes_log_probs_before_its_policy_changes():
  """And never after, however large drift is; in the order of its steps, which may be stopped."""
  space, visited, checks = types.SimpleNamespace, [], []

  def accumulate(mode, state, frozen, batch, key, index, check_stop, in_order):
    check_stop()
    visited.append((mode, jax.random.key_data(key).tolist(), int(index), in_order))
    return None, batch

  program = object.__new__(SharedProgram)
  program.accumulate, program.largest_drift = accumulate, lambda sums: 1.0
  program.finish = lambda state, sums: (state, None)
  trainer = space(
      update=program, state=None, frozen_unet=None,
      plan=space(num_train_timesteps=5, steps_per_inner_epoch=2),
      cfg=space(seed=0, sample=space(num_steps=10),
                train=space(num_inner_epochs=2, clip_range=1e-4)))
  stop = space(check=lambda: checks.append(len(visited)))
  list(inner_loop.optimizer_steps(trainer, None, 0, stop))
  assert [mode for mode, *_ in visited] == [Mode.FIRST_STEP, *[Mode.SCORE] * 3, *[Mode.STEP] * 3]
  scored, trained = ([step for mode, *step in visited if (mode == Mode.SCORE) == is_score]
                     for is_score in (True, False))
  assert scored == trained[1:]
  assert [in_order for *_, in_order in trained] == [True, True, False, False]  # by inner epochs
  assert checks == list(range(7))


def test_rescoring_changes_nothing_else(half):
  before = copy(half.state)
  after = rescored(dataclasses.replace(half, state=copy(half.state)), jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, after.state, before)
  old, new = half.batch.trajectory.log_probs, after.batch.trajectory.log_probs
  assert (old != new).mean() > 0.5  # every sample and step has been computed anew
  np.testing.assert_allclose(new, old, atol=0.1)
  np.testing.assert_array_equal(after.batch.trajectory.latents,
                                half.batch.trajectory.latents)


@pytest.mark.parametrize("options", (
    {"shared": True}, {"shared": True, "timesteps_per_batch": 2}, {"checkpointing": "blocks"},
    {"checkpointing": "full"}), ids=str)
def test_the_step_is_the_same_with_checkpointing_and_as_shared_program(
    plain_setup, plain, options):
  """Whatever is kept for the backward pass, and by the program that samples too."""
  state, metrics = take_step(make(jnp.float32, batch=plain_setup.batch, **options),
                              jax.random.key(0))
  assert float(metrics.grad_norm) > 0
  np.testing.assert_allclose(metrics.grad_norm, plain[1].grad_norm, rtol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
               state.params, plain[0].params)


@pytest.fixture(scope="module")
def scaled():
  """By one program, as a run has it: else half of the ratios are clipped at random."""
  return make(jnp.float16, loss_scaling=True, shared=True, shared_sampler=True)


def test_loss_scale_skips_overflow_and_goes_down(scaled):
  """fp16 gradients overflow under a scale too large: nothing is applied, the scale halves."""
  too_large = jax.device_put(LossScale(jnp.float32(2.0**100), jnp.int32(5)),
                             scaled.state.loss_scale.scale.sharding)
  before = dataclasses.replace(scaled.state, loss_scale=too_large)
  after, metrics = take_step(dataclasses.replace(scaled, state=copy(before)),
                              jax.random.key(0))
  assert float(metrics.skipped) == 1.0
  jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
  jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
  assert int(after.step) == 0
  assert float(after.loss_scale.scale) == 2.0**99
  assert int(after.loss_scale.good_steps) == 0


def test_loss_scale_leaves_the_gradient_as_it_is(plain, scaled):
  after, metrics = take_step(dataclasses.replace(scaled, state=copy(scaled.state)),
                              jax.random.key(0))
  assert float(metrics.skipped) == 0.0
  assert int(after.loss_scale.good_steps) == 1
  np.testing.assert_allclose(metrics.grad_norm, plain[1].grad_norm, rtol=0.01)
