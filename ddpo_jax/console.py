"""What the main process says while it runs."""

from __future__ import annotations

import sys

from tqdm import tqdm

from ddpo_jax import distributed


def say(text: str) -> None:
  """Prints on the main process at once, without tearing a progress bar."""
  if distributed.is_main():
    tqdm.write(text)
    sys.stdout.flush()  # into a file as well, where a run may be followed


def hide_bars() -> bool | None:
  """tqdm's `disable`: progress is for the main process, and for a terminal."""
  return None if distributed.is_main() else True
