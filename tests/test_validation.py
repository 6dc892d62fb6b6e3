"""Bad input: exit 2, one line that names the field, no traceback, nothing left behind."""

import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
import servers

from configs import base
from ddpo_jax import cli, dry_run, model_size, validation
from ddpo_jax.config import resolve
from ddpo_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
DEMO = str(ROOT / "configs" / "demo.py")
TINY = ROOT / "tests" / "golden" / "tiny-sd"
NOT_A_TEXT = 3
HUGE = 2**70


def raising(rng):
  raise RuntimeError("out\nof ideas")


def no_text(rng):
  return 3, {}


def no_pair(rng):
  return "a cat"


@pytest.mark.parametrize("function,message", [
    ("raising", r"raised RuntimeError: out of ideas \(.*test_validation\.py, line \d+\)$"),
    ("no_text", "returned a int and a dict; must return a prompt"),
    ("no_pair", "returned a str; must return a prompt"),
])
def test_prompt_function_that_is_wrong(exit_with, function, message):
  (line,) = exit_with({"prompt_fn": f"{__name__}:{function}", "prompt_fn_kwargs": {}})
  assert re.search(message, line)


# Each field of base.py in a type that it is not of, and out of its range, in a config file.
BAD_FIELDS = [
    ("run_name", NOT_A_TEXT), ("run_name", "../x"), ("run_name", "a\0b"), ("run_name", "n" * 300),
    ("seed", "x"), ("seed", -1), ("seed", HUGE),
    ("logdir", NOT_A_TEXT), ("logdir", ""), ("logdir", "x" * 5000), ("logdir", "~nobody_/x"),
    ("logdir", "half\ud800"),
    ("num_epochs", 1.5), ("num_epochs", 0), ("num_epochs", True),
    ("save_freq", None), ("save_freq", 0), ("eval_freq", "10"), ("eval_freq", -1),
    ("num_checkpoint_limit", [1]), ("num_checkpoint_limit", 0),
    ("mixed_precision", 16), ("mixed_precision", "fp8"), ("allow_tf32", "yes"),
    ("resume_from", NOT_A_TEXT), ("resume_from", "no_such_run"), ("use_lora", 1),
    ("compilation_cache", NOT_A_TEXT), ("compilation_cache", "~nobody_"),
    ("pretrained", 3), ("pretrained.model", NOT_A_TEXT), ("pretrained.model", "no/such/model"),
    ("pretrained.revision", NOT_A_TEXT),
    ("lora.rank", "4"), ("lora.rank", 0), ("lora.init_from", NOT_A_TEXT),
    ("lora.init_from", "no_such.safetensors"),
    ("sample.num_steps", 5.0), ("sample.num_steps", 1001), ("sample.eta", "1"),
    ("sample.eta", 0.0), ("sample.guidance_scale", "5"), ("sample.guidance_scale", -1.0),
    ("sample.guidance_scale", float("inf")), ("sample.batch_size", None),
    ("sample.batch_size", 0), ("sample.num_batches_per_epoch", "2"),
    ("sample.num_batches_per_epoch", 0), ("sample.decode_batch_size", 1.0),
    ("sample.decode_batch_size", 0),
    ("train", []), ("train.batch_size", "1"), ("train.batch_size", -2),
    ("train.use_8bit_adam", 0), ("train.use_8bit_adam", True),
    ("train.learning_rate", "3e-4"), ("train.learning_rate", float("nan")),
    ("train.adam_beta1", None), ("train.adam_beta1", 1.0), ("train.adam_beta2", "x"),
    ("train.adam_beta2", -0.1), ("train.adam_weight_decay", "x"),
    ("train.adam_weight_decay", -1.0), ("train.adam_epsilon", "x"), ("train.adam_epsilon", 0.0),
    ("train.gradient_accumulation_steps", 1.5), ("train.gradient_accumulation_steps", 0),
    ("train.max_grad_norm", "x"), ("train.max_grad_norm", float("inf")),
    ("train.num_inner_epochs", "1"), ("train.num_inner_epochs", 0),
    ("train.cfg", 1), ("train.adv_clip_max", "x"), ("train.adv_clip_max", 0.0),
    ("train.clip_range", "x"), ("train.clip_range", 2.0), ("train.timestep_fraction", "x"),
    ("train.timestep_fraction", 0.0), ("train.timesteps_per_batch", 1.0),
    ("train.timesteps_per_batch", 4), ("train.gradient_checkpointing", True),
    ("train.gradient_checkpointing", "some"),
    ("train.recompute_log_probs", 1), ("train.gradient_while_sampling", "no"),
    ("train.max_skipped_steps", "10"), ("train.max_skipped_steps", -1),
    ("prompt_fn", NOT_A_TEXT), ("prompt_fn", "nope"), ("prompt_fn", "no_such_module:f"),
    ("prompt_fn", "os:sep"), ("prompt_fn", f"{__name__}:raising"),
    ("prompt_fn", f"{__name__}:no_text"),
    ("prompt_fn_kwargs", 3), ("prompt_fn_kwargs", {"nope": 1}), ("prompt_fn_kwargs", {"pool": "x"}),
    ("reward_fn", 3), ("reward_fn", "nope"), ("reward_fn", "no_such_module:f"),
    ("reward_fn", {"jpeg_compressibility": float("inf")}), ("reward_fn", {"nope": 1.0}),
    ("reward_kwargs", "x"), ("reward_kwargs", {"nope": 1}),
    ("per_prompt_stat_tracking", 3), ("per_prompt_stat_tracking.buffer_size", "16"),
    ("per_prompt_stat_tracking.buffer_size", 0), ("per_prompt_stat_tracking.min_count", 1.0),
    ("per_prompt_stat_tracking.min_count", 17),
    ("wandb.mode", True), ("wandb.mode", "on"), ("wandb.project", NOT_A_TEXT),
    ("tensorboard", "yes"), ("distributed.detect", 1),
    ("distributed.coordinator_address", 1), ("distributed.coordinator_address", "nowhere"),
    ("distributed.num_processes", "2"), ("distributed.num_processes", 0),
    ("distributed.process_id", None), ("distributed.process_id", 1),
    ("distributed.timeout", "x"), ("distributed.timeout", 0), ("no_such_field", 1),
]


