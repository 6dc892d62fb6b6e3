"""Command line -> config -> training run -> exit status."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
import pathlib
import runpy
import sys

from absl import flags
import ml_collections
from ml_collections import config_flags

from ddpo_jax.config import Config, fields_of, inspect
from ddpo_jax.types import Interrupted, UserError

USAGE_ERROR = 2
_HELP = ("--help", "-h")
_DRY_RUN = "--dry_run"
_MAX_MESSAGE = 500  # characters of a library's message
_FREE_FORM = ("prompt_fn_kwargs", "reward_kwargs")


_USAGE = """usage: train.py --config FILE[:EXPERIMENT] [--config.FIELD=VALUE …] [--dry_run]

--dry_run checks everything, says what the run would be, and ends.

Experiments are in configs/; every field is described in configs/base.py."""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs scripts/train.py; returns its exit status."""
  argv = sys.argv if argv is None else argv
  if set(argv) & set(_HELP):
    print(_USAGE)
    return 0
  rest = [argument for argument in argv if argument != _DRY_RUN]
  return exit_status(lambda: (train if len(rest) == len(argv) else dry_run)(
      read_config(rest)))


def exit_status(run: Callable[[], None]) -> int:
  """What a script exits with.

  0: done. 2: an error that the user can correct, said in one line on standard error.
  128 + n: stopped by signal n, after saving. Anything else raises, for Python's 1.
  """
  try:
    run()
  except UserError as error:
    print(error, file=sys.stderr)
    return USAGE_ERROR
  except Interrupted as stop:
    print(stop, file=sys.stderr)
    return 128 + stop.signum
  return 0


def train(config: Config) -> None:
  from ddpo_jax import diagnostics  # imports JAX: only once the config is right
  from ddpo_jax import train as training
  with diagnostics.explained(config):
    training.train(config)


def dry_run(config: Config) -> None:
  from ddpo_jax import validation
  validation.dry_run(config)


def read_config(argv: Sequence[str]) -> Config:
  """Reads `--config FILE[:EXPERIMENT]` and its overrides `--config.FIELD=VALUE`.

  Raises:
    UserError: if the file, the experiment or a field does not exist, or a value is not
      right.
  """
  arguments = _join(argv[1:])
  files = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
  if not files:
    raise UserError("--config is missing; must be a config file such as configs/demo.py")
  config = load_config(files[-1])
  overrides = [a for a in arguments if not a.startswith("--config=")]
  overrides = [a for a in overrides if not _set_free_form(config, a)]
  for argument in overrides:
    _check_field(config, argument)
  values, words = flags.FlagValues(), [argv[0], *overrides]
  try:
    flag = config_flags.DEFINE_config_dict("config", config, flag_values=values,
                                           sys_argv=words)
    values(words)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(_one_line(error)) from error
  return _resolve(flag.value)


def _resolve(config: ml_collections.ConfigDict) -> Config:
  """As `config.resolve`; with something wrong, the rest is checked as well before it is said."""
  resolved, problems = inspect(config)
  if problems:
    if resolved is not None:
      from ddpo_jax import validation  # imports JAX: only where it is needed
      problems += validation.other_problems(resolved, fields_of(problems))
    raise UserError("\n".join(problems))
  assert resolved is not None  # it is None only with a problem
  return resolved


def load_config(spec: str) -> ml_collections.ConfigDict:
  """Runs the `get_config` of "FILE" or "FILE:EXPERIMENT".

  Raises:
    UserError: if there is no such file or experiment.
  """
  file, colon, experiment = spec.partition(":")
  if not pathlib.Path(file).is_file():
    raise UserError(f"--config={spec}: {file!r} does not exist; must be a config file such "
                    "as configs/demo.py")
  try:
    get_config = runpy.run_path(file)["get_config"]
    config = get_config(experiment) if colon else get_config()
  except (ValueError, TypeError, KeyError, ImportError, SyntaxError) as error:
    raise UserError(f"--config={spec}: {_one_line(error)}") from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f"--config={spec}: get_config returned a {type(config).__name__}; "
                    "must be a ConfigDict")
  return config


def _join(arguments: Sequence[str]) -> list[str]:
  """`--name value` -> `--name=value`; refuses what is not an option of ours."""
  joined, rest = [], list(arguments)
  while rest:
    argument = rest.pop(0)
    name = argument.partition("=")[0]
    if name != "--config" and not name.startswith("--config."):
      raise UserError(f"{argument!r} is not an option; there are --config=FILE, "
                      "--config.FIELD=VALUE and --dry_run")
    if "=" not in argument:
      if not rest:
        raise UserError(f"{argument} has no value")
      argument = f"{argument}={rest.pop(0)}"
    joined.append(argument)
  return joined


def _check_field(config: ml_collections.ConfigDict, argument: str) -> None:
  path = argument.partition("=")[0].removeprefix("--config.")
  group, names = config, path.split(".")
  for i, name in enumerate(names):
    if not isinstance(group, ml_collections.ConfigDict) or name not in group:
      there = ", ".join(group) if isinstance(group, ml_collections.ConfigDict) else "none"
      raise UserError(f"{argument}: {'.'.join(names[:i + 1])} is not a field; there are: "
                      f"{there}")
    group = group[name]


def _set_free_form(config: ml_collections.ConfigDict, argument: str) -> bool:
  """Sets what has no fixed type: the reward, or an argument of it or of the prompts."""
  path, _, text = argument.removeprefix("--config.").partition("=")
  group, _, name = path.partition(".")
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if path == "reward_fn":
    config[path] = value if isinstance(value, dict) else text
  elif group in _FREE_FORM and name:
    config[group] = {**(config[group] or {}), name: value}
  else:
    return False
  return True


def _one_line(error: Exception) -> str:
  text = " ".join(str(error).split())
  return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "…"
