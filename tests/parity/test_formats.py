"""Files as torch libraries write them today, and ours as they read them."""

import json
import pathlib
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.errors import UserError
from ddpo_jax.models import load_pretrained
from ddpo_jax.models.weights import save_module

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TINY = pathlib.Path(__file__).parents[1] / "golden" / "tiny-sd"
PARTS = {"unet": (diffusers.UNet2DConditionModel, "diffusion_pytorch_model"),
         "vae": (diffusers.AutoencoderKL, "diffusion_pytorch_model"),
         "text_encoder": (transformers.CLIPTextModel, "model")}


@pytest.fixture
def pipeline():
  return diffusers.StableDiffusionPipeline.from_pretrained(str(TINY), local_files_only=True)


def weights(model):
  return [leaf for part in PARTS for leaf in jax.tree.leaves(nnx.state(getattr(model, part)))]


@pytest.mark.parametrize("variant", (None, "fp16"))
@pytest.mark.parametrize("shards", ("200KB", "10GB"))
def test_saved_pipeline_loads(pipeline, variant, shards, tiny_sd, tmp_path):
  """Whole or in shards; rewritten, its names are today's."""
  pipeline.save_pretrained(tmp_path, variant=variant, max_shard_size=shards)
  written = {path.name for path in tmp_path.glob("*/*.safetensors")}
  assert (len(written) > 5) == (shards == "200KB")
  assert all((variant or "") in name for name in written)
  model = load_pretrained(tmp_path)
  for ours, expected in zip(weights(model), weights(tiny_sd), strict=True):
    np.testing.assert_array_equal(ours, expected)
  prompts = ["a cat", "two dogs on a hill"]
  np.testing.assert_array_equal(model.tokenize(prompts), tiny_sd.tokenize(prompts))


@pytest.mark.parametrize("stored,asked", [("float16", "float32"), ("bfloat16", "float32"),
                                          ("bfloat16", "bfloat16")])
def test_half_precision_files(pipeline, stored, asked, tiny_sd, tmp_path):
  pipeline.to(getattr(torch, stored)).save_pretrained(tmp_path)
  model = load_pretrained(tmp_path, dtype=jnp.dtype(asked))
  for ours, original in zip(weights(model), weights(tiny_sd), strict=True):
    assert ours.dtype == asked
    np.testing.assert_array_equal(np.asarray(ours, np.float32),
                                  np.asarray(original, stored).astype(np.float32))


def test_averaged_weights_load(pipeline, tiny_sd, tmp_path):
  """Their config also says how they were averaged."""
  folder = shutil.copytree(TINY, tmp_path / "model")
  unet = pipeline.unet
  diffusers.training_utils.EMAModel(
      unet.parameters(), model_cls=type(unet), model_config=unet.config
  ).save_pretrained(folder / "unet")
  assert json.loads((folder / "unet" / "config.json").read_text())["decay"] == 0.9999
  for ours, expected in zip(weights(load_pretrained(folder)), weights(tiny_sd), strict=True):
    np.testing.assert_array_equal(ours, expected)


def test_pickled_weights_are_refused_with_a_way_out(pipeline, tmp_path):
  pipeline.save_pretrained(tmp_path / "old", safe_serialization=False)
  with pytest.raises(UserError, match="save_pretrained"):
    load_pretrained(tmp_path / "old")


@pytest.mark.parametrize("dtype", (None, jnp.bfloat16))
@pytest.mark.parametrize("part", PARTS)
def test_torch_reads_what_we_save(part, dtype, tiny_sd, tmp_path):
  build, stem = PARTS[part]
  shutil.copytree(TINY / part, tmp_path / part)
  save_module(getattr(tiny_sd, part), tmp_path / part / f"{stem}.safetensors", dtype=dtype)
  ours, info = build.from_pretrained(
      tmp_path / part, output_loading_info=True, local_files_only=True)
  assert not any(info.values()), info
  reference = build.from_pretrained(TINY / part, local_files_only=True)
  for name, parameter in reference.state_dict().items():
    expected = parameter if dtype is None else parameter.to(torch.bfloat16)
    assert torch.equal(ours.state_dict()[name].float(), expected.float()), name


@pytest.mark.parametrize("pad_token,padded", [("!", 0), ("<|endoftext|>", 529)])
def test_padding_is_the_tokenizer_s_own(pad_token, padded, tmp_path):
  """Stable Diffusion 2 pads with "!", 1 with the end of the text."""
  folder = shutil.copytree(TINY, tmp_path / "model")
  for name in ("tokenizer_config.json", "special_tokens_map.json"):
    path = folder / "tokenizer" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": pad_token}))
  ids = load_pretrained(folder).tokenize(["a cat", " ".join(["cat"] * 100)])
  reference = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
  expected = reference(["a cat", " ".join(["cat"] * 100)], padding="max_length",
                       truncation=True, max_length=77, return_tensors="np").input_ids
  np.testing.assert_array_equal(ids, expected)
  assert ids.shape == (2, 77) and ids[0, -1] == padded and ids[1, -1] == 529
