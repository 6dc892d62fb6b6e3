"""Measures start, speed, memory and FLOP of a config; beside torch with --reference torch.

    python scripts/benchmark.py --config configs/demo.py --reference torch
    python scripts/benchmark.py --config configs/single_gpu.py:compressibility \
        --config.mixed_precision=bf16 --reference torch --torch_compile --output result.json
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for `configs`

from ddpo_jax import interrupt  # noqa: E402

if __name__ == "__main__":
  interrupt.end_at_signals()
  from ddpo_jax.benchmark import compare  # slow: only once a signal is answered
  sys.exit(compare.main(sys.argv))
