"""Rewards -> advantages, on the host, in float64 inside and float32 outside."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float, Float32
import numpy as np

_TRACKED_EPSILON = 1e-6  # ddpo-pytorch's, added to a standard deviation
_UNTRACKED_EPSILON = 1e-8


def normalize(rewards: Float[np.ndarray, " N"]) -> Float32[np.ndarray, " N"]:
  """(r − mean) / (std + 1e-8) over the whole batch."""
  rewards = _checked(rewards)
  return ((rewards - rewards.mean()) / (rewards.std() + _UNTRACKED_EPSILON)
          ).astype(np.float32)


class PerPromptStatTracker:
  """Standardises each reward by the recent rewards of its own prompt."""

  def __init__(self, buffer_size: int, min_count: int):
    """Keeps `buffer_size` rewards a prompt; uses them once there are `min_count`."""
    self._buffer_size = buffer_size
    self._min_count = min_count
    self._buffers: dict[str, collections.deque[float]] = {}

  def update(self, prompts: Sequence[str], rewards: Float[np.ndarray, " N"]
             ) -> Float32[np.ndarray, " N"]:
    """Remembers the rewards, then standardises them.

    Args:
      prompts: N prompts, whole: what the tokenizer would cut off counts.
      rewards: finite.

    Returns:
      Advantages: (r − mean) / (std + 1e-6), with the batch's mean and std for
      prompts that have fewer than `min_count` rewards.
    """
    rewards = _checked(rewards)
    if len(prompts) != len(rewards):
      raise ValueError(f"{len(prompts)} prompts for {len(rewards)} rewards")
    for prompt, reward in zip(prompts, rewards):
      self._buffer(prompt).append(float(reward))
    statistics = {prompt: self._statistics(prompt, rewards) for prompt in set(prompts)}
    mean, std = np.array([statistics[prompt] for prompt in prompts]).T
    return ((rewards - mean) / std).astype(np.float32)

  def get_stats(self) -> dict[str, dict[str, float]]:
    """Mean, std and count of each prompt's remembered rewards, as ddpo-pytorch gives them."""
    return {prompt: {"mean": float(np.mean(buffer)), "std": float(np.std(buffer)),
                     "count": len(buffer)} for prompt, buffer in self._buffers.items()}

  def state_dict(self) -> dict[str, list[float]]:
    """The remembered rewards, JSON-able."""
    return {prompt: list(buffer) for prompt, buffer in self._buffers.items()}

  def load_state_dict(self, state: Mapping[str, Any]) -> None:
    """Restores what `state_dict` gave."""
    self._buffers = {prompt: collections.deque(buffer, maxlen=self._buffer_size)
                     for prompt, buffer in state.items()}

  def _buffer(self, prompt: str) -> collections.deque[float]:
    return self._buffers.setdefault(prompt, collections.deque(maxlen=self._buffer_size))

  def _statistics(self, prompt: str, batch: np.ndarray) -> tuple[float, float]:
    buffer = self._buffers[prompt]
    values = batch if len(buffer) < self._min_count else np.array(buffer)
    return values.mean(), values.std() + _TRACKED_EPSILON


def _checked(rewards: np.ndarray) -> Float[np.ndarray, " N"]:
  rewards = np.asarray(rewards, np.float64)
  if rewards.ndim != 1 or not np.isfinite(rewards).all():
    raise ValueError(f"rewards of shape {rewards.shape} must be a vector of finite "
                     f"numbers: {rewards}")
  return rewards
