"""What is wrong with a run, found before anything is loaded or written: all of it at once.

`config.resolve` knows types, ranges and what fits together. Here is what takes the world
outside: functions that import, servers that answer, files, folders, room on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Set
import dataclasses
import functools
import math
import pathlib
import shutil
from typing import Any, TypeVar

import jax

from ddpo_jax import checkpoint, run_folder
from ddpo_jax.batches import BatchPlan
from ddpo_jax.config import Config, any_of, fields_of
from ddpo_jax.console import say
from ddpo_jax.devices import plan_batches
from ddpo_jax.errors import UserError
from ddpo_jax.files import check_output, nearest_existing
from ddpo_jax.messages import in_bytes, is_utf8, place, shown, with_type
from ddpo_jax.model_size import ModelSize, model_size, read_header, trained_weights
from ddpo_jax.models.hub import retries_in_one_line
from ddpo_jax.prompts import check_drawn, get_prompt_fn, sample_rng
from ddpo_jax.redaction import redacted
from ddpo_jax.resume_checks import check_continues, check_sizes
from ddpo_jax.rewards import REWARD_FACTORIES, get_reward, get_rewards
from ddpo_jax.rewards.metadata import check_metadata
from ddpo_jax.types import PromptFn, RewardFn

T = TypeVar("T")

STATE_BYTES = 3 * 4  # for each trained weight: itself and its two moments, float32
_DRAWS = 8  # from the same rng, to see that the prompt is the same
_check_output_folder = functools.partial(check_output, is_folder=True)
_LARGE_LATENT = 64 * 64 * 4  # numbers in a latent of 512 × 512 pixels


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What was made while it was checked, and need not be made twice."""

  run: pathlib.Path
  prompt_fn: PromptFn
  reward_fns: dict[str, RewardFn]


@dataclasses.dataclass(frozen=True)
class _Prompts:
  function: PromptFn
  metadata: dict[str, Any]  # of the first prompt


class _Problems:
  """Collects what checks raise."""

  def __init__(self) -> None:
    self.lines: list[str] = []

  def collect(self, check: Callable[..., T], *args: Any) -> T | None:
    """What the check returns; None if it says what the user should correct."""
    try:
      return check(*args)
    except UserError as error:
      self.lines += str(error).splitlines()
    except OSError as error:  # of a path that cannot even be looked at
      self.lines.append(f"{error.filename!r} cannot be used as a path: {error.strerror}")
    return None


def prepare(cfg: Config, run_name: str = "") -> Prepared:
  """Checks a config whose fields are right against the world.

  Args:
    cfg: from `config.resolve`.
    run_name: of the run where the config has none.

  Raises:
    UserError: a line for each problem.
  """
  problems = _Problems()
  prompts = problems.collect(_draw, cfg)
  run = problems.collect(run_folder.choose_run_folder, cfg, run_name)
  _check_files(cfg, run, set(), problems)
  with retries_in_one_line():
    reward_fns = problems.collect(get_rewards, cfg.reward_fn, cfg.reward_kwargs)
  if prompts is not None and reward_fns is not None:
    for function in reward_fns.values():
      problems.collect(check_metadata, function, [prompts.metadata])
  if problems.lines:
    raise UserError("\n".join(_once(problems.lines)))
  assert run is not None and prompts is not None and reward_fns is not None
  _warn_of_slowness(cfg)
  return Prepared(run, prompts.function, reward_fns)


def other_problems(cfg: Config, wrong: Set[str]) -> list[str]:
  """Further problems of a config some of whose fields are wrong already; loads no network.

  Args:
    cfg: with values that must not be used in the fields `wrong`.
    wrong: such as "sample.eta", or "sample" for all of a group.
  """
  problems = _Problems()
  prompts = None
  if not wrong & {"prompt_fn", "prompt_fn_kwargs"}:
    prompts = problems.collect(_draw, dataclasses.replace(cfg, seed=0))  # any will do
  run = None
  if not wrong & {"run_name", "logdir", "resume_from"}:
    run = problems.collect(run_folder.choose_run_folder, cfg)
  _check_files(cfg, run, wrong, problems)
  if not wrong & {"reward_fn", "reward_kwargs"} and isinstance(cfg.reward_fn, str):
    if cfg.reward_fn not in REWARD_FACTORIES:
      function = problems.collect(lambda: get_reward(str(cfg.reward_fn), **cfg.reward_kwargs))
      if prompts is not None and function is not None:
        problems.collect(check_metadata, function, [prompts.metadata])
  return [line for line in _once(problems.lines) if not fields_of([line]) & wrong]


def _once(lines: list[str]) -> list[str]:
  return list(dict.fromkeys(lines))


def _draw(cfg: Config) -> _Prompts:
  """The prompt function, which has drawn a few times: that finds a bad file or argument."""
  function = get_prompt_fn(cfg.prompt_fn, **cfg.prompt_fn_kwargs)
  try:
    drawn = [check_drawn(function(sample_rng(cfg.seed, 0, 0)), f"prompt_fn={cfg.prompt_fn!r}")
             for _ in range(_DRAWS)]
  except UserError:
    raise
  except (Exception, SystemExit) as error:  # the user's own, or arguments of the wrong type
    raise UserError(
        f"prompt_fn={cfg.prompt_fn!r} with prompt_fn_kwargs="
        f"{shown(redacted(cfg.prompt_fn_kwargs))} raised {with_type(error)}{place(error)}"
        ) from error
  _check_draws_from_rng(cfg, [prompt for prompt, _ in drawn])
  return _Prompts(function, drawn[0][1])


