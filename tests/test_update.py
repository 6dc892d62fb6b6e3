"""The PPO microbatch, its gradients and the AdamW step against the reference's numbers."""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import small_model

from ddpo_jax import lora, update
from ddpo_jax.diffusion import DDIMSchedule, policy_step
from ddpo_jax.models import load_pretrained
from ddpo_jax.types import Batch, Trajectory

CASES = {"onpolicy": "lora_old", "tight": "lora_new", "mid": "lora_new",
         "wide": "lora_new"}
P = jax.sharding.PartitionSpec


@pytest.fixture(scope="module")
def micro(golden):
  return golden("e_ppo_microbatch")


@pytest.fixture(scope="module")
def weights(golden):
  return golden("e_lora_grads")


@pytest.fixture(scope="module")
def schedule(tiny_sd, micro):
  return DDIMSchedule.create(tiny_sd.noise_schedule, int(micro["num_inference_steps"]))


@pytest.fixture(scope="module")
def batch(micro, schedule, nhwc):
  """The golden (sample, timestep) pairs, laid out as trajectories that a device holds."""
  visited = list(np.asarray(schedule.timesteps))
  steps = np.array([[visited.index(t) for t in row] for row in micro["timesteps"]])
  before, after = nhwc(micro["latents"]), nhwc(micro["next_latents"])
  latents = np.zeros((4, schedule.num_steps + 1, *before.shape[2:]), np.float32)
  log_probs = np.zeros((4, schedule.num_steps), np.float32)
  for sample, j in np.ndindex(steps.shape):
    step = steps[sample, j]
    latents[sample, step], latents[sample, step + 1] = before[sample, j], after[sample, j]
    log_probs[sample, step] = micro["old_log_probs"][sample, j]
  batch = Batch(trajectory=Trajectory(jnp.asarray(latents), jnp.asarray(log_probs)),
                text_embeddings=jnp.asarray(micro["prompt_embeds"]),
                negative_embedding=jnp.asarray(micro["neg_embeds"]),
                advantages=jnp.asarray(micro["advantages"]))
  return batch, update.Microbatches(
      sample=jnp.arange(4, dtype=jnp.int32)[None],
      step=jnp.asarray(steps.T[None, ..., None], jnp.int32))


@pytest.fixture(scope="module", params=((1, "cpu"), (3, "cpu"), (1, "gpu")),
                ids=("apart", "together", "as on a GPU"))
