"""Trains the embedded Stable Diffusion from scratch, on pictures that `tiny_scenes.py` draws.

    python scripts/make_tiny_model.py --output ddpo_jax/assets/tiny_sd

Takes an hour and a half on two CPU cores: the autoencoder first (half an hour), then the
UNet and the text encoder together. Every stage writes what it has as it goes (weights, and a
grid of pictures to look at); `--stage` runs one alone, from what the others wrote.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
import dataclasses
import functools
import json
import pathlib
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from tqdm import trange

from ddpo_jax import tiny_scenes
from ddpo_jax.cli import exit_status
from ddpo_jax.diffusion import DDIMSchedule, NoiseSchedule, sample
from ddpo_jax.errors import UserError
from ddpo_jax.models import load_clip_tokenizer, load_pretrained
from ddpo_jax.models.clip import CLIPTextConfig, CLIPTextModel
from ddpo_jax.models.pretrained import tokenize
from ddpo_jax.models.unet import UNet2DConditionModel, UNetConfig
from ddpo_jax.models.vae import AutoencoderKL, VAEConfig, to_uint8
from ddpo_jax.models.weights import load_module, save_module

_MAX_LENGTH = 77
_PICTURES_AT_ONCE = 200
_TEXT_FEATURES = 128
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"

UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 8, "in_channels": 4,
    "out_channels": 4, "block_out_channels": [64, 128, 128], "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn", "cross_attention_dim": _TEXT_FEATURES,
    "attention_head_dim": 4, "norm_num_groups": 16, "norm_eps": 1e-5, "act_fn": "silu",
    "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False,
    "downsample_padding": 1, "mid_block_scale_factor": 1,
}
VAE = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3,
    "latent_channels": 4, "block_out_channels": [16, 32, 64, 64], "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "norm_num_groups": 8, "act_fn": "silu",
    "sample_size": tiny_scenes.IMAGE_SIZE, "scaling_factor": 1.0,
}
TEXT = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
    "hidden_size": _TEXT_FEATURES, "intermediate_size": 4 * _TEXT_FEATURES,
    "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "max_position_embeddings": _MAX_LENGTH,
    "projection_dim": _TEXT_FEATURES, "attention_dropout": 0.0,
    "initializer_factor": 1.0, "initializer_range": 0.02,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085,
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "epsilon",
    "timestep_spacing": "leading", "trained_betas": None,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline", "feature_extractor": [None, None],
    "requires_safety_checker": False, "safety_checker": [None, None],
    "image_encoder": [None, None], "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}
GRID_PROMPTS = (
    "three red circles on a blue background", "a green star on a yellow background",
    "two white squares on a black background", "a purple triangle on an orange background",
    "four yellow stars on a plain purple background",
    "a blue circle on a striped white background",
    "two orange triangles on a checkered green background",
    "three black squares on a noisy red background", "one red star",
    "four green circles on a white background", "a black circle on a plain yellow background",
    "two purple stars on a plain white background",
    "an orange square on a striped blue background",
    "three white triangles on a checkered black background",
    "a yellow circle on a noisy green background", "two red squares on a blue background",
)


# ---- the folder and its tokenizer ----


def write_json(path: pathlib.Path, content: dict) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_configs(folder: pathlib.Path) -> None:
  """Everything in the folder but the weights. Keeps a scaling_factor already found."""
  vae_path = folder / "vae" / "config.json"
  vae = VAE
  if vae_path.is_file():
    vae = {**VAE, "scaling_factor": json.loads(vae_path.read_text())["scaling_factor"]}
  write_json(vae_path, vae)
  vocabulary, merges = byte_pair_encoding(tiny_scenes.vocabulary())
  special = {"bos_token": _BOS, "eos_token": _EOS, "unk_token": _EOS, "pad_token": _EOS}
  tokenizer = folder / "tokenizer"
  write_json(tokenizer / "vocab.json", vocabulary)
  (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n",
                                        encoding="utf-8")
  write_json(tokenizer / "special_tokens_map.json", special)
  write_json(tokenizer / "tokenizer_config.json",
             {"tokenizer_class": "CLIPTokenizer", "model_max_length": _MAX_LENGTH,
              "errors": "replace", "do_lower_case": True, **special})
  ids = {"bos_token_id": vocabulary[_BOS], "eos_token_id": vocabulary[_EOS],
         "pad_token_id": vocabulary[_EOS], "vocab_size": len(vocabulary)}
  write_json(folder / "text_encoder" / "config.json", {**TEXT, **ids})
  write_json(folder / "unet" / "config.json", UNET)
  write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
  write_json(folder / "model_index.json", INDEX)


def byte_pair_encoding(words: list[str]) -> tuple[dict[str, int], list[str]]:
  """CLIP's vocabulary with one token for each word: (token -> id, merges in order)."""
  symbols = byte_symbols()
  merges: list[tuple[str, str]] = []
  for word in words:
    pieces = apply_merges([*word[:-1], word[-1] + "</w>"], merges)
    while len(pieces) > 1:
      merges.append((pieces[0], pieces[1]))
      pieces = [pieces[0] + pieces[1], *pieces[2:]]
  tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges),
            _BOS, _EOS]
  return {token: i for i, token in enumerate(tokens)}, [f"{a} {b}" for a, b in merges]


