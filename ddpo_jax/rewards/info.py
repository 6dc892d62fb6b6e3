"""What rewards return besides the rewards: checked, and in order of the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float32
import numpy as np

from ddpo_jax import distributed
from ddpo_jax.console import say
from ddpo_jax.messages import shown

_Key = tuple[str, str]  # the reward function, and the name in its dict


@dataclasses.dataclass(frozen=True)
class RewardInfo:
  """What to log of an epoch's N samples besides their rewards."""

  numbers: Mapping[_Key, Float32[np.ndarray, " N"]]  # NaN where a batch did not have it
  texts: Mapping[_Key, list[Any]]  # N texts or lists of texts; None likewise

  def means(self) -> dict[str, float]:
    """For metrics.jsonl: the mean of each number over the samples where it is finite."""
    return {f"reward/{name}/{key}_mean": _finite_mean(values)
            for (name, key), values in self.numbers.items()}

  def per_image(self) -> dict[str, dict[str, list[Any]]]:
    """For rewards.jsonl: by reward function and name, N values each; None for no value."""
    nested: dict[str, dict[str, list[Any]]] = {}
    for (name, key), numbers in self.numbers.items():
      nested.setdefault(name, {})[key] = [
          float(f"{x:.6g}") if np.isfinite(x) else None for x in numbers]
    for (name, key), texts in self.texts.items():
      others = nested.setdefault(name, {}).get(key, [None] * len(texts))
      nested[name][key] = [other if text is None else text
                           for text, other in zip(texts, others)]
    return nested


class InfoCollector:
  """Keeps of the rewards' dicts what can be logged, and says once what cannot.

  That is, under each name: a number for each image, or one for all of them; a text, or a
  list of texts, for each image. The dicts are the users' own, so nothing in them may stop
  a run.
  """

  def __init__(self) -> None:
    self._said: set[tuple[str, str]] = set()

  def collect(self, batches: Sequence[Mapping[str, Mapping[Any, Any]]], indices: np.ndarray,
              total: int) -> RewardInfo:
    """Puts an epoch's dicts together; every process must call it.

    Numbers are gathered from all processes, those under the names that process 0 has.
    Texts are not: of another process's samples they are None.

    Args:
      batches: of each batch, the dict of each reward function.
      indices: [batches, samples], the sample index of each of this process's samples.
      total: N, the number of samples of all processes.
    """
    usable = [self._usable(batch, indices.shape[1]) for batch in batches]
    absent = np.full(indices.shape[1], np.nan, np.float32)
    numbers: dict[_Key, np.ndarray] = {}
    for key in _agreed([key for batch in usable for key, values in batch.items()
                        if isinstance(values, np.ndarray)]):
      rows = [batch.get(key) for batch in usable]
      numbers[key] = distributed.gather_samples(np.stack(
          [row if isinstance(row, np.ndarray) else absent for row in rows]))
    texts: dict[_Key, list[Any]] = {}
    for batch, positions in zip(usable, indices):
      for key, values in batch.items():
        if isinstance(values, list):
          of_all = texts.setdefault(key, [None] * total)
          for position, value in zip(positions, values):
            of_all[position] = value
    return RewardInfo(numbers, texts)

  def _usable(self, batch: Mapping[str, Mapping[Any, Any]], count: int
              ) -> dict[_Key, np.ndarray | list[Any]]:
    usable: dict[_Key, np.ndarray | list[Any]] = {}
    for name, info in batch.items():
      for key, value in info.items():
        values = _for_each_image(value, count) if isinstance(key, str) else None
        if values is not None:
          usable[name, key] = values
        else:
          self._say_once(name, shown(key), f"a {type(value).__name__} is not logged; must be "
                         f"a number, or {count} numbers or texts, one for each image, under a "
                         "name that is a text")
    return usable

  def _say_once(self, name: str, key: str, problem: str) -> None:
    if (name, key) not in self._said:
      self._said.add((name, key))
      say(f"Warning: reward_fn={name!r}, in its dict under {key}: {problem}")


def _for_each_image(value: Any, count: int) -> Float32[np.ndarray, " B"] | list[Any] | None:
  """`count` numbers, or as many texts; None if the value is neither."""
  try:
    if _is_list(value) and len(value) == count and all(map(_is_text, value)):
      return list(value)
    array = unmasked(value)
    is_number = array.dtype.kind in "biu" or jnp.issubdtype(array.dtype, jnp.floating)
    if not is_number or array.shape not in ((), (count,)):
      return None
    with np.errstate(over="ignore"):
      return np.broadcast_to(array.astype(np.float32), (count,))
  except Exception:  # whatever the value's own type raises
    return None


def unmasked(value: Any) -> np.ndarray:
  """As an array, with NaN for what a masked array hides."""
  array = np.asarray(value)
  hidden = np.ma.getmaskarray(value) if isinstance(value, np.ma.MaskedArray) else False
  return np.where(hidden, np.nan, array) if np.any(hidden) else array


def _is_list(value: Any) -> bool:
  return isinstance(value, (list, tuple)) or (
      isinstance(value, np.ndarray) and value.ndim == 1)


def _is_text(value: Any) -> bool:
  return isinstance(value, str) or (
      isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value))


def _agreed(keys: Sequence[_Key]) -> list[_Key]:
  """Process 0's keys, each once."""
  distinct = json.dumps(list(dict.fromkeys(keys)))
  return [(name, key) for name, key in json.loads(distributed.broadcast_from_main(distinct))]


def _finite_mean(values: np.ndarray) -> float:
  finite = values[np.isfinite(values)]
  return float(finite.mean(dtype=np.float64)) if finite.size else float("nan")
