"""From a run's folder to images and files, as scripts/sample.py and export_lora.py do."""

import dataclasses
import json
import os
import pathlib
import runpy
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_model import small_config, small_model

from ddpo_jax import build, checkpoint, export, inference, lora, sample_files, train
from ddpo_jax.config import resolve
from ddpo_jax.diffusion.sampler import sample_keys
from ddpo_jax.embeddings import PromptEncoder
from ddpo_jax.errors import UserError
from ddpo_jax.models import load_pretrained
from ddpo_jax.models.vae import AutoencoderKL

ROOT = pathlib.Path(__file__).parents[1]
PROMPTS = ["a cat", "a dog", "a cow"]


def brightness(images, prompts, metadata):
  return images.mean(axis=(1, 2, 3)), {}


def make_run(folder, **changes):
  config = small_config(**{
      "logdir": str(folder), "run_name": "run", "reward_fn": f"{__name__}:brightness",
      "num_epochs": 2, "save_freq": 1, **changes})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("jax.device_count", lambda: 1)
    patch.setattr("ddpo_jax.report.write_report", lambda run: None)
    return train.train(resolve(config))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp("lora"))


def sample(output, **changes):
  arguments = dict(output=output, prompts=PROMPTS, num_steps=2, guidance_scale=1.0,
                   batch_size=2)
  sample_files.sample_to_files(sample_files.SampleRequest(**{**arguments, **changes}))


def pictures(folder):
  return [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]


def test_load_run_has_the_checkpoints_weights(run):
  newest, first = (inference.load_run(str(path)) for path in (run, run / "checkpoints/0"))
  assert (newest.epoch, first.epoch) == (1, 0)
  weights = [jax.tree.leaves(lora.partition(t.models.unet)[1]) for t in (newest, first)]
  assert {w.shape[0] for w in weights[0]} | {w.shape[1] for w in weights[0]} >= {3}
  stored = checkpoint.restore_params(run, 1, lora.partition(newest.models.unet)[1])
  for ours, expected in zip(weights[0], jax.tree.leaves(stored), strict=True):
    np.testing.assert_array_equal(ours, expected)
  assert any((a != b).any() for a, b in zip(*weights))
  # The base model is put beside it without a second copy of what both have.
  parts = [lora.partition(unet) for unet in (newest.models.unet, inference.load_base_unet(newest))]
  assert all(a is b for a, b in zip(*(jax.tree.leaves(frozen) for _, _, frozen in parts)))
  assert parts[0][0] == parts[1][0] and not any(leaf.any() for leaf in jax.tree.leaves(parts[1][1]))


def test_a_run_is_read_into_host_memory(run, monkeypatch):
  """A GPU holds its weights once, where they are placed, and to export them takes no GPU."""
  host = jax.devices()[1]
  for module in (build, inference):
    monkeypatch.setattr(module, "host_memory", lambda: jax.default_device(host), raising=False)
  tuned = inference.load_run(str(run))
  for unet in (tuned.models.unet, inference.load_base_unet(tuned)):
    assert {device for leaf in jax.tree.leaves(unet) for device in leaf.devices()} == {host}


def test_a_run_whose_base_model_has_moved(run, tmp_path):
  config = run / "config.json"
  text = config.read_text()
  config.write_text(text.replace(str(small_model()), "/nowhere/model"))
  try:
    with pytest.raises(UserError, match="base model '/nowhere/model' does not exist.*--base_model"):
      export.export_run(str(run), tmp_path / "lora.safetensors")
    export.export_run(str(run), tmp_path / "moved.safetensors", base_model=str(small_model()))
    sample(tmp_path / "grid.png", run=str(run), base_model=str(small_model()))
  finally:
    config.write_text(text)
  export.export_run(str(run), tmp_path / "there.safetensors")
  moved, there = (load_file(tmp_path / f"{name}.safetensors")
                  for name in ("moved", "there"))
  assert moved.keys() == there.keys() and all((moved[k] == there[k]).all() for k in there)
  with pytest.raises(UserError, match="^--base_model='/no' does not exist"):
    inference.load_run(str(run), base_model="/no")
  with pytest.raises(UserError, match="--base_model must be the one that it was trained on"):
    inference.load_run(str(run), base_model="tiny")
  with pytest.raises(UserError, match="--base_model needs --run"):
    sample(tmp_path / "grid.png", model="tiny", base_model="tiny")