def byte_symbols() -> list[str]:
  """A printable character for each byte, in the order of GPT-2's table."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in printable]
  return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def apply_merges(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
  """Applies each merge in order of rank, as the tokenizer will."""
  for left, right in merges:
    merged, i = [], 0
    while i < len(pieces):
      if pieces[i:i + 2] == [left, right]:
        merged.append(left + right)
        i += 2
      else:
        merged.append(pieces[i])
        i += 1
    pieces = merged
  return pieces


# ---- training in general ----


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """A training run's state."""

  params: tuple[nnx.State, ...]
  average: tuple[nnx.State, ...]  # exponential moving average of the above
  opt_state: optax.OptState


def make_step(loss_fn: Callable, optimizer: optax.GradientTransformation) -> Callable:
  """Jits `(state, batch, key, step) -> (state, loss)` for `loss_fn(params, batch, key)`."""

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state: State, batch, key: jax.Array, step: jax.Array):
    key = jax.random.fold_in(key, step)
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch, key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(0.999, (1.0 + step) / (10.0 + step))
    average = optax.incremental_update(params, state.average, 1 - decay)
    return State(params, average, opt_state), loss

  return train_step


def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
  schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(200, steps // 10),
                                                steps, learning_rate / 50)
  return optax.chain(optax.clip_by_global_norm(1.0),
                     optax.adamw(schedule, b2=0.99, weight_decay=1e-4))


def fit(name: str, loss_fn: Callable, params: tuple[nnx.State, ...],
        batches: Iterator, steps: int, learning_rate: float, seed: int,
        save: Callable[[tuple[nnx.State, ...]], None], save_every: int) -> None:
  """Trains, saving the averaged weights every so often and at the end."""
  optimizer = make_optimizer(learning_rate, steps)
  state = State(params, jax.tree.map(jnp.copy, params), optimizer.init(params))
  train_step = make_step(loss_fn, optimizer)
  key, recent = jax.random.key(seed), []
  with trange(steps, desc=name, dynamic_ncols=True, mininterval=5) as progress:
    for step in progress:
      state, loss = train_step(state, next(batches), key, jnp.float32(step))
      recent = [*recent[-99:], float(loss)]
      progress.set_postfix(loss=f"{np.mean(recent):.4f}")
      if (step + 1) % save_every == 0 or step + 1 == steps:
        save(state.average)


def save_grid(images: np.ndarray, path: pathlib.Path, columns: int = 8) -> None:
  """[N, H, W, 3] uint8 -> one picture, `columns` wide, each pixel doubled."""
  rows = [np.concatenate(images[i:i + columns], axis=1)
          for i in range(0, len(images), columns)]
  grid = np.concatenate(rows)
  Image.fromarray(grid).resize((grid.shape[1] * 2, grid.shape[0] * 2),
                               Image.Resampling.NEAREST).save(path)


def to_float(images: np.ndarray | jax.Array) -> jax.Array:
  """uint8 -> [-1, 1]."""
  return jnp.asarray(images, jnp.float32) / 127.5 - 1


# ---- the autoencoder ----


