"""Stable Diffusion's networks, CLIP, and how to load them."""

from ddpo_jax.models.pretrained import (
    CLIP,
    StableDiffusion,
    load_clip,
    load_clip_tokenizer,
    load_pretrained,
    open_pretrained,
)
from ddpo_jax.models.weights import Unread

__all__ = ["CLIP", "StableDiffusion", "Unread", "load_clip", "load_clip_tokenizer",
           "load_pretrained", "open_pretrained"]
