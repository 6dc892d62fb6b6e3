"""The run folder: where it is, what is in it, and trackers that fail."""

import dataclasses
import json
import struct
import sys
import types

import numpy as np
from PIL import Image
import pytest
from tensorboardX.proto import event_pb2

from configs import demo
from ddpo_jax import report, tracking
from ddpo_jax.config import resolve
from ddpo_jax.run_folder import choose_run_folder

METRICS = {"reward_mean": -2.5, "reward_std": 0.5, "images_per_second": 3.0,
           "loss": float("nan"), "peak_memory_bytes": None}


@pytest.fixture
def cfg(tmp_path):
  config = demo.get_config()
  config.logdir, config.run_name, config.num_epochs = str(tmp_path), "run", 3
  return resolve(config)


@pytest.fixture
def clock(monkeypatch):
  """The tracker's, which only the test moves."""
  clock = types.SimpleNamespace(seconds=0.0)
  monkeypatch.setattr(tracking, "time",
                      types.SimpleNamespace(perf_counter=lambda: clock.seconds))
  return clock


def log(tracker, epoch, **others):
  images = np.random.default_rng(epoch).integers(0, 256, (3, 16, 16, 3), np.uint8)
  prompts = ["not shown", "a cat", "a dog " * 30, ""]
  tracker.log_epoch(epoch, {**METRICS, "reward_mean": -2.5 + epoch, **others}, prompts,
                    np.arange(4.0), images, np.array([1, 2, 3]))


def lines_of(run):
  return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_folder_and_lines(cfg, capsys):
  run = choose_run_folder(cfg)
  tracker = tracking.Tracker(run, cfg)
  log(tracker, 0)
  log(tracker, 1)
  tracker.close()
  assert run.name == "run"
  assert json.loads((run / "config.json").read_text()) == json.loads(
      json.dumps(cfg.to_dict()))
  assert [(line["epoch"], line["loss"]) for line in lines_of(run)] == [(0, None), (1, None)]
  with Image.open(run / "images" / "epoch_0001.jpg") as grid:
    assert grid.width >= 3 * 192
  printed = capsys.readouterr().out
  assert "epoch 2/3  reward -1.500 ± 0.500 (+1.000 since the start)" in printed
  assert "left" in printed


def test_captions_are_of_the_images_that_are_shown(cfg, monkeypatch):
  captions = []
  grid = tracking.image_grid
  monkeypatch.setattr(tracking, "image_grid", lambda images, given: (
      captions.extend(given) or grid(images, given)))
  log(tracking.Tracker(choose_run_folder(cfg), cfg), 0)
  assert captions == ["1.000 a cat", f"2.000 {'a dog ' * 30}", "3.000 "]


def test_each_of_several_rewards_is_shown(cfg, capsys):
  cfg = dataclasses.replace(cfg, reward_fn={"jpeg_compressibility": 1.0, "my:reward": 0.5})
  tracker = tracking.Tracker(choose_run_folder(cfg), cfg)
  log(tracker, 0, **{"reward/jpeg_compressibility_mean": -2.5, "reward/my:reward_mean": 0.25})
  tracker.close()
  printed = capsys.readouterr().out
  assert "since the start)  jpeg_compressibility -2.500  my:reward 0.250  " in printed


def test_resume_drops_epochs_that_will_be_done_again(cfg):
  run = choose_run_folder(cfg)
  tracker = tracking.Tracker(run, cfg)
  for epoch in range(3):
    tracker.log_eval(epoch, np.zeros((1, 16, 16, 3), np.uint8), ["a cat"])
    log(tracker, epoch)
  tracker.close()
  resumed = tracking.Tracker(run, cfg, first_epoch=1)
  assert sorted(path.name for path in (run / "images").iterdir()) == [
      "epoch_0000.jpg", "eval_0000.jpg", "eval_0001.jpg"]
  log(resumed, 1)
  assert [line["epoch"] for line in lines_of(run)] == [0, 1]


def test_a_resumed_run_is_compared_with_its_first_epoch(cfg, clock, capsys):
  """And the epochs that are left are taken to be as fast as those done here."""
  run = choose_run_folder(cfg)
  tracker = tracking.Tracker(run, cfg)
  log(tracker, 0)
  log(tracker, 1)
  (run / "wandb_id.txt").write_text("abcd")
  tracker.close()
  clock.seconds = 100.0
  resumed = tracking.Tracker(run, dataclasses.replace(cfg, num_epochs=5), first_epoch=2)
  assert (run / "wandb_id.txt").read_text() == "abcd"  # it goes on in the same run there
  clock.seconds = 160.0
  capsys.readouterr()
  log(resumed, 2)
  said = capsys.readouterr().out
  assert "epoch 3/5  reward -0.500 ± 0.500 (+2.000 since the start)" in said
  assert "0:02:00 left" in said  # two more epochs