@pytest.mark.parametrize("text", ("{", "[]", "{}"))
def test_a_config_that_cannot_be_read_is_a_line(text, tmp_path):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(UserError, match="config.json cannot be read: .*; must be the config that"):
    inference.config_of(tmp_path, None)


def test_a_runs_config_and_what_is_given_beside_it(run, monkeypatch):
  """Precision, base model and sampling options; a picture may end in capitals."""
  cfg = inference.config_of(run, None)
  assert cfg.mixed_precision != "bf16" == inference.config_of(run, "bf16").mixed_precision
  assert inference.config_of(run, None, "owner/name").pretrained.model == "owner/name"
  cfg = dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, eta=0.5))
  request = sample_files.SampleRequest(output="a.JPG", run=str(run),
                                       guidance_scale=2.0, mixed_precision="bf16", seed=7,
                                       batch_size=3)
  options = request.sampling_options(cfg)
  assert options == inference.SamplingOptions(
      num_steps=cfg.sample.num_steps, guidance_scale=2.0, eta=0.5, seed=7, batch_size=3)
  assert request.is_grid

  def stop(*args, **kwargs):
    raise InterruptedError([*args, *kwargs.values()])

  monkeypatch.setattr(sample_files, "load_run", stop)
  monkeypatch.setattr(sample_files, "load_pretrained", stop)
  for changes, precision in (
      ({}, "bf16"), ({"run": None, "model": "tiny"}, jnp.bfloat16),
      ({"run": None, "model": str(small_model())}, jnp.bfloat16)):
    with pytest.raises(InterruptedError) as loaded:
      sample_files.sample_to_files(dataclasses.replace(request, prompts=["a cat"], **changes))
    assert precision in loaded.value.args[0]


def test_options_reach_the_sampler(monkeypatch):
  """So do the prompts and the empty one, in a batch no larger than there are prompts."""
  models, given, arrays = load_pretrained(small_model()), {}, {}

  def denoise(unet, schedule, embeddings, negative, *, key, **options):
    given.update(options, num_steps=schedule.num_steps)
    jax.debug.callback(arrays.update, embeddings=embeddings, negative=negative,
                       keys=jax.random.key_data(key))
    return jnp.zeros((len(embeddings), 16, 16, 4))

  monkeypatch.setattr(inference, "denoise", denoise)
  options = inference.SamplingOptions(num_steps=3, guidance_scale=2.5, eta=0.5, seed=7)
  inference.ImageGenerator(models, options)(models.unet, PROMPTS[:2])
  jax.effects_barrier()
  assert given == {"num_steps": 3, "guidance_scale": 2.5, "eta": 0.5}
  encode = PromptEncoder(models)
  expected = {"embeddings": encode(PROMPTS[:2]), "negative": encode([""]),
              "keys": jax.random.key_data(sample_keys(jax.random.key(7), jnp.arange(2)))}
  jax.tree.map(np.testing.assert_array_equal, arrays, expected)


def test_what_a_run_began_with_is_not_asked_for(tmp_path):
  """A LoRA file, or a run: its checkpoint replaces what they hold, and they may be gone."""
  values = small_config(**{"lora.init_from": "/nowhere/lora.safetensors",
                           "resume_from": "/nowhere/run"})
  (tmp_path / "config.json").write_text(values.to_json())
  cfg = inference.config_of(tmp_path, None)
  assert cfg.lora.init_from == cfg.resume_from == ""


def test_the_base_unet_is_of_the_revision_that_was_trained(monkeypatch):
  cfg = resolve(small_config(**{"use_lora": False, "pretrained.model": "owner/name",
                                "pretrained.revision": "fp16"}))
  asked = mock.Mock(side_effect=InterruptedError)
  monkeypatch.setattr(inference, "model_folder", asked)
  with pytest.raises(InterruptedError):
    inference.load_base_unet(inference.FineTuned(None, cfg, epoch=0))
  asked.assert_called_once_with("owner/name", "fp16")


