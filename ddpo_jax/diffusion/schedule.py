"""Noise schedules: betas, cumulative alphas, and the timesteps that DDIM visits."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int
import numpy as np

from ddpo_jax.errors import UserError
from ddpo_jax.model_config import read_fields

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_OTHER_PROCESSES = ("FlowMatch", "EDM")  # what their schedulers' names begin with


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
  """The fields of a scheduler_config.json that matter to DDIM, whichever scheduler it names.

  Defaults are those of diffusers' DDIMScheduler, which is what it would build from the
  same file.
  """

  num_train_timesteps: int = 1000
  beta_start: float = 0.0001
  beta_end: float = 0.02
  beta_schedule: str = "linear"
  trained_betas: tuple[float, ...] | None = None
  prediction_type: str = "epsilon"
  timestep_spacing: str = "leading"
  steps_offset: int = 0
  set_alpha_to_one: bool = True  # kept for the record: see `DDIMSchedule.create`
  rescale_betas_zero_snr: bool = False
  clip_sample: bool = True
  clip_sample_range: float = 1.0
  thresholding: bool = False
  dynamic_thresholding_ratio: float = 0.995
  sample_max_value: float = 1.0

  def __post_init__(self):
    choices = {"prediction_type": PREDICTION_TYPES, "beta_schedule": BETA_SCHEDULES,
               "timestep_spacing": TIMESTEP_SPACINGS}
    for name, allowed in choices.items():
      if getattr(self, name) not in allowed:
        raise UserError(f"scheduler config: {name}={getattr(self, name)!r} is not "
                        f"supported; must be one of {', '.join(allowed)}")
    if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
      raise UserError("scheduler config: rescale_betas_zero_snr=True needs "
                      "prediction_type 'v_prediction' or 'sample', not 'epsilon': noise "
                      "alone says nothing about the sample")
    if self.num_train_timesteps < 1:
      raise UserError(f"scheduler config: num_train_timesteps={self.num_train_timesteps} "
                      "must be at least 1")
    bar = self.alphas_cumprod
    if bar.shape != (self.num_train_timesteps,):
      raise UserError(f"scheduler config: trained_betas has {len(bar)} entries; must have "
                      f"num_train_timesteps={self.num_train_timesteps}")
    if not (1 > bar[0] and (np.diff(bar) < 0).all() and bar[-1] >= 0):
      raise UserError("scheduler config: the betas must be above 0 and below 1: "
                      f"beta_start={self.beta_start}, beta_end={self.beta_end}, "
                      f"trained_betas {'absent' if self.trained_betas is None else 'given'}")

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> NoiseSchedule:
    """Reads a scheduler_config.json of any diffusers scheduler.

    Raises:
      UserError: if it asks for what is not built here, or its betas are no schedule.
    """
    name = values.get("_class_name")
    if values.get("use_flow_sigmas") or str(name).startswith(_OTHER_PROCESSES):
      raise UserError(f"scheduler config: _class_name={name!r} with use_flow_sigmas="
                      f"{values.get('use_flow_sigmas', False)} is of another process; must be one "
                      "of Stable Diffusion's, such as 'DDIMScheduler'")
    return read_fields(cls, values)

  @classmethod
  def of_pipeline(cls, values: Mapping[str, Any]) -> NoiseSchedule:
    """As `from_dict`, with what diffusers' StableDiffusionPipeline sets whatever the file says.

    Old files lack clip_sample and steps_offset. Stable Diffusion's latents are not in [−1, 1], and
    its timesteps begin at 1.
    """
    return cls.from_dict({**values, "clip_sample": False, "steps_offset": 1})

  @functools.cached_property
  def alphas_cumprod(self) -> Float32[np.ndarray, " num_train_timesteps"]:
    """ᾱ_t.

    Rounded where torch rounds: betas in float32, the product accumulated in float64.
    """
    alphas = np.float32(1) - self._betas()
    products = np.cumprod(alphas, dtype=np.float64).astype(np.float32)
    return _zero_terminal_snr(products) if self.rescale_betas_zero_snr else products

  def _betas(self) -> np.ndarray:
    n = self.num_train_timesteps
    if self.trained_betas is not None:
      return np.asarray(self.trained_betas, np.float32)
    if self.beta_schedule == "linear":
      return np.linspace(self.beta_start, self.beta_end, n, dtype=np.float32)
    if self.beta_schedule == "scaled_linear":
      roots = np.linspace(self.beta_start**0.5, self.beta_end**0.5, n, dtype=np.float32)
      return roots**2
    # arXiv:2102.09672, formula 17.
    bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999).astype(np.float32)


def _zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
  """Shifts and scales sqrt(ᾱ) so that the last is 0 and the first stays (arXiv:2305.08891)."""
  root = np.sqrt(alphas_cumprod.astype(np.float64))
  root = (root - root[-1]) * root[0] / (root[0] - root[-1])
  return (root**2).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DDIMSchedule:
  """What DDIM needs to know of each of its T steps; 0 is the first denoising step.

  1 − ᾱ and σ² are computed in float64 on the host: as differences of nearly equal numbers they
  would be inaccurate in float32.
  """

  timesteps: Int[Array, " T"]  # what the model is told
  alphas_cumprod: Float32[Array, " T"]  # ᾱ at this timestep
  alphas_cumprod_prev: Float32[Array, " T"]  # ᾱ at the next, less noisy timestep
  one_minus_alphas_cumprod: Float32[Array, " T"]  # 1 − ᾱ of the former
  one_minus_alphas_cumprod_prev: Float32[Array, " T"]  # and of the latter
  variances: Float32[Array, " T"]  # σ_t² of formula 16 at eta 1
  noise_schedule: NoiseSchedule = dataclasses.field(metadata={"static": True})
  # Whether every variance is above 0.
  has_density: bool = dataclasses.field(metadata={"static": True})

  @property
  def num_steps(self) -> int:
    return self.timesteps.shape[0]

  @classmethod
  def create(cls, noise_schedule: NoiseSchedule, num_steps: int) -> DDIMSchedule:
    """Chooses the timesteps and their alphas.

    The step past the end uses ᾱ_0 whatever `set_alpha_to_one` says: with 1 the last
    step would have no variance, hence no log-probability.

    Args:
      noise_schedule: of the model.
      num_steps: T, 1 to `num_train_timesteps`.

    Raises:
      UserError: if `num_steps` is out of range, or the first step would be past the last timestep.
    """
    trained = noise_schedule.num_train_timesteps
    if not 1 <= num_steps <= trained:
      raise UserError(f"num_steps={num_steps} must be in 1..{trained}, the timesteps "
                      "that the model was trained on")
    timesteps = _timesteps(noise_schedule, num_steps)
    if timesteps[0] >= trained:
      raise UserError(f"num_steps={num_steps} with steps_offset="
                      f"{noise_schedule.steps_offset} begins at timestep {timesteps[0]}; "
                      f"must be below {trained}: take fewer steps")
    previous = np.maximum(timesteps - trained // num_steps, 0)
    bar = noise_schedule.alphas_cumprod.astype(np.float64)[timesteps]
    bar_prev = noise_schedule.alphas_cumprod.astype(np.float64)[previous]
    variance = (1 - bar_prev) / (1 - bar) * (1 - bar / bar_prev)
    as_float32 = lambda x: jnp.asarray(x, jnp.float32)
    return cls(timesteps=jnp.asarray(timesteps, jnp.int32), alphas_cumprod=as_float32(bar),
               alphas_cumprod_prev=as_float32(bar_prev),
               one_minus_alphas_cumprod=as_float32(1 - bar),
               one_minus_alphas_cumprod_prev=as_float32(1 - bar_prev),
               variances=as_float32(variance), noise_schedule=noise_schedule,
               has_density=bool((variance > 0).all()))


def _timesteps(noise_schedule: NoiseSchedule, num_steps: int
               ) -> Int[np.ndarray, " num_steps"]:
  """Table 2 of arXiv:2305.08891, last timestep of the diffusion first."""
  trained = noise_schedule.num_train_timesteps
  if noise_schedule.timestep_spacing == "linspace":
    return np.linspace(0, trained - 1, num_steps).round()[::-1].astype(np.int64)
  if noise_schedule.timestep_spacing == "leading":
    steps = np.arange(num_steps) * (trained // num_steps)
    return steps[::-1] + noise_schedule.steps_offset
  # Rounding can give `arange` a step too many: its end would be timestep -1.
  exact = np.arange(trained, 0, -trained / num_steps)[:num_steps]
  return np.round(exact).astype(np.int64) - 1
