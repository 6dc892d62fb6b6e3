"""What a checkpoint takes on disk, and what is read of one that is not as it should be."""

import dataclasses
import errno
import json
import pathlib
import shutil
import subprocess
import sys
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import resuming

from ddpo_jax import checkpoint, lora, resume, update
from ddpo_jax.errors import UserError
from ddpo_jax.models.unet import UNet2DConditionModel, UNetConfig

SD15 = UNetConfig(cross_attention_dim=768)


def test_lora_of_stable_diffusion_takes_less_than_15_mb(tmp_path):
  # nnx.Rngs' counter takes long to trace in so large a module.
  rngs = types.SimpleNamespace(params=lambda: jax.random.key(0))

  def make():
    unet = UNet2DConditionModel(SD15, rngs=rngs)
    lora.inject_lora(unet, 4, jax.random.key(0))
    return unet

  params = nnx.state(nnx.eval_shape(make), nnx.LoRAParam)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 797_184
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  # Random, because zeros would be compressed away.
  params = jax.tree.unflatten(treedef, [
      jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)])
  optimizer = update.make_optimizer(3e-4)
  state = update.init_state(params, optimizer, loss_scaling=True)
  noise = lambda x: jax.random.normal(keys[0], x.shape).astype(x.dtype)
  state = jax.tree.map(lambda x: x + noise(x), state)  # Adam's moments too
  checkpointer = checkpoint.Checkpointer(tmp_path, keep=1)
  checkpointer.save(0, state, {"config": {}})
  checkpointer.close()
  size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
  assert 9e6 < size < 15e6, size


def make_state(size=64, rank=4):
  """Like a run's, without a model."""
  draw = lambda seed, *shape: nnx.LoRAParam(jax.random.normal(jax.random.key(seed), shape))
  params = nnx.State({"to_q": {"lora_down": draw(0, size, rank), "lora_up": draw(1, rank, size)}})
  optimizer = update.make_optimizer(3e-4)
  return update.init_state(params, optimizer, loss_scaling=False)


def save(run, epochs, keep=10):
  checkpointer = checkpoint.Checkpointer(run, keep)
  for epoch in epochs:
    checkpointer.save(epoch, make_state(), {"config": {"epoch": epoch}})
  checkpointer.close()


@pytest.fixture
def run(tmp_path):
  save(tmp_path, [3])
  return tmp_path


def data_files(run):
  """The state's files with data. The weights are in some; others orbax has superseded."""
  return list((run / "checkpoints" / "3" / "state").rglob("d/*"))


def test_reads_what_was_saved(run):
  restored = checkpoint.restore(run, 3, jax.tree.map(jnp.zeros_like, make_state()))
  assert (restored.epoch, restored.meta) == (3, {"config": {"epoch": 3}})
  jax.tree.map(np.testing.assert_array_equal, restored.state, make_state())


@pytest.mark.parametrize("name", ("meta/metadata", "state/_METADATA", "state/manifest.ocdbt", None))
@pytest.mark.parametrize("damage", (
    lambda path: path.unlink(), lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-9]),
    lambda path: path.write_bytes(bytes(path.stat().st_size))),
    ids=("gone", "empty", "cut off", "zeros"))
def test_damage(run, name, damage):
  for path in [run / "checkpoints" / "3" / name] if name else data_files(run):
    damage(path)
  try:
    restored = checkpoint.restore(run, 3, make_state())
  except checkpoint.DamagedError as error:
    assert str(run / "checkpoints" / "3") in str(error) and "\n" not in str(error)
  else:  # orbax has more copies of what this file says
    assert name == "state/_METADATA"
    jax.tree.map(np.testing.assert_array_equal, restored.state, make_state())


@pytest.mark.parametrize("name", ("meta/metadata", "state/manifest.ocdbt", "meta", "state"))
def test_a_folder_for_a_file_is_damage_and_so_is_the_converse(run, name):
  path = run / "checkpoints" / "3" / name
  if path.is_dir():
    shutil.rmtree(path)
    path.write_bytes(b"")
  else:
    path.unlink()
    path.mkdir()
  with pytest.raises(checkpoint.DamagedError, match="checkpoints/3 is damaged"):
    checkpoint.restore(run, 3, make_state())