def test_a_base_model_is_read_into_host_memory(tmp_path, monkeypatch):
  """As a run is: a GPU holds its weights once."""
  def stop(models, *_):
    raise InterruptedError({device for leaf in jax.tree.leaves((models.unet, models.vae))
                            for device in leaf.devices()})

  host = jax.devices()[1]
  monkeypatch.setattr(sample_files, "host_memory", lambda: jax.default_device(host))
  monkeypatch.setattr(sample_files, "_generator", stop)
  with pytest.raises(InterruptedError) as found:
    sample(tmp_path / "grid.jpg", model=str(small_model()))
  assert found.value.args[0] == {host}


def test_pictures_go_into_folders_new_and_old(tmp_path):
  """Whatever the length of a prompt: names of files may have 255 bytes."""
  images = np.zeros((2, 8, 8, 3), np.uint8)
  for captions in (["a cat", "a dog"], ["a cat", "a very " * 100 + "big dog"]):
    sample_files._write(images, captions, tmp_path / "new" / "files", is_grid=False)
  sample_files._write(images, captions, tmp_path / "other" / "new" / "grid.png", is_grid=True)
  assert len(pictures(tmp_path / "new" / "files")) == 3
  sample_files._write(images, ["...", ""], tmp_path / "bare", is_grid=False)
  assert {path.name for path in (tmp_path / "bare").iterdir()} == {"0000.png", "0001.png"}
  assert (tmp_path / "other" / "new" / "grid.png").exists()


def test_outputs_may_be_in_ones_home(run, tmp_path, monkeypatch):
  """A shell leaves --output=~/lora.safetensors as it is."""
  monkeypatch.setenv("HOME", str(tmp_path))
  export.export_run(str(run), pathlib.Path("~/lora.safetensors"))
  sample("~/grid.png", run=str(run))
  assert {path.name for path in tmp_path.iterdir()} >= {"lora.safetensors", "grid.png"}


def test_compare_is_base_and_tuned_from_the_same_noise(run, tmp_path, capsys):
  before, after = check_compare(run, tmp_path)
  assert np.abs(before - after).max() > 1
  assert "sampling 6 images in 2 steps" in capsys.readouterr().out
  assert [path.stem for path in sorted((tmp_path / "both").iterdir())] == [
      "0000_before_a_cat", "0001_after_a_cat", "0002_before_a_dog", "0003_after_a_dog",
      "0004_before_a_cow", "0005_after_a_cow"]


def check_compare(run, tmp_path):
  """Compares what --compare draws with each model drawn by itself, which it returns."""
  sample(tmp_path / "both", run=str(run), compare=True)
  sample(tmp_path / "base", model=str(small_model()), batch_size=3)
  sample(tmp_path / "tuned", run=str(run), batch_size=1)
  both, before, after = (pictures(tmp_path / n) for n in ("both", "base", "tuned"))
  assert len(both) == 6 and len(before) == len(after) == 3
  for i in range(3):  # batch sizes round differently by a value at most
    assert np.abs(both[2 * i].astype(int) - before[i]).max() <= 1
    assert np.abs(both[2 * i + 1].astype(int) - after[i]).max() <= 1
  return np.stack(before).astype(int), np.stack(after).astype(int)


def test_eta_zero_and_a_grid(run, tmp_path):
  sample(tmp_path / "grid.jpg", run=str(run), eta=0.0)
  assert Image.open(tmp_path / "grid.jpg").size[0] > 3 * 64
  file = tmp_path / "prompts.txt"
  file.write_text("a cat\n\na dog\n")
  sample(tmp_path / "files", run=str(run), prompts=[], prompts_file=str(file), eta=0.0)
  assert [p.name for p in sorted((tmp_path / "files").iterdir())] == [
      "0000_a_cat.png", "0001_a_dog.png"]


