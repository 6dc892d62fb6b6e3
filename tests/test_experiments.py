"""Every experiment in configs/ runs, with the smallest model, local servers and a tiny CLIP."""

import functools
import json

import numpy as np
import pytest
import servers
from small_model import small_model

from configs import demo, dgx
from ddpo_jax import train
from ddpo_jax.config import resolve

EXPERIMENTS = {
    **{f"dgx:{name}": functools.partial(dgx.get_config, name) for name in dgx.EXPERIMENTS},
    **{f"demo:{name}": functools.partial(demo.get_config, name) for name in demo.REWARDS}}


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Runs a config at the smallest size, on one device; returns its metrics' lines."""
  monkeypatch.setattr("jax.device_count", lambda: 1)
  monkeypatch.setattr("ddpo_jax.report.write_report", lambda run: None)  # tested elsewhere

  def run(config, **changes):
    config.pretrained.model = str(small_model())
    config.mixed_precision = "no"
    config.compilation_cache = ""
    config.logdir, config.run_name = str(tmp_path), "run"
    config.num_epochs, config.save_freq, config.eval_freq = 2, 1, 0
    config.sample.num_steps, config.sample.guidance_scale = 2, 1.0
    config.sample.batch_size, config.sample.num_batches_per_epoch = 2, 2
    config.train.batch_size, config.train.gradient_accumulation_steps = 2, 2
    config.lora.rank = 4
    config.update_from_flattened_dict(changes)
    folder = train.train(resolve(config))
    return [json.loads(line) for line in
            (folder / "metrics.jsonl").read_text().splitlines()]

  return run


@pytest.fixture
def local(tmp_path):
  """Arguments of each reward that needs something, for what is on this machine."""
  tiny_clip = pytest.importorskip("tiny_clip")
  clip = tiny_clip.save_clip(tmp_path / "clip")
  head, _ = tiny_clip.make_head(tmp_path / "head.pth")
  with servers.serve(servers.llava) as llava, servers.serve(servers.openai) as vlm:
    vlm.on_get = servers.list_models
    yield {"aesthetic_score": {"model": str(clip), **head},
           "clip_score": {"model": str(clip)}, "pick_score": {"model": str(clip)},
           "llava_bertscore": {"url": llava.url},
           "llava_strict_satisfaction": {"url": llava.url},
           "vlm_score": {"url": f"{vlm.url}/v1"}}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_runs(run, local, name):
  config = EXPERIMENTS[name]()
  config.reward_kwargs = local.get(config.reward_fn, {})
  lines = run(config)
  assert [line["optimizer_steps"] for line in lines] == [1, 2]
  assert all(np.isfinite(line["reward_mean"]) for line in lines)


def test_every_reward_at_once(run, local):
  """CLIP on the device, servers and the CPU, each under its own name."""
  config = dgx.get_config("compressibility")
  config.prompt_fn = "counting"
  config.prompt_fn_kwargs = {"nouns_file": "simple_animals.txt", "low": 2, "high": 4}
  config.reward_fn = {**dict.fromkeys(local, 1.0), "jpeg_compressibility": 0.2}
  config.reward_kwargs = local
  lines = run(config)
  for name in config.reward_fn:
    assert np.isfinite(lines[1][f"reward/{name}_mean"]), name
  assert lines[0]["reward/jpeg_compressibility_mean"] < 0
