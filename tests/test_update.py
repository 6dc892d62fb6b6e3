"""The PPO microbatch, its gradients and the AdamW step against the reference's numbers."""

import dataclasses
import functools
import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ddpo_jax import lora, update
from ddpo_jax.diffusion import DDIMSchedule, NoiseSchedule, policy_step
from ddpo_jax.models import load_pretrained
from ddpo_jax.types import Batch, Trajectory

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = ("onpolicy", "tight", "mid", "wide")
P = jax.sharding.PartitionSpec


def nhwc(x):
  return jnp.asarray(np.moveaxis(x, -3, -1))


@pytest.fixture(scope="module")
def golden():
  return dict(np.load(GOLDEN / "e_ppo_microbatch.npz"))


@pytest.fixture(scope="module")
def weights():
  return dict(np.load(GOLDEN / "e_lora_grads.npz"))


@pytest.fixture(scope="module")
def pretrained():
  return load_pretrained(GOLDEN / "tiny-sd")


def unet_with(pretrained, weights, group, tmp_path):
  """A fresh UNet with the golden LoRA weights, read from a file as a user's would be."""
  tensors = {k.split("/")[1]: v for k, v in weights.items() if k.startswith("lora_old/")}
  tensors |= {k.split("/")[1]: v for k, v in weights.items() if k.startswith(group + "/")}
  save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()},
            tmp_path / "lora.safetensors")
  unet = nnx.clone(pretrained.unet)
  lora.import_lora(unet, tmp_path / "lora.safetensors")
  return unet


def golden_batch(golden, schedule):
  """The golden (sample, timestep) pairs, laid out as trajectories that a device holds."""
  steps = np.array([[int(np.where(np.asarray(schedule.timesteps) == t)[0][0]) for t in row]
                    for row in golden["timesteps"]])
  before, after = nhwc(golden["latents"]), nhwc(golden["next_latents"])
  latents = np.zeros((4, schedule.num_steps + 1, *before.shape[2:]), np.float32)
  log_probs = np.zeros((4, schedule.num_steps), np.float32)
  for sample in range(4):
    for j, step in enumerate(steps[sample]):
      latents[sample, step] = before[sample, j]
      latents[sample, step + 1] = after[sample, j]
      log_probs[sample, step] = golden["old_log_probs"][sample, j]
  batch = Batch(trajectory=Trajectory(jnp.asarray(latents), jnp.asarray(log_probs)),
                text_embeddings=jnp.asarray(golden["prompt_embeds"]),
                negative_embedding=jnp.asarray(golden["neg_embeds"]),
                advantages=jnp.asarray(golden["advantages"]))
  microbatches = update.Microbatches(
      sample=jnp.tile(jnp.arange(4, dtype=jnp.int32), (3, 1)),
      step=jnp.asarray(steps.T, jnp.int32))
  return batch, microbatches


def config_for(golden, case):
  return update.UpdateConfig(
      batch_size=4, sample_batch_size=4, accumulation_steps=1, num_train_timesteps=3,
      timesteps_per_batch=1, guidance_scale=float(golden["guidance_scale"]),
      eta=float(golden["eta"]), clip_range=float(golden[f"{case}_clip_range"]),
      adv_clip_max=float(golden["adv_clip_max"]), loss_scaling=False)


def run_case(golden, weights, pretrained, case, tmp_path):
  group = "lora_old" if case == "onpolicy" else "lora_new"
  schedule = DDIMSchedule.create(pretrained.noise_schedule,
                                 int(golden["num_inference_steps"]))
  unet = unet_with(pretrained, weights, group, tmp_path)
  graphdef, params, frozen = lora.partition(unet)
  optimizer = update.make_optimizer(3e-4, 0.9, 0.999, 1e-4, 1e-8, 1.0)
  state = update.init_state(params, optimizer, loss_scaling=False)
  batch, microbatches = golden_batch(golden, schedule)
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  compute = functools.partial(update.accumulate_gradients, config_for(golden, case),
                              graphdef, schedule)
  mapped = jax.jit(jax.shard_map(compute, mesh=mesh, in_specs=(P(),) * 4,
                                 out_specs=P()))
  grads, metrics = mapped(state, frozen, batch, microbatches)
  return unet, state, optimizer, grads, metrics


