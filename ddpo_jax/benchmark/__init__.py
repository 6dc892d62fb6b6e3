"""How fast an epoch is and what memory it takes: `scripts/benchmark.py`."""
