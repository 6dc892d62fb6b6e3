"""Command line -> config -> training run -> exit status."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import inspect
import json
import os
import pathlib
import runpy
import signal
import sys
from typing import Any

import ml_collections

from ddpo_jax.config import FREE_FORM, GROUPS, Config, fields_of, inspect_config
from ddpo_jax.console import write
from ddpo_jax.errors import USAGE_ERROR, Interrupted, UserError
from ddpo_jax.messages import one_line, place, shown, with_type
from ddpo_jax.overrides import override, unquoted
from ddpo_jax.redaction import REDACTED

_HELP = ("--help", "-h")
_DRY_RUN = "--dry_run"

_USAGE = """usage: train.py --config FILE[:EXPERIMENT] [--config.FIELD=VALUE …] [--dry_run]

--dry_run checks everything, says what the run would be, and ends.

Experiments are in configs/; every field is described in configs/base.py."""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs scripts/train.py; returns its exit status."""
  argv = sys.argv if argv is None else argv
  if set(argv) & set(_HELP):
    write(_USAGE, sys.stdout)
    return 0
  run = dry_run if _DRY_RUN in argv else train
  rest = [argument for argument in argv if argument != _DRY_RUN]
  return exit_status(lambda: run(read_config(rest)))


def exit_status(run: Callable[[], None]) -> int:
  """What a script exits with.

  0: done. 2: an error that the user can correct, said in one line on standard error.
  128 + n: stopped by signal n, a run after saving. Anything else raises, for Python's 1.
  """
  try:
    run()
  except UserError as error:
    write(str(error), sys.stderr)
    return USAGE_ERROR
  except (Interrupted, KeyboardInterrupt) as error:
    stop = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
    write(str(stop), sys.stderr)
    return 128 + stop.signum
  return 0


def train(config: Config) -> None:
  from ddpo_jax import resource_errors  # imports JAX: only once the config is right
  from ddpo_jax import train as training
  with resource_errors.with_advice(config):
    training.train(config)


def dry_run(config: Config) -> None:
  from ddpo_jax import dry_run as dry
  from ddpo_jax import resource_errors
  with resource_errors.with_advice(config):  # a reward's network is put on the device
    dry.dry_run(config)


def read_config(argv: Sequence[str], others: str = _DRY_RUN) -> Config:
  """Reads `--config FILE[:EXPERIMENT]` and its overrides `--config.FIELD=VALUE`.

  Args:
    argv: the command line, without the script's other options.
    others: what these are, for the message about one that does not exist.

  Raises:
    UserError: if the file or the experiment does not exist; or a line for each field that
      does not exist, or whose value is not right.
  """
  options = [_split(argument) for argument in _join(argv[1:], others)]
  files = [value for name, value in options if name == "--config"]
  if not files:
    raise UserError("--config is missing; must be a config file such as configs/demo.py")
  fields = [(name.removeprefix("--config."), value) for name, value in options
            if name != "--config"]
  values, problems = override(load_config(files[-1]), fields)
  return _resolve(values, problems + _left_out(files[-1], values))


def _is_of_run(file: str) -> bool:
  """Whether a config file is the config.json that a run wrote."""
  return pathlib.Path(file).suffix == ".json"


def _left_out(spec: str, values: Mapping[str, Any]) -> list[str]:
  """A line for each group whose key or password a run's config.json does not hold."""
  if not _is_of_run(_split_spec(spec)[0]):
    return []
  return [f"{group} holds {REDACTED!r} where {spec} leaves out a key or password; give it again, "
          f"as --config.{group}.ARGUMENT=VALUE"
          for group in FREE_FORM
          if REDACTED in str(values.get(group))]


def _resolve(values: Mapping[str, Any], problems: list[str]) -> Config:
  """`config.resolve`, which in case of problems also runs the later checks, to report them all."""
  resolved, found = inspect_config(values)
  problems = problems + found
  if problems:
    if resolved is not None:
      from ddpo_jax import validation  # imports JAX: only where it is needed
      problems += validation.other_problems(resolved, fields_of(problems))
    raise UserError("\n".join(problems))
  assert resolved is not None  # it is None only with a problem
  return resolved


