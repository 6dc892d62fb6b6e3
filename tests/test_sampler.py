"""The scanned sampler: the reference's trajectories, a plain loop, and its randomness."""

import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import small_model

from ddpo_jax import generation, hoisting, lora
from ddpo_jax.diffusion import (
  DDIMSchedule,
  NoiseSchedule,
  ddim,
  denoise,
  policy_step,
  sample,
)
from ddpo_jax.models import load_pretrained, open_pretrained
from ddpo_jax.models.vae import AutoencoderKL


@pytest.fixture(scope="module")
def pipeline(golden):
  return golden("f_pipeline")


@pytest.fixture(scope="module")
def schedule(tiny_sd):
  return DDIMSchedule.create(tiny_sd.noise_schedule, 8)


def replay(unet, schedule, pipeline, nhwc):
  return sample(unet, schedule, jnp.asarray(pipeline["prompt_embeds"]),
                jnp.asarray(pipeline["neg_embeds"]), guidance_scale=5.0, eta=1.0,
                initial_latents=nhwc(pipeline["init_latents"]),
                step_noise=jnp.moveaxis(nhwc(pipeline["step_noise"]), 1, 0))


def relative(ours, reference):
  return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


def test_text_encoder_and_tokenizer(tiny_sd, pipeline):
  ids = tiny_sd.tokenize([str(p) for p in pipeline["prompts"]])
  np.testing.assert_array_equal(ids, pipeline["prompt_ids"])
  assert ids.dtype == np.int32
  assert relative(tiny_sd.text_encoder(ids), pipeline["prompt_embeds"]) < 1e-5


def test_whole_trajectory_and_images(tiny_sd, schedule, pipeline, nhwc):
  trajectory = replay(tiny_sd.unet, schedule, pipeline, nhwc)
  assert relative(trajectory.latents, nhwc(pipeline["base_latents"])) < 1e-4
  np.testing.assert_allclose(trajectory.log_probs, pipeline["base_log_probs"], rtol=1e-4)
  images = tiny_sd.vae.decode(trajectory.final_latents / tiny_sd.scaling_factor)
  np.testing.assert_allclose(np.clip(images / 2 + 0.5, 0, 1),
                             nhwc(pipeline["base_images"]), atol=1e-4)


def test_trajectory_with_lora(tiny_sd, schedule, pipeline, golden_lora, nhwc):
  trajectory = replay(golden_lora("lora_old"), schedule, pipeline, nhwc)
  assert relative(trajectory.latents, nhwc(pipeline["lora_latents"])) < 1e-4
  np.testing.assert_allclose(trajectory.log_probs, pipeline["lora_log_probs"], rtol=1e-4)


def test_scan_equals_a_plain_loop(tiny_sd, schedule, pipeline, nhwc):
  scanned = replay(tiny_sd.unet, schedule, pipeline, nhwc)
  latents = nhwc(pipeline["init_latents"])
  one_step = jax.jit(lambda unet, step, latents, noise: policy_step(
      unet, schedule, jnp.full(2, step), latents, jnp.asarray(pipeline["prompt_embeds"]),
      jnp.asarray(pipeline["neg_embeds"]), guidance_scale=5.0, eta=1.0, noise=noise))
  for step in range(schedule.num_steps):
    latents, log_prob = one_step(tiny_sd.unet, step, latents,
                                 nhwc(pipeline["step_noise"][:, step]))
    np.testing.assert_allclose(scanned.latents[:, step + 1], latents, atol=2e-5)
    np.testing.assert_allclose(scanned.log_probs[:, step], log_prob, rtol=1e-5)


@pytest.fixture(scope="module")
def small_unet():
  return load_pretrained(small_model()).unet


def draw(unet, embeddings, key, guidance_scale=1.0):
  schedule = DDIMSchedule.create(NoiseSchedule(clip_sample=False, steps_offset=1), 2)
  return sample(unet, schedule, embeddings, jnp.zeros_like(embeddings[:1]),
                guidance_scale=guidance_scale, key=key)


@jax.tree_util.register_static
class Zeros:
  """A policy without weights."""

  config = types.SimpleNamespace(sample_size=4, in_channels=4)

  def __call__(self, latents, timesteps, text_embeddings):
    return jnp.zeros_like(latents)


def sample_zeros(batch, key, draw=sample):
  schedule = DDIMSchedule.create(NoiseSchedule(clip_sample=False, steps_offset=1), 2)
  return draw(Zeros(), schedule, jnp.zeros((batch, 7, 5)), jnp.zeros((1, 7, 5)), key=key)


def test_a_sample_does_not_depend_on_its_batch(small_unet, pipeline):
  embeddings = jnp.tile(jnp.asarray(pipeline["prompt_embeds"]), (2, 1, 1))
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(4))
  together = draw(small_unet, embeddings, keys)
  alone = draw(small_unet, embeddings[2:3], keys[2:3])
  np.testing.assert_array_equal(together.latents[2, 0], alone.latents[0, 0])
  np.testing.assert_allclose(together.latents[2], alone.latents[0], atol=1e-4)
  one_key = draw(small_unet, embeddings, jax.random.key(3))
  np.testing.assert_array_equal(one_key.latents, together.latents)
  assert len(np.unique(together.latents[:, 0, 0, 0, 0])) == 4  # no noise is drawn twice