def results(micro, schedule, batch, golden_lora, request):
  """{case: (train state, gradients, metrics, log-probabilities)}; one compilation for all.

  With each of a sample's three steps in a microbatch of its own, or all in one; and what is
  written for a GPU, run on the CPU.
  """
  together, backend = request.param
  optimizer = update.make_optimizer(3e-4)
  config = update.UpdateConfig(
      batch_size=4, accumulation_steps=1, num_train_timesteps=3,
      timesteps_per_batch=together, guidance_scale=float(micro["guidance_scale"]),
      eta=float(micro["eta"]), clip_range=0.0, adv_clip_max=float(micro["adv_clip_max"]),
      loss_scaling=False)
  graphdef, _, frozen = lora.partition(golden_lora("lora_old"))
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

  def compute(clip_range, state, frozen, samples, microbatches):
    grads, metrics = update.accumulate_gradients(
        dataclasses.replace(config, clip_range=clip_range), graphdef, schedule, state,
        frozen, samples, microbatches)
    # The log-probabilities are those of a step by itself; the update's are in its metrics.
    unet, latents = nnx.merge(graphdef, state.params, frozen), samples.trajectory.latents
    (sample,), steps = microbatches.sample, microbatches.step[0].swapaxes(1, 2).reshape(3, 4)
    log_probs = jax.lax.map(lambda step: policy_step(
        unet, schedule, step, latents[sample, step], samples.text_embeddings[sample],
        samples.negative_embedding, guidance_scale=config.guidance_scale, eta=config.eta,
        prev_latents=latents[sample, step + 1])[1], steps)
    return grads, metrics, log_probs

  mapped = jax.jit(jax.shard_map(compute, mesh=mesh, in_specs=(P(),) * 5, out_specs=P(),
                                 check_vma=False))
  samples, microbatches = batch
  step = microbatches.step.swapaxes(1, 3).reshape(1, 4, -1, together).swapaxes(1, 2)
  microbatches = dataclasses.replace(microbatches, step=step)
  out = {}
  for case, group in CASES.items():
    params = lora.partition(golden_lora(group))[1]
    state = update.init_state(params, optimizer, loss_scaling=False)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(jax, "default_backend", lambda: backend)
      out[case] = (state, *mapped(jnp.float32(micro[f"{case}_clip_range"]), state, frozen,
                                  samples, microbatches))
  return optimizer, out


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
def test_log_probs(results, micro, case):
  *_, log_probs = results[1][case]
  np.testing.assert_allclose(log_probs, micro[f"{case}_log_prob_f64"], rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_loss_kl_and_clipfrac_equal_the_references(results, micro, case):
  _, _, metrics, _ = results[1][case]
  # The loss is a difference of terms as large as the advantages.
  scale = np.abs(micro["advantages"]).max()
  assert abs(float(metrics.loss) - micro[f"{case}_loss_f64"].mean()) < 1e-4 * scale
  np.testing.assert_allclose(float(metrics.approx_kl),
                             micro[f"{case}_approx_kl_f64"].mean(), rtol=1e-3, atol=1e-11)
  assert float(metrics.clipfrac) == pytest.approx(micro[f"{case}_clipfrac_f64"].mean())
  if f"{case}_grad_norm" in micro:
    np.testing.assert_allclose(float(metrics.grad_norm), micro[f"{case}_grad_norm"],
                               rtol=1e-4)


def test_ratio_is_one_on_policy(results):
  assert float(results[1]["onpolicy"][2].ratio_drift) < 1e-5


@pytest.mark.parametrize("case", ("onpolicy", "mid"))
def test_every_lora_gradient(results, weights, case):
  reference = {k.split("/")[-1]: v for k, v in weights.items()
               if k.startswith(f"{case}/accgrad/")}
  ours = by_name(results[1][case][1], reference)
  for name, expected in reference.items():
    error = np.linalg.norm(ours[name] - expected)
    assert error <= 1e-3 * np.linalg.norm(expected) + 1e-9, (name, error)


def test_adamw_step(results, weights):
  optimizer, cases = results
  state, grads, *_ = cases["mid"]
  updates, _ = optimizer.update(grads, state.opt_state, state.params)
  reference = {k.split("/")[-1]: v for k, v in weights.items()
               if k.startswith("mid/after_step/")}
  ours = by_name(jax.tree.map(jnp.add, state.params, updates), reference)
  for name, expected in reference.items():
    error = np.linalg.norm(ours[name] - expected)
    assert error < 1e-4 * np.linalg.norm(expected), (name, error)


def test_gradients_are_clipped_by_their_global_norm():
  optimizer = update.make_optimizer(1.0, beta1=0.0, max_grad_norm=0.5)
  grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
  _, (_, (adam, *_)) = optimizer.update(grads, optimizer.init(grads), grads)
  np.testing.assert_allclose([*adam.mu["a"], *adam.mu["b"]], [0.3, 0.4], rtol=1e-6)


def layout_config(batch_size, accumulation_steps, num_train_timesteps):
  return update.UpdateConfig(
      batch_size=batch_size, accumulation_steps=accumulation_steps,
      num_train_timesteps=num_train_timesteps, timesteps_per_batch=3, guidance_scale=1.0, eta=1.0,
      clip_range=1e-4, adv_clip_max=5.0, loss_scaling=False)


def test_microbatches_cover_every_sample_and_timestep_once():
  """Over an inner epoch; by the same steps on any number of devices, in batches of any size."""
  groups = []
  for devices, batch_size, accumulation in ((1, 4, 2), (1, 2, 4), (1, 8, 1), (2, 2, 2), (4, 1, 2)):
    config, own = layout_config(batch_size, accumulation, 6), 8 // devices
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices],
                         axis_types=(jax.sharding.AxisType.Auto,))

    def choose(index):
      local = update.choose_microbatches(config, 6, 3, own, jax.random.key(5), index)
      batch, place = local.sample // own, local.sample % own
      everywhere = batch * 8 + jax.lax.axis_index("data") * own + place
      everywhere = jnp.broadcast_to(everywhere[:, None, :, None], local.step.shape)
      # The slot that the shared program would sample it in.
      slots = place // (own // config.batch_size)
      return everywhere[None], local.step[None], slots[None]

    mapped = jax.jit(jax.shard_map(choose, mesh=mesh, in_specs=P(), out_specs=P("data")))
    steps = [mapped(jnp.int32(index)) for index in range(3)]
    pairs = [{(int(s), int(t)) for s, t in zip(np.ravel(sample), np.ravel(step))}
             for sample, step, _ in steps]
    assert set.union(*pairs) == {(s, t) for s in range(24) for t in range(6)}
    assert sum(map(len, pairs)) == 24 * 6
    for _, _, slots in steps:
      np.testing.assert_array_equal(slots, np.broadcast_to(np.arange(batch_size), slots.shape))
    groups.append(pairs)
  assert all(pairs == groups[0] for pairs in groups)


