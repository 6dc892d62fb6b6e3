"""What a run writes: its config, lines and grids, the report, the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import datetime
import json
import math
import pathlib
import time
from typing import Any

import numpy as np

from ddpo_jax import distributed
from ddpo_jax.config import Config
from ddpo_jax.console import say
from ddpo_jax.files import append_jsonl, read_jsonl, write_atomically
from ddpo_jax.images import image_grid, number_of
from ddpo_jax.loggers import WANDB_ID, Loggers

_GRID_IMAGES = 32  # most images in one grid
_REPORT_SHARE = 0.02  # of the run's time that may go into writing the report
_METRICS, _REWARDS = "metrics.jsonl", "rewards.jsonl"


class Tracker:
  """Writes a run's results as they come. Only process 0 writes anything."""

  def __init__(self, run: pathlib.Path, cfg: Config, first_epoch: int = 0):
    """Writes the config into the run's folder, and opens the dashboards.

    What is there of `first_epoch` and later is dropped: it is about to be written again.
    """
    self._run = run
    self._num_epochs = cfg.num_epochs
    self._rewards = list(cfg.reward_fn) if isinstance(cfg.reward_fn, Mapping) else []
    self._writes = distributed.is_main()
    self._first_reward: float | None = None
    self._started = time.perf_counter()
    self._epochs_here = 0
    self._report_due = 0.0  # not before this time
    if self._writes:
      (run / "images").mkdir(parents=True, exist_ok=True)
      write_atomically(run / "config.json", json.dumps(cfg.to_dict(), indent=2) + "\n")
      self._drop_lines(first_epoch)
      self._drop_others(first_epoch)
      self._loggers = Loggers(run, cfg, first_epoch)

  def _drop_lines(self, first_epoch: int) -> None:
    for name in (_METRICS, _REWARDS):
      path = self._run / name
      kept = [line for line in read_jsonl(path) if line["epoch"] < first_epoch]
      if path.exists():
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
      if kept and name == _METRICS:
        self._first_reward = kept[0]["reward_mean"]

  def _drop_others(self, first_epoch: int) -> None:
    for path in (self._run / "images").glob("epoch_*.jpg"):
      if number_of(path) >= first_epoch:
        path.unlink()
    for path in (self._run / "images").glob("eval_*.jpg"):
      if number_of(path) > first_epoch or not first_epoch:
        path.unlink()
    if not first_epoch:
      (self._run / WANDB_ID).unlink(missing_ok=True)  # it is another run there as well

  def log_epoch(self, epoch: int, metrics: Mapping[str, Any], prompts: Sequence[str],
                rewards: np.ndarray, images: np.ndarray, shown: np.ndarray,
                info: Mapping[str, Any] | None = None) -> None:
    """Writes one epoch.

    Args:
      epoch: its number, from 0.
      metrics: of the epoch; what is not finite becomes null.
      prompts: of all N samples.
      rewards: [N].
      images: [M, H, W, 3] uint8, some or all of the epoch's.
      shown: [M], the index of each of `images` among the samples.
      info: what the rewards returned besides, `RewardInfo.per_image`.
    """
    if not self._writes:
      return
    self._epochs_here += 1
    line = {"epoch": epoch, **{name: _finite(value) for name, value in metrics.items()}}
    append_jsonl(self._run / _REWARDS, {
        "epoch": epoch, "prompts": list(prompts),
        "rewards": [float(f"{r:.6g}") for r in rewards], **({"info": info} if info else {})})
    append_jsonl(self._run / _METRICS, line)
    captions = [f"{rewards[i]:.3f} {prompts[i]}" for i in shown[:_GRID_IMAGES]]
    path = self._run / "images" / f"epoch_{epoch:04d}.jpg"
    image_grid(images[:_GRID_IMAGES], captions).save(path, quality=92)
    say(self._summary(epoch, metrics))
    self._loggers.each(lambda logger: logger.log_epoch(epoch, line, rewards, path))
    self._write_report(final=False)

  def log_eval(self, epochs: int, images: np.ndarray, prompts: Sequence[str]) -> None:
    """Writes the grid of the fixed prompts and noise, after `epochs` epochs."""
    if not self._writes:
      return
    path = self._run / "images" / f"eval_{epochs:04d}.jpg"
    drawn_again = path.exists()  # by a resumed run: dashboards have it
    image_grid(images, prompts).save(path, quality=92)
    if not drawn_again:
      self._loggers.each(lambda logger: logger.log_eval(epochs, path))

  def close(self) -> None:
    """Writes the report for the last time, and ends the dashboards."""
    if self._writes:
      self._write_report(final=True)
      self._loggers.each(lambda logger: logger.close())

  def _write_report(self, final: bool) -> None:
    """Writes the report, unless the last one was too short a time ago."""
    from ddpo_jax import report  # imports matplotlib: only in the process that writes
    started = time.perf_counter()
    if started < self._report_due and not final:
      return
    try:
      report.write_report(self._run)
    except Exception as error:  # pictures of a run must never stop it
      say(f"report.html could not be written: {error}")
    finished = time.perf_counter()
    self._report_due = finished + (finished - started) / _REPORT_SHARE

  def _summary(self, epoch: int, metrics: Mapping[str, Any]) -> str:
    mean = metrics["reward_mean"]
    if self._first_reward is None:
      self._first_reward = mean
    # The sum of several rewards says little: each is standardised anew.
    each = "".join(f"  {name} {metrics[f'reward/{name}_mean']:.3f}" for name in self._rewards)
    elapsed = time.perf_counter() - self._started
    left = elapsed / self._epochs_here * (self._num_epochs - epoch - 1)
    return (f"epoch {epoch + 1}/{self._num_epochs}  reward {mean:.3f} ± "
            f"{metrics['reward_std']:.3f} ({mean - self._first_reward:+.3f} since the "
            f"start){each}  {metrics['images_per_second']:.2f} images/s  "
            f"{datetime.timedelta(seconds=round(left))} left")


def _finite(value: Any) -> Any:
  """JSON has no NaN."""
  return None if isinstance(value, float) and not math.isfinite(value) else value
