"""Which folder a run writes to, and that no other run writes there at the same time."""

import dataclasses
import errno
import json
import os
import re
import sys
import types
import warnings

import numpy as np
import pytest

from configs import demo
from ddpo_jax import checkpoint, run_folder, tracking
from ddpo_jax.config import resolve
from ddpo_jax.errors import UserError
from ddpo_jax.run_folder import choose_run_folder, claim


@pytest.fixture
def cfg(tmp_path):
  config = demo.get_config()
  config.logdir, config.run_name, config.num_epochs = str(tmp_path), "run", 3
  return resolve(config)


@pytest.mark.parametrize("saved,advice", [(True, r"continue it with resume_from='.*run'"),
                                          (False, "resume_from='auto'")])
def test_finished_epochs_are_never_written_over(cfg, saved, advice):
  run = choose_run_folder(cfg)
  tracking.Tracker(run, cfg).close()
  (run / "metrics.jsonl").write_text('{"epoch": 0}\n')
  if saved:
    (run / "checkpoints" / "0").mkdir(parents=True)
  with pytest.raises(UserError, match=f"run_name='run'.*already holds a run.*{advice}"):
    choose_run_folder(cfg)
  other = dataclasses.replace(cfg, resume_from=str(run.parent / "other"))
  with pytest.raises(UserError, match=f"run_name='run'.*already holds a run.*{advice}"):
    choose_run_folder(other)  # its epochs would take the place of these
  for again in ("auto", str(run), str(run / "checkpoints" / "0")):
    assert choose_run_folder(dataclasses.replace(cfg, resume_from=again)) == run


@pytest.mark.parametrize("left", ("checkpoints", "metrics"))
def test_what_is_left_of_a_run_is_not_another_ones(cfg, left):
  """A copy without its config: orbax would keep the old checkpoints, and save none of the new."""
  run = choose_run_folder(cfg)
  if left == "checkpoints":
    (run / "checkpoints" / "5").mkdir(parents=True)
  else:
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"epoch": 0}\n')
  with pytest.raises(UserError, match="run_name='run'.*already holds a run"):
    choose_run_folder(cfg)


def test_a_run_without_its_checkpoints_is_not_to_be_started_again(cfg):
  run = choose_run_folder(cfg)
  run.mkdir()
  (run / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1}\n')
  with pytest.raises(UserError, match="^run_name='run': .*bring it back, or choose another run_na"):
    choose_run_folder(cfg)


def test_a_run_without_a_finished_epoch_makes_room_for_another(cfg):
  run = choose_run_folder(cfg)
  held = claim(run, cfg)
  failed = tracking.Tracker(run, cfg)
  failed.log_eval(0, np.zeros((1, 16, 16, 3), np.uint8), ["a cat"])
  (run / "rewards.jsonl").write_text('{"epoch": 0, "prompts": [], "rewards": []}\n')
  (run / "wandb_id.txt").write_text("failed")
  with pytest.raises(UserError, match="another run is writing to .*run at the moment"):
    choose_run_folder(cfg)
  failed.close()
  held.release()
  assert choose_run_folder(cfg) == run
  claimed = claim(run, cfg)
  tracking.Tracker(run, dataclasses.replace(cfg, seed=7)).close()
  assert json.loads((run / "config.json").read_text())["seed"] == 7
  assert not list((run / "images").iterdir()) and not (run / "wandb_id.txt").exists()
  assert (run / "rewards.jsonl").read_text() == ""
  claimed.release()


def test_one_run_at_a_time(cfg, monkeypatch, capsys):
  """Neither begins where another one is at work, nor continues it before its end."""
  run = choose_run_folder(cfg)
  first = claim(run, cfg)
  with pytest.raises(UserError, match="another run is writing"):  # both had found it free
    claim(run, cfg)
  resuming = dataclasses.replace(cfg, resume_from="auto")
  monkeypatch.setattr(run_folder, "_LOCK_SECONDS", 0.1)
  monkeypatch.setattr("time.sleep", lambda seconds: None)
  with pytest.raises(UserError, match="another run is writing"):
    claim(run, resuming)
  assert capsys.readouterr().out.count("waiting up to 0.1 s for its end") == 1
  monkeypatch.setattr(run_folder, "_LOCK_SECONDS", 60)
  monkeypatch.setattr("time.sleep", lambda seconds: first.release())
  claim(run, resuming).release()