def test_a_file_that_cannot_be_read_now_is_no_damage(run):
  """As far as tensorstore says; here the links go round in a circle."""
  for path in data_files(run):
    path.unlink()
    path.symlink_to(path)
  with pytest.raises(UserError, match="symbolic links.*may be intact") as error:
    checkpoint.restore(run, 3, make_state())
  assert not isinstance(error.value, checkpoint.DamagedError)
  assert "tensorstore" not in str(error.value)  # its many lines about the file's format


@pytest.mark.parametrize("error,raised", (
    (OSError(errno.EIO, "Input/output error"), UserError),
    (OSError(errno.EMFILE, "Too many open files"), UserError),
    (ValueError("UNKNOWN: Failed to open [os_error_code='116']"), UserError),  # ESTALE
    (MemoryError(), MemoryError),
    (ValueError("RESOURCE_EXHAUSTED: Failed to allocate"), ValueError),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"), jax.errors.JaxRuntimeError),
))
def test_other_errors_are_no_damage(run, monkeypatch, error, raised):
  def fail(*args, **kwargs):
    raise Exception("Encountered error while reading array index") from error  # as orbax does

  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
  with pytest.raises(Exception) as found:
    checkpoint.restore(run, 3, make_state())
  if raised is UserError:
    assert type(found.value) is UserError and "\n" not in str(found.value)
  else:
    assert found.value.__cause__ is error


@pytest.mark.parametrize("written", ("[1]", "7", "null"))
def test_what_is_no_object_is_damage(run, written):
  (run / "checkpoints" / "3" / "meta" / "metadata").write_text(written)
  with pytest.raises(checkpoint.DamagedError):
    checkpoint.restore_meta(run, 3)


@pytest.mark.parametrize("epochs,lost", ((0, False), (3, False), (4, True)))
def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(tmp_path, epochs, lost):
  """One every two epochs: the first is finished before the fourth epoch is."""
  (tmp_path / "config.json").write_text('{"save_freq": 2}')
  (tmp_path / "metrics.jsonl").write_text(
      "".join(f'{{"epoch": {epoch}}}\n' for epoch in range(epochs)))
  if lost:
    with pytest.raises(UserError, match="checkpoints has no checkpoint, though 4 epochs are fin"):
      checkpoint.to_resume("auto", tmp_path)
  else:
    assert checkpoint.to_resume("auto", tmp_path) == (tmp_path, [])


@pytest.mark.parametrize("disk", ("scratch", "job/checkpoints"))
def test_checkpoints_may_be_a_link_to_another_disk(tmp_path, disk):
  run = tmp_path / "run"
  (tmp_path / disk / "7").mkdir(parents=True)
  (tmp_path / disk / "8").mkdir()
  run.mkdir()
  (run / "checkpoints").symlink_to(tmp_path / disk)
  for path in (run, run / "checkpoints"):
    assert checkpoint.find_all(path) == (run, [8, 7])
  assert checkpoint.find_all(run / "checkpoints" / "7") == (run, [7])


def test_a_link_to_a_checkpoint_is_followed(run):
  (run / "best").symlink_to(run / "checkpoints" / "3")
  assert checkpoint.find_all(run / "best") == (run, [3])


@pytest.mark.parametrize("config", ("", "{}", "[]", '{"save_freq": null}'))
def test_a_run_whose_config_is_damaged_may_have_saved_each_epoch(tmp_path, config):
  (tmp_path / "config.json").write_text(config)
  (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1}\n')
  with pytest.raises(UserError, match="checkpoints has no checkpoint, though 2 epochs are fin"):
    checkpoint.to_resume("auto", tmp_path)


def test_a_disk_that_is_not_mounted_is_no_new_run(tmp_path):
  """Unlike one that is, with nothing on it yet."""
  (tmp_path / "mounted" / "run").mkdir(parents=True)
  (tmp_path / "mounted" / "run" / "checkpoints").symlink_to(tmp_path)
  assert checkpoint.to_resume("auto", tmp_path / "mounted" / "run")[1] == []
  (tmp_path / "checkpoints").symlink_to("/nowhere/checkpoints")
  with pytest.raises(UserError, match="is a link to /nowhere/checkpoints, which does not exist"):
    checkpoint.to_resume("auto", tmp_path)


