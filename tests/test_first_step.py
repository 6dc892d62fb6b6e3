"""The first optimizer step of an epoch, whose gradient is computed while its samples are drawn."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import small_config, with_weights

from ddpo_jax import hoisting, inner_loop, lora, train, update
from ddpo_jax.batches import BatchPlan
from ddpo_jax.build import first_gradient_bytes
from ddpo_jax.config import resolve
from ddpo_jax.interrupt import Stop
from ddpo_jax.models.unet import UNet2DConditionModel, UNetConfig
from ddpo_jax.ops.matmul import matmul_lora
from ddpo_jax.prompts import get_prompt_fn
from ddpo_jax.rewards import get_rewards
from ddpo_jax.shared_program import Mode, SharedProgram
from ddpo_jax.work import WorkLayout

UNET = UNetConfig(
    block_out_channels=(16,), layers_per_block=1, attention_head_dim=2, cross_attention_dim=32,
    norm_num_groups=8, mid_block_type=None, down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",))


def layout(batch_size, accumulation_steps, timesteps_per_batch=1):
  return WorkLayout(update.UpdateConfig(
      batch_size=batch_size, accumulation_steps=accumulation_steps, num_train_timesteps=6,
      timesteps_per_batch=timesteps_per_batch, guidance_scale=1.0, eta=1.0, clip_range=1e-4,
      adv_clip_max=5.0, loss_scaling=False), 6, (4, 4, 4))


@pytest.mark.parametrize("tokens", (3, 300))  # the matrix is larger than what it multiplies, or not
@pytest.mark.parametrize("branches", (1, 2))
def test_a_copied_weight_has_each_samples_gradient(tokens, branches):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (branches * 4, tokens, 24))
  weight, grad = (jax.random.normal(keys[1], (24, 40)),
                  jax.random.normal(keys[2], (branches * 4, tokens, 40)))
  y, backward = jax.vjp(matmul_lora, x, jnp.broadcast_to(weight, (4, 24, 40)))
  np.testing.assert_allclose(y, x @ weight, rtol=1e-4, atol=1e-4)
  x_grad, grads = backward(grad)
  np.testing.assert_allclose(x_grad, grad @ weight.T, rtol=1e-4, atol=1e-4)
  for sample in range(4):
    expected = sum(x[row].T @ grad[row] for row in range(sample, branches * 4, 4))
    np.testing.assert_allclose(grads[sample], expected, rtol=1e-4, atol=1e-4)


def test_copied_lora_has_each_samples_gradient(monkeypatch):
  """Of the network that a GPU is given, with all its forms of LoRA, in both of its branches."""
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  unet = with_weights(functools.partial(UNet2DConditionModel, UNET, dtype=jnp.float32), seed=0)
  lora.inject_lora(unet, rank=3, key=jax.random.key(0))
  for i, (_, linear) in enumerate(lora.attention_projections(unet)):
    key = jax.random.fold_in(jax.random.key(1), i)
    linear.lora_up[...] = 0.1 * jax.random.normal(key, linear.lora_up.shape)
  graphdef, weights, rest = hoisting.hoist_weights(lora.partition(unet))
  latents = jax.random.normal(jax.random.key(2), (3, 8, 8, 4))
  prompts = jax.random.normal(jax.random.key(3), (6, 7, 32))

  @jax.jit
  def losses(weights):  # of each sample
    noise = nnx.merge(graphdef, weights, rest).predict_branches(
        latents, jnp.array([500, 20, 999]), prompts, 2)
    return jnp.square(noise.reshape(2, 3, -1)).mean((0, 2))

  expected = jax.jacrev(losses)(weights)
  together = jax.grad(lambda copies: losses(copies).sum())(hoisting.copy_lora(weights, 3))
  assert len(jax.tree.leaves(expected)) > 8
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max())), together, expected)


@pytest.mark.parametrize("batches,samples,sizes,expected", (
    # configs/single_gpu.py: every fourth batch, of 16 samples in two parts.
    (16, 16, (8, 8), {(batch, part) for batch in (0, 4, 8, 12) for part in (0, 1)}),
    (1, 4, (2, 1), {(0, 0)}),  # of the two halves of its only batch the first
    (2, 4, (2, 4), {(batch, part) for batch in (0, 1) for part in (0, 1)}),  # all of the epoch
    (3, 4, (2, 3), {(0, 0), (1, 1), (2, 0)}),  # here the first half, there the second
    (4, 2, (1, 4, 2), {(0, 0), (2, 0)}),  # two timesteps of a sample in a microbatch
    (1, 4, (2, 1, 2), set()),  # for which all four samples are drawn at once
    (8, 1, (1, 8, 2), set())))  # half of each microbatch would be for nothing
def test_which_parts_are_the_first_steps(batches, samples, sizes, expected):
  on_device = layout(*sizes)
  found = on_device.find_first_parts(batches, samples)
  assert found == expected
  columns = sizes[0] * sizes[1]
  own = [batch * samples + place for batch, part in found
         for place in range(part, samples, on_device.num_parts(samples))]
  assert not found or len(own) == len(set(own)) == columns


def test_rows_of_several_microbatches_have_no_first_part(monkeypatch):
  """Then a microbatch's pairs are not always of the same samples."""
  monkeypatch.setattr("ddpo_jax.work.samples_at_once", lambda batch_size: batch_size // 2)
  assert not layout(4, 1).find_first_parts(1, 4)


@pytest.mark.parametrize("train_batch,timesteps,samples,wasted", (
    (8, 1, 16, 0), (8, 1, 12, 4), (8, 2, 8, 8), (8, 4, 64, 0), (24, 2, 48, 16), (24, 2, 72, 24)))
def test_samples_that_are_computed_for_nothing(train_batch, timesteps, samples, wasted):
  """Of sixteen at a time, as on a CPU at most; each part of a batch fills its own."""
  on_device = layout(train_batch, 1, timesteps)
  assert on_device.pairs == min(16, train_batch * timesteps)
  assert on_device.wasted_samples(samples) == wasted


def build(monkeypatch, devices=1, **changes):
  """A trainer whose policy is as a GPU has it, but in float32; and 8 samples in 4 batches."""
  monkeypatch.setattr(hoisting.jax, "default_backend", lambda: "gpu")
  config = small_config(**{
      "allow_tf32": True, "sample.num_steps": 3, "sample.guidance_scale": 5.0,
      "sample.batch_size": 2, "sample.num_batches_per_epoch": 4, "train.batch_size": 2,
      "train.gradient_accumulation_steps": 2, "train.max_grad_norm": 1e9,
      "train.learning_rate": 1e-3, **changes})
  cfg = resolve(config)
  with jax.default_matmul_precision("highest"):
    return train.build(cfg, BatchPlan.create(cfg, devices), get_prompt_fn(cfg.prompt_fn),
                       get_rewards(cfg.reward_fn, {}), train.open_model(cfg))


def an_epoch(trainer):
  """Its rollout, and the batch that the update is given."""
  rollout = inner_loop.roll_out(trainer, 0)
  rewards = np.random.default_rng(0).normal(size=trainer.plan.samples_per_epoch)
  return rollout, train.make_batch(trainer, rollout, rewards.astype(np.float32))


@pytest.mark.parametrize("devices,changes", (
    (2, {"train.adv_clip_max": 0.7, "sample.batch_size": 4, "sample.num_batches_per_epoch": 2}),
    (1, {"train.timesteps_per_batch": 2, "train.gradient_accumulation_steps": 4,
         "sample.num_steps": 4, "sample.batch_size": 4, "sample.num_batches_per_epoch": 2})),
    ids=str)
def test_the_first_gradient_is_that_of_the_update(monkeypatch, devices, changes):
  """As if its samples were visited again; the same loss, and the same samples."""
  trainer = build(monkeypatch, devices, **changes)
  rollout, batch = an_epoch(trainer)
  assert float(jnp.abs(batch.advantages).max()) > 1  # so that some are clipped at 0.7
  key, step, program = jax.random.key(7), jnp.int32(0), trainer.update
  sums = program.first_step(rollout.gradients, trainer.state, trainer.frozen_unet, batch, key)
  visited, _ = program.accumulate(Mode.FIRST_STEP, trainer.state, trainer.frozen_unet, batch, key,
                                  step, in_order=True)
  for name in ("loss", "approx_kl", "clipfrac"):
    np.testing.assert_allclose(getattr(sums, name), getattr(visited, name), rtol=1e-5, atol=1e-6)
  assert float(sums.ratio_drift.max()) < 1e-6
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(visited.grads))
  assert scale > 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale),
               sums.grads, visited.grads)


