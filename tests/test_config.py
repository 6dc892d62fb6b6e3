"""Validation of configs, and the batch arithmetic."""

import dataclasses
import functools
import json
import pathlib
import re

import numpy as np
import pytest

from configs import base, demo, dgx, single_gpu
from ddpo_jax.batches import BatchPlan
from ddpo_jax.config import field_type, resolve
from ddpo_jax.errors import UserError
from ddpo_jax.resume_checks import check_continues, check_sizes
from ddpo_jax.train import with_absolute_paths

EXPERIMENTS = [base.get_config,
               *(functools.partial(dgx.get_config, name) for name in dgx.EXPERIMENTS),
               *(functools.partial(single_gpu.get_config, name) for name in dgx.EXPERIMENTS),
               *(functools.partial(demo.get_config, name) for name in demo.REWARDS)]


def changed(**changes):
  config = base.get_config()
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.parametrize("get_config", EXPERIMENTS)
def test_every_experiment_is_valid(get_config):
  cfg = resolve(get_config())
  json.dumps(cfg.to_dict())
  assert BatchPlan.create(cfg, 8).steps_per_inner_epoch >= 1


@pytest.mark.parametrize("name,images,steps", [
    ("compressibility", 256, 4), ("incompressibility", 256, 4), ("aesthetic", 256, 2),
    ("prompt_image_alignment", 384, 2)])
def test_one_gpu_does_the_work_of_the_references_eight(name, images, steps):
  plan = BatchPlan.create(resolve(dgx.get_config(name)), 8)
  assert (plan.samples_per_epoch, plan.steps_per_inner_epoch) == (images, steps)
  one = BatchPlan.create(resolve(single_gpu.get_config(name)), 1)
  assert (one.samples_per_epoch, one.steps_per_inner_epoch) == (images, steps)


def test_cores_share_the_batches_of_one_device():
  cfg = resolve(demo.get_config())
  one, two = BatchPlan.create(cfg, 1), BatchPlan.create(cfg, 2, devices_per_batch=2)
  assert (two.sample_batch_size, two.train_batch_size) == (64, 32)
  same = dict(num_devices=1, devices_per_batch=1, sample_batch_size=128, train_batch_size=64)
  assert dataclasses.replace(two, **same) == one
  shown = dataclasses.replace(two, device="cpu").describe()
  assert "1 x cpu (2 cores share each batch)" in shown
  assert "Sample batch size per device = 128" in shown
  assert "Train batch size per device = 64" in shown


def test_the_batch_arithmetic_is_shown():
  plan = BatchPlan.create(resolve(dgx.get_config("compressibility")), 8)
  assert {"Images per epoch = 256", "Optimizer steps per inner epoch = 4",
          "Images per optimizer step (all devices, accumulated) = 64"
          } <= set(map(str.strip, plan.describe().splitlines()))
  plan = BatchPlan.create(resolve(changed(**{
      "sample.batch_size": 8, "train.batch_size": 2, "train.num_inner_epochs": 3,
      "sample.num_batches_per_epoch": 1, "train.gradient_accumulation_steps": 1})), 8)
  assert {"Optimizer steps per inner epoch = 4", "Inner epochs = 3"
          } <= set(map(str.strip, plan.describe().splitlines()))
  assert plan.optimizer_steps_per_epoch == 12