def picture_batches(rng: np.random.Generator, size: int) -> Iterator[np.ndarray]:
  while True:
    yield np.stack([tiny_scenes.draw(tiny_scenes.random_scene(rng), rng) for _ in range(size)])


def train_vae(args: argparse.Namespace) -> None:
  """Trains the autoencoder on freshly drawn pictures: L1 + L2 + a little KL."""
  folder, config = args.output / "vae", VAEConfig.from_dict(VAE)
  weights = folder / "diffusion_pytorch_model.safetensors"
  build = functools.partial(AutoencoderKL, config)
  vae = load_module(build, [weights]) if args.resume else build(rngs=nnx.Rngs(args.seed))
  graphdef, params = nnx.split(vae)

  def loss_fn(params, images, key):
    vae, images = nnx.merge(graphdef, *params), to_float(images)
    mean, log_variance = vae.encode(images)
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    error = vae.decode(latents) - images
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
    return jnp.mean(jnp.abs(error)) + jnp.mean(error**2) + 1e-5 * kl

  shown = next(picture_batches(np.random.default_rng(args.seed + 1), 32))

  def save(params):
    vae = nnx.merge(graphdef, *params)
    save_module(vae, weights)
    rebuilt = jax.jit(lambda vae, x: vae.decode(vae.encode(x)[0]))(vae, to_float(shown))
    pairs = np.concatenate([shown, np.asarray(to_uint8(rebuilt))], axis=1)
    save_grid(pairs, args.work / "vae.png", columns=16)

  batches = picture_batches(np.random.default_rng(args.seed), args.vae_batch)
  fit("autoencoder", loss_fn, (params,), batches, args.vae_steps, 1.5e-3, args.seed, save,
      save_every=500)


# ---- latents ----


