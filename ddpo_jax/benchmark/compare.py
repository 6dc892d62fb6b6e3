"""Runs the sides of the benchmark in turns, and says what came out."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import contextlib
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

from tqdm import tqdm

from ddpo_jax.benchmark.side import EPOCH_PARTS, Side, serve
from ddpo_jax.cli import exit_status, read_config
from ddpo_jax.config import Config
from ddpo_jax.console import ArgumentParser
from ddpo_jax.errors import UserError
from ddpo_jax.files import check_output
from ddpo_jax.overrides import redacted_command

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_DEFAULT = str(_ROOT / "configs" / "single_gpu.py") + ":compressibility"
_DEFAULT_IS = """No --config: measuring Stable Diffusion 1.5's shapes in fp16, as in
configs/single_gpu.py:compressibility. On a CPU that takes hours; --config configs/demo.py is
the small one.""".replace("\n", " ")
_JAX = "ddpo_jax"
_NEEDED = ("torch", "diffusers", "peft", "transformers")  # by scripts/torch_reference.py
# By itself JAX takes three quarters of a GPU's memory at once, which the other sides need too.
_SHARING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
_REFERENCE_REWARDS = ("jpeg_compressibility", "jpeg_incompressibility")
_LISTED = 20  # of a profile's operations; more are in the JSON file
_USAGE = """%(prog)s [--config FILE[:EXPERIMENT]] [--config.FIELD=VALUE …] [--rounds N]
                    [--reference torch] [--torch_compile] [--skip_start] [--profile]
                    [--output FILE]"""
_DESCRIPTION = """Measures start, epochs, memory and FLOP of a config, on random weights.