def test_reports_take_a_small_share_of_the_time(cfg, clock, monkeypatch):
  written = []

  def write(run):
    clock.seconds += 1.0
    written.append(run)

  monkeypatch.setattr(report, "write_report", write)
  tracker = tracking.Tracker(choose_run_folder(cfg), cfg)
  for epoch in range(100):
    clock.seconds += 1.0
    log(tracker, epoch)
  assert len(written) == 2  # seconds, of 100
  tracker.close()
  assert len(written) == 3


def test_a_failing_wandb_never_stops_the_run(cfg, monkeypatch, capsys):
  def fail(*args, **kwargs):
    raise ConnectionError("server gone")

  fake = types.SimpleNamespace(init=lambda **kwargs: fake, log=fail, finish=fail,
                               Histogram=lambda x: x, Image=lambda x: x)
  monkeypatch.setitem(sys.modules, "wandb", fake)
  online = dataclasses.replace(cfg, wandb=dataclasses.replace(cfg.wandb, mode="offline"))
  run = choose_run_folder(online)
  tracker = tracking.Tracker(run, online)
  log(tracker, 0)
  log(tracker, 1)
  tracker.close()
  assert len(lines_of(run)) == 2
  assert capsys.readouterr().out.count("server gone") == 1  # said once


def test_tensorboard_has_metrics_histograms_and_images(cfg):
  run = choose_run_folder(cfg)
  tracker = tracking.Tracker(run, dataclasses.replace(cfg, tensorboard=True))
  log(tracker, 0)
  tracker.log_eval(0, np.zeros((1, 16, 16, 3), np.uint8), ["a cat"])
  tracker.close()
  (file,) = (run / "tensorboard").iterdir()
  values = {value.tag: value for value in events(file.read_bytes())}
  assert values["reward_mean"].simple_value == -2.5
  assert "loss" not in values  # it was not finite
  assert values["reward"].histo.num == 4
  assert values["images"].image.width >= 3 * 192
  assert values["eval_images"].image.encoded_image_string.startswith(b"\x89PNG")


def events(data):
  """Every value of an event file."""
  return (value for event in records(data) for value in event.summary.value)


def records(data):
  """Every event of a file: records of length, its checksum, event, checksum."""
  while data:
    (length,) = struct.unpack_from("<Q", data)
    yield event_pb2.Event.FromString(data[12:12 + length])
    data = data[16 + length:]


def test_without_tensorboardx_the_run_goes_on(cfg, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  run = choose_run_folder(cfg)
  tracker = tracking.Tracker(run, dataclasses.replace(cfg, tensorboard=True))
  log(tracker, 0)
  tracker.close()
  assert "pip install -e '.[tensorboard]'" in capsys.readouterr().out


def test_wandb_goes_on_in_the_same_run_with_a_step_for_each_epoch(cfg, monkeypatch):
  started, logged = [], []
  fake = types.SimpleNamespace(
      init=lambda **kwargs: started.append(kwargs), finish=lambda: None, Histogram=list,
      log=lambda values, step: logged.append((step, "eval_images" in values)),
      Image=lambda path: path)
  monkeypatch.setitem(sys.modules, "wandb", fake)
  offline = dataclasses.replace(cfg, wandb=dataclasses.replace(cfg.wandb, mode="offline"))
  run = choose_run_folder(offline)
  black = np.zeros((1, 16, 16, 3), np.uint8)
  for first_epoch in (0, 1, 0):
    tracker = tracking.Tracker(run, offline, first_epoch)
    tracker.log_eval(first_epoch, black, ["a cat"])  # which a resumed run has logged before
    log(tracker, first_epoch)
    tracker.log_eval(first_epoch + 1, black, ["a cat"])
    tracker.close()
  # W&B drops what comes with a lower step than what it has.
  assert logged[:5] == [(0, True), (0, False), (0, True), (1, False), (1, True)]
  first, resumed, anew = (each["id"] for each in started)
  assert first and first == resumed != anew
  assert all(each["resume"] == "allow" and each["name"] == "run" for each in started)


def test_tensorboard_hides_the_epochs_that_are_done_again(cfg):
  run = choose_run_folder(cfg)
  tracker = tracking.Tracker(run, dataclasses.replace(cfg, tensorboard=True), 1)
  log(tracker, 1)
  tracker.log_eval(2, np.zeros((1, 16, 16, 3), np.uint8), ["a cat"])
  tracker.close()
  (file,) = (run / "tensorboard").iterdir()
  written = list(records(file.read_bytes()))
  assert [event.step for event in written
          if event.session_log.status == event_pb2.SessionLog.START] == [1]
  assert {event.step for event in written if event.summary.value} == {1}
