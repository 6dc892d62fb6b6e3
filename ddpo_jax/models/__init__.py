"""Stable Diffusion's and CLIP's networks, and how to load them."""

from ddpo_jax.models.pretrained import CLIP, StableDiffusion, load_clip, load_pretrained

__all__ = ["CLIP", "StableDiffusion", "load_clip", "load_pretrained"]
