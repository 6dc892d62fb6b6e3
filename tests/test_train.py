"""Whole runs of the loop on the golden files' tiny model: files, resume, failures."""

import dataclasses
import json
import random
import shutil
import threading
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import metrics_of, weights_of, without_times
from safetensors.numpy import load_file, save_file
from small_model import small_config, small_model

from ddpo_jax import build, checkpoint, inner_loop, lora, train, update, validation
from ddpo_jax.config import resolve
from ddpo_jax.devices import plan_batches
from ddpo_jax.errors import DivergedError, UserError
from ddpo_jax.interrupt import Stop
from ddpo_jax.models.vae import to_uint8
from ddpo_jax.prompts import get_prompt_fn
from ddpo_jax.report import write_report
from ddpo_jax.rewards import get_rewards


def brightness(images, prompts, metadata):
  values = images.mean(axis=(1, 2, 3))
  return values, {"half": values / 2, "first": [p.split()[0] for p in prompts], "no": [0.0]}


@pytest.fixture
def make_config(tmp_path, monkeypatch):
  """A one-device config of seconds; keyword arguments override it. No run writes a report."""
  monkeypatch.setattr("jax.device_count", lambda: 1)
  monkeypatch.setattr("ddpo_jax.report.write_report", lambda run: None)

  def make(**changes):
    return resolve(small_config(**{
        "logdir": str(tmp_path), "run_name": "run", "reward_fn": f"{__name__}:brightness",
        "num_epochs": 3, "save_freq": 2, "eval_freq": 2, **changes}))

  return make


def build_trainer(cfg, model=None):
  return build.build(cfg, plan_batches(cfg), get_prompt_fn(cfg.prompt_fn),
                     get_rewards(cfg.reward_fn, {}), model or build.open_model(cfg))


TWO_BATCHES = {"sample.num_batches_per_epoch": 2, "train.gradient_accumulation_steps": 2}
REQUIRED = {
    "epoch", "reward_mean", "reward_std", "reward_min", "reward_max", "sampling_seconds",
    "reward_seconds", "training_seconds", "images_per_second", "loss", "approx_kl",
    "clipfrac", "grad_norm", "ratio_drift", "sampler_drift", "learning_rate",
    "optimizer_steps", "peak_memory_bytes"}


def test_run_folder_and_resume(make_config, tmp_path, monkeypatch, capsys):
  """A run of 3 epochs equals one of 2 that is resumed for the third, bit for bit."""
  with monkeypatch.context() as patch:
    patch.setattr("ddpo_jax.report.write_report", write_report)
    run = train.train(make_config(**TWO_BATCHES))
  assert {p.name for p in run.iterdir()} == {
      "config.json", "metrics.jsonl", "rewards.jsonl", "images", "checkpoints",
      "report.html"}
  lines = metrics_of(run)
  assert [line["epoch"] for line in lines] == [0, 1, 2]
  assert REQUIRED <= set(lines[0])
  assert all(line["ratio_drift"] < 1e-5 for line in lines)
  assert [line["optimizer_steps"] for line in lines] == [2, 4, 6]
  assert sorted(p.name for p in (run / "images").iterdir()) == [
      *(f"epoch_{epoch:04d}.jpg" for epoch in range(3)),
      *(f"eval_{epochs:04d}.jpg" for epochs in (0, 2, 3))]
  assert json.loads((run / "config.json").read_text())["seed"] == 42
  assert checkpoint.find(run) == (run, 2)
  half = f"reward/{__name__}:brightness/half_mean"
  np.testing.assert_allclose([line[half] for line in lines],
                             [line["reward_mean"] / 2 for line in lines], rtol=1e-6)
  last = json.loads((run / "rewards.jsonl").read_text().splitlines()[-1])
  assert last["info"] == {f"{__name__}:brightness": {
      "half": pytest.approx(np.array(last["rewards"]) / 2, rel=1e-5),
      "first": [prompt.split()[0] for prompt in last["prompts"]]}}
  assert capsys.readouterr().out.count("'no'") == 1

  with pytest.raises(UserError, match="already holds a run"):
    train.train(make_config(**TWO_BATCHES))

  train.train(make_config(run_name="other", num_epochs=2, **TWO_BATCHES))
  train.train(make_config(run_name="other", resume_from=str(tmp_path / "other"),
                          **TWO_BATCHES))
  resumed = metrics_of(tmp_path / "other")
  assert without_times(resumed) == without_times(lines)
  assert (run / "rewards.jsonl").read_text() == (
      tmp_path / "other" / "rewards.jsonl").read_text()
  np.testing.assert_array_equal(weights_of(run, 2), weights_of(tmp_path / "other", 2))


