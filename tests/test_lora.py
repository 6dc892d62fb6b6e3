"""LoRA: which weights it adds, that they start as nothing, and its files."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ddpo_jax import lora
from ddpo_jax.errors import UserError
from ddpo_jax.models.unet import UNet2DConditionModel, UNetConfig


@pytest.fixture
def unet(tiny_sd):
  return nnx.clone(tiny_sd.unet)


def noise_of(unet, seed=0):
  latents = jax.random.normal(jax.random.key(seed), (1, 8, 8, 4))
  text = jax.random.normal(jax.random.key(seed + 1), (1, 7, 32))
  return jax.jit(lambda unet: unet(latents, jnp.array([500]), text))(unet)


def test_attached_lora_changes_nothing_yet(unet):
  before = noise_of(unet)
  lora.inject_lora(unet, rank=4, key=jax.random.key(0))
  np.testing.assert_array_equal(noise_of(unet), before)
  # And is not merely ignored:
  _, first = lora.attention_projections(unet)[0]
  first.lora_up[...] = jnp.ones_like(first.lora_up[...])
  assert not np.allclose(noise_of(unet), before)


def test_shapes_and_initial_values(unet):
  """The reference's: 112 matrices, down normal with std 1/rank, up zero."""
  lora.inject_lora(unet, rank=4, key=jax.random.key(0))
  _, params, _ = lora.partition(unet)
  leaves = nnx.to_flat_state(params)
  assert len(leaves) == 112
  assert sum(leaf[...].size for _, leaf in leaves) == 21504
  down = np.concatenate([np.ravel(x[...]) for path, x in leaves if path[-1] == "lora_down"])
  assert down.std() == pytest.approx(1 / 4, rel=0.05) and abs(down.mean()) < 0.02
  assert all(not x[...].any() for path, x in leaves if path[-1] == "lora_up")
  assert {x[...].dtype for _, x in leaves} == {jnp.dtype("float32")}


def test_partition_covers_everything_once(unet):
  everything = len(jax.tree.leaves(nnx.state(unet)))
  lora.inject_lora(unet, rank=2, key=jax.random.key(0))
  graphdef, params, frozen = lora.partition(unet)
  assert len(jax.tree.leaves(frozen)) == everything
  np.testing.assert_array_equal(noise_of(nnx.merge(graphdef, params, frozen)),
                                noise_of(unet))


def test_full_finetuning_partition(unet):
  _, params, frozen = lora.partition(unet, use_lora=False)
  assert len(jax.tree.leaves(frozen)) == 0
  assert len(jax.tree.leaves(params)) == len(jax.tree.leaves(nnx.state(unet)))


def test_partition_without_lora_is_an_error(unet):
  with pytest.raises(ValueError, match="inject_lora"):
    lora.partition(unet)


