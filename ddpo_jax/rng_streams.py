"""Which random stream serves what: numbers that are folded into the seed's key.

Sampling folds in the epoch, so these are larger than `num_epochs` may be.
"""

LORA = 1_000_001  # initial weights
SHUFFLE = 1_000_002  # of samples and timesteps; then the epoch and the inner epoch
EVALUATION = 1_000_003  # takes an epoch's place: the fixed prompts and noise