@pytest.fixture
def exit_with(tmp_path, monkeypatch, capsys):
  """Runs scripts/train.py's main on a changed demo; the lines that it ends with exit 2 for.

  Whatever it does, training must not start and no folder be made.
  """
  monkeypatch.setattr("ddpo_jax.train.build", lambda *args: pytest.fail("work began"))

  def run(changes, *arguments):
    config = demo_values(tmp_path)
    for field, value in changes.items():
      group = config
      *groups, name = field.split(".")
      for each in groups:
        group = group[each]
      group[name] = value
    file = tmp_path / "config_file.py"
    file.write_text("import ml_collections\nnan, inf = float('nan'), float('inf')\n"
                    "def get_config():\n"
                    f"  return ml_collections.ConfigDict({source(config)})\n")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["train.py", f"--config={file}", *arguments]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()

  return run


def demo_values(tmp_path):
  """Of the demo, on the test's own model, with all types free."""
  config = cli.load_config(DEMO).to_dict()
  config["pretrained"]["model"] = str(TINY)
  config["logdir"], config["compilation_cache"] = str(tmp_path / "logs"), ""
  return config


def source(value):
  """As Python."""
  if isinstance(value, dict):
    return "{" + ", ".join(f"{k!r}: {source(v)}" for k, v in value.items()) + "}"
  return repr(value)


@pytest.mark.parametrize("number", range(len(BAD_FIELDS)), ids=lambda n: f"{BAD_FIELDS[n][0]}-{n}")
def test_bad_field(exit_with, number):
  field, value = BAD_FIELDS[number]
  (line,) = exit_with({field: value})
  assert field in line
  assert len(line) < 1000


def test_every_field_of_base_is_in_the_table():
  flat = set(resolve_names(base.get_config().to_dict()))
  assert flat <= {field for field, _ in BAD_FIELDS}


def resolve_names(values, prefix=""):
  for name, value in values.items():
    if isinstance(value, dict) and value:
      yield from resolve_names(value, f"{prefix}{name}.")
    else:
      yield prefix + name


# ---- files ----


def a_file(path):
  path.write_text("not a folder")
  return path


def read_only(path):
  path.mkdir(mode=0o500)
  return path


