"""Loading: every layout that occurs in the wild, and every way a folder can be wrong."""

import json
import logging
import pathlib
import shutil
import subprocess
import sys
import types
import unittest.mock

from flax import nnx
import huggingface_hub
from huggingface_hub import errors as hub_errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_model import small_config, small_model

from ddpo_jax import build, model_size
from ddpo_jax.config import resolve
from ddpo_jax.diffusion import NoiseSchedule
from ddpo_jax.errors import UserError
from ddpo_jax.models import hub as model_hub
from ddpo_jax.models import load_pretrained, pretrained, weights
from ddpo_jax.models.clip import CLIPTextConfig, CLIPTextModel
from ddpo_jax.models.unet import UNet2DConditionModel, UNetConfig
from ddpo_jax.models.vae import AutoencoderKL, VAEConfig

TINY = pathlib.Path(__file__).parent / "golden" / "tiny-sd"
UNET = "unet/diffusion_pytorch_model"
VAE = "vae/diffusion_pytorch_model"
TEXT = "text_encoder/model"


@pytest.fixture
def folder(tmp_path):
  """A copy of the golden model that a test may damage."""
  return pathlib.Path(shutil.copytree(TINY, tmp_path / "model"))


def rewrite(folder, stem, change):
  """Applies `change` to the tensors of one file."""
  path = folder / f"{stem}.safetensors"
  tensors = load_file(path)
  tensors = change(tensors) or tensors
  save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)


def leaves(model):
  return [np.asarray(x, np.float32) for part in (model.unet, model.vae,
                                                 model.text_encoder)
          for x in jax.tree.leaves(nnx.state(part))]


def assert_same_weights(ours, expected):
  for a, b in zip(leaves(ours), leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)


def rename(tensors, pairs):
  out = {}
  for name, tensor in tensors.items():
    for old, new in pairs:
      name = name.replace(old, new)
    out[name] = tensor
  return out


def test_old_and_new_vae_attention_names(folder, tiny_sd):
  old = [("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."),
         ("to_out.0.", "proj_attn.")]
  for pairs in (old, [(new, name) for name, new in old]):
    rewrite(folder, VAE, lambda tensors, pairs=pairs: rename(tensors, pairs))
    assert_same_weights(load_pretrained(folder), tiny_sd)


def test_with_and_without_text_model_prefix(folder, tiny_sd):
  rewrite(folder, TEXT, lambda t: {k.removeprefix("text_model."): v for k, v in t.items()})
  assert_same_weights(load_pretrained(folder), tiny_sd)
  rewrite(folder, TEXT, lambda t: {f"text_model.{k}": v for k, v in t.items()})
  assert_same_weights(load_pretrained(folder), tiny_sd)


def test_projections_as_linear_or_as_convolution(folder, tiny_sd):
  def to_linear(tensors):
    return {k: v[..., 0, 0] if "proj_in.weight" in k or "proj_out.weight" in k else v
            for k, v in tensors.items()}
  rewrite(folder, UNET, to_linear)
  rewrite(folder, VAE, lambda t: {k: v[..., None, None] if "attentions" in k and
                                  v.ndim == 2 else v for k, v in t.items()})
  assert_same_weights(load_pretrained(folder), tiny_sd)


def test_sharded_and_fp16_files(folder, tiny_sd):
  tensors = load_file(folder / f"{UNET}.safetensors")
  (folder / f"{UNET}.safetensors").unlink()
  names = sorted(tensors)
  halves = {f"diffusion_pytorch_model-0000{i}-of-00002.safetensors": names[i - 1::2]
            for i in (1, 2)}
  for file, part in halves.items():
    save_file({name: tensors[name] for name in part}, folder / "unet" / file)
  index = folder / f"{UNET}.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {n: f for f, p in halves.items() for n in p}}))
  (folder / f"{TEXT}.safetensors").rename(folder / f"{TEXT}.fp16.safetensors")
  assert_same_weights(load_pretrained(folder), tiny_sd)

  index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../elsewhere.safetensors"}}))
  with pytest.raises(UserError, match="elsewhere"):
    load_pretrained(folder)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_dtype_asked_for(dtype):
  model = load_pretrained(TINY, dtype=dtype)
  for part in (model.unet, model.vae, model.text_encoder):
    assert {x.dtype for x in jax.tree.leaves(nnx.state(part))} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("part", ("unet", "vae", "text_encoder"))