def _check_draws_from_rng(cfg: Config, prompts: list[str]) -> None:
  """Says that a prompt function draws from something else; refuses it in several processes.

  Those have to agree on all prompts, which each of them draws.
  """
  others = [prompt for prompt in prompts if prompt != prompts[0]]
  if not others:
    return
  problem = (f"prompt_fn={cfg.prompt_fn!r} returned {shown(prompts[0])} and {shown(others[0])} for "
             "the same rng; must draw from the rng that it is given, and nothing else")
  if jax.process_count() > 1:
    raise UserError(problem)
  say(f"Warning: {problem}. A run that is resumed will not have the same prompts")


def _check_files(cfg: Config, run: pathlib.Path | None, wrong: Set[str],
                 problems: _Problems) -> None:
  """Folders that can be written, a model and weights that can be read, and room."""
  if run is not None:
    # A checkpoint's folder that does not exist is said to be wrong below.
    if run.is_dir() or not run_folder.is_named_by_checkpoint(cfg):
      problems.collect(_check_output_folder, run_folder.named_by(cfg), run)
    problems.collect(_check_is_utf8, run_folder.named_by(cfg), run)
    if (run / "checkpoints").is_symlink():  # to another disk
      problems.collect(_check_output_folder, f"{run_folder.named_by(cfg)}: its checkpoints",
                       (run / "checkpoints").resolve())
  cache = None if "compilation_cache" in wrong else cfg.compilation_cache_folder()
  if cache is not None and cfg.compilation_cache != "auto":
    problems.collect(_check_output_folder, f"compilation_cache={cfg.compilation_cache!r}", cache)
  if not any_of(["lora.init_from"], wrong) and cfg.lora.init_from:
    problems.collect(read_header, "lora.init_from", pathlib.Path(cfg.lora.init_from).expanduser())
  if run is not None and cfg.resume_from and "resume_from" not in wrong:
    problems.collect(_check_resumes, cfg, run, None if wrong else plan_batches(cfg))
  needed = ("pretrained.model", "use_lora", "lora.rank", "lora.init_from", "num_epochs",
            "save_freq", "num_checkpoint_limit")
  if not any_of(needed, wrong):
    size = problems.collect(model_size, cfg)
    if size is not None and run is not None:
      problems.collect(_check_room, cfg, run, size)


def _check_is_utf8(named: str, run: pathlib.Path) -> None:
  """Refuses a folder in which no checkpoint could be written: tensorstore takes UTF-8 alone."""
  if not is_utf8(str(run.resolve())):
    raise UserError(f"{named}: the path of the run's folder {shown(run.name)} is not UTF-8, and "
                    "no checkpoint could be written there; choose another run_name or logdir")


def _check_resumes(cfg: Config, run: pathlib.Path, plan: BatchPlan | None) -> None:
  """That there is a checkpoint to go on from, of the same experiment, and the run's newest."""
  source, epochs = checkpoint.to_resume(cfg.resume_from, run)
  if not epochs:
    return
  later = [epoch for epoch in checkpoint.saved_epochs(source) if epoch > epochs[0]]
  if later and source == run.resolve():
    raise UserError(
        f"resume_from={cfg.resume_from!r}: the run has later checkpoints "
        f"({', '.join(map(str, sorted(later)))}), which going on from this one would overwrite; "
        "set run_name to go on in a new folder, or delete them first")
  try:
    meta = checkpoint.restore_meta(source, epochs[0])
  except checkpoint.DamagedError:
    return  # the one before it may do; resuming finds out
  where = checkpoint.describe(source, epochs[0])
  check_continues(cfg, meta["config"], where)
  if plan is not None:
    check_sizes(cfg, plan, meta, where)


def _check_room(cfg: Config, run: pathlib.Path, size: ModelSize) -> None:
  saves = math.ceil(cfg.num_epochs / cfg.save_freq)
  # One more than are kept: the oldest is deleted once the newest is there.
  count = min(cfg.num_checkpoint_limit + 1, saves)
  each = trained_weights(cfg, size) * STATE_BYTES
  there = nearest_existing((run / "checkpoints").resolve())
  free = shutil.disk_usage(there).free
  if min(2, saves) * each > free:  # not with num_checkpoint_limit=1 either
    raise UserError(
        f"{run_folder.named_by(cfg)}: a checkpoint takes {in_bytes(each)}, and {there} has "
        f"{in_bytes(free)} free; must be on a disk with room for {min(2, saves)}")
  if count * each > free:
    raise UserError(
        f"num_checkpoint_limit={cfg.num_checkpoint_limit}: {count} checkpoints take "
        f"{in_bytes(count * each)}, and {there} has {in_bytes(free)} free; must be lower, "
        "or logdir must be on another disk")


def _warn_of_slowness(cfg: Config) -> None:
  """Of a config made for a GPU, where JAX has none."""
  if jax.default_backend() != "cpu" or cfg.mixed_precision == "no":
    return
  size = model_size(cfg)
  if size is None or size.latent_size >= _LARGE_LATENT:  # None: a model on the hub
    say(f"Warning: mixed_precision={cfg.mixed_precision!r} with Stable Diffusion on a CPU: an "
        "epoch takes hours. JAX finds no GPU here; if there is one, install the extra cuda12 or "
        "cuda13")