def test_an_epoch_trains_on_every_sample_once(monkeypatch):
  """The second step has the samples that the first has not; each step is taken."""
  trainer, visited = build(monkeypatch), []
  program, accumulate = trainer.update, trainer.update.accumulate

  def counted(mode, **arguments):
    visited.append((mode, int(arguments["index"]), arguments["in_order"]))
    return accumulate(mode, **arguments)

  monkeypatch.setattr(program, "accumulate", counted)
  rollout, batch = an_epoch(trainer)
  steps = jax.device_get(list(inner_loop.optimizer_steps(
      trainer, batch, 0, Stop(), rollout.gradients)))
  assert visited == [(Mode.STEP, 1, True)]
  assert not rollout.gradients  # they take memory
  assert [float(step.skipped) for step in steps] == [0, 0]
  assert all(float(step.grad_norm) > 0 for step in steps)
  assert int(trainer.state.step) == 2
  first = [2 * batch + place for batch, _ in program._first_parts for place in (0, 1)]
  second = [program._lay_out_training(batch, jax.random.key(0), jnp.int32(1), jnp.int32(group),
                                      True)[0].batch_index.tolist() for group in (0, 1)]
  assert sorted(first + sum(second, [])) == list(range(8))


@pytest.mark.parametrize("changes", (
    {"train.gradient_while_sampling": False}, {"use_lora": False},
    {"train.timestep_fraction": 0.7}, {"mixed_precision": "no"}, {"lora.rank": 10**7}), ids=str)