def test_saved_files_are_the_loaded_ones(part, tiny_sd, tmp_path):
  weights.save_module(getattr(tiny_sd, part), tmp_path / "x.safetensors")
  stem = model_hub.WEIGHT_NAMES[part]
  original = {weights._canonical(k): v for k, v in
              load_file(TINY / part / f"{stem}.safetensors").items()
              if "position_ids" not in k}
  saved = load_file(tmp_path / "x.safetensors")
  assert saved.keys() == original.keys()
  for name, tensor in saved.items():
    np.testing.assert_array_equal(tensor, original[name])


def drop(name):
  return lambda tensors: {k: v for k, v in tensors.items() if k != name}


@pytest.mark.parametrize("stem,change,message", [
    (UNET, drop("conv_in.weight"), r"1 tensors missing: conv_in\.weight"),
    (UNET, lambda t: {**t, "extra.weight": np.zeros(2, np.float32)}, "extra.weight"),
    (VAE, lambda t: {**t, "decoder.conv_in.bias": np.zeros(3, np.float32)},
     "1 tensors misshapen: decoder.conv_in.bias"),
    (TEXT, drop("text_model.final_layer_norm.bias"), "final_layer_norm.bias"),
    (TEXT, lambda t: {**t, "final_layer_norm.bias": np.zeros(32, np.float32)},
     "1 tensors there twice: (text_model.)?final_layer_norm.bias"),
    *((UNET, lambda t, dtype=dtype: {**t, "conv_in.weight": t["conv_in.weight"].astype(dtype)},
       f"1 tensors of another dtype than F64, F32, F16, BF16: conv_in.weight {name}$")
      for dtype, name in ((np.int8, "I8"), (jnp.float8_e4m3fn, "F8_E4M3"))),
])
def test_wrong_tensors_are_listed(folder, stem, change, message):
  rewrite(folder, stem, change)
  with pytest.raises(UserError, match=message) as error:
    load_pretrained(folder)
  assert str(error.value).count(" tensors ") == 1  # one problem, said once


def test_opened_and_not_read(folder, tiny_sd):
  """The shapes, dtypes and structure that reading gives; the weights are read when asked for."""
  model = pretrained.open_pretrained(folder, dtype=jnp.float16)
  read = model.read()
  for part in ("unet", "vae", "text_encoder"):
    (graphdef, shapes), (of_read, weights) = (
        nnx.split(getattr(each, part)) for each in (model.shapes, read))
    assert graphdef == of_read
    assert jax.tree.structure(shapes) == jax.tree.structure(weights)
    for shape, weight in zip(jax.tree.leaves(shapes), jax.tree.leaves(weights)):
      assert isinstance(shape, jax.ShapeDtypeStruct)
      assert (shape.shape, shape.dtype) == (weight.shape, weight.dtype)
  opened = pretrained.open_pretrained(folder)
  (folder / f"{UNET}.safetensors").unlink()
  with pytest.raises(UserError, match="cannot be read as safetensors"):
    opened.read()


def size_of(folder):
  return model_size.model_size(resolve(small_config(**{"pretrained.model": str(folder)})))


def test_a_pointer_to_a_large_file_is_said_to_be_one(folder):
  (folder / f"{UNET}.safetensors").write_text(
      "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 335\n")
  for read in (load_pretrained, size_of):
    with pytest.raises(UserError, match="it is a pointer of Git LFS, whose file `git lfs pull` fe"):
      read(folder)


def edit_json(path, **changes):
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("sample_size,numbers", ((16, 16 * 16 * 4), ([8, 24], 8 * 24 * 4),
                                                 (None, 64 * 64 * 4)))
def test_the_size_of_an_images_latent(folder, sample_size, numbers):
  edit_json(folder / "unet" / "config.json", sample_size=sample_size)
  assert size_of(folder).latent_size == numbers


@pytest.mark.parametrize("version,written,size", (
    ("0.6.0", 32, 64), ("0.8.1", 32, 64), ("0.9.0", 32, 32), ("0.17.1", 32, 32), ("0.6.0", 96, 96),
    ("0.6.0", [32, 32], (32, 32)), ("0.6.0", None, None), (None, 32, 32)))
def test_old_configs_that_say_a_smaller_size(folder, version, written, size):
  """As in diffusers' pipeline, and wherever the size is read."""
  values = {"sample_size": written, "_diffusers_version": version}
  assert UNetConfig.from_dict(values).sample_size == size
  edit_json(folder / "unet" / "config.json", **values)
  height, width = size if isinstance(size, tuple) else (size or 64,) * 2
  assert size_of(folder).latent_size == height * width * 4


