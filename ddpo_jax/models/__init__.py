"""Stable Diffusion's networks, CLIP, and how to load them."""

from ddpo_jax.models.pretrained import (
    CLIP,
    StableDiffusion,
    load_clip,
    load_clip_tokenizer,
    load_pretrained,
    open_pretrained,
)
from ddpo_jax.models.weights import LazyModel

__all__ = ["CLIP", "StableDiffusion", "LazyModel", "load_clip", "load_clip_tokenizer",
           "load_pretrained", "open_pretrained"]