The config is configs/single_gpu.py:compressibility, Stable Diffusion 1.5 on a GPU, or what
--config names; the small one, for a CPU, is configs/demo.py. All its fields can be set as for
train.py. A model that is neither "tiny" nor a local folder has Stable Diffusion 1.5's shapes, and
is not downloaded. A whole epoch of a large model is long: lower sample.num_batches_per_epoch and
train.gradient_accumulation_steps together, so that the epoch has as many optimizer steps as before,
and the rates stay the same. With --reference the reward must be one of JPEG sizes.
"""


def main(argv: Sequence[str]) -> int:
  """Runs scripts/benchmark.py; returns its exit status."""
  return exit_status(lambda: _run(argv))


def _run(argv: Sequence[str]) -> None:
  options, rest = _parse(argv[1:])
  if not any(argument.partition("=")[0] == "--config" for argument in rest):
    print(_DEFAULT_IS, file=sys.stderr, flush=True)
    rest = [f"--config={_DEFAULT}", *rest]
  cfg = read_config([argv[0], *rest], "those that --help lists")
  if options.reference and cfg.reward_fn not in _REFERENCE_REWARDS:
    raise UserError(f"reward_fn={cfg.reward_fn!r}: with --reference it must be one of "
                    f"{', '.join(_REFERENCE_REWARDS)}, which both sides have")
  if options.side:
    from ddpo_jax import resource_errors  # imports JAX, as the next: only in its own process
    from ddpo_jax.benchmark.jax_side import JaxSide
    serve(lambda: JaxSide(cfg), resource_errors.with_advice(cfg))
    return
  print(describe(measure(cfg, [argv[0], *rest], options, redacted_command(argv))))


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  parser = ArgumentParser(
      prog="benchmark.py", usage=_USAGE, description=_DESCRIPTION, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=3, help="epochs of each side (3)")
  parser.add_argument("--reference", choices=("torch",), action="append",
                      help="measure ddpo-pytorch's algorithm in current torch as well")
  parser.add_argument("--torch_compile", action="store_true",
                      help="with --reference: measure it again with torch.compile")
  parser.add_argument("--skip_start", action="store_true",
                      help="do not measure a cold and a warm start")
  parser.add_argument("--profile", action="store_true",
                      help="say which operations take the time of sampling and training")
  parser.add_argument("--output", help="write the results into this file, as JSON")
  parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
  options, rest = parser.parse_known_args(arguments)
  if options.rounds < 1:
    raise UserError(f"--rounds={options.rounds} must be at least 1")
  if options.torch_compile and not options.reference:
    raise UserError("--torch_compile needs --reference=torch, which it is another way of running")
  missing = [name for name in _NEEDED if options.reference and not _is_installed(name)]
  if missing:
    raise UserError(f"--reference=torch needs {', '.join(missing)}: pip install -e '.[test]'")
  if options.output:
    options.output = os.path.expanduser(options.output)
    check_output(f"--output={options.output:.200}", pathlib.Path(options.output),
                 is_folder=False)
  return options, rest


def _is_installed(module: str) -> bool:
  return importlib.util.find_spec(module) is not None


def measure(cfg: Config, command: Sequence[str], options: argparse.Namespace, started_as: str
            ) -> dict[str, Any]:
  """Everything, as it goes into the JSON file: part by part, so that none is lost.

  Args:
    cfg: the config.
    command: starts a side, without the options that are the benchmark's own.
    options: those.
    started_as: the command as it may be written down.
  """
  results: dict[str, Any] = {
      "command": started_as, "config": cfg.to_dict(), "start": None, "profile": None}

  def note(**measured: Any) -> None:
    results.update(measured)
    if options.output:
      output = pathlib.Path(options.output)
      output.parent.mkdir(parents=True, exist_ok=True)
      output.write_text(json.dumps(results, indent=2) + "\n")

  ours = [sys.executable, *command, "--side"]
  with contextlib.ExitStack() as stack:
    if not options.skip_start:
      # What a cold start compiles, the rounds need not compile again.
      cache = stack.enter_context(tempfile.TemporaryDirectory())
      ours.append(f"--config.compilation_cache={cache}")
      note(start=measure_start(ours))
    sides = start_sides(ours, command, options)
    note(machine={side.name: side.call("describe") for side in sides})
    _check_one_gpu(results["machine"][_JAX], options)
    epochs = run_rounds(sides, options.rounds)
    sides = [side for side in sides if side.name in epochs]
    visits = cfg.num_train_timesteps * cfg.train.num_inner_epochs  # of each sample
    note(epochs=epochs, rates={name: rates(of, visits) for name, of in epochs.items()})
    note(memory={side.name: side.call("memory") for side in sides})
    for side in sides[1:]:
      side.close()
    for part in ("decode", "jpeg", "matmul_peak", "flops"):
      note(**{part: sides[0].call(part)})
    if options.profile:
      note(profile=sides[0].call("profile"))
    sides[0].close()
  note(of_peak=share_of_peak(cfg, results))
  return results


def _check_one_gpu(machine: Mapping[str, Any], options: argparse.Namespace) -> None:
  """Refuses to compare several GPUs with the one that the reference uses."""
  if options.reference and machine["platform"] == "gpu" and machine["devices"] > 1:
    raise UserError(f"--reference {options.reference[0]} uses one GPU, and JAX finds "
                    f"{machine['devices']}; set CUDA_VISIBLE_DEVICES=0 in the environment")


def measure_start(command: Sequence[str]) -> dict[str, float]:
  """Seconds from the start of a process to its first optimizer step.

  Args:
    command: of a side whose compilation cache is empty.
  """
  seconds = {}
  for kind in ("cold", "warm"):
    side = Side(f"{_JAX} ({kind} start)", command)
    seconds[kind] = side.call("first_step")["seconds"]
    side.close()
  return seconds


def start_sides(ours: Sequence[str], command: Sequence[str], options: argparse.Namespace
                ) -> list[Side]:
  """This package's side first, and those that it is to be compared with."""
  if not options.reference:
    return [Side(_JAX, ours)]
  theirs = [sys.executable, str(_ROOT / "scripts" / "torch_reference.py"), *command[1:]]
  sides = [Side(_JAX, ours, _SHARING), Side("torch", theirs)]
  if options.torch_compile:
    sides.append(Side("torch.compile", [*theirs, "--compile"]))
  return sides


def run_rounds(sides: Sequence[Side], rounds: int) -> dict[str, list[dict[str, Any]]]:
  """Epochs of each side in turn; the first of each, which compiles, is not counted.

  A side that fails, for lack of memory or of what `torch.compile` needs, is left out, if it
  is not the first.
  """
  epochs: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
  for round_number in tqdm(range(rounds + 1), desc="Rounds", unit="round", disable=None):
    for side in [side for side in sides if side.name in epochs]:
      try:
        epoch = side.call("epoch")
      except UserError as error:
        if side is sides[0]:
          raise
        print(f"{error}; going on without it", file=sys.stderr, flush=True)
        del epochs[side.name]
        continue
      if round_number > 0:
        epochs[side.name].append(epoch)
  return epochs


def rates(epochs: Sequence[Mapping[str, float]], visits: int) -> dict[str, list[float]]:
  """Median, least and largest over the rounds.

  Args:
    epochs: what each side's `epoch` returned.
    visits: how many (sample, timestep) pairs an epoch trains on for each sample.
  """
  spread = lambda values: [statistics.median(values), min(values), max(values)]
  return {
      "images_per_second": spread([e["images"] / e["sampling_seconds"] for e in epochs]),
      "sample_timesteps_per_second": spread(
          [e["images"] * visits / e["training_seconds"] for e in epochs]),
      "epoch_seconds": spread([_epoch_seconds(e) for e in epochs])}


