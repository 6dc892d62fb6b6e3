"""Schedules and single steps against diffusers' DDIMScheduler, setting by setting."""

import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.diffusion import DDIMSchedule, NoiseSchedule
from ddpo_jax.diffusion.ddim import ddim_mean_and_std

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SCALED = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
              set_alpha_to_one=False)
SETTINGS = {
    "leading": dict(SCALED, steps_offset=1, clip_sample=False),
    "trailing-v": dict(SCALED, timestep_spacing="trailing", clip_sample=False,
                       prediction_type="v_prediction"),
    "trailing": dict(timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False),
    "linspace": dict(SCALED, timestep_spacing="linspace", clip_sample=False),
    "zero-snr": dict(SCALED, timestep_spacing="trailing", clip_sample=False,
                     prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "sample-clipped": dict(SCALED, steps_offset=1, prediction_type="sample",
                           clip_sample=True, clip_sample_range=0.8),
    "thresholding": dict(SCALED, steps_offset=1, clip_sample=False, thresholding=True,
                         sample_max_value=2.0),
    "another-ratio": dict(SCALED, steps_offset=1, clip_sample=False, thresholding=True,
                          sample_max_value=1.5, dynamic_thresholding_ratio=0.9),
    "linear": dict(beta_schedule="linear", clip_sample=False, set_alpha_to_one=False),
    "cosine": dict(beta_schedule="squaredcos_cap_v2", clip_sample=False,
                   set_alpha_to_one=False, steps_offset=1),
}


@pytest.mark.parametrize("num_steps", (4, 7, 20))
@pytest.mark.parametrize("name", SETTINGS)
def test_against_diffusers(name, num_steps):
  settings, eta = SETTINGS[name], 0.7
  reference = diffusers.DDIMScheduler(**settings)
  reference.set_timesteps(num_steps)
  schedule = DDIMSchedule.create(NoiseSchedule.from_dict(dict(reference.config)),
                                 num_steps)
  np.testing.assert_array_equal(schedule.timesteps, reference.timesteps)
  np.testing.assert_allclose(schedule.noise_schedule.alphas_cumprod,
                             reference.alphas_cumprod, rtol=2e-5, atol=1e-7)
  generator = torch.Generator().manual_seed(0)
  draw = lambda: torch.randn(2, 4, 6, 6, generator=generator)
  for step, t in enumerate(reference.timesteps):
    latents, output, noise = draw(), draw(), draw()
    output[1] *= 0.1  # so that each sample has a threshold of its own
    latents[1] *= 0.1
    expected = reference.step(output, t, latents, eta=eta, variance_noise=noise
                              ).prev_sample.permute(0, 2, 3, 1).numpy()
    nhwc = lambda x: jnp.asarray(x.permute(0, 2, 3, 1).numpy())
    mean, std = ddim_mean_and_std(schedule, nhwc(output), jnp.full(2, step),
                                  nhwc(latents), eta)
    error = np.linalg.norm(mean + std * nhwc(noise) - expected)
    assert error < 1e-4 * np.linalg.norm(expected), (step, error)


def test_a_pndm_config_gives_the_ddim_schedule():
  """Hub models name PNDM; ddpo-pytorch builds DDIM from the same file, and so do we."""
  pndm = diffusers.PNDMScheduler(**{k: v for k, v in SETTINGS["leading"].items()
                                    if k != "clip_sample"})
  config = {**pndm.config, "clip_sample": False}
  ddim = diffusers.DDIMScheduler.from_config(config)
  ddim.set_timesteps(50)
  ours = DDIMSchedule.create(NoiseSchedule.from_dict(config), 50)
  np.testing.assert_array_equal(ours.timesteps, ddim.timesteps)
