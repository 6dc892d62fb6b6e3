"""Draws images from a run, one of its checkpoints, or a base model.

    python scripts/sample.py --run logs/NAME --prompts "a cat" "a dog" --output grid.jpg
    python scripts/sample.py --run logs/NAME --prompts_file prompts.txt --compare \\
        --output before_and_after.jpg
    python scripts/sample.py --model tiny --prompts "a red star on a white background" \\
        --output images/ --eta 0

An output that ends in .jpg, .jpeg or .png is one grid; one without such an ending, or with a
slash at the end, is a folder of single files.
"""

from __future__ import annotations

import argparse
import sys

from ddpo_jax import interrupt
from ddpo_jax.console import ArgumentParser


def parse(argv: list[str]) -> argparse.Namespace:
  parser = ArgumentParser(description=__doc__,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--run", help="a run's folder, or a checkpoint in it")
  source.add_argument("--model", help="a base model: folder, hub id or 'tiny'")
  parser.add_argument("--base_model", help="the run's base model, if it is not where it was")
  parser.add_argument("--prompts", nargs="+", action="extend", default=[],
                      help="an image is drawn for each")
  parser.add_argument("--prompts_file",
                      help="a text file with a prompt on each line; these come after --prompts")
  parser.add_argument("--output", required=True,
                      help="a .jpg or .png file for one grid, else a folder")
  parser.add_argument("--compare", action="store_true",
                      help="the base model's image beside the run's, from the same noise")
  parser.add_argument("--seed", type=int, default=0, help="of the noise; default: 0")
  parser.add_argument("--num_steps", type=int, help="default: the run's, or 50")
  parser.add_argument("--guidance_scale", type=float, help="default: the run's, or 5")
  parser.add_argument("--eta", type=float, help="in [0, 1]; default: the run's, or 1")
  parser.add_argument("--batch_size", type=int, default=8,
                      help="images at a time, which bounds the memory; default: 8")
  parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"),
                      help="default: the run's, or no")
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
  args = parse(sys.argv[1:] if argv is None else argv)
  from ddpo_jax import cli, sample_files  # imports JAX: only once the arguments are right
  return cli.exit_status(
      lambda: sample_files.sample_to_files(sample_files.SampleRequest(**vars(args))))


if __name__ == "__main__":
  interrupt.end_at_signals()
  sys.exit(main())
