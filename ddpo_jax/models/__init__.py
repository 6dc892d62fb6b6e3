"""Stable Diffusion's networks, and how to load them."""

from ddpo_jax.models.pretrained import StableDiffusion, load_pretrained

__all__ = ["StableDiffusion", "load_pretrained"]
