"""DDIM: schedule, step with log-probability, sampler."""

from ddpo_jax.diffusion.ddim import ddim_step, policy_step
from ddpo_jax.diffusion.sampler import denoise, sample
from ddpo_jax.diffusion.schedule import DDIMSchedule, NoiseSchedule

__all__ = ["DDIMSchedule", "NoiseSchedule", "ddim_step", "denoise", "policy_step", "sample"]