@pytest.mark.parametrize("damage,message", [
    (lambda f: shutil.rmtree(f / "vae"), "vae"),
    (lambda f: (f / "unet" / "config.json").unlink(), "unet.config.json"),
    (lambda f: (f / "unet" / "config.json").write_text("{"), "JSON"),
    (lambda f: (f / f"{UNET}.safetensors").unlink(), "must hold the weights"),
    (lambda f: (f / f"{UNET}.safetensors").rename(f / f"{UNET}.bin"), "pickled"),
    (lambda f: (f / f"{VAE}.safetensors").write_bytes(b"\x08" * 20), "safetensors"),
    (lambda f: (f / "tokenizer" / "merges.txt").unlink(), "merges.txt"),
    (lambda f: (f / "tokenizer" / "merges.txt").write_text(""), "merges.txt has no merge rules"),
    (lambda f: (f / "tokenizer" / "merges.txt").write_text("#version: 0.2\n\n"),
     "merges.txt has no merge rules"),
    (lambda f: (f / "tokenizer" / "merges.txt").write_bytes(b"\xff"), "merges.txt cannot be read"),
    (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "scheduler_config"),
    (lambda f: edit_json(f / "model_index.json",
                         _class_name="StableDiffusionXLPipeline"), "XLPipeline"),
    (lambda f: edit_json(f / "unet" / "config.json", class_embed_type="timestep"),
     "class_embed_type"),
    (lambda f: edit_json(f / "unet" / "config.json", layers_per_block="2"),
     "unet.config.json does not describe a network"),
    (lambda f: edit_json(f / "unet" / "config.json", block_out_channels=32),
     "unet.config.json has a value of the wrong kind"),
    (lambda f: edit_json(f / "vae" / "config.json", norm_num_groups=5),
     r"vae.config.json does not describe a network.*\(5\)"),
    (lambda f: edit_json(f / "vae" / "config.json", block_out_channels=[]),
     "vae.config.json does not describe a network"),
    (lambda f: edit_json(f / "scheduler" / "scheduler_config.json", beta_start=None),
     "scheduler_config.json has a value of the wrong kind"),
    (lambda f: edit_json(f / "unet" / "config.json", cross_attention_dim=48),
     "hidden_size=32 must equal the UNet's cross_attention_dim=48"),
    (lambda f: edit_json(f / "vae" / "config.json", latent_channels=8),
     "latent_channels=8 must equal the UNet's in_channels=4"),
    (lambda f: edit_json(f / "text_encoder" / "config.json", vocab_size=500),
     "tokenizer has 530 tokens"),
])
def test_damaged_folders_are_refused_by_name(folder, damage, message):
  damage(folder)
  with pytest.raises(UserError, match=message) as error:
    load_pretrained(folder)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("config,field,value", [
    (UNetConfig, "in_channels", 9), (UNetConfig, "num_class_embeds", 10),
    (UNetConfig, "addition_embed_type", "text_time"),
    (UNetConfig, "mid_block_type", "UNetMidBlock2D"),
    (UNetConfig, "down_block_types", ["AttnDownBlock2D"] * 4),
    (UNetConfig, "transformer_layers_per_block", [1, 2, 10]),
    (UNetConfig, "resnet_time_scale_shift", "scale_shift"),
    (UNetConfig, "act_fn", "tanh"), (UNetConfig, "a_field_of_tomorrow", 3),
    (UNetConfig, "attention_head_dim", [5, 10]), (UNetConfig, "attention_head_dim", 7),
    (UNetConfig, "attention_head_dim", [8, 8, 8, 7]),  # of the middle, which attends
    (UNetConfig, "layers_per_block", [2, 2, 2]), (UNetConfig, "layers_per_block", [2] * 5),
    (CLIPTextConfig, "num_attention_heads", 7), (VAEConfig, "scaling_factor", 0),
    (VAEConfig, "up_block_types", ["AttnUpDecoderBlock2D"]),
    (VAEConfig, "use_quant_conv", False),
    (CLIPTextConfig, "hidden_act", "swish2"), (CLIPTextConfig, "use_attention_mask", True),
])
def test_configs_that_ask_for_more_are_refused_by_field(config, field, value):
  with pytest.raises(UserError, match=field):
    config.from_dict({field: value})


def test_stable_diffusions_old_configs_do_not_say_how_latents_are_scaled():
  assert VAEConfig.from_dict({}).scaling_factor == 0.18215