def test_where_the_first_step_is_visited(changes):
  """What is asked for, what cannot be done for each sample, and what would take gigabytes."""
  def size(**changes):
    cfg = resolve(small_config(**{"mixed_precision": "bf16"} | changes))
    return first_gradient_bytes(cfg, BatchPlan.create(cfg, 1), trained=32 * cfg.lora.rank * 4)

  assert size(**changes) == 0
  # Of the step's two samples, and three times of a microbatch's two.
  assert size() == 8 * 32 * 4 * small_config().lora.rank


@pytest.mark.parametrize("inner_epochs,steps", ((1, 2), (2, 2), (2, 1)))
def test_rescoring_includes_the_first_steps_samples(monkeypatch, inner_epochs, steps):
  """If a later inner epoch reads them: the first step has not written theirs."""
  trainer = build(monkeypatch, **{"train.num_inner_epochs": inner_epochs,
                                  "train.gradient_accumulation_steps": 4 // steps})
  rollout, batch = an_epoch(trainer)
  monkeypatch.setattr(SharedProgram, "largest_drift", lambda *_: jnp.float32(1))
  scored, accumulate = [], SharedProgram.accumulate

  def counted(program, mode, **arguments):
    if mode == Mode.SCORE:
      scored.append((int(arguments["index"]), arguments["in_order"]))
    return accumulate(program, mode, **arguments)

  monkeypatch.setattr(SharedProgram, "accumulate", counted)
  list(inner_loop.optimizer_steps(trainer, batch, 0, Stop(), rollout.gradients))
  assert scored == [(0, True), (1, True)][2 - inner_epochs:steps]


def test_without_gradients_the_first_step_is_visited(monkeypatch):
  trainer = build(monkeypatch, **{"train.gradient_while_sampling": False})
  rollout, batch = an_epoch(trainer)
  assert not rollout.gradients
  first, *_ = inner_loop.optimizer_steps(trainer, batch, 0, Stop(), rollout.gradients)
  assert float(first.ratio_drift) < 1e-6 and float(first.grad_norm) > 0