def test_the_model_is_read_while_the_programs_compile(make_config, monkeypatch):
  compiling = threading.Event()
  compile_programs = build.compile_programs

  def begin(*arguments):
    compiling.set()
    return compile_programs(*arguments)

  def wait():
    assert compiling.wait(timeout=60)
    return model.read()

  cfg = make_config()
  model = build.open_model(cfg)
  monkeypatch.setattr(build, "compile_programs", begin)
  trainer = build_trainer(cfg, dataclasses.replace(model, read=wait))
  assert {leaf.dtype for leaf in jax.tree.leaves(trainer.frozen_unet)} == {jnp.dtype("float32")}


def test_the_configs_numbers_reach_the_trainer(make_config, monkeypatch):
  made = mock.Mock(wraps=update.make_optimizer)
  monkeypatch.setattr(update, "make_optimizer", made)
  trainer = build_trainer(make_config(**{
      "train.learning_rate": 1e-3, "train.adam_beta1": 0.5, "train.adam_beta2": 0.6,
      "train.adam_weight_decay": 0.7, "train.adam_epsilon": 0.8, "train.max_grad_norm": 0.9,
      "per_prompt_stat_tracking.buffer_size": 3}))
  made.assert_called_once_with(1e-3, beta1=0.5, beta2=0.6, weight_decay=0.7, epsilon=0.8,
                               max_grad_norm=0.9)
  trainer.stat_tracker.update(["a"] * 5, np.arange(5.0))
  assert trainer.stat_tracker.get_stats()["a"]["count"] == 3


def test_each_epoch_and_inner_epoch_draws_anew(make_config):
  trainer = build_trainer(make_config(**{"train.num_inner_epochs": 2}))
  rollouts = [trainer.worker.run(trainer.state.params, epoch) for epoch in (0, 1)]
  one, other = (np.asarray(rollout.trajectory.latents[:, :, 0]) for rollout in rollouts)
  assert (one != other).all()
  keys = []

  def note(state, frozen, batch, key, index):
    keys.append((*jax.random.key_data(key).tolist(), int(index)))
    return state, None

  trainer.update = note
  for epoch in (0, 1):
    list(inner_loop.optimizer_steps(trainer, None, epoch, Stop()))
  assert len(keys) == len(set(keys)) == 8  # 2 epochs, 2 inner epochs, 2 steps


def test_training_gives_memory_back_and_heeds_signals_before_each_step(monkeypatch):
  """Which samples a step takes goes with the seed, and not with the noise that one began with."""
  space, events, keys = types.SimpleNamespace, [], []

  def update(state, frozen, batch, key, index):
    events.append(int(index))
    keys.append(tuple(jax.random.key_data(key).tolist()))
    return state, None

  monkeypatch.setattr(inner_loop.glibc, "return_freed_memory", lambda: events.append("memory"))
  for seed in (1, 2):
    trainer = space(update=update, state=None, frozen_unet=None,
                    plan=space(steps_per_inner_epoch=2),
                    cfg=space(seed=seed, train=space(num_inner_epochs=1)))
    list(inner_loop.optimizer_steps(trainer, None, 0, space(check=lambda: events.append("check"))))
    epoch_key = jax.random.fold_in(jax.random.key(seed), 0)
    keys.append(tuple(jax.random.key_data(jax.random.fold_in(epoch_key, 0)).tolist()))  # a sample's
  assert events == ["memory", "check", 0, "check", 1] * 2
  assert len(set(keys)) == 4