def make_latents(args: argparse.Namespace) -> None:
  """Draws the UNet's training set and encodes it; finds the scaling factor.

  The autoencoder is rounded to half precision first, as the committed file is.
  """
  folder = args.output / "vae"
  weights = folder / "diffusion_pytorch_model.safetensors"
  vae = load_module(functools.partial(AutoencoderKL, VAEConfig.from_dict(VAE)), [weights])
  save_module(vae, weights, dtype=np.float16)
  vae = load_module(functools.partial(AutoencoderKL, VAEConfig.from_dict(VAE)), [weights])
  encode = jax.jit(lambda vae, images: vae.encode(images)[0])
  rng, size = np.random.default_rng(args.seed + 2), _PICTURES_AT_ONCE
  latents, captions = [], []
  for _ in trange(args.pictures // size, desc="latents", mininterval=5):
    scenes = [tiny_scenes.random_scene(rng) for _ in range(size)]
    images = np.stack([tiny_scenes.draw(scene, rng) for scene in scenes])
    latents.append(np.asarray(encode(vae, to_float(images))))
    captions += [[s.caption(numeral=n), s.caption(texture=False, numeral=n),
                  s.caption(background=False, numeral=n)]
                 for s, n in zip(scenes, rng.random(size) < 0.3)]
  latents = np.concatenate(latents)
  write_json(folder / "config.json", {**VAE, "scaling_factor": float(1 / latents.std())})
  np.savez(args.work / "latents.npz", latents=latents / latents.std(),
           captions=np.array(captions))


# ---- the UNet and the text encoder ----


def latent_batches(args: argparse.Namespace) -> Iterator[dict]:
  """Latents and token ids; how much each caption tells is drawn anew each time."""
  file = args.work / "latents.npz"
  if not file.is_file():
    raise UserError(f"{file} does not exist; must have been made by --stage latents")
  with np.load(file) as stored:
    latents, captions = stored["latents"], stored["captions"]
  distinct, inverse = np.unique(captions, return_inverse=True)
  tokenizer = load_clip_tokenizer(args.output / "tokenizer")
  tokens = tokenize(tokenizer, [*distinct, ""], _MAX_LENGTH)
  choices = inverse.reshape(captions.shape)
  rng = np.random.default_rng(args.seed + 3)
  while True:
    picked = rng.integers(len(latents), size=args.unet_batch)
    # Texture named in half of the captions, nothing at all in a tenth (for guidance).
    detail = rng.choice(3, size=args.unet_batch, p=[0.5, 0.35, 0.15])
    caption = choices[picked, detail]
    caption[rng.random(args.unet_batch) < 0.1] = len(distinct)
    yield {"latents": latents[picked], "tokens": tokens[caption]}


def train_unet(args: argparse.Namespace) -> None:
  """Trains UNet and text encoder together to predict noise (arXiv:2006.11239)."""
  text_config = CLIPTextConfig.from_dict(
      json.loads((args.output / "text_encoder" / "config.json").read_text()))
  builders = {
      "unet/diffusion_pytorch_model.safetensors":
          functools.partial(UNet2DConditionModel, UNetConfig.from_dict(UNET)),
      "text_encoder/model.safetensors": functools.partial(CLIPTextModel, text_config)}
  modules = [load_module(build, [args.output / name]) if args.resume else
             build(rngs=nnx.Rngs(args.seed)) for name, build in builders.items()]
  graphdefs, params = zip(*map(nnx.split, modules))
  alphas = jnp.asarray(NoiseSchedule.from_dict(SCHEDULER).alphas_cumprod)

  def loss_fn(params, batch, key):
    unet, text_encoder = map(nnx.merge, graphdefs, params)
    time_key, noise_key = jax.random.split(key)
    latents = batch["latents"]
    timesteps = jax.random.randint(time_key, latents.shape[:1], 0, len(alphas))
    noise = jax.random.normal(noise_key, latents.shape)
    alpha = alphas[timesteps][:, None, None, None]
    noisy = jnp.sqrt(alpha) * latents + jnp.sqrt(1 - alpha) * noise
    predicted = unet(noisy, timesteps, text_encoder(batch["tokens"]))
    return jnp.mean((predicted - noise) ** 2)

  def save(params):
    for name, graphdef, state in zip(builders, graphdefs, params):
      save_module(nnx.merge(graphdef, state), args.output / name, dtype=np.float16)
    draw_prompts(args.output, args.work / "prompts.png", args.seed)

  fit("UNet", loss_fn, params, latent_batches(args), args.unet_steps, 1e-3, args.seed, save,
      save_every=args.save_every)


def draw_prompts(folder: pathlib.Path, path: pathlib.Path, seed: int) -> None:
  """Samples a grid of prompts with the model in `folder`, as the demo would."""
  model = load_pretrained(folder)
  encode = jax.jit(lambda encoder, ids: encoder(ids))
  schedule = DDIMSchedule.create(model.noise_schedule, num_steps=20)
  trajectory = sample(
      model.unet, schedule, encode(model.text_encoder, model.tokenize(GRID_PROMPTS)),
      encode(model.text_encoder, model.tokenize([""])), guidance_scale=3.0,
      key=jax.random.key(seed))
  decode = jax.jit(lambda vae, x: to_uint8(vae.decode(x)))
  latents = trajectory.final_latents / model.scaling_factor
  save_grid(np.asarray(decode(model.vae, latents)), path)


STAGES = {"vae": train_vae, "latents": make_latents, "unet": train_unet}


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output", type=pathlib.Path, required=True,
                      help="the model's folder")
  parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("tiny_model_work"),
                      help="for the cached latents and the grids")
  parser.add_argument("--stage", choices=("all", *STAGES), default="all")
  parser.add_argument("--resume", action="store_true",
                      help="start from the weights in --output")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--vae_steps", type=int, default=8000)
  parser.add_argument("--vae_batch", type=int, default=8)
  parser.add_argument("--pictures", type=int, default=48_000)
  parser.add_argument("--unet_steps", type=int, default=6000)
  parser.add_argument("--unet_batch", type=int, default=32)
  parser.add_argument("--save_every", type=int, default=1000)
  args = parser.parse_args()
  if args.pictures < _PICTURES_AT_ONCE:
    parser.error(f"--pictures={args.pictures} must be at least {_PICTURES_AT_ONCE}")
  args.work.mkdir(parents=True, exist_ok=True)
  write_configs(args.output)
  for name, stage in STAGES.items():
    if args.stage in ("all", name):
      stage(args)


if __name__ == "__main__":
  sys.exit(exit_status(main))
