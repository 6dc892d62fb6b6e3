"""report.html: which charts it has."""

import json
import re

import pytest

from ddpo_jax import report

METRICS = {
    "reward_mean": 1.0, "reward_std": 0.5, "reward_min": 0.0, "reward_max": 2.0,
    "sampling_seconds": 1.0, "training_seconds": 1.0, "reward_seconds": 0.0,
    "images_per_second": 4.0, "approx_kl": 1e-6, "clipfrac": 0.1, "grad_norm": 0.5,
    "diversity": 0.3, "ratio_drift": 0.0, "sampler_drift": 3e-5, "skipped_steps": 0}


@pytest.fixture
def charts(tmp_path):
  """Writes the report of a run with such metrics; its charts by title."""
  def write(*epochs):
    (tmp_path / "config.json").write_text(json.dumps(
        {"reward_fn": "vlm_score", "num_epochs": 9, "pretrained": {"model": "tiny"}}))
    (tmp_path / "metrics.jsonl").write_text("".join(
        json.dumps({"epoch": i, **METRICS, **each}) + "\n" for i, each in enumerate(epochs)))
    page = report.write_report(tmp_path).read_text()
    return dict(re.findall(r"<figcaption>(.*?)</figcaption>(.*?)</figure>", page, re.DOTALL))

  return write


def test_every_sign_of_trouble_has_a_chart(charts):
  found = charts({}, {"skipped_steps": 2, "diversity": None}, {})
  assert {title.partition(":")[0] for title in found} >= {
      "Diversity", "Clip fraction", "Drift by rounding", "Skipped optimizer steps"}
  for values, legend in (({}, True), ({"sampler_drift": None}, False)):
    (drift,) = (svg for title, svg in charts(values).items() if title.startswith("Drift"))
    assert ("<!-- sampler_drift -->" in drift) == legend


def test_without_skipped_steps_there_is_no_chart_of_them(charts):
  assert not any("Skipped" in title for title in charts({}, {}))


def test_runs_of_other_versions_have_a_report(charts, monkeypatch):
  for name in ("diversity", "sampler_drift", "skipped_steps"):
    monkeypatch.delitem(METRICS, name)
  assert any("Diversity" in title for title in charts({}, {}))


def test_numbers_beside_the_rewards(charts):
  found = charts({"reward/a_mean": 1.0, "reward/a_std": 1.0},
                 {"reward/a_mean": 1.0, "reward/a_std": 1.0, "reward/a/mass_mean": 0.5})
  assert "a, raw" in found and "a/mass, mean" in found
  assert "a/mass, raw" not in found
