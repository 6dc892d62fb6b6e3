"""Signs in an epoch's metrics that a run does not learn, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import math
from typing import Any

from jaxtyping import UInt8
import numpy as np
from PIL import Image

from ddpo_jax.config import Config

_SIDE = 16  # pixels to which images are shrunk before they are compared
_MOST_IMAGES = 128  # that are compared, each with each
_COLLAPSE = 0.25  # of the largest diversity of the run
_CLIPPED = 0.9  # clip fraction
_RELATIVE_STD = 1e-5  # of the reward's size


def drift_tolerance(clip_range: float) -> float:
  """What `ratio_drift` may be: above a tenth of the clip range, clipping acts on noise."""
  return clip_range / 10


def remedy_of_no_finite_numbers(cfg: Config) -> str:
  """What to change where loss or gradient are not finite in step after step."""
  precision = "" if cfg.mixed_precision == "no" else ", or set mixed_precision='no'"
  return f"lower the learning rate{precision}"


def diversity(images: UInt8[np.ndarray, "N H W 3"]) -> float:
  """How far images are from each other, whatever the details.

  Returns:
    The root of the mean squared difference of two images' pixels at 16 × 16, averaged over
    pairs of the first 128: 0 if all are the same, 1 if black and white. 0 for one image.
  """
  small = np.stack([
      np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BOX))
      for image in images[:_MOST_IMAGES]])
  flat = small.reshape(len(small), -1).astype(np.float64) / 255
  count = len(flat)
  if count < 2:
    return 0.0
  norms = (flat**2).mean(axis=1)
  squares = norms[:, None] + norms - 2 * (flat @ flat.T) / flat.shape[1]
  distances = np.sqrt(np.maximum(squares, 0))
  np.fill_diagonal(distances, 0)
  return float(distances.sum() / (count * (count - 1)))


class Watch:
  """Looks at each epoch's metrics for signs of trouble, and reports each kind once."""

  def __init__(self, cfg: Config):
    self._cfg = cfg
    self._said: set[str] = set()
    self._most_diverse = 0.0

  def new_warnings(self, metrics: Mapping[str, Any]) -> list[str]:
    """Lines to show; a kind that was shown before is not shown again.

    Args:
      metrics: of an epoch, as in metrics.jsonl.
    """
    self._most_diverse = max(self._most_diverse, metrics["diversity"])
    checks: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
        "skipped_steps": self._all_skipped, "ratio_drift": self._drift, "diversity": self._collapse,
        "reward_std": self._constant_reward, "clipfrac": self._clipping}
    found = {name: check(metrics) for name, check in checks.items()
             if name not in self._said}
    lines = [f"Warning: {text}" for text in found.values() if text is not None]
    self._said |= {name for name, text in found.items() if text is not None}
    return lines

  def state_dict(self) -> dict[str, float]:
    """What later epochs are compared with, JSON-able. What was said may be said again."""
    return {"most_diverse": self._most_diverse}

  def load_state_dict(self, state: Mapping[str, Any]) -> None:
    """Restores what `state_dict` gave."""
    self._most_diverse = state["most_diverse"]

  def _all_skipped(self, metrics: Mapping[str, Any]) -> str | None:
    # Means over the steps that were taken are finite; of skipped ones either may not be.
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
      return None
    what = "loss or gradient was not finite"
    remedy = (f"With train.learning_rate={self._cfg.train.learning_rate:g}: "
              f"{remedy_of_no_finite_numbers(self._cfg)}")
    if self._cfg.mixed_precision == "fp16" and math.isfinite(metrics["loss"]):
      what = "the gradient was too large for fp16"
      remedy = ("The loss scale has been lowered for it; should this go on, set "
                "mixed_precision='bf16'")
    return (f"skipped_steps={metrics['skipped_steps']}: {what} in every optimizer step of this "
            f"epoch, and nothing was learned. {remedy}")

  def _drift(self, metrics: Mapping[str, Any]) -> str | None:
    drift, clip_range = metrics["ratio_drift"], self._cfg.train.clip_range
    if not drift > drift_tolerance(clip_range):
      return None
    if not self._cfg.train.recompute_log_probs:
      remedy = "set train.recompute_log_probs=True"
    else:
      remedy = ("set sample.batch_size to train.batch_size="
                f"{self._cfg.train.batch_size}, so that both compute in the same shapes")
    return (f"ratio_drift={drift:.2g} is above a tenth of train.clip_range={clip_range:g}: "
            "sampler and update disagree on the policy by rounding alone, and clipping acts "
            f"on noise; {remedy}, or raise train.clip_range")

  def _collapse(self, metrics: Mapping[str, Any]) -> str | None:
    now = metrics["diversity"]
    if not now < _COLLAPSE * self._most_diverse:
      return None
    return (f"diversity={now:.3g} is down from {self._most_diverse:.3g}: the images have become "
            "almost the same, whatever the prompt. The reward may be one that a single picture "
            "satisfies; look at the images, lower train.learning_rate, or keep an earlier "
            "checkpoint")

  def _constant_reward(self, metrics: Mapping[str, Any]) -> str | None:
    std, mean = metrics["reward_std"], metrics["reward_mean"]
    if not std <= _RELATIVE_STD * abs(mean):
      return None
    return (f"reward_std={std:.2g} with reward_mean={mean:.4g}: all images get the same "
            f"reward, so there is nothing to learn from. Does reward_fn="
            f"{self._cfg.reward_fn!r} fit these images and prompts (prompt_fn="
            f"{self._cfg.prompt_fn!r})?")

  def _clipping(self, metrics: Mapping[str, Any]) -> str | None:
    if not metrics["clipfrac"] > _CLIPPED:
      return None
    return (f"clipfrac={metrics['clipfrac']:.2f}: nearly every ratio leaves train.clip_range="
            f"{self._cfg.train.clip_range:g}, so most of the gradient is cut off. Steps are "
            f"too large: lower train.learning_rate={self._cfg.train.learning_rate:g} or "
            f"train.num_inner_epochs={self._cfg.train.num_inner_epochs}, or raise "
            "train.clip_range")
