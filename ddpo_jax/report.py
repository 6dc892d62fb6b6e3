"""report.html: a run's curves, timings and pictures in one file that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
import html
import io
import json
import pathlib
import re
from typing import Any
import warnings

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import numpy as np
from PIL import Image

from ddpo_jax.diagnostics import drift_tolerance
from ddpo_jax.files import read_jsonl, write_atomically
from ddpo_jax.images import encode_image, number_of
from ddpo_jax.messages import counted

_INK = "#010203"  # becomes the page's text colour, whichever that is
_ACCENT, _SECOND, _THIRD = "#3b82f6", "#f59e0b", "#10b981"  # readable on white and black
_MOST_PROMPTS = 16
_PROMPT_LENGTH = 42  # characters beside a chart
_MOST_GRIDS = 10
_MOST_BESIDE = 8  # charts of what rewards return beside the rewards
_GRID_WIDTH = 1200  # pixels

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #8884; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #14161a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink);
       background: var(--paper); font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--faint); }
.facts { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0; padding: 0; }
.facts div { min-width: 7rem; } .facts b { display: block; font-size: 1.3rem; }
.charts { display: grid; gap: 1rem;
          grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; } figcaption { font-size: .9rem; opacity: .8; }
svg, img { width: 100%; height: auto; display: block; }
pre { overflow-x: auto; font-size: .8rem; }
"""


def write_report(run: pathlib.Path) -> pathlib.Path:
  """Makes `run`/report.html from what the run has written so far; returns its path."""
  config = json.loads((run / "config.json").read_text(encoding="utf-8"))
  metrics = read_jsonl(run / "metrics.jsonl")
  rewards = read_jsonl(run / "rewards.jsonl")
  sections = [_facts(run, config, metrics)]
  if metrics:
    sections += [
        _section("Reward", [_reward_chart(metrics), *_histogram(rewards),
                            *_prompts_chart(rewards), *_each_reward(metrics),
                            *_beside_rewards(metrics)]),
        _section("The same prompts from the same noise", _grids(run), "stack"),
        _section("Policy", _policy_charts(config, metrics)),
        _section("Time", _time_charts(metrics))]
  sections.append("<h2>Config</h2><details><summary>config.json</summary><pre>"
                  f"{html.escape(json.dumps(config, indent=2))}</pre></details>")
  title = html.escape(run.name)
  page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
          '<meta name="viewport" content="width=device-width, initial-scale=1">'
          f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n")
  path = run / "report.html"
  write_atomically(path, page)
  return path


# ---- sections ----


def _facts(run: pathlib.Path, config: Mapping[str, Any], metrics: Sequence[Mapping]) -> str:
  reward = config["reward_fn"]
  name = reward if isinstance(reward, str) else " + ".join(
      f"{weight:g} × {each}" for each, weight in reward.items())
  facts = {"epochs": f"{len(metrics)} of {config['num_epochs']}"}
  if metrics:
    first, last = metrics[0], metrics[-1]
    # Of several rewards each one's own: their sum is of values that are standardised anew.
    names = {"reward": "reward"} if isinstance(reward, str) else {
        each: f"reward/{each}" for each in reward}
    for label, name_of in names.items():
      mean, std = f"{name_of}_mean", f"{name_of}_std"
      if None in (first.get(mean), last.get(mean)):
        continue
      facts[f"{label} at the start"] = f"{first[mean]:.3f}"
      facts[f"{label} now"] = f"{last[mean]:.3f}"
      if first.get(std):
        gain = (last[mean] - first[mean]) / first[std]
        facts[f"{label}: change, in the first epoch's deviations"] = f"{gain:+.2f}"
    facts["images per second"] = f"{last['images_per_second']:.2f}"
  items = "".join(f"<div><b>{html.escape(value)}</b>{html.escape(label)}</div>"
                  for label, value in facts.items())
  return (f"<h1>{html.escape(run.name)}</h1><div>{html.escape(name)} on "
          f"{html.escape(config['pretrained']['model'])}</div>"
          f'<div class="facts">{items}</div>')


def _section(title: str, figures: Sequence[str], layout: str = "charts") -> str:
  if not figures:
    return ""
  return f'<h2>{html.escape(title)}</h2><div class="{layout}">{"".join(figures)}</div>'


def _grids(run: pathlib.Path) -> list[str]:
  # Without what a user put there, such as a copy.
  paths = sorted(path for path in (run / "images").glob("eval_*.jpg") if number_of(path) >= 0)
  if len(paths) > _MOST_GRIDS:
    chosen = np.linspace(0, len(paths) - 1, _MOST_GRIDS).round().astype(int)
    paths = [paths[i] for i in chosen]
  return [_picture(path) for path in paths]


