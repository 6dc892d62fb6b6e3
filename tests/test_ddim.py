"""The DDIM step and its log-probability against the reference's numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.diffusion import DDIMSchedule, NoiseSchedule, ddim_step
from ddpo_jax.errors import UserError


@pytest.fixture(scope="module")
def schedule_of(tiny_sd):
  def make(num_steps, **changes):
    return DDIMSchedule.create(
        dataclasses.replace(tiny_sd.noise_schedule, **changes), num_steps)
  return make


@pytest.fixture(scope="module")
def cases(golden):
  return golden("a_ddim_step")


def steps_at(schedule, timesteps):
  visited = list(np.asarray(schedule.timesteps))
  return jnp.asarray([visited.index(t) for t in timesteps])


def test_alphas_to_the_last_place(schedule_of, cases):
  ours = schedule_of(10).noise_schedule.alphas_cumprod
  assert np.abs(ours - cases["alphas_cumprod"]).max() <= 2 ** -24  # one unit


@pytest.mark.parametrize("num_steps", (10, 50))
def test_timesteps(schedule_of, cases, num_steps):
  np.testing.assert_array_equal(schedule_of(num_steps).timesteps,
                                cases[f"timesteps_{num_steps}"])


@pytest.mark.parametrize("case", range(60))
def test_golden_case(schedule_of, cases, nhwc, case):
  schedule = schedule_of(int(cases["case_num_inference_steps"][case]),
                         prediction_type=str(cases["case_prediction_type"][case]))
  step = steps_at(schedule, cases["case_timesteps"][case])
  eta = float(cases["case_eta"][case])
  output, latents, noise = map(nhwc, (cases["model_output"], cases["sample"],
                                      cases["noise"]))

  prev, log_prob = ddim_step(schedule, output, step, latents, eta, noise=noise)
  np.testing.assert_allclose(prev, nhwc(cases["sampled_prev"][case]), rtol=1e-4,
                             atol=1e-4)
  np.testing.assert_allclose(log_prob, cases["sampled_logp"][case], rtol=1e-4)

  def total(output):
    given = nhwc(cases["given_prev"][case])
    log_prob = ddim_step(schedule, output, step, latents, eta, prev_latents=given)[1]
    return log_prob.sum(), log_prob

  (_, log_prob), grad = jax.value_and_grad(total, has_aux=True)(output)
  np.testing.assert_allclose(log_prob, cases["given_logp"][case], rtol=1e-4)
  expected = nhwc(cases["given_grad"][case])
  assert np.linalg.norm(grad - expected) <= 1e-3 * np.linalg.norm(expected)


def extra(schedule, golden, nhwc, t):
  cases = golden("a_ddim_step")
  step = steps_at(schedule, [t, t])
  return ddim_step(schedule, nhwc(cases["model_output"]), step, nhwc(cases["sample"]),
                   1.0, noise=nhwc(cases["noise"]))


def test_latents_without_a_batch_axis_are_refused(schedule_of):
  """Their log-probability would be averaged over the wrong axes."""
  x = jnp.zeros((8, 8, 4))
  with pytest.raises(ValueError, match=r"latents \(8, 8, 4\) must be \[B, h, w, C\]"):
    ddim_step(schedule_of(10), x, jnp.array([0]), x, 1.0, noise=x)


def test_old_scheduler_files_mean_what_a_pipeline_makes_of_them():
  for values in ({}, {"clip_sample": True, "steps_offset": 0}):
    read = NoiseSchedule.of_pipeline({"beta_end": 0.012, **values})
    assert (read.clip_sample, read.steps_offset, read.beta_end) == (False, 1, 0.012)


def test_clip_sample(schedule_of, golden, nhwc):
  extras = golden("a_extras")
  schedule = schedule_of(10, clip_sample=True, clip_sample_range=1.0)
  prev, log_prob = extra(schedule, golden, nhwc, int(extras["extra_timestep"]))
  np.testing.assert_allclose(prev, nhwc(extras["clip_prev"]), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(log_prob, extras["clip_logp"], rtol=1e-4)


def test_last_step_has_variance_whatever_set_alpha_to_one_says(schedule_of, golden, nhwc):
  extras = golden("a_extras")
  schedule = schedule_of(10, set_alpha_to_one=True)
  prev, log_prob = extra(schedule, golden, nhwc, 1)
  np.testing.assert_allclose(prev, nhwc(extras["alpha_to_one_last_prev"]), rtol=1e-4,
                             atol=1e-5)
  np.testing.assert_allclose(log_prob, extras["alpha_to_one_last_logp"], rtol=1e-4)


@pytest.mark.parametrize("offset,steps", [(0, 10), (0, 50), (0, 7), (1, 7), (1, 3)])
def test_timesteps_with_offset(schedule_of, golden, offset, steps):
  np.testing.assert_array_equal(
      schedule_of(steps, steps_offset=offset).timesteps,
      golden("a_extras")[f"timesteps_offset{offset}_n{steps}"])


@pytest.mark.parametrize("eta", (0.0, -0.1, 1.5, float("nan")))
def test_eta_without_density_is_refused(schedule_of, eta):
  """The reference documents eta=0 and then trains on NaN."""
  x = jnp.zeros((1, 2, 2, 4))
  with pytest.raises(ValueError, match="eta"):
    ddim_step(schedule_of(10), x, jnp.array([0]), x, eta, noise=x)


def test_schedule_without_density_is_refused(schedule_of):
  """With steps_offset 0 the last step goes from timestep 0 to itself."""
  x = jnp.zeros((1, 2, 2, 4))
  with pytest.raises(UserError, match="steps_offset"):
    ddim_step(schedule_of(10, steps_offset=0), x, jnp.array([0]), x, 1.0, noise=x)


def test_neither_or_both_of_noise_and_prev_latents(schedule_of):
  x = jnp.zeros((1, 2, 2, 4))
  for given in ({}, {"noise": x, "prev_latents": x}):
    with pytest.raises(ValueError, match="either"):
      ddim_step(schedule_of(10), x, jnp.array([0]), x, **given)


@pytest.mark.parametrize("config", [
    {"prediction_type": "flow"}, {"beta_schedule": "cosine"},
    {"timestep_spacing": "random"}, {"rescale_betas_zero_snr": True}])
def test_unknown_scheduler_config_is_refused_by_name(config):
  with pytest.raises(UserError, match=next(iter(config))):
    NoiseSchedule.from_dict(config)


@pytest.mark.parametrize("config", [
    {"trained_betas": [0.1] * 7}, {"trained_betas": [0.1, 1.5], "num_train_timesteps": 2},
    {"beta_end": 2.0}, {"beta_start": float("nan")}, {"num_train_timesteps": 0}])
def test_betas_that_give_no_schedule_are_refused_by_name(config):
  with pytest.raises(UserError, match=next(iter(config))):
    NoiseSchedule.from_dict(config)


@pytest.mark.parametrize("spacing", ("leading", "trailing", "linspace"))
def test_every_number_of_steps(spacing):
  """In diffusers, 62 numbers of trailing steps give one more, at timestep -1."""
  noise_schedule = NoiseSchedule(timestep_spacing=spacing)
  for num_steps in (*range(1, 130), 223, 500, 999, 1000):
    timesteps = np.asarray(DDIMSchedule.create(noise_schedule, num_steps).timesteps)
    assert timesteps.shape == (num_steps,)
    assert (np.diff(timesteps) < 0).all() and timesteps[-1] >= 0


@pytest.mark.parametrize("num_steps,message", (
    (0, "num_steps=0 must be in 1..1000"), (1001, "num_steps=1001 must be in 1..1000"),
    (1000, "num_steps=1000 with steps_offset=1 begins at timestep 1000; must be below")))
def test_num_steps_out_of_range(num_steps, message):
  with pytest.raises(UserError, match=message):
    DDIMSchedule.create(NoiseSchedule(steps_offset=1), num_steps)