@pytest.mark.parametrize("field,value", [
    ("seed", -1), ("seed", "x"), ("num_epochs", 0), ("save_freq", 0), ("run_name", "a/b"),
    ("mixed_precision", "fp8"), ("use_lora", 1), ("num_checkpoint_limit", 0),
    ("sample.eta", 0.0), ("sample.eta", 1.5), ("sample.eta", float("nan")),
    ("sample.num_steps", 0), ("sample.num_steps", 1001), ("sample.num_steps", 1.5),
    ("sample.guidance_scale", -1.0), ("sample.batch_size", 0),
    ("train.clip_range", 0.0), ("train.clip_range", 1e-8), ("train.learning_rate", 0.0),
    ("train.adam_beta1", 1.0),
    ("train.use_8bit_adam", True), ("train.timestep_fraction", 0.0),
    ("train.timestep_fraction", 1.1), ("train.gradient_checkpointing", "some"),
    ("train.max_grad_norm", float("nan")), ("lora.rank", 0), ("wandb.mode", "on"),
    ("pretrained.model", "no/such/folder"), ("pretrained.model", ""),
    ("resume_from", "no_such_run"), ("lora.init_from", "no_such_file"),
    ("per_prompt_stat_tracking.buffer_size", 0), ("prompt_fn_kwargs", 3),
    ("reward_fn", 3), ("reward_fn", ""), ("reward_fn", {}), ("reward_fn", {"a": "b"}),
    ("reward_fn", {"a": float("nan")}), ("reward_fn", {"a": 0.0}), ("reward_fn", {"a": True}),
    ("reward_fn", {"a": 10**400}), ("reward_fn", {1: 1.0}), ("reward_fn", {"a": -1e30}),
])
def test_bad_value_is_one_line_that_names_the_field(field, value):
  config = base.get_config().to_dict()
  group = config
  *groups, name = field.split(".")
  for each in groups:
    group = group[each]
  group[name] = value
  with pytest.raises(UserError, match=re.escape(field)) as error:
    resolve(config)
  assert len(str(error.value).splitlines()) == 1


def test_all_problems_at_once():
  with pytest.raises(UserError) as error:
    resolve(changed(**{"sample.eta": 0.0, "lora.rank": 0, "seed": -3}))
  assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("changes,numbers", [
    ({"sample.batch_size": 3, "train.batch_size": 2}, ("3", "2")),
    ({"sample.batch_size": 4, "sample.num_batches_per_epoch": 3,
      "train.gradient_accumulation_steps": 5}, ("12", "5")),
    ({"sample.num_steps": 5, "train.timestep_fraction": 0.1}, ("0.1", "5")),
    ({"sample.num_steps": 10, "train.timesteps_per_batch": 3}, ("3", "10")),
    ({"train.cfg": False}, ("5.0", "guidance_scale")),
    ({"per_prompt_stat_tracking.min_count": 17}, ("17", "16")),
])
def test_what_does_not_fit_together_is_refused_with_the_numbers(changes, numbers):
  """The reference says a bare AssertionError, or trains nothing and exits 0."""
  with pytest.raises(UserError) as error:
    resolve(changed(**changes))
  assert all(number in str(error.value) for number in numbers)


def test_train_cfg_does_not_matter_where_there_is_no_guidance():
  resolve(changed(**{"train.cfg": False, "sample.guidance_scale": 1.0}))


@pytest.mark.parametrize("num_steps", (1, 3, 7, 50, 333, 999, 1000))
def test_the_fraction_that_is_advised_is_accepted(num_steps):
  with pytest.raises(UserError, match="trains no timestep") as error:
    resolve(changed(**{"sample.num_steps": num_steps,
                       "train.timestep_fraction": 0.99 / num_steps}))
  advised = float(str(error.value).rpartition(" ")[2])
  resolve(changed(**{"sample.num_steps": num_steps, "train.timestep_fraction": advised}))
  assert advised < 1.1 / num_steps


def test_lora_that_would_not_be_used_is_refused(tmp_path):
  (tmp_path / "lora.safetensors").touch()
  changes = {"lora.init_from": str(tmp_path / "lora.safetensors")}
  resolve(changed(**changes))
  with pytest.raises(UserError, match="lora.init_from=.* with use_lora=False"):
    resolve(changed(**changes, use_lora=False))


def test_unknown_and_missing_fields():
  config = base.get_config().to_dict()
  config["sample"]["steps"] = 3
  del config["seed"]
  with pytest.raises(UserError) as error:
    resolve(config)
  assert "sample.steps is not a field" in str(error.value)
  assert "did you mean sample.num_steps?" in str(error.value)
  assert "seed is missing" in str(error.value)