@pytest.mark.parametrize("changes,message", [
    ({"prompts": []}, "--prompts is empty"),
    ({"prompts": ["a cat", os.fsdecode(b"caf\xe9")]}, "--prompts has .*; must be text in UTF-8"),
    ({"compare": True}, "--compare needs --run"), ({"output": ""}, "^--output is empty"),
    ({"eta": 1.5}, "--eta=1.5"), ({"num_steps": 0}, "--num_steps=0"),
    ({"guidance_scale": float("inf")}, "--guidance_scale=inf must be a finite"),
    ({"guidance_scale": float("nan")}, "--guidance_scale=nan"),
    ({"seed": 10**20}, f"--seed={10**20} must be in"), ({"seed": -1}, "--seed=-1"),
    ({"batch_size": 0}, "--batch_size=0"), ({"model": None}, "--run or --model"),
    ({"run": "no_such_run", "model": None}, "^--run='no_such_run' does not exist"),
    ({"model": "tinny"}, "^--model='tinny' does not exist"),
    ({"model": "~nobody-such/a/b"}, "^--model='~nobody-such/a/b' does not exist"),
    ({"run": "~nobody-such/run", "model": None}, "^--run='~nobody-such/run' does not exist"),
    ({"prompts_file": "~nobody-such/a.txt"}, "~nobody-such/a.txt' does not exist"),
    ({"prompts_file": "none.txt"}, "none.txt")])
def test_bad_arguments_are_one_line(changes, message, tmp_path):
  with pytest.raises(UserError, match=message) as error:
    sample(**{"output": tmp_path / "out", "model": str(small_model()), **changes})
  assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output,message", [
    ("a.webp", "must end in .jpg"), ("a.GIF", "must end in .jpg"), ("file", "not a folder"),
    ("file/a.jpg", "not a folder"), ("file/a", "not a folder"), ("folder.jpg", "a folder"),
    ("a" * 300, "too long"), ("a\0.jpg", "null"),
    pytest.param("closed/a.jpg", "cannot be written", marks=pytest.mark.skipif(
        os.geteuid() == 0, reason="root may write everywhere"))])
def test_outputs_that_cannot_be_written_are_found_first(output, message, tmp_path,
                                                        monkeypatch):
  monkeypatch.setattr(sample_files, "load_pretrained", lambda *_, **__: pytest.fail("loaded"))
  (tmp_path / "file").write_text("")
  (tmp_path / "folder.jpg").mkdir()
  (tmp_path / "closed").mkdir(mode=0o500)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(UserError, match=f"--output=.*{message}"):
    sample(tmp_path / output, model="tiny")
  assert sorted(tmp_path.rglob("*")) == before


def test_a_home_that_is_nobodys_is_a_line(run):
  """A shell leaves ~NAME as it is where there is no such user."""
  for output in ("~nobody-such/a.jpg", "~nobody-such/files", "~a.jpg"):
    with pytest.raises(UserError, match=f"^--output={output} begins with the home folder of a"):
      sample(output, model="tiny")
  with pytest.raises(UserError, match="^--output=.* begins with the home folder of a user"):
    export.export_run(str(run), pathlib.Path("~nobody-such/lora.safetensors"))


def test_a_slash_at_the_end_makes_it_a_folder(run, tmp_path, capsys):
  """Whatever the name; what was written is said, and what takes long before it does."""
  sample(f"{tmp_path}/grid.jpg/", run=str(run))
  assert len(pictures(tmp_path / "grid.jpg")) == 3
  assert capsys.readouterr().out.splitlines() == [
      f"Reading the model of {run}", "Compiling, and sampling 3 images in 2 steps",
      f"Wrote 3 images to {tmp_path}/grid.jpg/"]


def test_prompts_of_a_file_come_after_the_others(run, tmp_path, capsys):
  (tmp_path / "prompts.txt").write_text("a cow\n")
  sample(tmp_path / "files", run=str(run), prompts=["a dog"],
         prompts_file=str(tmp_path / "prompts.txt"))
  assert [p.name for p in sorted((tmp_path / "files").iterdir())] == [
      "0000_a_dog.png", "0001_a_cow.png"]