def test_a_new_run_does_not_wait_for_the_end_of_another(cfg, monkeypatch):
  run = choose_run_folder(cfg)
  first = claim(run, cfg)
  monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waited"))
  with pytest.raises(UserError, match="another run is writing"):
    claim(run, cfg)
  first.release()


def test_a_lock_that_is_not_got_leaves_no_file_open(cfg):
  """A run that waits for another one tries every half second."""
  first = claim(choose_run_folder(cfg), cfg)
  before = len(os.listdir("/dev/fd"))
  for _ in range(9):
    with pytest.raises(UserError, match="another run is writing"):
      claim(first.path, cfg)
  assert len(os.listdir("/dev/fd")) < before + 9
  first.release()


def test_a_worker_that_a_reward_forked_does_not_hold_the_folder(cfg):
  """Where a run is killed, its workers may live on."""
  run = choose_run_folder(cfg)
  first = claim(run, cfg)
  (run / "config.json").write_text("{}")
  (up, is_up), (ending, end) = os.pipe(), os.pipe()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Python's and JAX's, of threads: a worker could wait for one
    worker = os.fork()
  if worker == 0:
    os.write(is_up, b"1")
    os.close(end)
    os.read(ending, 1)
    os._exit(0)
  os.read(up, 1)
  first.release()
  claim(run, cfg).release()
  os.close(end)
  assert os.waitpid(worker, 0)[1] == 0
  for descriptor in (up, is_up, ending):
    os.close(descriptor)


def test_process_zero_claims_the_folder_for_all(cfg, monkeypatch):
  monkeypatch.setattr(run_folder.distributed, "is_main", lambda: False)
  run = choose_run_folder(cfg)
  assert claim(run, cfg) == run_folder.Claim(run, None) and not run.exists()


@pytest.mark.parametrize("name", ("run", ""))
def test_the_logdir_need_not_be_there(cfg, tmp_path, name):
  cfg = dataclasses.replace(cfg, logdir=str(tmp_path / "new" / "logs"), run_name=name)
  claimed = claim(choose_run_folder(cfg), cfg)
  assert claimed.path.is_dir() and claimed.path.parent == tmp_path / "new" / "logs"
  claimed.release()


def test_a_run_that_ends_before_it_writes_leaves_no_folder(cfg):
  run = choose_run_folder(cfg)
  claim(run, cfg).release()
  assert not run.exists()
  kept = claim(run, cfg)
  (run / "config.json").write_text("{}")
  kept.release()
  assert run.exists()


def test_runs_named_by_the_same_second_have_folders_of_their_own(cfg):
  unnamed = dataclasses.replace(cfg, run_name="")
  run = choose_run_folder(unnamed, "2026.01.01_00.00.00")
  assert run.name == "2026.01.01_00.00.00"
  claims = [claim(run, unnamed) for _ in range(3)]
  assert [each.path.name.removeprefix(run.name) for each in claims] == ["", "_2", "_3"]
  for each in claims:
    each.release()


def test_probes_of_one_runs_processes_do_not_meet(cfg, monkeypatch):
  """All of them look whether another run is at work, at the same time."""
  run = choose_run_folder(cfg)
  tracking.Tracker(run, cfg).close()
  close = run_folder.os.close

  def probe_again(descriptor):
    monkeypatch.setattr(run_folder.os, "close", close)
    assert choose_run_folder(cfg) == run  # while the first one's lock is held
    close(descriptor)

  monkeypatch.setattr(run_folder.os, "close", probe_again)
  assert choose_run_folder(cfg) == run


def test_unwritable_logdir_names_the_field(cfg, tmp_path):
  (tmp_path / "file").write_text("")
  bad = dataclasses.replace(cfg, logdir=str(tmp_path / "file"))
  with pytest.raises(UserError, match="^logdir='.*file': .*run cannot be made"):
    claim(choose_run_folder(bad), bad)