@pytest.mark.parametrize("path,meant", [
    ("learning_rate", "train.learning_rate"), ("num_steps", "sample.num_steps"),
    ("batch_size", "sample.batch_size or train.batch_size"), ("epochs", "num_epochs"),
    ("sample.nun_steps", "sample.num_steps"), ("sampel.batch_size", "sample.batch_size"),
    ("sampel.xyz", "sample"), ("sampel", "sample"), ("train.num_steps", "sample.num_steps"),
    ("lora_rank", "lora.rank"), ("train.clip", "train.clip_range"), ("Seed", "seed"),
    ("reward", "reward_fn or reward_kwargs"), ("prompt_fn_kwarg.pool", "prompt_fn_kwargs"),
    ("adam", "train.adam_beta1 or train.adam_beta2 or train.adam_weight_decay"),
])
def test_fields_that_may_have_been_meant(path, meant):
  with pytest.raises(UserError) as error:
    field_type(path)
  assert str(error.value) == f"{path} is not a field; did you mean {meant}?"


@pytest.mark.parametrize("path,first", [
    ("lr", "run_name, seed, "), ("foo.bar", "run_name, "), ("train.lr", "batch_size, "),
    ("", "run_name, "), ("nope" * 999, "run_name, ")])
def test_all_fields_are_said_where_none_is_near(path, first):
  with pytest.raises(UserError) as error:
    field_type(path)
  assert f"{path[:120]} is not a field; there are: {first}" in str(error.value)


@pytest.mark.parametrize("value", (None, {}, {"buffer_size": 4, "min_count": 2}))
def test_per_prompt_stat_tracking_may_be_none_or_a_dict(value):
  config = base.get_config()
  config.per_prompt_stat_tracking = value
  tracking = resolve(config).per_prompt_stat_tracking
  assert (tracking is None) == (not value)


def test_config_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    resolve(base.get_config()).seed = 3


VLM, LLAVA = "vlm_score", "llava_bertscore"


@pytest.mark.parametrize("before,now,contradicting", [
    ({"url": "http://a/v1"}, {"url": "http://b/v1", "timeout": 9.0, "time_limit": 99.0,
                              "backoff": 2.0, "max_parallel": 1, "api_key_env": "KEY"}, []),
    ({}, {"api_key": "sk-1"}, []),
    ({"mode": "strict", "url": "a"}, {"mode": "probability", "url": "b"}, ["mode"]),
    ({}, {"mode": "strict"}, ["mode"]),
    ({"model": "m", "question": "Is it?"}, {"url": "a"}, ["model", "question"]),
    ({"nested": {"url": "a"}}, {"nested": {"url": "b"}}, ["nested"]),
    ({VLM: {"url": "a"}}, {VLM: {"url": "b"}, LLAVA: {"batch_size": 2}}, []),
    ({VLM: {"url": "a", "mode": "strict"}}, {VLM: {"url": "b"}}, [f"{VLM}.mode"]),
    ({VLM: {"nested": {"url": "a"}}}, {VLM: {"nested": {"url": "b"}}}, [f"{VLM}.nested"]),
])
def test_a_resumed_run_may_have_its_reward_elsewhere(before, now, contradicting):
  """The server may have moved; what it is asked may not have changed."""
  config = base.get_config().to_dict()
  several = VLM in before
  config["reward_fn"] = {VLM: 1.0, LLAVA: 0.5} if several else VLM
  saved = json.loads(json.dumps(resolve(config | {"reward_kwargs": before}).to_dict()))
  cfg = resolve(config | {"reward_kwargs": now})
  if not contradicting:
    return check_continues(cfg, saved, "the checkpoint of epoch 3")
  with pytest.raises(UserError) as error:
    check_continues(cfg, saved, "the checkpoint of epoch 3")
  lines = str(error.value).splitlines()
  assert [line.partition("=")[0] for line in lines] == [
      f"reward_kwargs.{name}" for name in contradicting]
  assert all("contradicts the checkpoint of epoch 3, which has " in line for line in lines)