def _picture(path: pathlib.Path) -> str:
  number = number_of(path)
  caption = "before training" if number == 0 else f"after {counted(number, 'epoch')}"
  image: Image.Image = Image.open(path)
  if image.width > _GRID_WIDTH:
    image = image.resize((_GRID_WIDTH, round(image.height * _GRID_WIDTH / image.width)))
  data = base64.b64encode(encode_image(np.asarray(image), "JPEG", quality=85)).decode()
  return (f'<figure><figcaption>{caption}</figcaption><img loading="lazy" alt="images '
          f'{caption}" src="data:image/jpeg;base64,{data}"></figure>')


# ---- charts ----


def _chart(title: str, plot: Callable[[Axes], None], *, y_label: str = "",
           x_label: str = "epoch") -> str:
  """Draws one chart: an inline SVG whose text takes the page's colour."""
  figure = Figure(figsize=(5.2, 3.0), layout="constrained")
  axes = figure.add_subplot()
  plot(axes)
  axes.set_xlabel(x_label, color=_INK)
  axes.set_ylabel(y_label, color=_INK)
  axes.tick_params(which="both", colors=_INK)
  if x_label == "epoch":
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  for side, spine in axes.spines.items():
    spine.set_visible(side in ("left", "bottom"))
    spine.set_color(_INK)
  legend = axes.get_legend()
  if legend is not None:
    legend.set_frame_on(False)
    for text in legend.get_texts():
      text.set_color(_INK)
  buffer = io.StringIO()
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph .* missing")  # drawn as boxes
    figure.savefig(buffer, format="svg", transparent=True)
  svg = buffer.getvalue()
  svg = svg[svg.index("<svg"):].replace(_INK, "currentColor")
  label = html.escape(title)
  return (f"<figure><figcaption>{label}</figcaption>"
          f'{svg.replace("<svg", f"""<svg role="img" aria-label="{label}" """, 1)}</figure>')


def _values(metrics: Sequence[Mapping], name: str) -> np.ndarray:
  """A metric of every epoch; NaN where it was not finite or is not known."""
  return np.array([np.nan if line.get(name) is None else line[name] for line in metrics],
                  float)


def _reward_chart(metrics: Sequence[Mapping]) -> str:
  epochs, mean, std, low, high = (_values(metrics, name) for name in (
      "epoch", "reward_mean", "reward_std", "reward_min", "reward_max"))

  def plot(axes: Axes) -> None:
    axes.fill_between(epochs, low, high, color=_ACCENT, alpha=0.12, lw=0, label="all")
    axes.fill_between(epochs, mean - std, mean + std, color=_ACCENT, alpha=0.25, lw=0,
                      label="± deviation")
    axes.plot(epochs, mean, color=_ACCENT, lw=2, label="mean")
    _add_legend(axes)
  return _chart("Reward of each epoch's images", plot)


def _each_reward(metrics: Sequence[Mapping]) -> list[str]:
  """Where several rewards are combined: each on its own scale."""
  names = [key.removeprefix("reward/").removesuffix("_mean") for key in metrics[-1]
           if key.startswith("reward/") and key.endswith("_mean")]
  raw = [name for name in names if "/" not in name]
  return [_lines(metrics, f"{name}, raw", {f"reward/{name}_mean": name}) for name in raw]


def _beside_rewards(metrics: Sequence[Mapping]) -> list[str]:
  """The numbers that rewards returned besides; the first few of them."""
  names = [key for key in dict.fromkeys(key for line in metrics for key in line)
           if re.fullmatch(r"reward/[^/]+/.+_mean", key)]
  return [_lines(metrics, name.removeprefix("reward/").removesuffix("_mean") + ", mean",
                 {name: ""}) for name in names[:_MOST_BESIDE]]


def _histogram(rewards: Sequence[Mapping]) -> list[str]:
  if not rewards:
    return []
  values = [np.array(line["rewards"], float) for line in rewards]
  every = np.concatenate(values)
  largest = np.abs(every).max()
  # Numbers so close for their size that the bins' edges could not be told apart are a single bin.
  bins: Any = 30
  if np.ptp(every) <= 1e-10 * largest:
    bins = every.mean() + np.array([-1, 1]) * max(1.0, 0.01 * largest)
  edges = np.histogram_bin_edges(every, bins)
  counts = np.stack([np.histogram(v, edges)[0] / len(v) for v in values], axis=1)
  first = rewards[0]["epoch"]
  extent = (first - 0.5, first + len(values) - 0.5, edges[0], edges[-1])

  def plot(axes: Axes) -> None:
    axes.imshow(counts, origin="lower", aspect="auto", extent=extent, cmap="viridis",
                interpolation="nearest")
  return [_chart("How the rewards are distributed", plot, y_label="reward")]


