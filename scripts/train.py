"""Fine-tunes a diffusion model with DDPO.

    python scripts/train.py --config configs/demo.py
    python scripts/train.py --config configs/dgx.py:compressibility \
        --config.sample.batch_size=4 --config.run_name=my_run
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for `configs`

from ddpo_jax import interrupt  # noqa: E402

if __name__ == "__main__":
  interrupt.end_at_signals()
  from ddpo_jax import cli  # slow: only once a signal is answered
  interrupt.leave(cli.main())