def test_a_checkpoint_that_orbax_declines_is_not_taken_for_saved(run):
  checkpointer = checkpoint.Checkpointer(run, keep=10)
  with pytest.raises(RuntimeError, match="checkpoints/1 was not saved"):
    checkpointer.save(1, make_state(), {"config": {}})
  checkpointer.close()


def test_what_is_tried_again_is_written_where_the_run_is(tmp_path, monkeypatch):
  """A reward may have changed the working folder."""
  monkeypatch.chdir(tmp_path)
  checkpointer = checkpoint.Checkpointer(pathlib.Path("run"), keep=1)
  (tmp_path / "other").mkdir()
  monkeypatch.chdir(tmp_path / "other")
  monkeypatch.setattr(checkpointer._manager, "wait_until_finished", lambda: 1 / 0)
  assert not checkpointer.finish_writing()
  checkpointer.save_and_wait(0, make_state(), {"config": {}})
  checkpointer.close()
  assert checkpoint.saved_epochs(tmp_path / "run") == [0]


CANNOT_WRITE = """
import asyncio, gc, logging, pathlib, resource, signal, sys
import numpy as np
import optax
from ddpo_jax import checkpoint, update
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
weights = {"w": np.random.default_rng(0).normal(size=10_000)}
state = update.init_state(weights, optax.sgd(1.0), False)
checkpointer = checkpoint.Checkpointer(pathlib.Path(sys.argv[1]), 1)
most = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))  # as little as a full disk takes
checkpointer.save(0, state, {"config": {}})
assert not checkpointer.finish_writing()
assert not checkpointer.save_and_wait(0, state, {"config": {}})
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
assert checkpointer.save_and_wait(0, state, {"config": {}})
checkpointer.close()

class Other:
  def __del__(self):
    raise ValueError("in another library")

Other()
logging.getLogger("absl").error("said by another library")

def fail_beside_another(library):  # nobody asks why it failed, which asyncio logs
  exec(compile("async def fail():\\n  raise ValueError('in asyncio')", library, "exec"), globals())
  async def run():
    task = asyncio.ensure_future(fail())
    await asyncio.sleep(0.01)
  asyncio.run(run())
  gc.collect()

async def fail_in_another_language():  # without frames of Python's
  future = asyncio.get_running_loop().create_future()
  future.set_exception(ValueError("cannot write 0.orbax-checkpoint-tmp"))

fail_beside_another("orbax/checkpoint/store.py")
fail_beside_another("elsewhere.py")
asyncio.run(fail_in_another_language())
gc.collect()
"""


def test_a_checkpoint_that_cannot_be_written_is_a_line(tmp_path):
  """Of each of its threads, orbax would log the traceback.

  Nothing of it is left that would keep the next one from being written.
  """
  done = subprocess.run([sys.executable, "-c", CANNOT_WRITE, tmp_path], capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert all(line.startswith("Warning: a checkpoint could not be written (") for line in lines)
  assert [line.endswith("; it will be tried again") for line in lines] == [True, True, False]
  assert checkpoint.saved_epochs(tmp_path) == [0]
  assert done.stderr.count("in another library") == 1, done.stderr
  assert "orbax-checkpoint-tmp" not in done.stderr, done.stderr
  assert done.stderr.count("Traceback") == 2 and "elsewhere.py" in done.stderr, done.stderr
  assert "said by another library" in done.stderr


def test_another_format(run):
  file = run / "checkpoints" / "3" / "meta" / "metadata"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 1}))
  with pytest.raises(UserError, match="format_version 1; must be 3") as error:
    checkpoint.restore_meta(run, 3)
  assert not isinstance(error.value, checkpoint.DamagedError)


def test_another_model_is_no_damage(run):
  for like in (make_state(size=65), make_state(rank=2)):
    with pytest.raises(UserError, match="of another model, whose '.*lora") as error:
      checkpoint.restore(run, 3, like)
    assert not isinstance(error.value, checkpoint.DamagedError)
  fewer = make_state()
  del fewer.params["to_q"]["lora_up"]
  with pytest.raises(UserError, match="of another model, whose 'params/to_q/lora_up"):
    checkpoint.restore(run, 3, fewer)
  with pytest.raises(UserError, match="of another model, whose 'params/to_q/lora_down"):
    checkpoint.restore_params(run, 3, make_state(size=65).params)
  other = nnx.State({"to_v": make_state().params["to_q"]})
  with pytest.raises(UserError, match="of another model, whose 'params/to_v"):
    checkpoint.restore_params(run, 3, other)