def test_images_are_the_decoded_latents(make_config):
  cfg = make_config()
  trainer, models = build_trainer(cfg), build.load_models(cfg)
  rollout = trainer.worker.run(trainer.state.params, 0)
  latents = rollout.trajectory.final_latents[0]
  expected = to_uint8(models.vae.decode(latents / models.scaling_factor))
  assert np.abs(rollout.images.astype(int) - np.asarray(expected)).max() <= 1


def test_the_first_lora_weights_go_with_the_seed(make_config):
  one, other = (lora.partition(build.load_models(make_config(seed=seed)).unet).trained
                for seed in (1, 2))
  assert any((a != b).any() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)))


def test_weights_that_cannot_be_read_end_the_run(make_config, monkeypatch, tmp_path):
  """Found while the update compiles, and said as where it is found before."""
  def unreadable(cfg):
    def read():
      raise UserError("the disk is gone")
    return dataclasses.replace(open_model(cfg), read=read)

  open_model = train.open_model
  monkeypatch.setattr(train, "open_model", unreadable)
  with pytest.raises(UserError, match="the disk is gone"):
    train.train(make_config())
  assert not (tmp_path / "run").exists()


def fails_in_epoch_one(images, prompts, metadata):
  fails_in_epoch_one.calls += 1
  if fails_in_epoch_one.calls > 2:  # two batches an epoch
    raise ConnectionError("the server is gone")
  return images.mean(axis=(1, 2, 3)), {}


def test_a_reward_that_fails_loses_no_finished_epoch(make_config, tmp_path):
  fails_in_epoch_one.calls = 0
  with pytest.raises(ConnectionError, match="the server is gone"):
    train.train(make_config(reward_fn=f"{__name__}:fails_in_epoch_one", save_freq=100,
                            **TWO_BATCHES))
  assert checkpoint.find(tmp_path / "run")[1] == 0
  assert len(metrics_of(tmp_path / "run")) == 1


def test_several_rewards_resume_exactly(make_config):
  """In another folder, from the checkpoint of the second of three epochs."""
  brightness, size = f"{__name__}:brightness", "jpeg_compressibility"
  rewards = {"reward_fn": {brightness: 1.0, size: 0.5}}
  run = train.train(make_config(**rewards))
  lines = metrics_of(run)
  assert {f"reward/{name}_{of}" for name in (brightness, size)
          for of in ("mean", "std")} <= set(lines[0])
  other = train.train(make_config(
      run_name="other", resume_from=str(run / "checkpoints" / "1"), **rewards))
  resumed = metrics_of(other)
  assert checkpoint.saved_epochs(other) == [2, 1]  # should it be killed before its own first
  assert resumed[-1]["epoch"] == 2
  assert resumed[-1]["reward_mean"] == lines[2]["reward_mean"]
  assert resumed[-1]["loss"] == lines[2]["loss"]


def test_a_run_goes_on_in_smaller_batches(make_config):
  """As on a smaller device: of the same images, as many in each optimizer step."""
  run = train.train(make_config(num_epochs=2, save_freq=1))
  expected = metrics_of(run)[1]
  smaller = {"sample.batch_size": 2, "sample.num_batches_per_epoch": 2, "train.batch_size": 1,
             "train.gradient_accumulation_steps": 2, "train.gradient_checkpointing": "blocks",
             "sample.decode_batch_size": 1}
  other = {"run_name": "other", "resume_from": str(run / "checkpoints" / "0")}
  resumed = metrics_of(train.train(make_config(num_epochs=2, **other, **smaller)))[-1]
  assert resumed["reward_mean"] == pytest.approx(expected["reward_mean"], rel=1e-5)
  assert resumed["optimizer_steps"] == expected["optimizer_steps"]
  with pytest.raises(UserError, match="makes 8 images per epoch, which contradicts .*, with 4;"):
    validation.prepare(make_config(num_epochs=2, **other | {"run_name": "third"},  # nothing built
                                   **{"sample.num_batches_per_epoch": 2}))