def test_a_resumed_run_learns_as_before():
  """What changes nothing of what is learned may change, and so may what is new here."""
  before = resolve(base.get_config()).to_dict()
  for group, name in ((before, "tensorboard"), (before["train"], "recompute_log_probs")):
    del group[name]  # as in a checkpoint of before there was this field
  check_continues(resolve(changed(num_epochs=7, **{"wandb.mode": "disabled"})), before, "it")
  with pytest.raises(UserError, match="seed=7 contradicts it, which has 42"):
    check_continues(resolve(changed(seed=7)), before, "it")


def test_arguments_that_only_one_run_has_are_said_to_be_none():
  config = base.get_config().to_dict() | {"reward_fn": VLM}
  without, with_mode = (resolve(config | {"reward_kwargs": kwargs})
                        for kwargs in ({}, {"mode": "strict"}))
  with pytest.raises(UserError, match="^reward_kwargs.mode='strict' contradicts it, .* nothing;"):
    check_continues(with_mode, without.to_dict(), "it")
  with pytest.raises(UserError, match="^reward_kwargs.mode=nothing contradicts it, .* 'strict';"):
    check_continues(without, with_mode.to_dict(), "it")


def test_a_base_model_may_have_moved(tmp_path):
  """To another machine, with another mount; not to another model while the first is there."""
  first, second = tmp_path / "a", tmp_path / "b"
  first.mkdir(), second.mkdir()
  saved = resolve(changed(**{"pretrained.model": str(first)})).to_dict()
  now = resolve(changed(**{"pretrained.model": str(second)}))
  with pytest.raises(UserError, match="^pretrained.model="):
    check_continues(now, saved, "it")
  first.rmdir()
  check_continues(now, saved, "it")
  with pytest.raises(UserError, match="^pretrained.model="):
    check_continues(resolve(changed(**{"pretrained.model": "owner/name"})), saved, "it")


def test_a_base_model_may_be_called_from_any_folder(tmp_path, monkeypatch):
  for name in ("model", "here", "there/below"):
    (tmp_path / name).mkdir(parents=True)
  monkeypatch.chdir(tmp_path / "here")
  saved = with_absolute_paths(resolve(changed(**{"pretrained.model": "../model"})))
  assert saved.pretrained.model == str(tmp_path / "model")
  monkeypatch.chdir(tmp_path / "there/below")
  now = resolve(changed(**{"pretrained.model": "../../model/"}))
  check_continues(now, saved.to_dict(), "it")


def test_prompts_may_be_called_from_any_folder_and_may_move(tmp_path, monkeypatch):
  """Another file in the place of one that is still there would be other prompts."""
  for name in ("here", "there"):
    (tmp_path / name).mkdir()
  first, second = tmp_path / "here" / "simple_animals.txt", tmp_path / "there" / "moved.txt"
  first.write_text("a cat")
  second.write_text("a cat")
  given = lambda path: resolve(changed(prompt_fn="from_file", prompt_fn_kwargs={"path": str(path)}))
  monkeypatch.chdir(first.parent)
  saved = with_absolute_paths(given(first.name))
  assert saved.prompt_fn_kwargs == {"path": str(first)}
  check_continues(given(first.name), saved.to_dict(), "it")
  check_continues(given(first.name), given(first.name).to_dict(), "it")  # of before there was this
  monkeypatch.chdir(second.parent)
  for other in (second, first.name):  # the latter is now one of this package's lists
    with pytest.raises(UserError, match="^prompt_fn_kwargs="):
      check_continues(given(other), saved.to_dict(), "it")
  first.unlink()
  check_continues(given(second), saved.to_dict(), "it")
  with pytest.raises(UserError, match="^prompt_fn_kwargs="):  # as JSON has them
    whole, real = (resolve(changed(prompt_fn="my:f", prompt_fn_kwargs={"low": low}))
                   for low in (1, 1.0))
    check_continues(whole, real.to_dict(), "it")
  own = resolve(changed(prompt_fn="my:prompts", prompt_fn_kwargs={"path": "moved.txt"}))
  assert with_absolute_paths(own) == own  # whatever it means there


