"""Dashboards that follow a run: Weights & Biases, TensorBoard.

None of them may ever stop a run: one that fails is dropped, and said to be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import pathlib
import secrets
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ddpo_jax.config import Config
from ddpo_jax.console import say

WANDB_ID = "wandb_id.txt"  # in the run's folder


class Logger(Protocol):
  """What a dashboard does with a run."""

  name: str

  def log_epoch(self, epoch: int, metrics: Mapping[str, Any], rewards: np.ndarray,
                grid: pathlib.Path) -> None:
    """Shows an epoch's metrics, its rewards [N] as a histogram, and its images."""
    ...

  def log_eval(self, epochs: int, grid: pathlib.Path) -> None:
    """Shows the images of the fixed prompts after `epochs` epochs."""
    ...

  def close(self) -> None:
    ...


class WandbLogger:
  """Weights & Biases; a resumed run goes on in the same run there."""

  name = "wandb"

  def __init__(self, run: pathlib.Path, cfg: Config):
    import wandb
    self._wandb = wandb
    mode: Any = cfg.wandb.mode
    wandb.init(project=cfg.wandb.project, name=run.name, config=cfg.to_dict(),
               mode=mode, dir=str(run), id=_wandb_id(run), resume="allow")

  def log_epoch(self, epoch: int, metrics: Mapping[str, Any], rewards: np.ndarray,
                grid: pathlib.Path) -> None:
    self._wandb.log({**metrics, "reward": self._wandb.Histogram(rewards.tolist()),
                     "images": self._wandb.Image(str(grid))}, step=epoch)

  def log_eval(self, epochs: int, grid: pathlib.Path) -> None:
    self._wandb.log({"eval_images": self._wandb.Image(str(grid))}, step=max(0, epochs - 1))

  def close(self) -> None:
    self._wandb.finish()


class TensorBoardLogger:
  """Event files in the run's folder, for `tensorboard --logdir`."""

  name = "tensorboard"

  def __init__(self, run: pathlib.Path, first_epoch: int):
    from tensorboardX import SummaryWriter  # an extra
    # What a killed run wrote of the epochs that are done again is not shown.
    self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_epoch)

  def log_epoch(self, epoch: int, metrics: Mapping[str, Any], rewards: np.ndarray,
                grid: pathlib.Path) -> None:
    for name, value in metrics.items():
      if isinstance(value, (int, float)):
        self._writer.add_scalar(name, value, epoch)
    self._writer.add_histogram("reward", rewards, epoch)
    self._add_image("images", grid, epoch)

  def log_eval(self, epochs: int, grid: pathlib.Path) -> None:
    self._add_image("eval_images", grid, max(0, epochs - 1))

  def close(self) -> None:
    self._writer.close()

  def _add_image(self, name: str, grid: pathlib.Path, epoch: int) -> None:
    with Image.open(grid) as image:
      self._writer.add_image(name, np.asarray(image), epoch, dataformats="HWC")
    self._writer.flush()


class Loggers:
  """Those that the config asks for and that work here."""

  def __init__(self, run: pathlib.Path, cfg: Config, first_epoch: int):
    self._loggers: list[Logger] = []
    if cfg.wandb.mode != "disabled":
      self._start(f"wandb.mode={cfg.wandb.mode!r}", lambda: WandbLogger(run, cfg))
    if cfg.tensorboard:
      self._start("tensorboard=True (pip install -e '.[tensorboard]')",
                  lambda: TensorBoardLogger(run, first_epoch))

  def each(self, action: Callable[[Logger], None]) -> None:
    """Does something with every logger that has not failed yet."""
    for logger in list(self._loggers):
      try:
        action(logger)
      except Exception as error:  # any of the library's or the network's
        self._loggers.remove(logger)
        say(f"{logger.name} failed; continuing without it: {error}")

  def _start(self, setting: str, make: Callable[[], Logger]) -> None:
    try:
      self._loggers.append(make())
    except Exception as error:  # no login, no network, no such package
      say(f"{setting} does not work here; continuing without it: {error}")


def _wandb_id(run: pathlib.Path) -> str:
  """Kept in the run's folder, for the next start."""
  path = run / WANDB_ID
  if not path.exists():
    path.write_text(secrets.token_hex(4), encoding="utf-8")
  return path.read_text(encoding="utf-8").strip()