def test_metrics_of_an_epoch():
  """Means are over the steps that were taken; nothing else is left out."""
  space = types.SimpleNamespace
  rewards = np.array([1, 2, 3, 6], np.float32)
  step = lambda loss, skipped: space(loss=loss, approx_kl=loss, clipfrac=0.0, grad_norm=1.0,
                                     ratio_drift=1e-9, skipped=skipped)
  trainer = space(combiner=object(), cfg=resolve(small_config()), update=None,
                  state=space(step=3))
  rollout = space(rewards={"a": rewards}, reward_info=space(means=dict), sampling_seconds=2.0,
                  reward_seconds=1.0, images=np.zeros((2, 16, 16, 3), np.uint8))
  steps = [step(1.0, 0.0), step(float("nan"), 1.0), step(3.0, 0.0)]
  found = train.epoch_metrics(trainer, rollout, rewards, steps, 1.0)
  expected = {"reward_mean": 3.0, "reward_min": 1.0, "reward_max": 6.0, "reward/a_mean": 3.0,
              "reward/a_std": rewards.std(), "reward_std": rewards.std(), "loss": 2.0,
              "skipped_steps": 1, "images_per_second": 2.0, "optimizer_steps": 3}
  assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("precision", ("no", "bf16"))
def test_steps_skipped_in_a_row_are_counted(precision):
  """Too many are an error that the user can correct: one line names the field."""
  cfg = resolve(small_config(**{"train.max_skipped_steps": 2, "mixed_precision": precision,
                                "train.learning_rate": 1e30}))
  trainer = types.SimpleNamespace(skipped_in_a_row=0, cfg=cfg)
  count = lambda skipped: train.count_skipped(
      trainer, types.SimpleNamespace(skipped=skipped), epoch=0)
  for skipped in (1.0, 1.0, 0.0, 1.0, 1.0):
    count(skipped)
  with pytest.raises(DivergedError, match=r"^train.learning_rate=1e\+30: .* the last 3") as error:
    count(1.0)
  assert ("mixed_precision='no'" in str(error.value)) == (precision != "no")
  assert "epoch 1/" in str(error.value)


@pytest.mark.parametrize("ends", (True, False))
def test_a_checkpoint_that_cannot_be_written_is_not_said_to_be_there(
    ends, make_config, monkeypatch, capsys):
  """Neither of a run that is done nor of one that fails."""
  monkeypatch.setattr(checkpoint.Checkpointer, "finish_writing", lambda *_, **__: False)
  monkeypatch.setattr(checkpoint.Checkpointer, "save", lambda *_: None)
  if not ends:
    monkeypatch.setattr(train, "evaluate", lambda trainer, tracker, epochs: 1 / (1 - epochs))
  with pytest.raises(UserError if ends else ZeroDivisionError) as error:
    train.train(make_config(num_epochs=2 if not ends else 1))
  said = str(error.value) if ends else capsys.readouterr().out
  assert "/run: the checkpoint after 1 epoch could not be written, and there is none" in said
  assert "Saved after" not in said


def test_auto_starts_continues_and_survives_a_damaged_checkpoint(make_config, tmp_path,
                                                                 capsys):
  changes = dict(save_freq=1, resume_from="auto")
  run = train.train(make_config(num_epochs=3, **changes))
  expected, weights = metrics_of(run), weights_of(run, 2)
  for file in (run / "checkpoints" / "2" / "state").rglob("*"):
    if file.is_file() and file.name not in ("manifest.ocdbt", "_METADATA"):
      file.write_bytes(b"")
  with open(run / "metrics.jsonl", "a") as file:
    file.write('{"epoch": 3, "rew')  # as a kill in the middle of a line leaves it
  train.train(make_config(num_epochs=4, **changes))
  printed = capsys.readouterr().out
  assert "checkpoints/2 is damaged (" in printed and "Trying the one before it" in printed
  assert f"Resuming after 2 epochs, with checkpoint {run}/checkpoints/1" in printed
  assert f"Keeping the damaged checkpoint as {run / 'checkpoints' / '2.damaged'}" in printed
  assert (run / "checkpoints" / "2.damaged" / "state").is_dir()
  assert without_times(metrics_of(run)[:3]) == without_times(expected)
  assert len(metrics_of(run)) == 4
  np.testing.assert_array_equal(weights_of(run, 2), weights)