def truncated(path):
  whole = (TINY / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
  path.write_bytes(whole[:len(whole) // 2])
  return path


def hostile_header(path):
  """Claims a header of 2^63 bytes."""
  path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
  return path


def model(path, change):
  shutil.copytree(TINY, path)
  change(path)
  return path


def index_outside(folder):
  """Names a file that lies outside."""
  (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "x.safetensors")
  (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
      json.dumps({"weight_map": {"a": "../x.safetensors"}}))


def only_pickles(folder):
  unet = folder / "unet"
  (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.bin")


def text_file(path, content):
  path.write_bytes(content)
  return path


BAD_FILES = {
    "logdir is a file": ("logdir", a_file),
    "compilation_cache is a file": ("compilation_cache", a_file),
    "resume_from a file": ("resume_from", a_file),
    "resume_from an empty folder": ("resume_from", lambda p: p.mkdir() or p),
    "lora truncated": ("lora.init_from", truncated),
    "lora a text": ("lora.init_from", a_file),
    "lora empty": ("lora.init_from", lambda p: text_file(p, b"")),
    "lora a folder": ("lora.init_from", lambda p: p.mkdir() or p),
    "lora hostile": ("lora.init_from", hostile_header),
    "model a file": ("pretrained.model", a_file),
    "model an empty folder": ("pretrained.model", lambda p: p.mkdir() or p),
    "model truncated": ("pretrained.model", lambda p: model(p, lambda f: truncated(
        f / "unet" / "diffusion_pytorch_model.safetensors"))),
    "model without VAE": ("pretrained.model", lambda p: model(p, lambda f: shutil.rmtree(
        f / "vae"))),
    "model of pickles": ("pretrained.model", lambda p: model(p, only_pickles)),
    "model config no JSON": ("pretrained.model", lambda p: model(p, lambda f: (
        f / "unet" / "config.json").write_text("{"))),
    "model config a list": ("pretrained.model", lambda p: model(p, lambda f: (
        f / "vae" / "config.json").write_text("[]"))),
    "model config deeply nested": ("pretrained.model", lambda p: model(p, lambda f: (
        f / "unet" / "config.json").write_text("[" * 100_000))),
    "model config huge": ("pretrained.model", lambda p: model(p, lambda f: (
        f / "unet" / "config.json").write_text('{"a": "' + "x" * 2**21 + '"}'))),
    "index leaves its folder": ("pretrained.model", lambda p: model(p, index_outside)),
    "prompt file absent": ("prompt_fn_kwargs", lambda p: {"path": str(p)}),
    "prompt file empty": ("prompt_fn_kwargs", lambda p: {"path": str(text_file(p, b"\n\n"))}),
    "prompt file binary": ("prompt_fn_kwargs",
                           lambda p: {"path": str(text_file(p, b"\xff\xfe\0"))}),
    "prompt file a folder": ("prompt_fn_kwargs", lambda p: p.mkdir() or {"path": str(p)}),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(exit_with, tmp_path, name):
  field, make = BAD_FILES[name]
  value = make(tmp_path / "bad")
  changes = {field: str(value) if isinstance(value, pathlib.Path) else value}
  if field == "prompt_fn_kwargs":
    changes["prompt_fn"] = "from_file"
  (line,) = exit_with(changes)
  assert field in line


def test_checkpoints_on_a_disk_that_cannot_be_written(exit_with, tmp_path):
  """A link leads there, so that the run's own folder says nothing of it."""
  (tmp_path / "file").write_text("")
  (tmp_path / "logs" / "linked").mkdir(parents=True)
  (tmp_path / "logs" / "linked" / "checkpoints").symlink_to(tmp_path / "file" / "run")
  (line,) = exit_with({"logdir": str(tmp_path / "logs"), "run_name": "linked"})
  assert line.startswith(f"logdir='{tmp_path}/logs': its checkpoints: ") and "file" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_logdir(exit_with, tmp_path):
  (line,) = exit_with({"logdir": str(read_only(tmp_path / "bad"))})
  assert "logdir" in line and "cannot be written" in line


@pytest.mark.parametrize("field", ("run_name", "logdir"))
def test_run_folder_that_is_not_utf8(exit_with, tmp_path, field):
  """No checkpoint could be written there, which the run would find out after save_freq epochs."""
  name = os.fsdecode(b"caf\xe9")
  value = name if field == "run_name" else str(tmp_path / name)
  (line,) = exit_with({field: value})
  assert field in line and "is not UTF-8" in line


def test_run_folder_that_is_taken(exit_with, tmp_path):
  (tmp_path / "logs" / "run").mkdir(parents=True)
  (tmp_path / "logs" / "run" / "config.json").write_text("{}")
  (tmp_path / "logs" / "run" / "metrics.jsonl").write_text('{"epoch": 0}\n')
  (line,) = exit_with({"run_name": "run"})
  assert "already holds a run" in line


def test_server_that_is_not_there(exit_with):
  (line,) = exit_with({"reward_fn": "llava_bertscore",
                       "reward_kwargs": {"url": "http://127.0.0.1:9"}})
  assert "reward_kwargs.url" in line and "cannot be reached" in line


def test_server_that_is_there(tmp_path, capsys):
  with servers.serve(servers.llava) as llava:
    cfg = resolve(demo_values(tmp_path) | {"reward_fn": "llava_bertscore",
                                           "reward_kwargs": {"url": llava.url}})
    dry_run.dry_run(cfg)
  assert "The config is valid" in capsys.readouterr().out


@pytest.mark.parametrize("limit,checkpoints,message", [
    (5, 0, "logdir="), (5, 1.9, "logdir="),
    (5, 2.1, "num_checkpoint_limit=5: 5 checkpoints take"), (5, 4.9, "num_checkpoint_limit=5"),
    (2, 2.9, "num_checkpoint_limit=2: 3 checkpoints take")])
def test_disk_too_small_for_the_checkpoints(exit_with, monkeypatch, tmp_path, limit, checkpoints,
                                            message):
  """Five are made; one more than are kept is there while the oldest is replaced.

  A disk that has no room for two is no good with any limit.
  """
  cfg = resolve(demo_values(tmp_path))
  each = model_size.trained_weights(cfg, model_size.model_size(cfg)) * 12  # AdamW in float32
  usage = shutil.disk_usage("/")
  monkeypatch.setattr("shutil.disk_usage",
                      lambda path: usage._replace(free=int(checkpoints * each)))
  (line,) = exit_with({"num_checkpoint_limit": limit})
  assert line.startswith(message) and "MiB free; must be" in line


def test_lora_of_another_rank_counts_as_it_is(tmp_path):
  save_file({"unet.a.lora_A.weight": np.zeros((2, 3), np.float32),
             "unet.a.lora_B.weight": np.zeros((5, 2), np.float32)}, tmp_path / "lora.safetensors")
  values = demo_values(tmp_path)
  values["lora"]["init_from"] = str(tmp_path / "lora.safetensors")
  cfg = resolve(values)
  assert model_size.trained_weights(cfg, model_size.model_size(cfg)) == 16


@pytest.mark.parametrize("reward_fn,mode", [
    ("color_alignment", None), ("llava_strict_satisfaction", None), ("vlm_score", "strict"),
    ({"color_alignment": 1.0, "jpeg_compressibility": 0.5}, None)])
def test_prompts_that_do_not_fit_the_reward(exit_with, reward_fn, mode):
  pytest.importorskip("openai")
  with servers.serve(servers.llava) as llava, servers.serve(servers.openai) as vlm:
    vlm.on_get = servers.list_models
    kwargs = {"llava_strict_satisfaction": {"url": llava.url},
              "vlm_score": {"url": f"{vlm.url}/v1", "mode": mode}}
    changes = {"prompt_fn": "simple_animals", "prompt_fn_kwargs": {}, "reward_fn": reward_fn}
    if reward_fn in list(kwargs):
      changes["reward_kwargs"] = kwargs[reward_fn]
    (line,) = exit_with(changes)
  assert "got metadata {}" in line and "use prompt_fn=" in line


def test_prompts_that_do_not_fit_are_said_with_the_rest(exit_with):
  lines = exit_with({"prompt_fn": "simple_animals", "prompt_fn_kwargs": {},
                     "reward_fn": "color_alignment", "sample.eta": 0.0})
  assert [line.partition("=")[0] for line in lines] == ["sample.eta", "reward_fn"]


@pytest.mark.parametrize("precision,latent_size,warns", [
    ("fp16", 64 * 64 * 4, True), ("bf16", None, True), ("no", None, False),
    ("fp16", 32 * 32 * 4, False)])
def test_a_large_model_on_a_processor_is_warned_of(tmp_path, monkeypatch, capsys, precision,
                                                   latent_size, warns):
  size = latent_size and model_size.ModelSize(1, 1, 1, latent_size, 1)
  monkeypatch.setattr(validation, "model_size", lambda cfg: size)
  validation.prepare(resolve(demo_values(tmp_path) | {"mixed_precision": precision}))
  out = capsys.readouterr().out
  assert (out.count(f"Warning: mixed_precision='{precision}'") == 1) == warns
  assert len(out.splitlines()) == warns


def test_all_problems_at_once_from_everywhere(exit_with, tmp_path):
  lines = exit_with({
      "seed": -1, "sample.eta": 0.0, "train.timesteps_per_batch": 4, "prompt_fn": "nope",
      "reward_fn": "no_such_module:f", "pretrained.model": "no/such/model",
      "logdir": str(a_file(tmp_path / "file"))})
  for field in ("seed", "sample.eta", "train.timesteps_per_batch", "prompt_fn", "reward_fn",
                "pretrained.model", "logdir"):
    assert len([line for line in lines if line.startswith(field)]) == 1, (field, lines)
  assert len(lines) == 7


def test_all_problems_of_the_command_line_at_once(exit_with):
  lines = exit_with({"lora.rank": 0}, "--config.seed=abc", "--config.num_epochs=x",
                    "--config.sample.eta=0", "--config.nope=1", "--config.reward_fn=nope")
  for field in ("lora.rank", "seed", "num_epochs", "sample.eta", "nope", "reward_fn"):
    assert len([line for line in lines if line.startswith(field)]) == 1, (field, lines)
  assert len(lines) == 6


def test_all_problems_of_the_world_at_once(exit_with, tmp_path):
  lines = exit_with({
      "prompt_fn": "nope", "reward_fn": "llava_bertscore",
      "reward_kwargs": {"url": "http://127.0.0.1:9"}, "logdir": str(a_file(tmp_path / "file")),
      "pretrained.model": str(model(tmp_path / "model", only_pickles))})
  assert len(lines) == 4


@pytest.mark.parametrize("arguments", [
    ["--config.seed=two"], ["--config.nope=1"], ["--config.train.learning_rate=fast"],
    ["--config.seed=" + "9" * 5000], ["--config.use_lora=maybe"], ["--nope"],
    ["--config.reward_kwargs=3"], ["--config.prompt_fn_kwargs.pool=" + "(" * 500],
    ["--config.logdir=/dev/null/x"], ["--config.pretrained.model=/nowhere"],
])
def test_bad_override(exit_with, arguments):
  (line,) = exit_with({}, *arguments)
  field = arguments[0].lstrip("-").removeprefix("config.").partition("=")[0]
  assert field.split(".")[0] in line and len(line) < 1000


# ---- the dry run ----


def test_dry_run_says_what_the_run_would_be(tmp_path, capsys):
  assert cli.main(["train.py", f"--config={DEMO}", "--dry_run",
                   f"--config.logdir={tmp_path / 'logs'}"]) == 0
  out = capsys.readouterr().out
  assert "Images per optimizer step" in out and "Memory per device" in out
  assert "The run would be" in out and "Running training" not in out
  assert not (tmp_path / "logs").exists()


# What the run would find when it opens the model.
DAMAGE = {
    "vocab.json does not exist": lambda f: (f / "tokenizer" / "vocab.json").unlink(),
    "scheduler_config.json does not exist": lambda f: shutil.rmtree(f / "scheduler"),
    "merges.txt has no merge rules": lambda f: (f / "tokenizer" / "merges.txt").write_text(""),
    "in_channels=9": lambda f: change_config(f / "unet", in_channels=9, out_channels=9),
    "sample_size=None must be the size of its latents": lambda f: change_config(
        f / "unet", sample_size=None),
    "sample_size=0 must be": lambda f: change_config(f / "unet", sample_size=0),
    "sample_size=(16,) must be": lambda f: change_config(f / "unet", sample_size=[16]),
    "tensors misshapen": lambda f: change_config(f / "vae", block_out_channels=[16, 16]),
    "sample.num_steps=6 with pretrained.model=": lambda f: (
        f / "scheduler" / "scheduler_config.json").write_text('{"num_train_timesteps": 5}')}


def change_config(folder, **changes):
  file = folder / "config.json"
  file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("message", DAMAGE)
def test_dry_run_opens_the_model(exit_with, tmp_path, message):
  damaged = model(tmp_path / "model", DAMAGE[message])
  (line,) = exit_with({"pretrained.model": str(damaged)}, "--dry_run")
  assert message in line


def test_dry_run_knows_whether_lora_weights_fit(exit_with, tmp_path):
  save_file({"unet.a.lora_A.weight": np.zeros((2, 3), np.float32)}, tmp_path / "l.safetensors")
  (line,) = exit_with({"lora.init_from": str(tmp_path / "l.safetensors")}, "--dry_run")
  assert "l.safetensors has no " in line


def test_dry_run_says_what_the_run_would_go_on_without(tmp_path, monkeypatch, capsys):
  values = demo_values(tmp_path) | {"tensorboard": True}
  for there in (True, False):
    if not there:
      monkeypatch.setitem(sys.modules, "tensorboardX", None)
    dry_run.dry_run(resolve(values))
    assert ("Warning: tensorboard=True needs" in capsys.readouterr().out) != there


def test_resuming_without_the_weights_that_it_began_with(exit_with, tmp_path):
  path = str(tmp_path / "gone.safetensors")
  (line,) = exit_with({"lora.init_from": path, "resume_from": "auto", "run_name": "a"})
  assert line.startswith(f"lora.init_from='{path}' does not exist; a run that has a checkpoint")
  (line,) = exit_with({"lora.init_from": path})
  assert line.endswith("does not exist")


def test_a_run_is_no_lora_file(exit_with, tmp_path):
  (line,) = exit_with({"lora.init_from": str(tmp_path)})
  assert line == (f"lora.init_from='{tmp_path}' is a folder; must be a .safetensors file, such as "
                  "scripts/export_lora.py makes of a run")


def test_model_size_is_that_of_the_loaded_model(tmp_path):
  from flax import nnx
  import jax

  from ddpo_jax import build, lora
  cfg = resolve(demo_values(tmp_path))
  models = build.load_models(cfg)
  _, trained, _ = lora.partition(models.unet)
  size = model_size.model_size(cfg)
  numbers = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  assert model_size.trained_weights(cfg, size) == numbers(trained)
  assert size.unet_weights == numbers(nnx.state(models.unet)) - numbers(trained)
  models.vae.drop_encoder()
  assert size.weights == size.unet_weights + numbers(nnx.state(models.vae))


@pytest.mark.parametrize("arguments,words", [
    (["--config.sample.eta=0"], "sample.eta"),
    (["--config.sample.eta=0", "--config.lora.rank=0", "--dry_run"], "lora.rank"),
])
def test_process_exits_2_without_traceback(tmp_path, arguments, words):
  done = subprocess.run(
      [sys.executable, str(ROOT / "scripts" / "train.py"), f"--config={DEMO}",
       f"--config.run_name={tmp_path.name}", *arguments], cwd=ROOT, capture_output=True,
      text=True)
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == (2 if "--dry_run" in arguments else 1)
  assert words in done.stderr and "Traceback" not in done.stderr
  assert not (ROOT / "logs" / tmp_path.name).exists()


def test_problems_of_resolve_stay_as_they_were():
  with pytest.raises(UserError) as error:
    resolve({})
  assert all(re.match(r"\w+ is missing", line) for line in str(error.value).splitlines())


@pytest.mark.parametrize("precision,bytes_each", (("no", 4), ("bf16", 2)))
def test_what_a_device_has_to_hold(monkeypatch, precision, bytes_each):
  """Of the 8 samples of an epoch each of two devices has half, of latents in float32."""
  from small_model import small_config

  from ddpo_jax.batches import BatchPlan
  mebi = 2**20
  size = model_size.ModelSize(weights=8 * mebi, unet_weights=5 * mebi,
                              lora_weights_per_rank=mebi, latent_size=mebi, embedding_size=mebi)
  monkeypatch.setattr(dry_run, "model_size", lambda cfg: size)
  cfg = resolve(small_config(mixed_precision=precision))
  first, *lines = dry_run.describe_memory(cfg, BatchPlan.create(cfg, 2)).splitlines()
  # Gradients, where sampling computes them: of two samples, and three times of a microbatch's two.
  gradients = [] if precision == "no" else [8 * 3 * 4]
  parts = [8 * bytes_each, 3 * 16, 2 * 4 * 3 * 4, *gradients, 2 * 4 * bytes_each]
  assert [float(line.split()[-2]) for line in lines[:-1]] == parts
  assert ("sample.batch_size" in lines[-1]) == (precision == "no")
  amount = f"{sum(parts) / 1024:.2f} GiB"
  assert f"Memory per device: {amount} plus activations" in first