def test_a_folder_may_be_of_the_pipeline_that_starts_from_an_image(folder):
  """It has the same networks."""
  edit_json(folder / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline")
  load_pretrained(folder)


@pytest.mark.parametrize("values", (
    {"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"_class_name": "EDMEulerScheduler"},
    {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}))
def test_schedulers_of_other_processes_are_refused(values):
  with pytest.raises(UserError, match="^scheduler config: _class_name='.* is of another process"):
    NoiseSchedule.of_pipeline(values)
  NoiseSchedule.of_pipeline({"_class_name": "DPMSolverMultistepScheduler",
                             "use_flow_sigmas": False})


def test_weights_that_are_trained_are_read_in_float32(tmp_path):
  """A checkpoint or an export in half precision would have lost the digits of the others."""
  cfg = resolve(small_config(mixed_precision="fp16", use_lora=False))
  model, expected = build.open_model(cfg).read(), load_pretrained(small_model())
  for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m.unet)) for m in (model, expected))):
    np.testing.assert_array_equal(ours, theirs)
  assert model.vae.decoder.conv_in.kernel.dtype == jnp.float16
  lora = build.open_model(resolve(small_config(mixed_precision="fp16"))).shapes
  assert lora.unet.conv_in.kernel.dtype == jnp.float16


# What the hub's files say, and how many parameters their networks have.
CROSS = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
HUB_CONFIGS = {
    "unet 1.4": (UNet2DConditionModel, UNetConfig, 859_520_964, {
        "_class_name": "UNet2DConditionModel", "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768,
        "down_block_types": CROSS, "dropout": 0.0, "freq_shift": 0, "in_channels": 4,
        "layers_per_block": 2, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}),
    "unet 2.1": (UNet2DConditionModel, UNetConfig, 865_910_724, {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu",
        "attention_head_dim": [5, 10, 20, 20],
        "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False,
        "cross_attention_dim": 1024, "down_block_types": CROSS, "downsample_padding": 1,
        "dual_cross_attention": False, "flip_sin_to_cos": True, "freq_shift": 0,
        "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
        "norm_eps": 1e-05, "norm_num_groups": 32, "num_class_embeds": None,
        "only_cross_attention": False, "out_channels": 4, "sample_size": 96,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "upcast_attention": True, "use_linear_projection": True}),
    "vae": (AutoencoderKL, VAEConfig, 83_653_863, {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "force_upcast": True,
        "block_out_channels": [128, 256, 512, 512], "in_channels": 3,
        "latent_channels": 4, "down_block_types": ["DownEncoderBlock2D"] * 4,
        "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
        "sample_size": 768, "up_block_types": ["UpDecoderBlock2D"] * 4}),
    "text encoder 1.4": (CLIPTextModel, CLIPTextConfig, 123_060_480, {
        "architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu",
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
        "num_hidden_layers": 12, "projection_dim": 768, "torch_dtype": "float32"}),
    "text encoder 2.1": (CLIPTextModel, CLIPTextConfig, 340_387_840, {
        "architectures": ["CLIPTextModel"], "hidden_act": "gelu", "hidden_size": 1024,
        "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23,
        "projection_dim": 512, "torch_dtype": "float16"}),
}


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_hub_configs_give_networks_of_the_known_size(name):
  cls, config_cls, parameters, values = HUB_CONFIGS[name]
  rngs = types.SimpleNamespace(params=lambda: jax.random.key(0))  # fast to trace
  network = nnx.eval_shape(lambda: cls(config_cls.from_dict(values), rngs=rngs))
  assert sum(x.size for x in jax.tree.leaves(nnx.state(network))) == parameters


@pytest.mark.parametrize("path", ("no_such_folder", "./owner/name", "a/b/c", ""))
def test_neither_folder_nor_hub_id(path):
  with pytest.raises(UserError, match="does not exist"):
    model_hub.model_folder(path)


def test_hub_files_are_chosen_once():
  names = ["model_index.json", "unet/config.json", f"{UNET}.safetensors", f"{UNET}.bin",
           f"{UNET}.fp16.safetensors", f"{TEXT}.fp16.safetensors",
           "text_encoder/config.json", "vae/config.json", f"{VAE}.safetensors",
           "tokenizer/vocab.json", "tokenizer/merges.txt", "v1-5-pruned.ckpt",
           "scheduler/scheduler_config.json", "safety_checker/model.safetensors"]
  chosen = model_hub.DIFFUSERS_REPOSITORY.choose(names)
  assert set(names) - set(chosen) == {
      f"{UNET}.bin", f"{UNET}.fp16.safetensors", "v1-5-pruned.ckpt",
      "safety_checker/model.safetensors"}
  assert len(chosen) == len(set(chosen))