def test_weights_that_are_not_finite_are_refused(make_config, tmp_path):
  """They would draw black images, to which any reward gives some number."""
  folder = shutil.copytree(small_model(), tmp_path / "model")
  file = folder / "unet" / "diffusion_pytorch_model.safetensors"
  tensors = load_file(file)
  tensors["conv_in.bias"][0] = np.nan
  save_file(tensors, file)
  with pytest.raises(UserError, match="pretrained.model=.*model': what its UNet predicts is not"):
    train.train(make_config(**{"pretrained.model": str(folder)}))


def test_one_sample_that_is_not_finite_is_not_the_models_fault():
  log_probs = jnp.zeros((1, 2, 3)).at[0, 0].set(jnp.nan)
  space = types.SimpleNamespace
  train.check_predictions(None, space(trajectory=space(log_probs=log_probs)))


def test_a_run_takes_the_rank_of_the_lora_that_it_starts_from(make_config, tmp_path, capsys):
  """Its config.json has that rank, and it is resumed by the same command."""
  unet = build.load_models(make_config(**{"lora.rank": 2})).unet
  lora.export_lora(unet, tmp_path / "lora.safetensors")
  changes = {"lora.init_from": str(tmp_path / "lora.safetensors"), "resume_from": "auto"}
  run = train.train(make_config(num_epochs=1, **changes))
  assert "its rank of 2 is taken, not lora.rank=3" in capsys.readouterr().out
  assert json.loads((run / "config.json").read_text())["lora"]["rank"] == 2
  train.train(make_config(num_epochs=2, **changes))
  assert len(metrics_of(run)) == 2
  (tmp_path / "lora.safetensors").unlink()  # a checkpoint has its weights
  train.train(make_config(num_epochs=3, resume_from="auto", **{"lora.rank": 2}))
  assert len(metrics_of(run)) == 3


def test_a_run_can_be_used_from_another_folder_than_it_was_made_in(make_config, tmp_path,
                                                                  monkeypatch):
  shutil.copytree(small_model(), tmp_path / "model")
  monkeypatch.chdir(tmp_path)
  run = train.train(make_config(num_epochs=1, **{"pretrained.model": "model"}))
  stored = json.loads((run / "config.json").read_text())["pretrained"]["model"]
  assert stored == str(tmp_path / "model")
  train.train(make_config(num_epochs=2, resume_from="auto", **{"pretrained.model": "model"}))
  assert len(metrics_of(run)) == 2


def impure(rng):
  """Draws from Python's generator, as the functions of ddpo-pytorch do."""
  return f"a {random.choice(['cat', 'dog', 'cow', 'pig', 'hen'])}", {}


def prompts_given(images, prompts, metadata):
  return images.mean(axis=(1, 2, 3)), {"given": list(prompts)}


def test_rewards_are_logged_with_the_prompts_that_were_drawn(make_config, capsys):
  run = train.train(make_config(num_epochs=1, prompt_fn=f"{__name__}:impure",
                                prompt_fn_kwargs={}, reward_fn=f"{__name__}:prompts_given"))
  assert "for the same rng; must draw from the rng" in capsys.readouterr().out
  (line,) = map(json.loads, (run / "rewards.jsonl").read_text().splitlines())
  assert line["prompts"] == line["info"][f"{__name__}:prompts_given"]["given"]


@pytest.mark.parametrize("precision", ("fp16", pytest.param("bf16", marks=pytest.mark.slow)))
def test_half_precision_runs(make_config, precision):
  line = metrics_of(train.train(make_config(mixed_precision=precision, num_epochs=1)))[0]
  assert np.isfinite(line["loss"]) and line["skipped_steps"] == 0