def test_denoise_draws_what_sample_draws(small_unet, pipeline):
  schedule = DDIMSchedule.create(NoiseSchedule(clip_sample=False, steps_offset=1), 2)
  arguments = (small_unet, schedule, jnp.asarray(pipeline["prompt_embeds"]),
               jnp.asarray(pipeline["neg_embeds"]))
  expected = sample(*arguments, key=jax.random.key(3)).final_latents
  np.testing.assert_allclose(denoise(*arguments, key=jax.random.key(3)), expected, atol=1e-4)


@pytest.mark.parametrize("several", (False, True))
def test_keys_of_either_type(several):
  """JAX's own, and the plain arrays of before, which many programs still pass."""
  keys = jax.random.key(3), jax.random.PRNGKey(3)
  if several:
    keys = [jax.random.split(key, 3) for key in keys]
  latents = [sample_zeros(3, key).latents for key in keys]
  np.testing.assert_array_equal(*latents)
  assert len(np.unique(latents[0][:, 0, 0, 0, 0])) == 3


@pytest.mark.parametrize("draw_images", (False, True))
@pytest.mark.parametrize("key", (
    jax.random.split(jax.random.key(0), 2), jax.random.split(jax.random.PRNGKey(0), 2),
    jax.random.split(jax.random.key(0), (3, 1))))
def test_as_many_keys_as_samples(key, draw_images):
  with pytest.raises(ValueError, match=r"key has shape .*; must be \[\], one key, or \[3\]"):
    sample_zeros(3, key, denoise if draw_images else sample)


def test_another_size_than_the_models(small_unet, pipeline):
  schedule = DDIMSchedule.create(NoiseSchedule(clip_sample=False, steps_offset=1), 2)
  embeddings = jnp.asarray(pipeline["prompt_embeds"])[:1]
  drawn = sample(small_unet, schedule, embeddings, embeddings, key=jax.random.key(0),
                 latent_size=(8, 16))
  assert drawn.latents.shape == (1, 3, 8, 16, 4)
  assert np.isfinite(drawn.log_probs).all()


@pytest.mark.parametrize("scale", (0.0, 0.7))
def test_guidance_up_to_one_is_none(small_unet, pipeline, scale):
  """One rule: in the reference the sampler drops guidance here and the update does not."""
  embeddings = jnp.asarray(pipeline["prompt_embeds"])
  ours = draw(small_unet, embeddings, jax.random.key(0), scale)
  plain = draw(small_unet, embeddings, jax.random.key(0), 1.0)
  np.testing.assert_array_equal(ours.latents, plain.latents)
  assert not ddim.uses_guidance(scale) and not ddim.uses_guidance(1.0)


def test_sampling_needs_randomness_from_somewhere(tiny_sd, schedule, pipeline):
  with pytest.raises(ValueError, match="key"):
    sample(tiny_sd.unet, schedule, jnp.asarray(pipeline["prompt_embeds"]),
           jnp.asarray(pipeline["neg_embeds"]))


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_generating_keeps_to_its_config(monkeypatch, dtype):
  """So many samples and images at a time; what all steps have in common is computed before them."""
  models, policies, decoded = open_pretrained(small_model(), None, dtype).shapes, [], []

  def with_lora(unet):
    lora.inject_lora(unet, rank=3, key=jax.random.key(0))
    return unet

  def spy_sample(policy, schedule, embeddings, negative, **options):
    policies.append((policy, embeddings.shape[0], options["guidance_scale"], options["eta"]))
    return sample(policy, schedule, embeddings, negative, **options)

  def spy_decode(vae, latents):
    decoded.append(latents.shape[0])
    return decode(vae, latents)

  decode = AutoencoderKL.decode
  monkeypatch.setattr(AutoencoderKL, "decode", spy_decode)
  monkeypatch.setattr(generation, "sample", spy_sample)
  unet = nnx.eval_shape(with_lora, models.unet)
  graphdef, params, frozen = lora.partition(unet)
  config = generation.GenerateConfig(batch_size=4, num_batches=1, guidance_scale=2.5, eta=0.3,
                                     samples_at_once=2, decode_batch_size=1)
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,),
                       devices=jax.devices()[:1])
  generate = generation.make_generate(config, models.vae, graphdef,
                                      DDIMSchedule.create(models.noise_schedule, 2), mesh)
  drawn = jax.eval_shape(
      generate, params, generation.FrozenModels(frozen, nnx.state(models.vae)),
      *(jax.ShapeDtypeStruct((batch, 7, 32), dtype) for batch in (1, 4)), jnp.arange(4),
      jax.random.key(0))
  assert drawn.images.shape == (4, 32, 32, 3) and set(decoded) == {1}
  for policy, *options in policies:
    assert options == [2, 2.5, 0.3]
    parts = [type(module) for _, module in nnx.iter_graph(policy)]
    assert (hoisting._PrecomputedProjection in parts) == (dtype == jnp.float32)
    weights = jax.tree.leaves(nnx.state(policy, nnx.LoRAParam))
    assert {str(weight.dtype) for weight in weights} == {jnp.dtype(dtype).name}
  assert policies
