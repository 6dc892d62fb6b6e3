"""Reinforcement learning for diffusion models: DDPO (arXiv:2305.13301) in JAX."""

__version__ = "0.1.0"