def _prompts_chart(rewards: Sequence[Mapping]) -> list[str]:
  """Each prompt's mean reward in the first and in the last quarter of the epochs."""
  quarter = max(1, len(rewards) // 4)
  early, late = (_by_prompt(part) for part in (rewards[:quarter], rewards[-quarter:]))
  both = sorted(early.keys() & late.keys(), key=lambda p: (-len(early[p] + late[p]), p))
  prompts = both[:_MOST_PROMPTS]
  if len(rewards) < 2 or not prompts:
    return []
  before, after = ([np.mean(part[p]) for p in prompts] for part in (early, late))
  rows = np.arange(len(prompts))

  def plot(axes: Axes) -> None:
    axes.hlines(rows, before, after, color=_INK, alpha=0.4, lw=1)
    axes.plot(before, rows, "o", color=_SECOND, ms=4, label="first quarter")
    axes.plot(after, rows, "o", color=_ACCENT, ms=4, label="last quarter")
    # Without mathematics: a prompt may have dollar signs.
    axes.set_yticks(rows, [_shorten(prompt) for prompt in prompts], fontsize=7, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(4))  # half of the width is the prompts'
    _add_legend(axes)
  return [_chart("Reward of the most frequent prompts", plot, x_label="reward")]


def _shorten(prompt: str) -> str:
  """Leaves out the middle: what prompts differ in may be at either end."""
  if len(prompt) <= _PROMPT_LENGTH:
    return prompt
  tail = _PROMPT_LENGTH // 2
  return prompt[:_PROMPT_LENGTH - 1 - tail] + "…" + prompt[-tail:]


def _by_prompt(rewards: Sequence[Mapping]) -> dict[str, list[float]]:
  grouped: dict[str, list[float]] = {}
  for line in rewards:
    for prompt, reward in zip(line["prompts"], line["rewards"]):
      grouped.setdefault(prompt, []).append(reward)
  return grouped


def _lines(metrics: Sequence[Mapping], title: str, names: Mapping[str, str], *,
           log: bool = False, from_zero: bool = False, y_label: str = "") -> str:
  def plot(axes: Axes) -> None:
    for (name, label), color in zip(names.items(), (_ACCENT, _SECOND, _THIRD)):
      axes.plot(_values(metrics, "epoch"), _values(metrics, name), color=color, lw=1.6,
                label=label)
    if log and any((_values(metrics, name) > 0).any() for name in names):
      axes.set_yscale("log")
    if from_zero:
      axes.set_ylim(bottom=0)
    if len(names) > 1:
      _add_legend(axes)
  return _chart(title, plot, y_label=y_label)


def _add_legend(axes: Axes) -> None:
  """Above the chart, where it covers nothing."""
  axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize="small",
              columnspacing=1.2)


def _policy_charts(config: Mapping[str, Any], metrics: Sequence[Mapping]) -> list[str]:
  return [
      _lines(metrics, "Diversity: 0 if all images are the same", {"diversity": ""},
             from_zero=True),
      _lines(metrics, "Clip fraction: ratios outside the clip range", {"clipfrac": ""}),
      _lines(metrics, "Approximate KL divergence", {"approx_kl": ""}, log=True),
      _lines(metrics, "Gradient norm, before clipping", {"grad_norm": ""}, log=True),
      _drift_chart(drift_tolerance(config["train"]["clip_range"]), metrics),
      *([_lines(metrics, "Skipped optimizer steps: not finite", {"skipped_steps": ""})]
        if np.nansum(_values(metrics, "skipped_steps")) else [])]


def _drift_chart(tolerance: float, metrics: Sequence[Mapping]) -> str:
  """Both drifts beside what `diagnostics` tolerates; by themselves they mean little.

  The two are the same wherever log-probabilities were not recomputed, so one is dashed.
  """
  styles: dict[str, dict[str, Any]] = {
      "sampler_drift": {"color": _SECOND, "lw": 4, "alpha": 0.6},
      "ratio_drift": {"color": _ACCENT, "lw": 1.6, "ls": "--"}}
  drifts = {name: _values(metrics, name) for name in styles if _has(metrics, name)}
  shown = [tolerance / 10, tolerance, *(x for each in drifts.values() for x in each if x > 0)]

  def plot(axes: Axes) -> None:
    for name, values in drifts.items():
      axes.plot(_values(metrics, "epoch"), values, label=name, clip_on=False, **styles[name])
    axes.axhline(tolerance, color=_INK, lw=1, ls=":", label="tolerance: clip_range / 10")
    axes.set_yscale("symlog", linthresh=min(shown) / 2)  # so that 0, as it should be, is seen
    axes.set_ylim(0, max(shown) * 2)
    _add_legend(axes)
  return _chart("Drift by rounding: |ratio − 1| before the first step", plot)


def _has(metrics: Sequence[Mapping], name: str) -> bool:
  return bool(np.isfinite(_values(metrics, name)).any())


def _time_charts(metrics: Sequence[Mapping]) -> list[str]:
  return [
      _lines(metrics, "Seconds per epoch",
             {"sampling_seconds": "sampling", "training_seconds": "training",
              "reward_seconds": "waiting for rewards"}, y_label="s"),
      _lines(metrics, "Images sampled per second", {"images_per_second": ""})]