def test_unet_without_attention_cannot_take_lora():
  config = UNetConfig.from_dict(dict(
      block_out_channels=[8], norm_num_groups=4, layers_per_block=1, mid_block_type=None,
      down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"]))
  with pytest.raises(ValueError, match="no attention"):
    lora.inject_lora(UNet2DConditionModel(config, rngs=nnx.Rngs(0)), 4, jax.random.key(0))


def test_export_and_import(unet, tiny_sd, golden_lora, tmp_path):
  trained = golden_lora("lora_new")
  lora.export_lora(trained, tmp_path / "lora.safetensors", {"base_model": "tiny"})
  names = load_file(tmp_path / "lora.safetensors")
  (tmp_path / "as_ever").touch()
  assert (tmp_path / "lora.safetensors").stat().st_mode == (
      tmp_path / "as_ever").stat().st_mode
  assert len(names) == 112 and all(n.startswith("unet.") for n in names)
  lora.import_lora(unet, tmp_path / "lora.safetensors")
  np.testing.assert_array_equal(noise_of(unet), noise_of(trained))
  bare = {n.removeprefix("unet."): v for n, v in names.items()}
  save_file(bare, tmp_path / "bare.safetensors")
  other = nnx.clone(tiny_sd.unet)
  lora.import_lora(other, tmp_path / "bare.safetensors")
  np.testing.assert_array_equal(noise_of(other), noise_of(trained))


def test_alpha_scales_a_kohya_file(unet, golden_lora, tmp_path):
  """In every layer; what is exported has a scale of 1."""
  trained, file = golden_lora("lora_new"), tmp_path / "lora.safetensors"
  lora.export_lora(trained, file, file_format="kohya")
  tensors = load_file(file)
  assert {name.split(".")[-1] for name in tensors} == {"alpha", "weight"}
  alphas = {name: value for name, value in tensors.items() if name.endswith(".alpha")}
  assert len(alphas) == 56 and all(value == 4 for value in alphas.values())  # the rank
  save_file(tensors | {name: np.array(value / 2) for name, value in alphas.items()}, file)
  lora.import_lora(unet, file)
  for half, whole in zip(lora.adapted(unet), lora.adapted(trained), strict=True):
    np.testing.assert_array_equal(half.lora_up[...], whole.lora_up[...] / 2)
    np.testing.assert_array_equal(half.lora_down[...], whole.lora_down[...])
  save_file({**tensors, min(tensors): np.zeros(2, np.float32)}, file)
  with pytest.raises(UserError, match="alpha"):
    lora.import_lora(unet, file)


@pytest.mark.parametrize("prefix", ("", "unet."))
def test_alpha_in_the_header_of_a_diffusers_file(unet, golden_lora, tmp_path, prefix):
  """Where diffusers, since 0.34, keeps peft's config."""
  trained, file = golden_lora("lora_new"), tmp_path / "lora.safetensors"

  def with_header(config):
    text = json.dumps({prefix + name: value for name, value in config.items()})
    lora.export_lora(trained, file, {"lora_adapter_metadata": text})

  with_header({"r": 4, "lora_alpha": 8, "alpha_pattern": {}, "use_rslora": False})
  lora.import_lora(unet, file)
  for double, whole in zip(lora.adapted(unet), lora.adapted(trained), strict=True):
    np.testing.assert_array_equal(double.lora_up[...], whole.lora_up[...] * 2)
  for name, value in {"use_rslora": True, "alpha_pattern": {"to_q": 2}, "lora_alpha": "8"}.items():
    with_header({name: value})
    with pytest.raises(UserError, match=name):
      lora.import_lora(unet, file)
  lora.export_lora(trained, file, {"lora_adapter_metadata": "[]"})
  with pytest.raises(UserError, match="must be a JSON object"):
    lora.import_lora(unet, file)


@pytest.mark.parametrize("change,message", [
    (lambda t: t.pop(min(t)), "has no"),
    (lambda t: t.update({"unet.other.lora_A.weight": np.zeros((4, 4), np.float32)}),
     "belong to no attention"),
    (lambda t: t.update({f"base_model.model.{name}": t.pop(name) for name in list(t)}),
     "is in peft's format"),
    (lambda t: t.update({min(t): np.zeros((4, 5), np.float32)}), "shapes"),
    (lambda t: t.update({min(t): np.zeros(4, np.float32)}), "matrix"),
    (lambda t: t[min(t)].fill(np.nan), "holds NaN or infinity"),
    (lambda t: t.update({min(t): t[min(t)].astype(jnp.float8_e4m3fn)}), "is F8_E4M3; must be"),
])
def test_wrong_files_are_refused(unet, golden_lora, tmp_path, change, message):
  lora.export_lora(golden_lora("lora_new"), tmp_path / "lora.safetensors")
  tensors = load_file(tmp_path / "lora.safetensors")
  change(tensors)
  save_file(tensors, tmp_path / "lora.safetensors")
  with pytest.raises(UserError, match=message):
    lora.import_lora(unet, tmp_path / "lora.safetensors")


def test_a_file_that_is_no_safetensors(unet, tmp_path):
  (tmp_path / "x").write_bytes(b"PK\x03\x04 not this")
  for path in (tmp_path / "x", tmp_path / "missing"):
    with pytest.raises(UserError, match="safetensors"):
      lora.import_lora(unet, path)