@pytest.mark.parametrize("part", ("unet", "vae"))
def test_images_that_are_not_finite_are_not_written(part, tmp_path):
  """They would be black."""
  folder = pathlib.Path(shutil.copytree(small_model(), tmp_path / "model"))
  file = folder / part / "diffusion_pytorch_model.safetensors"
  tensors = load_file(file)
  name = {"unet": "conv_in.bias", "vae": "decoder.conv_in.bias"}[part]
  save_file({**tensors, name: np.full_like(tensors[name], np.nan)}, file)
  with pytest.raises(UserError, match="--model=.*the base model draws .* not finite numbers"):
    sample(tmp_path / "grid.jpg", model=str(folder), mixed_precision="no")
  assert not (tmp_path / "grid.jpg").exists()


def test_images_are_decoded_one_by_one(tmp_path, monkeypatch):
  """All at once they would take most of the memory that sampling takes."""
  shapes, decode = [], AutoencoderKL.decode

  def spy(vae, latents):
    shapes.append(latents.shape)
    return decode(vae, latents)

  monkeypatch.setattr(AutoencoderKL, "decode", spy)
  sample(tmp_path / "images", model=str(small_model()), batch_size=3)
  assert {shape[0] for shape in shapes} == {1} and len(pictures(tmp_path / "images")) == 3