def by_name(state, reference):
  """{reference's name: array in the reference's layout} of a LoRA-shaped state."""
  out = {}
  for path, leaf in nnx.to_flat_state(state):
    *module, kind = map(str, path)
    side = {"lora_down": "down", "lora_up": "up"}[kind]
    name = ".".join(module).replace("to_out.0", "to_out")
    attention, projection = name.rsplit(".", 1)
    key = f"{attention}.processor.{projection}_lora.{side}.weight"
    out[key] = np.asarray(leaf[...]).T
  assert set(out) == set(reference)
  return out


@pytest.mark.parametrize("case", CASES)
def test_microbatch_metrics(golden, weights, pretrained, case, tmp_path):
  *_, grads, metrics = run_case(golden, weights, pretrained, case, tmp_path)
  loss = golden[f"{case}_loss_f64"].mean()
  scale = np.abs(golden["advantages"]).max()  # the loss is a difference of such terms
  assert abs(float(metrics.loss) - loss) < 1e-4 * scale
  np.testing.assert_allclose(float(metrics.approx_kl),
                             golden[f"{case}_approx_kl_f64"].mean(), rtol=1e-3, atol=1e-11)
  assert float(metrics.clipfrac) == pytest.approx(golden[f"{case}_clipfrac_f64"].mean())
  if f"{case}_grad_norm" in golden:
    np.testing.assert_allclose(float(metrics.grad_norm), golden[f"{case}_grad_norm"],
                               rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_log_probs(golden, weights, pretrained, case, tmp_path):
  schedule = DDIMSchedule.create(pretrained.noise_schedule, 8)
  unet = unet_with(pretrained, weights,
                   "lora_old" if case == "onpolicy" else "lora_new", tmp_path)
  batch, microbatches = golden_batch(golden, schedule)
  latents = batch.trajectory.latents

  @jax.jit
  def log_prob(unet, sample, step):
    return policy_step(unet, schedule, step, latents[sample, step],
                       batch.text_embeddings[sample], batch.negative_embedding,
                       guidance_scale=5.0, eta=1.0,
                       prev_latents=latents[sample, step + 1])[1]

  ours = np.stack([log_prob(unet, s, t) for s, t in
                   zip(microbatches.sample, microbatches.step)])
  np.testing.assert_allclose(ours, golden[f"{case}_log_prob_f64"], rtol=1e-4)


@pytest.mark.parametrize("case", ("onpolicy", "mid"))
def test_every_lora_gradient(golden, weights, pretrained, case, tmp_path):
  *_, grads, _ = run_case(golden, weights, pretrained, case, tmp_path)
  reference = {k.split("/")[-1]: v for k, v in weights.items()
               if k.startswith(f"{case}/accgrad/")}
  ours = by_name(grads, reference)
  for name, expected in reference.items():
    error = np.linalg.norm(ours[name] - expected)
    assert error <= 1e-3 * np.linalg.norm(expected) + 1e-9, (name, error)


def test_adamw_step(golden, weights, pretrained, tmp_path):
  _, state, optimizer, grads, _ = run_case(golden, weights, pretrained, "mid", tmp_path)
  updates, _ = optimizer.update(grads, state.opt_state, state.params)
  after = jax.tree.map(jnp.add, state.params, updates)
  reference = {k.split("/")[-1]: v for k, v in weights.items()
               if k.startswith("mid/after_step/")}
  ours = by_name(after, reference)
  for name, expected in reference.items():
    error = np.linalg.norm(ours[name] - expected)
    assert error < 1e-4 * np.linalg.norm(expected), (name, error)