def test_messages_name_the_field_that_the_folder_is_from(cfg):
  assert run_folder.named_by(cfg) == f"logdir={cfg.logdir!r}"
  branch = dataclasses.replace(cfg, resume_from="old")
  assert run_folder.named_by(branch) == f"logdir={cfg.logdir!r}"
  assert run_folder.named_by(dataclasses.replace(branch, run_name="")) == "resume_from='old'"


def test_a_run_is_the_same_from_wherever_it_is_named(cfg, tmp_path, monkeypatch):
  """And a new one continues none, not even that in the working folder."""
  run = choose_run_folder(cfg)
  (run / "checkpoints" / "7").mkdir(parents=True)
  monkeypatch.chdir(run)
  for logdir in ("..", str(tmp_path)):
    for path in (".", str(run)):
      again = dataclasses.replace(cfg, logdir=logdir, resume_from=path)
      assert choose_run_folder(again).resolve() == run
    with pytest.raises(UserError, match="run_name='run'.*already holds a run"):
      choose_run_folder(dataclasses.replace(cfg, logdir=logdir))


def cannot_lock(descriptor, operation):
  raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("locks", (None, types.SimpleNamespace(
    flock=cannot_lock, LOCK_SH=1, LOCK_EX=2, LOCK_NB=4)), ids=("system", "file system"))
def test_without_locks_a_run_may_still_be_in_its_first_epoch(cfg, monkeypatch, locks):
  """As on some network file systems."""
  monkeypatch.setitem(sys.modules, "fcntl", locks)
  assert claim(choose_run_folder(cfg), cfg).lock is None
  tracking.Tracker(choose_run_folder(cfg), cfg).close()
  with pytest.raises(UserError, match="already holds a run.*resume_from='auto'"):
    choose_run_folder(cfg)


def test_resuming_without_a_name_goes_on_in_the_same_folder(cfg, tmp_path):
  for path in ("old", "old/checkpoints", "old/checkpoints/7"):
    (tmp_path / path).mkdir(parents=True, exist_ok=True)
    resumed = dataclasses.replace(cfg, run_name="", resume_from=str(tmp_path / path))
    assert choose_run_folder(resumed) == tmp_path / "old"


def test_a_run_that_goes_on_without_a_name_writes_where_it_wrote(cfg):
  run = choose_run_folder(cfg)
  (run / "checkpoints" / "7").mkdir(parents=True)
  for path in (run, run / "checkpoints" / "7"):
    resumed = dataclasses.replace(cfg, run_name="", resume_from=str(path))
    claimed = claim(choose_run_folder(resumed), resumed)
    assert claimed.path == run and claimed.lock is not None
    claimed.release()
    claimed.release()  # it holds no lock that it could give up again


@pytest.mark.parametrize("path", ("checkpoints/7", "checkpoints"))
def test_a_run_may_be_called_as_what_is_in_one(cfg, tmp_path, monkeypatch, path):
  run = tmp_path / path
  (run / "checkpoints" / "7").mkdir(parents=True)
  (run / "config.json").write_text("{}")
  changes = {"logdir": str(run.parent), "resume_from": str(run)}
  for name in ("", run.name):
    assert choose_run_folder(dataclasses.replace(cfg, run_name=name, **changes)) == run
  monkeypatch.chdir(run / "checkpoints")
  assert choose_run_folder(dataclasses.replace(cfg, run_name="", resume_from="7")) == run


def test_runs_may_be_in_ones_home(cfg, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  run = choose_run_folder(dataclasses.replace(cfg, logdir="~/logs"))
  assert run == tmp_path / "logs" / "run"
  (run / "checkpoints" / "7").mkdir(parents=True)
  resumed = dataclasses.replace(cfg, run_name="", resume_from="~/logs/run")
  assert choose_run_folder(resumed) == run
  assert checkpoint.find("~/logs/run") == (run, 7)


def test_a_name_is_made_from_the_time(cfg):
  name = choose_run_folder(dataclasses.replace(cfg, run_name="")).name
  assert re.fullmatch(r"20\d\d(\.\d\d){2}_\d\d(\.\d\d){2}", name)