@pytest.fixture
def hub(monkeypatch, tmp_path):
  """A hub that raises `hub.error`, with an empty cache folder `hub.cache`."""
  hub = types.SimpleNamespace(error=ConnectionError("no\nnetwork"), cache=tmp_path / "hub")

  def refuse(*args, **kwargs):
    raise hub.error

  monkeypatch.setattr(huggingface_hub, "list_repo_files", refuse)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub.cache))
  return hub


def test_unreachable_hub_is_said_in_one_line(hub):
  with pytest.raises(UserError, match="'some/model' is not a local folder.*no network"):
    load_pretrained("some/model")


def test_downloaded_model_loads_without_network(hub, tiny_sd):
  """What was downloaded is part of the repository: its other files are never asked for."""
  repository = hub.cache / "models--some--model"
  shutil.copytree(TINY, repository / "snapshots" / ("0" * 40))
  (repository / "refs").mkdir()
  (repository / "refs" / "main").write_text("0" * 40)
  assert_same_weights(load_pretrained("some/model"), tiny_sd)
  with pytest.raises(UserError, match="cannot be downloaded"):
    load_pretrained("some/model", revision="fp16")


@pytest.mark.parametrize("error,message", [
    (hub_errors.GatedRepoError, "is gated"),
    (hub_errors.RepositoryNotFoundError, "neither a local folder nor a public hub"),
    (hub_errors.RevisionNotFoundError, "revision='fp17' does not exist"),
])
@pytest.mark.parametrize("at", ("list_repo_files", "snapshot_download"))
def test_hub_refusals_are_told_apart(hub, monkeypatch, at, error, message):
  """A gated repository may be listed by anyone, and refuses only the download."""
  hub.error = error("", response=unittest.mock.MagicMock())
  if at == "snapshot_download":
    monkeypatch.setattr(huggingface_hub, at, huggingface_hub.list_repo_files)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *a, **k: [])
  with pytest.raises(UserError, match=message):
    load_pretrained("some/model", revision="fp17")


def test_weights_are_downloaded_of_the_revision_and_never_pickled(hub, monkeypatch):
  """Most repositories have pickled ones beside the others, which are left there."""
  names = [f"{stem}{ending}" for stem in (UNET, VAE, TEXT) for ending in (".bin", ".safetensors")]
  downloads = []

  def download(repo, revision, allow_patterns):
    downloads.append((repo, revision, allow_patterns))
    return str(TINY)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  monkeypatch.setattr(huggingface_hub, "list_repo_files",
                      lambda repo, revision: names if revision == "v1" else [])
  assert model_hub.model_folder("some/model", "v1") == TINY
  assert downloads == [("some/model", "v1", [f"{x}.safetensors" for x in (UNET, VAE, TEXT)])]
  names.remove(f"{VAE}.safetensors")
  with pytest.raises(UserError, match=f"{VAE}.bin has only pickled weights"):
    model_hub.model_folder("some/model", "v1")
  assert len(downloads) == 1


def test_name_that_no_repository_can_have():
  with pytest.raises(UserError, match="does not exist"):
    load_pretrained("some/mo..del")


RETRYING = """
import logging
from ddpo_jax.models import hub

logging.basicConfig()  # as importing orbax does
with hub.retries_in_one_line(), hub.retries_in_one_line():
  import huggingface_hub.utils
  log = huggingface_hub.utils.logging.get_logger("huggingface_hub.utils._http")
  for i in range(5):
    log.warning(f"'no network' thrown while requesting HEAD https://hub/{i}")
    log.warning(f"Retrying in {i}s [Retry {i}/5].")
  log.warning("Rate limited. Waiting 60s before retry [Retry 1/5].")
log.warning("Retrying in 9s [Retry 9/9].")
"""


def test_retries_of_the_hub_are_one_line():
  """The library says each of them in two lines, and all of it twice."""
  said = subprocess.run([sys.executable, "-c", RETRYING], capture_output=True, text=True,
                        check=True).stderr
  assert said.splitlines()[:2] == [
      "The hub does not answer, trying again: 'no network' thrown while requesting HEAD "
      "https://hub/0", "Rate limited. Waiting 60s before retry [Retry 1/5]."]
  assert said.count("Retrying in 9s") == 2 and len(said.splitlines()) == 4  # as it was


def test_downloads_are_retried_in_one_line(hub, monkeypatch):
  seen = []
  log = logging.getLogger("huggingface_hub.utils._http")
  monkeypatch.setattr(huggingface_hub, "list_repo_files",
                      lambda *args, **kwargs: seen.extend(log.filters) or [])
  with pytest.raises(UserError):
    load_pretrained("some/model")
  assert len(seen) == 1 and not log.filters
