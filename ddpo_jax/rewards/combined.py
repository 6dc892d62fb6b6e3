"""Several rewards as one: each standardised by its own history, then weighted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Float32
import numpy as np

_EPSILON = 1e-8  # added to a standard deviation


class RewardCombiner:
  """Σ w (r − mean) / std over the reward functions.

  Mean and deviation are those of all rewards that the function has given in this run. A
  weighted sum of raw rewards would follow whichever has the largest numbers: JPEG sizes
  vary by tens of kilobytes where aesthetic scores vary by tenths.
  """

  def __init__(self, weights: Mapping[str, float]):
    """Takes each function's weight; a negative one asks for little of that reward."""
    self._weights = dict(weights)
    self._moments = {name: (0, 0.0, 0.0) for name in weights}  # count, mean, Σ(r − mean)²

  def combine(self, rewards: Mapping[str, Float[np.ndarray, " N"]]
              ) -> Float32[np.ndarray, " N"]:
    """Remembers an epoch's rewards (finite), then standardises, weights and adds them."""
    total = 0.0
    for name, weight in self._weights.items():
      values = np.asarray(rewards[name], np.float64)
      count, mean, squares = self._moments[name] = _merge(self._moments[name], values)
      total += weight * (values - mean) / (np.sqrt(squares / count) + _EPSILON)
    return np.asarray(total, np.float32)

  def state_dict(self) -> dict[str, list[float]]:
    """What is remembered, JSON-able."""
    return {name: list(moments) for name, moments in self._moments.items()}

  def load_state_dict(self, state: Mapping[str, Any]) -> None:
    """Restores what `state_dict` gave."""
    self._moments = {name: tuple(state[name]) for name in self._weights}


def _merge(moments: tuple[int, float, float], values: np.ndarray
           ) -> tuple[int, float, float]:
  """Adds values to (count, mean, sum of squared deviations), by Chan's formula."""
  count, mean, squares = moments
  total = count + len(values)
  delta = values.mean() - mean
  return (total, float(mean + delta * len(values) / total),
          float(squares + ((values - values.mean())**2).sum()
                + delta**2 * count * len(values) / total))