def test_weights_to_begin_with_may_be_called_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "l.safetensors").touch()
  given = resolve(changed(**{"lora.init_from": "l.safetensors"}))
  saved = with_absolute_paths(given)
  assert saved.lora.init_from == str(tmp_path / "l.safetensors")
  check_continues(given, saved.to_dict(), "it")
  (tmp_path / "other.safetensors").touch()
  with pytest.raises(UserError, match="^lora.init_from='other.safetensors' contradicts it"):
    check_continues(resolve(changed(**{"lora.init_from": "other.safetensors"})), saved.to_dict(),
                    "it")
  assert with_absolute_paths(resolve(base.get_config())).lora.init_from == ""


def test_the_rank_is_that_of_the_weights_to_begin_with(tmp_path):
  """Which may be gone once the run has checkpoints of its own."""
  (tmp_path / "l.safetensors").touch()
  given = {"lora.init_from": str(tmp_path / "l.safetensors")}
  saved = resolve(changed(**given, **{"lora.rank": 2})).to_dict()
  check_continues(resolve(changed(**given, **{"lora.rank": 3})), saved, "it")
  check_continues(resolve(changed(**{"lora.rank": 2})), saved, "it")
  with pytest.raises(UserError, match="^lora.rank=3 contradicts it, which has 2"):
    check_continues(resolve(changed(**{"lora.rank": 3})), saved, "it")


@pytest.mark.parametrize("before, now", ((None, {"buffer_size": 16, "min_count": 8}),
                                         ({"buffer_size": 16, "min_count": 8}, None)))
def test_statistics_of_prompts_are_kept_or_not_as_before(before, now):
  saved = json.loads(json.dumps(resolve(changed(per_prompt_stat_tracking=before)).to_dict()))
  check_continues(resolve(changed(per_prompt_stat_tracking=before)), saved, "it")
  with pytest.raises(UserError, match="per_prompt_stat_tracking.buffer_size=.* contradicts it"):
    check_continues(resolve(changed(per_prompt_stat_tracking=now)), saved, "it")


def test_arguments_are_compared_by_what_they_say():
  """Not by the order that they are given in, nor by whether a weight has a point."""
  before = changed(prompt_fn_kwargs={"a": 1, "b": 2}, reward_fn={"x:y": 1, "z:y": 0.5})
  now = changed(prompt_fn_kwargs={"b": 2, "a": 1}, reward_fn={"z:y": 0.5, "x:y": 1.0})
  saved = json.loads(json.dumps(resolve(before).to_dict()))
  check_continues(resolve(now), saved, "it")
  more = changed(prompt_fn_kwargs={"a": 1, "b": 2, "c": 3},
                 reward_fn={"x:y": 1, "z:y": 0.5, "w:y": 1})
  with pytest.raises(UserError) as error:
    check_continues(resolve(more), saved, "it")
  assert sorted(line.partition("=")[0] for line in str(error.value).splitlines()) == [
      "prompt_fn_kwargs", "reward_fn"]