def test_trained_weights_alone(run, monkeypatch):
  """Without the optimizer's, which take twice as much; of the rank that they were saved in."""
  read, restore = [], ocp.PyTreeCheckpointHandler.restore

  def spy(*args, **kwargs):
    read.append(restore(*args, **kwargs))
    return read[-1]

  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", spy)
  params = checkpoint.restore_params(run, 3, make_state(rank=2).params)
  jax.tree.map(np.testing.assert_array_equal, params, make_state().params)
  ((down, up),) = read
  assert down == "params/to_q/lora_down/value" and up == "params/to_q/lora_up/value"


def test_a_checkpoint_under_another_name_is_none_of_the_runs(tmp_path):
  """Renamed to keep it: the run goes on from the newest that it has."""
  save(tmp_path, [0, 1, 2])
  folder = tmp_path / "checkpoints"
  shutil.copytree(folder / "1", folder / "good_1")
  (folder / "2").rename(folder / "best_2")
  assert checkpoint.saved_epochs(tmp_path) == [1, 0]


def test_what_is_set_aside_stays_and_is_no_checkpoint(tmp_path):
  save(tmp_path, [1, 2])
  folder = tmp_path.resolve() / "checkpoints"
  assert checkpoint.set_aside(tmp_path, 2) == folder / "2.damaged"
  assert checkpoint.saved_epochs(tmp_path) == [1]
  save(tmp_path, [2])
  assert checkpoint.set_aside(tmp_path, 2) == folder / "2.damaged.2"
  save(tmp_path, [2, 3, 4], keep=1)
  assert checkpoint.find(tmp_path) == (tmp_path.resolve(), 4)
  assert {path.name for path in folder.iterdir()} == {"2.damaged", "2.damaged.2", "4"}


# ---- what a run goes on with, without a model ----


@pytest.fixture
def trainer(tmp_path):
  (tmp_path / "first").mkdir()
  return resuming.make_trainer(tmp_path / "first")


def test_another_runs_damaged_checkpoints_are_left_alone(trainer, tmp_path, capsys):
  first, link = tmp_path / "first", tmp_path / "link"
  resuming.save(trainer, first)
  metadata = [first / "checkpoints" / str(epoch) / "meta" / "metadata" for epoch in range(4)]
  link.symlink_to(first)
  metadata[3].unlink()
  assert resume.resume(trainer, tmp_path / "second") == (3, [])
  assert resume.resume(trainer, link) == resume.resume(trainer, first) == (3, [3])
  assert int(trainer.state.step) == 2
  assert "must hold the same weights" not in capsys.readouterr().out
  for path in metadata[:3]:
    path.unlink()
  with pytest.raises(UserError, match="checkpoints/0 is damaged .* none that is older, so start a"):
    resume.resume(trainer, first)


@pytest.mark.parametrize("before,said", (("/gone/model", True), ("same/", False)))
def test_a_base_model_that_has_moved_is_said(trainer, tmp_path, capsys, monkeypatch, before, said):
  monkeypatch.chdir(tmp_path)
  model = tmp_path / "same"
  model.mkdir()
  trainer.cfg = dataclasses.replace(trainer.cfg, pretrained=dataclasses.replace(
      trainer.cfg.pretrained, model=str(model)))
  state, meta = resume.checkpoint_of(trainer)
  meta["config"]["pretrained"]["model"] = before
  checkpointer = checkpoint.Checkpointer(tmp_path / "first", 1)
  checkpointer.save(0, state, meta)
  checkpointer.close()
  resume.resume(trainer, tmp_path / "first")
  warning = f"pretrained.model='{model}' must hold the same weights as {before!r}, which is not"
  assert (warning in capsys.readouterr().out) == said


def test_what_is_saved_is_not_what_the_update_overwrites(trainer):
  state, _ = resume.checkpoint_of(trainer)
  for saved, now in zip(jax.tree.leaves(state), jax.tree.leaves(trainer.state)):
    assert not np.shares_memory(saved, np.asarray(now))