def load_config(spec: str) -> ml_collections.ConfigDict:
  """Runs the `get_config` of "FILE" or "FILE:EXPERIMENT", or reads a run's config.json.

  Raises:
    UserError: if there is no such file or experiment, or the file raises anything.
  """
  file, colon, experiment = _split_spec(spec)
  if not os.path.isfile(file):
    problem = "is a folder" if os.path.isdir(file) else "does not exist"
    of_run = os.path.join(file, "config.json")
    instead = of_run if os.path.isfile(of_run) else "a config file such as configs/demo.py"
    raise UserError(f"--config={spec}: {file!r} {problem}; must be {instead}")
  if _is_of_run(file):
    if colon:
      raise UserError(f"--config={spec}: has no experiments; must be --config={file}")
    return _explained(spec, lambda: _config_of_run(file))
  if pathlib.Path(file).suffix != ".py":
    raise UserError(f"--config={spec}: {file!r} must be a Python file such as "
                    "configs/demo.py, or a run's config.json")
  config = _explained(spec, lambda: _config_of(file, [experiment] if colon else []))
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f"--config={spec}: get_config returned a {type(config).__name__}; "
                    "must be a ConfigDict")
  return config


def _split_spec(spec: str) -> tuple[str, str, str]:
  """"FILE:EXPERIMENT" as file, colon and experiment; the file's own path may have colons."""
  spec = os.path.expanduser(spec)
  ends = [i for i, letter in enumerate(spec) if letter == ":"] + [len(spec)]
  for end in ends:
    if os.path.isfile(spec[:end]):
      return spec[:end], spec[end:end + 1], spec[end + 1:]
  return spec.partition(":")


def _config_of_run(file: str) -> ml_collections.ConfigDict:
  values = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
  if not isinstance(values, dict):
    raise UserError("must be the config.json that a run wrote")
  # Groups of fields become ConfigDicts; rewards by name stay a dict, as names may have dots.
  return ml_collections.ConfigDict(
      {name: ml_collections.ConfigDict(value, convert_dict=False)
       if isinstance(value, dict) and name in GROUPS else value
       for name, value in values.items()}, convert_dict=False)


def _config_of(file: str, arguments: Sequence[str]) -> Any:
  get_config = runpy.run_path(file).get("get_config")
  if not callable(get_config):
    raise UserError("has no get_config; must define a function of that name that returns a "
                    "ConfigDict")
  try:
    inspect.signature(get_config).bind(*arguments)
  except TypeError:
    raise UserError(f"has no experiments; must be --config={file}" if arguments else
                    f"must name an experiment: --config={file}:EXPERIMENT") from None
  return get_config(*arguments)


def _explained(spec: str, load: Callable[[], Any]) -> Any:
  """Returns `load()`; what it raises becomes a UserError that names the line of the file."""
  file = pathlib.Path(_split_spec(spec)[0]).resolve()
  try:
    return load()
  except UserError as error:
    raise UserError(f"--config={spec}: {error}") from error
  except Exception as error:  # the file is the user's own code
    text = one_line(error) if isinstance(error, ValueError) else with_type(error)
    where = place(error, lambda name: pathlib.Path(name).resolve() == file)
    raise UserError(f"--config={spec}: {text}{where}") from error


def _join(arguments: Sequence[str], others: str) -> list[str]:
  """`--name value` -> `--name=value`; refuses what is not an option of ours."""
  joined: list[str] = []
  rest = list(arguments)
  while rest:
    argument = rest.pop(0)
    first, *fields = argument.partition("=")[0].split(".")
    if first != "--config" or not all(fields):
      raise UserError(f"{shown(argument)} is not an option; {_instead(joined, others)}")
    if "=" not in argument:
      if not rest:
        raise UserError(f"{argument} has no value")
      argument = f"{argument}={rest.pop(0)}"
    joined.append(argument)
  return joined


def _instead(before: Sequence[str], others: str) -> str:
  """What to write instead of an argument that is not an option.

  Args:
    before: the options so far. The last may be the first piece of a dict that the shell split.
    others: what there is besides the config's.
  """
  name, value = _split(before[-1]) if before else ("", "")
  if name.startswith("--config.") and value.count("{") > value.count("}"):
    field = name.removeprefix("--config.")
    return f"{field} {unquoted(field)}"
  return f"there are --config=FILE, --config.FIELD=VALUE and {others}"


def _split(argument: str) -> tuple[str, str]:
  name, _, value = argument.partition("=")
  return name, value