def test_batch_sizes_go_with_the_devices():
  """A resumed run must have as many images an epoch and a step, however they are divided."""
  def sizes(devices, **changes):
    cfg = resolve(changed(**changes))
    return cfg, BatchPlan.create(cfg, devices)

  base_sizes = {"sample.batch_size": 8, "sample.num_batches_per_epoch": 4, "train.batch_size": 4,
                "train.gradient_accumulation_steps": 2}
  cfg, plan = sizes(2, **base_sizes)
  meta = {"config": cfg.to_dict(), "sizes": plan.sizes}
  for devices, same in ((1, {"sample.num_batches_per_epoch": 8,
                             "train.gradient_accumulation_steps": 4}),
                        (4, {"sample.batch_size": 4, "train.batch_size": 2}),
                        (2, {"train.batch_size": 1, "train.gradient_accumulation_steps": 8})):
    now, plan = sizes(devices, **base_sizes | same)
    check_continues(now, meta["config"], "it")
    check_sizes(now, plan, meta, "it")
  with pytest.raises(UserError) as error:
    check_sizes(*sizes(1, **base_sizes), meta, "it")
  assert str(error.value).splitlines() == [
      "sample.batch_size=8 × sample.num_batches_per_epoch=4 × 1 devices makes 32 images per epoch, "
      "which contradicts it, with 64; must make as many, or start a new run",
      "train.batch_size=4 × train.gradient_accumulation_steps=2 × 1 devices makes 8 images per "
      "optimizer step, which contradicts it, with 16; must make as many, or start a new run"]
  cores = BatchPlan.create(cfg, 4, devices_per_batch=4)
  with pytest.raises(UserError, match=r" × 1 devices makes 32 images per epoch, "):
    check_sizes(cfg, cores, meta, "it")


@pytest.mark.parametrize("argument", ({1, 2}, np.ones(3), pathlib.Path("x")))
def test_arguments_are_what_a_config_file_can_hold(argument):
  with pytest.raises(UserError, match="^reward_kwargs={…} must hold nothing but texts") as error:
    resolve(base.get_config().to_dict() | {"reward_kwargs": {"api_key": "secret", "x": argument}})
  assert "secret" not in str(error.value)


def test_a_single_file_is_no_model(tmp_path):
  (tmp_path / "model.safetensors").write_text("")
  with pytest.raises(UserError, match="model.safetensors' is a file; must be a folder"):
    resolve(changed(**{"pretrained.model": str(tmp_path / "model.safetensors")}))


def test_configs_of_ddpo_pytorch_have_the_defaults_of_what_is_new():
  """Its config/base.py, which has no such fields."""
  values = base.get_config().to_dict()
  for name in ("eval_freq", "compilation_cache", "lora", "reward_kwargs", "wandb", "tensorboard",
               "distributed"):
    del values[name]
  del values["sample"]["decode_batch_size"]
  for name in ("timesteps_per_batch", "gradient_checkpointing", "recompute_log_probs",
               "max_skipped_steps"):
    del values["train"][name]
  assert resolve(values) == resolve(base.get_config())
  del values["train"]["cfg"]
  with pytest.raises(UserError, match="^train.cfg is missing from the config$"):
    resolve(values)


def test_functions_get_what_config_json_holds():
  """So that a run which is continued by its config.json calls them with the same."""
  cfg = resolve(changed(reward_kwargs={"range": (1, 9), "table": [{"a": (2,)}]}))
  assert cfg.reward_kwargs == {"range": [1, 9], "table": [{"a": [2]}]}
  for wrong in ({"table": {1: 2}}, {"list": [({"a": {None: 1}},)]}):
    with pytest.raises(UserError, match="^reward_kwargs={…} must have texts as the keys of dicts"):
      resolve(base.get_config().to_dict() | {"reward_kwargs": wrong})


def test_where_and_how_a_resumed_run_computes_may_change(tmp_path):
  saved = json.loads(json.dumps(resolve(changed()).to_dict()))
  changes = {
      "run_name": "other", "logdir": str(tmp_path), "num_epochs": 7, "save_freq": 3,
      "eval_freq": 2, "num_checkpoint_limit": 1, "resume_from": "auto", "compilation_cache": "",
      "wandb.mode": "offline", "wandb.project": "other", "tensorboard": True,
      "distributed.detect": False, "distributed.timeout": 9, "sample.decode_batch_size": 1,
      "train.max_skipped_steps": 3, "train.gradient_checkpointing": "full",
      "train.timesteps_per_batch": 2}
  for name, value in changes.items():
    *groups, field = name.split(".")
    assert functools.reduce(dict.get, groups, saved)[field] != value, name
  check_continues(resolve(changed(**changes)), saved, "it")
