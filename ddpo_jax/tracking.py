"""What a run writes: its folder, metrics.jsonl, image grids, the console, wandb."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import datetime
import json
import math
import os
import pathlib
import textwrap
import time
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ddpo_jax.config import Config
from ddpo_jax.types import UserError

_GRID_IMAGES = 32  # most images in one grid
_GRID_COLUMNS = 8
_TILE = 192  # pixels; smaller images are enlarged to it
_CAPTION_LINES = 3


def choose_run_folder(cfg: Config) -> pathlib.Path:
  """The run's folder: a new one, or the one that `resume_from` continues.

  Raises:
    UserError: if a run that is not to be continued is already there.
  """
  name = cfg.run_name or datetime.datetime.now().strftime("%Y.%m.%d_%H.%M.%S")
  if cfg.resume_from and not cfg.run_name:
    return _run_of(pathlib.Path(cfg.resume_from).expanduser())
  run = pathlib.Path(cfg.logdir).expanduser() / name
  if (run / "config.json").exists() and not cfg.resume_from:
    raise UserError(f"run_name={name!r}: {run} already holds a run; choose another name, "
                    f"or continue it with resume_from={str(run)!r}")
  return run


def say(text: str) -> None:
  """Prints on process 0, without tearing a progress bar."""
  if jax.process_index() == 0:
    tqdm.write(text)


def _run_of(checkpoint: pathlib.Path) -> pathlib.Path:
  """The run folder that a checkpoint, or its `checkpoints` folder, lies in."""
  for folder in (checkpoint, *checkpoint.parents):
    if folder.name == "checkpoints":
      return folder.parent
  return checkpoint


class Tracker:
  """Writes a run's results as they come. Only process 0 writes anything."""

  def __init__(self, run: pathlib.Path, cfg: Config):
    """Makes the folder `run` and writes the config into it.

    Raises:
      UserError: if the folder cannot be made.
    """
    self._run = run
    self._num_epochs = cfg.num_epochs
    self._writes = jax.process_index() == 0
    self._first_reward: float | None = None
    self._started = time.perf_counter()
    self._epochs_here = 0
    self._wandb = None
    if self._writes:
      try:
        (run / "images").mkdir(parents=True, exist_ok=True)
      except OSError as error:
        raise UserError(f"logdir={cfg.logdir!r}: {run} cannot be made: {error}") from error
      _write_atomically(run / "config.json", json.dumps(cfg.to_dict(), indent=2) + "\n")
      self._wandb = _start_wandb(run, cfg)

  def resume(self, first_epoch: int) -> None:
    """Drops the lines from `first_epoch` on, which are about to be written again."""
    path = self._run / "metrics.jsonl"
    if not self._writes or not path.exists():
      return
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    kept = [line for line in lines if line["epoch"] < first_epoch]
    _write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
    if kept:
      self._first_reward = kept[0]["reward_mean"]

  def log_epoch(self, epoch: int, metrics: Mapping[str, Any], images: np.ndarray,
                prompts: Sequence[str], rewards: np.ndarray) -> None:
    """Writes one epoch.

    Args:
      epoch: its number, from 0.
      metrics: of the epoch; what is not finite becomes null.
      images: [N, H, W, 3] uint8, some or all of the epoch's.
      prompts: of `images`.
      rewards: [N], of `images`.
    """
    if not self._writes:
      return
    self._epochs_here += 1
    line = {"epoch": epoch, **{name: _finite(value) for name, value in metrics.items()}}
    with open(self._run / "metrics.jsonl", "a", encoding="utf-8") as file:
      file.write(json.dumps(line) + "\n")
    captions = [f"{reward:.3f} {prompt}" for reward, prompt in zip(rewards, prompts)]
    path = self._run / "images" / f"epoch_{epoch:04d}.jpg"
    image_grid(images[:_GRID_IMAGES], captions[:_GRID_IMAGES]).save(path, quality=92)
    say(self._summary(epoch, metrics))
    self._to_wandb(lambda wandb: wandb.log(
        {**line, "reward": wandb_histogram(rewards), "images": wandb_image(path)},
        step=epoch))

  def close(self) -> None:
    self._to_wandb(lambda wandb: wandb.finish())

  def _summary(self, epoch: int, metrics: Mapping[str, Any]) -> str:
    mean = metrics["reward_mean"]
    if self._first_reward is None:
      self._first_reward = mean
    elapsed = time.perf_counter() - self._started
    left = elapsed / self._epochs_here * (self._num_epochs - epoch - 1)
    return (f"epoch {epoch + 1}/{self._num_epochs}  reward {mean:.3f} ± "
            f"{metrics['reward_std']:.3f} ({mean - self._first_reward:+.3f} since the "
            f"start)  {metrics['images_per_second']:.2f} images/s  "
            f"{datetime.timedelta(seconds=round(left))} left")

  def _to_wandb(self, action: Callable[[Any], None]) -> None:
    """Does something with wandb; a tracker that fails is dropped, never the run."""
    if self._wandb is None:
      return
    try:
      action(self._wandb)
    except Exception as error:  # any of the library's or the network's
      self._wandb = None
      say(f"wandb failed and is not used any more in this run: {error}")


def wandb_histogram(values: np.ndarray):
  import wandb
  return wandb.Histogram(values)


def wandb_image(path: pathlib.Path):
  import wandb
  return wandb.Image(str(path))


def _start_wandb(run: pathlib.Path, cfg: Config):
  if cfg.wandb.mode == "disabled":
    return None
  try:
    import wandb
    return wandb.init(project=cfg.wandb.project, name=run.name, config=cfg.to_dict(),
                      mode=cfg.wandb.mode, dir=str(run))
  except Exception as error:  # no login, no network, no such package
    say(f"wandb.mode={cfg.wandb.mode!r} does not work here, going on without: "
        f"{error}")
    return None


def image_grid(images: np.ndarray, captions: Sequence[str]) -> Image.Image:
  """Lays out images with a caption under each.

  Args:
    images: [N, H, W, 3] uint8, N at least 1.
    captions: N lines of text, wrapped to the image's width.
  """
  zoom = max(1, math.ceil(_TILE / images.shape[2]))
  width, height = images.shape[2] * zoom, images.shape[1] * zoom
  font = ImageFont.load_default(size=max(12, width // 16))
  letters = int(width / font.getlength("n")) - 1
  line_height = math.ceil(font.size * 1.25)
  tile_height = height + _CAPTION_LINES * line_height + 8
  columns = min(_GRID_COLUMNS, len(images))
  rows = math.ceil(len(images) / columns)
  grid = Image.new("RGB", (columns * (width + 4), rows * tile_height), "white")
  pen = ImageDraw.Draw(grid)
  for i, (image, caption) in enumerate(zip(images, captions)):
    left, top = i % columns * (width + 4), i // columns * tile_height
    tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
    grid.paste(tile, (left, top))
    lines = textwrap.wrap(caption, letters, max_lines=_CAPTION_LINES, placeholder="…")
    for row, text in enumerate(lines):
      pen.text((left + 2, top + height + 2 + row * line_height), text, fill="black",
               font=font)
  return grid


def _finite(value: Any) -> Any:
  """JSON has no NaN."""
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_atomically(path: pathlib.Path, text: str) -> None:
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)
