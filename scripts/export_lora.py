"""Writes a run's LoRA weights as a file that other programs load.

    python scripts/export_lora.py --run logs/NAME --output lora.safetensors
    python scripts/export_lora.py --run logs/NAME --output lora.safetensors --format kohya

"diffusers" is for `pipeline.load_lora_weights("lora.safetensors")`, "kohya" for ComfyUI and
the A1111 web UI. For a run with `use_lora=False` the output is a UNet folder, for
`UNet2DConditionModel.from_pretrained`.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from ddpo_jax import interrupt
from ddpo_jax.console import ArgumentParser


def main(argv: list[str] | None = None) -> int:
  parser = ArgumentParser(description=__doc__,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--run", required=True, help="a run's folder, or a checkpoint in it")
  parser.add_argument("--output", type=pathlib.Path, required=True,
                      help="a .safetensors file; a folder for a run with use_lora=False")
  parser.add_argument("--format", choices=("diffusers", "kohya"), default="diffusers")
  parser.add_argument("--base_model", help="the run's base model, if it is not where it was")
  args = parser.parse_args(argv)
  from ddpo_jax import cli, export  # imports JAX: only once the arguments are right
  return cli.exit_status(
      lambda: export.export_run(args.run, args.output, args.format, args.base_model))


if __name__ == "__main__":
  interrupt.end_at_signals()
  sys.exit(main())
