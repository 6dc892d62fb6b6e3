"""report.html: which charts it has."""

import itertools
import json
import re

from matplotlib.figure import Figure
import numpy as np
from PIL import Image
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
        {"reward_fn": "vlm_score", "num_epochs": 9, "pretrained": {"model": "tiny"},
         "train": {"clip_range": 1e-4}}))
    (tmp_path / "metrics.jsonl").write_text("".join(
        json.dumps({"epoch": i, **METRICS, **each}) + "\n" for i, each in enumerate(epochs)))
    page = report.write_report(tmp_path).read_text()
    return dict(re.findall(r"<figcaption>(.*?)</figcaption>(.*?)</figure>", page, re.DOTALL))

  return write


@pytest.mark.filterwarnings("error")
def test_every_sign_of_trouble_has_a_chart(charts):
  found = charts({}, {"skipped_steps": 2, "diversity": None}, {})
  assert {title.partition(":")[0] for title in found} >= {
      "Diversity", "Clip fraction", "Drift by rounding", "Skipped optimizer steps"}
  for values, legend in (({}, True), ({"sampler_drift": None}, False)):
    (drift,) = (svg for title, svg in charts(values).items() if title.startswith("Drift"))
    assert ("<!-- sampler_drift -->" in drift) == legend


@pytest.fixture
def drawn(charts, monkeypatch, tmp_path):
  """Writes a report as `charts` does; the axes of a chart, drawn, by the chart's title."""
  plots = {}
  chart = report._chart
  monkeypatch.setattr(report, "_chart", lambda title, plot, **labels: (
      plots.update({title: plot}) or chart(title, plot, **labels)))

  def draw(title, epochs=(), rewards=()):
    (tmp_path / "rewards.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rewards))
    charts(*epochs)
    (plot,) = (plot for name, plot in plots.items() if name.startswith(title))
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.add_subplot()
    plot(axes)
    figure.canvas.draw()
    return axes

  return draw


@pytest.mark.parametrize("title", ("Reward of each", "Drift", "Seconds"))
def test_a_legend_covers_no_curve(drawn, title):
  axes = drawn(title, [{}, {}])
  assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1


def test_drift_is_shown_beside_what_is_tolerated(drawn):
  axes = drawn("Drift", [{"ratio_drift": 2e-7, "sampler_drift": 2e-7},
                         {"ratio_drift": 5e-7, "sampler_drift": 5e-7}])
  styles = {line.get_label(): line.get_linestyle() for line in axes.lines}
  assert styles["ratio_drift"] != styles["sampler_drift"]  # one on the other, both are seen
  (tolerance,) = (line for line in axes.lines if line.get_label().startswith("tolerance"))
  assert tolerance.get_ydata() == pytest.approx([1e-5, 1e-5])  # of clip_range=1e-4
  assert axes.get_ylim()[1] > 1e-5


def test_no_drift_is_seen_as_well(drawn):
  """As on GPUs by default: all of it is 0, of which a logarithm would show nothing."""
  axes = drawn("Drift", [{"ratio_drift": 0.0, "sampler_drift": 0.0}] * 2)
  bottom = axes.get_window_extent().y0
  for line in axes.lines[:2]:
    assert line.get_window_extent().y0 == pytest.approx(bottom, abs=3)


PROMPTS = [f"a yellow square beside a violet square on a {colour} background"
           for colour in ("white", "black", "green")]


def test_prompts_of_one_beginning_are_told_apart(drawn):
  axes = drawn("Reward of the most", [{}, {}], [
      {"epoch": i, "prompts": PROMPTS, "rewards": [-3.0, -2.75, -1.5]} for i in range(2)])
  labels = [label.get_text() for label in axes.get_yticklabels()]
  assert len(set(labels)) == 3 and all(len(label) == 42 for label in labels)
  ticks = [label.get_window_extent() for label in axes.get_xticklabels()
           if label.get_window_extent().x0 < axes.get_window_extent().x1]
  assert len(ticks) > 2
  assert all(a.x1 + 5 < b.x0 for a, b in itertools.pairwise(ticks))


def test_prompts_are_compared_between_the_first_and_the_last_quarter(drawn):
  axes = drawn("Reward of the most", [{}] * 8, [
      {"epoch": i, "prompts": ["a cat", "a cat"], "rewards": [i, i + 2.0]} for i in range(8)])
  values = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
  assert values == {"first quarter": [1.5], "last quarter": [7.5]}


@pytest.mark.parametrize("rewards", ([1e17, 1e17 + 16], [-1e17, -1e17], [0.0, 0.0]))
def test_rewards_that_are_almost_equal_have_a_distribution(drawn, rewards):
  axes = drawn("How the rewards", [{}], [{"epoch": 0, "prompts": ["a"] * 2, "rewards": rewards}])
  np.testing.assert_allclose(np.asarray(axes.images[0].get_array()).sum(axis=0), [1])


def test_each_epochs_distribution_adds_up_to_one(drawn):
  """That of an epoch with few images too. Each is at its epoch's number, rewards upwards."""
  axes = drawn("How the rewards", [{}] * 2, [
      {"epoch": 3, "prompts": ["a"] * 4, "rewards": [0.0, 1, 2, 3]},
      {"epoch": 4, "prompts": ["a"] * 2, "rewards": [1.0, 2]}])
  (image,) = axes.images
  np.testing.assert_allclose(np.asarray(image.get_array()).sum(axis=0), [1, 1])
  assert image.get_extent() == pytest.approx([2.5, 4.5, 0.0, 3.0]) and image.origin == "lower"


def test_pictures_without_a_number_are_left_out(charts, tmp_path):
  """Such as a copy that a user made."""
  (tmp_path / "images").mkdir()
  for name in ("eval_0000", "eval_0000 (copy)", "eval_0002", "eval_"):
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.jpg")
  assert list(charts({})).count("before training") == 1
  page = (tmp_path / "report.html").read_text()
  assert re.findall(r'alt="images (.*?)"', page) == ["before training", "after 2 epochs"]


def test_without_skipped_steps_there_is_no_chart_of_them(charts):
  assert not any("Skipped" in title for title in charts({}, {}))


def test_runs_of_other_versions_have_a_report(charts, monkeypatch):
  for name in ("diversity", "sampler_drift", "skipped_steps"):
    monkeypatch.delitem(METRICS, name)
  assert any("Diversity" in title for title in charts({}, {}))


def test_of_several_rewards_each_ones_own_are_in_the_headline(charts, tmp_path):
  """Their sum is near 0 at any time."""
  charts({})
  assert "reward at the start" in (tmp_path / "report.html").read_text()
  config = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | {"reward_fn": {"a": 1.0, "b": 0.5}}))
  lines = [{"reward/a_mean": 1.0, "reward/a_std": 0.5, "reward/b_mean": -3.0, "reward/b_std": 0.0},
           {"reward/a_mean": 2.0, "reward/a_std": 0.5, "reward/b_mean": -2.5, "reward/b_std": 0.0}]
  (tmp_path / "metrics.jsonl").write_text("".join(
      json.dumps({"epoch": i, **METRICS, **line}) + "\n" for i, line in enumerate(lines)))
  page = report.write_report(tmp_path).read_text()
  facts = {label: value for value, label in re.findall(r"<div><b>([^<]*)</b>([^<]*)</div>", page)}
  assert (facts["a at the start"], facts["a now"]) == ("1.000", "2.000")
  assert facts["a: change, in the first epoch&#x27;s deviations"] == "+2.00"
  assert facts["b now"] == "-2.500" and "reward now" not in facts


def test_numbers_beside_the_rewards(charts):
  found = charts({"reward/a_mean": 1.0, "reward/a_std": 1.0},
                 {"reward/a_mean": 1.0, "reward/a_std": 1.0, "reward/a/mass_mean": 0.5})
  assert "a, raw" in found and "a/mass, mean" in found
  assert "a/mass, raw" not in found


@pytest.mark.filterwarnings("error")
def test_prompts_are_no_mathematics_and_of_any_script(drawn):
  prompts = ["a $5 circle and a $10 square", r"$\frac{1}{ broken $", "一只猫"]
  axes = drawn("Reward of the most", [{}, {}], [
      {"epoch": i, "prompts": prompts, "rewards": [-3.0, -2.75, -1.5]} for i in range(2)])
  labels = axes.get_yticklabels()
  assert {label.get_text() for label in labels} == set(prompts)
  assert not any(label.get_parse_math() for label in labels)