def _epoch_seconds(epoch: Mapping[str, float]) -> float:
  parts = (epoch[f"{part}_seconds"] for part in EPOCH_PARTS)
  return epoch.get("epoch_seconds", sum(parts))


def share_of_peak(cfg: Config, results: Mapping[str, Any]) -> dict[str, float]:
  """What part of a large matrix product's speed sampling and training reach."""
  flops, rate = results["flops"], results["rates"][_JAX]
  peak = results["matmul_peak"]["flops_per_second"]
  of = lambda part: flops[part]["counted"]
  image = cfg.sample.num_steps * of("denoising_step") + of("decode")  # prompts are known
  timestep = of("training_timestep") + _rescored(results) * of("denoising_step")
  machine = results["machine"][_JAX]
  devices = machine["devices"] if machine["platform"] == "gpu" else 1  # a CPU's are its cores
  return {"sampling": image * rate["images_per_second"][0] / peak / devices,
          "training": timestep * rate["sample_timesteps_per_second"][0] / peak / devices}


def describe(results: Mapping[str, Any]) -> str:
  """The results as text."""
  ours = results["rates"][_JAX]
  lines = [f"{results['command']}", f"machine: {results['machine'][_JAX]}"]
  if results["start"]:
    lines.append("start to first optimizer step: {cold:.1f} s cold, {warm:.1f} s warm"
                 .format(**results["start"]))
  for name, rate in results["rates"].items():
    memory = results["memory"][name]
    lines += ["", name]
    for key, (median, least, largest) in rate.items():
      ratio = "" if name == _JAX else f"   ddpo_jax: {_ratio(key, ours, rate):.2f} times as fast"
      lines.append(f"  {key:28} {median:10.3f}  ({least:.3f} to {largest:.3f}){ratio}")
    lines += [f"  {key:28} {value / 1e9:10.3f} GB" for key, value in memory.items() if value]
  if any(epoch.get("gradient_while_sampling") for epoch in results["epochs"][_JAX]):
    lines += ["", "In an epoch the first optimizer step's gradient is computed while sampling; the "
              "other two rates are of epochs where it is not"]
  drift = max(epoch["sampler_drift"] for epoch in results["epochs"][_JAX])
  lines += [
      "", f"ratios drift by up to {drift:.1e} between sampler and update; log-probabilities "
      f"were computed anew for {_rescored(results):.0%} of training",
      "decoding: {:.2f} images/s".format(
          results["decode"]["images"] / results["decode"]["seconds"]),
      "JPEG reward of 256 images of 512x512: {seconds:.2f} s in two threads, "
      "{seconds_one_by_one:.2f} s one by one".format(**results["jpeg"]),
      "large matrix product: {:.3f} TFLOP/s".format(
          results["matmul_peak"]["flops_per_second"] / 1e12),
      "of that in sampling {sampling:.1%}, in training {training:.1%}".format(
          **results["of_peak"]), "", "GFLOP of one sample    counted   compiler"]
  for part, count in results["flops"].items():
    compiled = "" if count["compiled"] is None else f"{count['compiled'] / 1e9:10.2f}"
    lines.append(f"  {part:18} {count['counted'] / 1e9:10.2f} {compiled}")
  for part, profile in (results["profile"] or {}).items():
    lines += ["", *_describe_profile(part, profile)]
  return "\n".join(lines)


def _describe_profile(part: str, profile: Mapping[str, Any]) -> list[str]:
  lines = [f"{part}: {profile['busy_seconds']:.2f} s of operations in {profile['seconds']:.2f} s"]
  for name, seconds, count in profile["operations"][:_LISTED]:
    share = seconds / profile["busy_seconds"]
    lines.append(f"  {share:6.1%} {count:8} of {seconds / count * 1e6:8.1f} us  {name[:90]}")
  return lines


def _rescored(results: Mapping[str, Any]) -> float:
  """For what part of the optimizer steps log-probabilities were computed anew."""
  return statistics.mean(epoch["rescored"] for epoch in results["epochs"][_JAX])


def _ratio(key: str, ours: Mapping[str, list], theirs: Mapping[str, list]) -> float:
  ratio = ours[key][0] / theirs[key][0]
  return 1 / ratio if key.endswith("_seconds") else ratio