def test_too_many_images_at_a_time_are_a_line(run, tmp_path, monkeypatch):
  def out_of_memory(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

  monkeypatch.setattr(inference.ImageGenerator, "__call__", out_of_memory)
  for source in ({"run": str(run)}, {"model": str(small_model())}):
    with pytest.raises(UserError, match="^out of memory; .*--batch_size=1; --mixed_precision=fp16"):
      sample(tmp_path / "grid.jpg", **source, batch_size=2)
  with pytest.raises(UserError, match="^out of memory") as error:
    sample(tmp_path / "grid.jpg", run=str(run), prompts=PROMPTS[:1], batch_size=8)
  assert "batch_size" not in str(error.value)  # there is one image at a time as it is


def test_jax_is_set_up_as_the_run_had_it(run, tmp_path, monkeypatch):
  """It keeps programs in the run's cache, and draws the same whatever the environment says."""
  names = ("jax_compilation_cache_dir", "jax_default_matmul_precision", "jax_enable_x64")
  before = {name: jax.config.values[name] for name in names}
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  config = run / "config.json"
  text = config.read_text()
  config.write_text(json.dumps(json.loads(text) | {
      "compilation_cache": str(tmp_path / "programs"), "allow_tf32": False}))
  try:
    for source, cache, precision in (
        ({"run": str(run)}, tmp_path / "programs", "highest"),
        ({"model": str(small_model())}, tmp_path / "ddpo_jax" / "xla", "tensorfloat32")):
      jax.config.update("jax_enable_x64", True)
      jax.config.update("jax_compilation_cache_dir", None)
      sample(tmp_path / "grid.jpg", **source, prompts=PROMPTS[:1])
      assert [jax.config.values[name] for name in names] == [str(cache), precision, False]
  finally:
    config.write_text(text)
    for name, value in before.items():
      jax.config.update(name, value)


def test_a_folder_may_have_a_dot_in_its_name(run, tmp_path):
  sample(tmp_path / "images.v2", run=str(run), prompts=PROMPTS[:1])
  assert len(pictures(tmp_path / "images.v2")) == 1


def test_the_script_takes_its_options(monkeypatch, capsys):
  main = runpy.run_path(str(ROOT / "scripts" / "sample.py"))["main"]
  assert main(["--model", "tinny", "--prompts", "a cat", "--output", "a.jpg"]) == 2
  assert capsys.readouterr().err.startswith("--model='tinny'")


def test_prompts_may_be_given_in_several_options(monkeypatch):
  """None of them is dropped."""
  drawn = []
  monkeypatch.setattr(sample_files, "sample_to_files",
                      lambda request: drawn.extend(request.prompts))
  main = runpy.run_path(str(ROOT / "scripts" / "sample.py"))["main"]
  assert main(["--model", "tiny", "--prompts", "a cat", "a cow", "--prompts", "a dog",
               "--output", "a.jpg"]) == 0
  assert drawn == ["a cat", "a cow", "a dog"]


@pytest.mark.parametrize("script", ("sample", "export_lora"))
def test_wrong_options_are_said_in_a_line(script, capsys):
  with pytest.raises(SystemExit, match="2"):
    runpy.run_path(str(ROOT / "scripts" / f"{script}.py"))["main"](["--run", "x"])
  (line,) = capsys.readouterr().err.splitlines()
  assert line == ("the following arguments are required: --output; --help describes the options")


@pytest.mark.parametrize("name", ("lora.bin", "lora"))
def test_a_lora_file_is_called_what_it_is(run, name, tmp_path):
  with pytest.raises(UserError, match=f"--output=.*{name} must end in .safetensors.*such as .*"
                                      "/lora.safetensors$"):
    export.export_run(str(run), tmp_path / name)
  assert not list(tmp_path.iterdir())


def test_the_rank_of_an_exported_file_is_its_own(run, tmp_path):
  """Not lora.rank, where the run began with lora.init_from."""
  export.export_run(str(run), tmp_path / "lora.safetensors")
  other = make_run(tmp_path, num_epochs=1, **{
      "lora.init_from": str(tmp_path / "lora.safetensors"), "lora.rank": 4})
  export.export_run(str(other), tmp_path / "again.safetensors")
  with safe_open(tmp_path / "again.safetensors", framework="numpy") as tensors:
    assert tensors.metadata()["lora_rank"] == "3"


def test_a_folder_is_no_place_for_a_lora_file(run, tmp_path):
  with pytest.raises(UserError, match="--output=.* is a folder; must be a file's path"):
    export.export_run(str(run), tmp_path)
  with pytest.raises(UserError, match="--run='nope' does not exist"):
    export.export_run("nope", tmp_path / "lora.safetensors")


@pytest.mark.parametrize("file_format", lora.FORMATS)
def test_export_says_what_it_was_made_from(run, file_format, tmp_path):
  export.export_run(str(run), tmp_path / "new" / "lora.safetensors", file_format)
  with safe_open(tmp_path / "new" / "lora.safetensors", framework="numpy") as tensors:
    metadata = tensors.metadata()
    assert len(tensors.keys()) == 48 * (1.5 if file_format == "kohya" else 1)
  assert metadata["base_model"] == str(small_model()) and metadata["lora_rank"] == "3"
  assert metadata["epoch"] == "1"


def test_full_finetuning_trains_every_weight_and_exports_a_unet_folder(tmp_path):
  run = make_run(tmp_path, use_lora=False, num_epochs=1)
  with pytest.raises(UserError, match="--format=kohya: the run has use_lora=False.*; must be"):
    export.export_run(str(run), tmp_path / "unet", "kohya")
  with pytest.raises(UserError, match="--output=.*full.safetensors: the run has use_lora=False"):
    export.export_run(str(run), tmp_path / "full.safetensors")
  with pytest.raises(UserError, match="is the base model's own folder; choose another"):
    export.export_run(str(run), small_model() / "unet")
  export.export_run(str(run), tmp_path / "unet")
  assert json.loads((tmp_path / "unet/config.json").read_text()) == json.loads(
      (small_model() / "unet/config.json").read_text())
  folder = tmp_path / "model"
  folder.mkdir()
  for part in small_model().iterdir():
    (folder / part.name).symlink_to(tmp_path / "unet" if part.name == "unet" else part)
  reloaded = load_pretrained(folder)
  trained = inference.load_run(str(run)).models.unet
  base = load_pretrained(small_model()).unet
  weights = [lora.partition(unet, use_lora=False)[1]
             for unet in (reloaded.unet, trained, base)]
  for a, b, before in zip(*map(jax.tree.leaves, weights), strict=True):
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(b, before)
  before, after = check_compare(run, tmp_path)
  assert np.abs(before - after).max() > 1