def test_samples_and_timesteps_are_shuffled():
  """Each sample's timesteps by themselves, and all of it anew with another key."""
  config = layout_config(batch_size=4, accumulation_steps=1, num_train_timesteps=3)
  mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1],
                       axis_types=(jax.sharding.AxisType.Auto,))
  choose = jax.jit(jax.shard_map(
      lambda key: jax.vmap(lambda index: update.choose_microbatches(config, 20, 3, 8, key, index))(
          jnp.arange(6)), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
  one, other = (choose(jax.random.key(seed)) for seed in (5, 6))
  order = np.asarray(one.sample)[:, 0]  # a column for each sample of a step
  assert (order != np.sort(order, axis=0)).any(axis=0).all()
  assert (order != other.sample[:, 0]).any()
  steps, others = (dict(zip(np.ravel(x.sample).tolist(), np.reshape(x.step, (-1, 3)).tolist()))
                   for x in (one, other))
  assert len(set(map(tuple, steps.values()))) > 20  # of 24 samples
  assert sum(steps[sample] == others[sample] for sample in steps) < 4
  assert len(set(np.ravel(one.step).tolist())) > 15  # of 20, and not the first ones only


@pytest.mark.parametrize("samples,together,total",
                         ((32, 1, 6), (6, 2, 8), (3, 1, 5), (24, 3, 6)))
@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_a_cpu_takes_steps_of_a_sample_together(samples, together, total, dtype):
  """Up to sixteen pairs at a time, each once, and the same samples throughout a group."""
  steps = np.random.default_rng(0).permuted(np.tile(np.arange(total), (2, samples, 1)), axis=2)
  given = update.Microbatches(
      sample=jnp.arange(2 * samples).reshape(2, samples),
      step=jnp.asarray(steps).reshape(2, samples, -1, together).swapaxes(1, 2))
  split = update._resize_for_cpu(given, jnp.dtype(dtype))
  each = split.sample[:, None, :, None]
  pairs = np.stack(np.broadcast_arrays(each, split.step), axis=-1).reshape(-1, 2)
  assert len(pairs) == 2 * samples * total == len(np.unique(pairs, axis=0))
  size = split.step.shape[2] * split.step.shape[3]
  exact = dtype == "float32"
  assert size <= 16 and split.step.shape[3] == math.gcd(total if exact else together, size)


def test_memory_does_not_grow_with_the_microbatches(schedule, batch):
  """The reference keeps each microbatch's graph alive through what it logs."""
  graphdef, params, frozen = lora.partition(load_pretrained(small_model()).unet,
                                            use_lora=False)
  config = update.UpdateConfig(
      batch_size=1, accumulation_steps=1, num_train_timesteps=1,
      timesteps_per_batch=1, guidance_scale=1.0, eta=1.0, clip_range=1e-4,
      adv_clip_max=5.0, loss_scaling=False)
  optimizer = update.make_optimizer(3e-4)
  state = update.init_state(params, optimizer, loss_scaling=False)
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

  def temporaries(groups, each):
    microbatches = update.Microbatches(sample=jnp.zeros((groups, 1), jnp.int32),
                                       step=jnp.zeros((groups, each, 1, 1), jnp.int32))
    program = jax.jit(jax.shard_map(
        lambda *arguments: update.accumulate_gradients(
            config, graphdef, schedule, *arguments),
        mesh=mesh, in_specs=(P(), P(), P("data"), P()), out_specs=P()))
    compiled = program.lower(state, frozen, batch[0], microbatches).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  few, many = temporaries(1, 2), temporaries(10, 20)
  assert few > 1e5
  assert many < few + 1e5


def test_loss_scale_halves_on_overflow_and_doubles_in_time():
  from ddpo_jax.types import LossScale
  scale = LossScale(jnp.float32(8.0), jnp.int32(update._LOSS_SCALE_PERIOD - 1))
  halved = update._next_loss_scale(scale, jnp.bool_(False))
  assert (float(halved.scale), int(halved.good_steps)) == (4.0, 0)
  doubled = update._next_loss_scale(scale, jnp.bool_(True))
  assert (float(doubled.scale), int(doubled.good_steps)) == (16.0, 0)
