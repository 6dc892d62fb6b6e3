"""ml_collections config -> frozen, validated dataclasses.

Imports nothing slow, so that a mistake in a config is answered at once.

A new field goes into configs/base.py, which documents it, a dataclass here, and `_RULES`; into
`_RELATIONS` if it depends on others, and `resume_checks._MAY_CHANGE` if it may differ when a run
is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
import dataclasses
import json
import math
import os
import pathlib
import re
import typing
from typing import Any

import ml_collections

from ddpo_jax import model_names, rng_streams
from ddpo_jax.errors import UserError
from ddpo_jax.field_names import group_of, not_a_field, shortened, with_groups
from ddpo_jax.messages import shown
from ddpo_jax.redaction import redacted


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
  model: str
  revision: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  rank: int = 4
  init_from: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  num_steps: int
  eta: float
  guidance_scale: float
  batch_size: int
  num_batches_per_epoch: int
  decode_batch_size: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  batch_size: int
  use_8bit_adam: bool
  learning_rate: float
  adam_beta1: float
  adam_beta2: float
  adam_weight_decay: float
  adam_epsilon: float
  gradient_accumulation_steps: int
  max_grad_norm: float
  num_inner_epochs: int
  cfg: bool
  adv_clip_max: float
  clip_range: float
  timestep_fraction: float
  timesteps_per_batch: int = 1
  gradient_checkpointing: str = "none"
  recompute_log_probs: bool = True
  gradient_while_sampling: bool = True
  max_skipped_steps: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerPromptStatTrackingConfig:
  buffer_size: int
  min_count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandbConfig:
  mode: str = "disabled"
  project: str = "ddpo-jax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
  detect: bool = True
  coordinator_address: str = ""
  num_processes: int = 1
  process_id: int = 0
  timeout: int = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The whole experiment; every field is described in configs/base.py.

  What ddpo-pytorch's configs lack has the default of that file.
  """

  run_name: str
  seed: int
  logdir: str
  num_epochs: int
  save_freq: int
  eval_freq: int = 10
  num_checkpoint_limit: int
  mixed_precision: str
  allow_tf32: bool
  resume_from: str
  use_lora: bool
  compilation_cache: str = "auto"
  pretrained: PretrainedConfig
  lora: LoraConfig = LoraConfig()
  sample: SampleConfig
  train: TrainConfig
  prompt_fn: str
  prompt_fn_kwargs: Mapping[str, Any]
  reward_fn: str | Mapping[str, float]
  reward_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  per_prompt_stat_tracking: PerPromptStatTrackingConfig | None
  wandb: WandbConfig = WandbConfig()
  tensorboard: bool = False
  distributed: DistributedConfig = DistributedConfig()

  def to_dict(self) -> dict[str, Any]:
    """Plain nested dicts, ready for JSON and for other eyes: without keys and passwords."""
    values = dataclasses.asdict(self)
    return {**values, **{name: redacted(values[name]) for name in FREE_FORM}}

  @property
  def reward_weights(self) -> Mapping[str, float] | None:
    """The weight of each reward function; None if there is one, whose rewards are used raw."""
    return None if isinstance(self.reward_fn, str) else self.reward_fn

  @property
  def num_train_timesteps(self) -> int:
    """How many of each sample's timesteps are trained; rounded down, as in ddpo-pytorch."""
    return int(self.sample.num_steps * self.train.timestep_fraction)

  def compilation_cache_folder(self) -> pathlib.Path | None:
    """Where compiled programs are kept between runs; None for nowhere."""
    if not self.compilation_cache:
      return None
    if self.compilation_cache != "auto":
      return pathlib.Path(self.compilation_cache).expanduser()
    return automatic_cache_folder()


def automatic_cache_folder() -> pathlib.Path | None:
  """Where compiled programs are kept if nobody says where; None for a user without a home."""
  root = os.environ.get("XDG_CACHE_HOME")
  try:
    folder = pathlib.Path(root) if root else pathlib.Path.home() / ".cache"
  except RuntimeError:  # as in a container without HOME, whose user has no entry
    return None
  return folder / "ddpo_jax" / "xla"


def _at_least(low: float) -> tuple[Callable[[Any], bool], str]:
  return lambda x: x >= low, f"must be at least {low}"


def _above(low: float) -> tuple[Callable[[Any], bool], str]:
  return lambda x: x > low, f"must be above {low}"


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
  return lambda x: x in choices, f"must be one of {', '.join(map(repr, choices))}"


def _within(low: float, high: float, low_included: bool = False,
            high_included: bool = True) -> tuple[Callable[[Any], bool], str]:
  def check(x: float) -> bool:
    return (low <= x if low_included else low < x) and (
        x <= high if high_included else x < high)
  text = f"{'[' if low_included else '('}{low}, {high}{']' if high_included else ')'}"
  return check, f"must be in {text}"


_MAX_TEXT = 4095  # bytes of a text, as long as a path may be
_MAX_NAME = 255  # and a name in it
_LARGEST_WEIGHT = 1e9  # of a reward; float32 has to hold the sums of their squares

GROUPS = frozenset(name for name, kind in typing.get_type_hints(Config).items() if group_of(kind))
FREE_FORM = ("prompt_fn_kwargs", "reward_kwargs")  # what users fill with their own

_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "run_name": (lambda x: x not in (".", "..") and not re.search(r"[/\\\0]", x),
                 "must be a plain folder name"),
    "seed": _within(0, 2**31, low_included=True, high_included=False),
    "logdir": (bool, "must not be empty"),
    "num_epochs": _within(1, rng_streams.LORA - 1, low_included=True),
    "save_freq": _at_least(1),
    "eval_freq": _at_least(0),
    "num_checkpoint_limit": _at_least(1),
    "mixed_precision": _one_of("no", "fp16", "bf16"),
    "lora.rank": _at_least(1),
    "sample.num_steps": _within(1, 1000, low_included=True),
    "sample.eta": (lambda x: 0 < x <= 1, "must be in (0, 1]: at 0 a step is deterministic "
                   "and has no log-probability"),
    "sample.guidance_scale": _at_least(0),
    "sample.batch_size": _at_least(1),
    "sample.num_batches_per_epoch": _at_least(1),
    "sample.decode_batch_size": _at_least(1),
    "train.batch_size": _at_least(1),
    "train.use_8bit_adam": (lambda x: not x, "is not supported: the LoRA optimizer's "
                            "state is a few megabytes; must be False"),
    "train.learning_rate": _above(0),
    "train.adam_beta1": _within(0, 1, low_included=True, high_included=False),
    "train.adam_beta2": _within(0, 1, low_included=True, high_included=False),
    "train.adam_weight_decay": _at_least(0),
    "train.adam_epsilon": _above(0),
    "train.gradient_accumulation_steps": _at_least(1),
    "train.max_grad_norm": _above(0),
    "train.num_inner_epochs": _at_least(1),
    "train.adv_clip_max": _above(0),
    # Below, 1 ± clip_range is 1 in float32.
    "train.clip_range": _within(1e-7, 1, low_included=True),
    "train.timestep_fraction": _within(0, 1),
    "train.timesteps_per_batch": _at_least(1),
    "train.gradient_checkpointing": _one_of("none", "blocks", "full"),
    "train.max_skipped_steps": _at_least(0),
    "per_prompt_stat_tracking.buffer_size": _at_least(1),
    "per_prompt_stat_tracking.min_count": _at_least(1),
    "wandb.mode": _one_of("online", "offline", "disabled"),
    "distributed.coordinator_address": (
        lambda x: not x or re.fullmatch(r".+:\d{1,5}", x) is not None,
        "must be the host and port of process 0, such as '10.0.0.1:1234'"),
    "distributed.num_processes": _at_least(1),
    "distributed.process_id": _at_least(0),
    "distributed.timeout": _at_least(1),
}


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
  """Checks a whole config and freezes it.

  Raises:
    UserError: one line for every problem, naming field, value and what would be right.
  """
  resolved, problems = inspect_config(config)
  if problems:
    raise UserError("\n".join(problems))
  assert resolved is not None  # it is None only with a problem
  return resolved


def inspect_config(config: ml_collections.ConfigDict | Mapping[str, Any]
                   ) -> tuple[Config | None, list[str]]:
  """`resolve` for a caller that has more to check before it reports all problems.

  Returns:
    The config and a line for each problem. The config's values for `fields_of(problems)` must not
    be used; it is None if the input is not a group of fields at all.
  """
  problems: list[str] = []
  values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
  resolved = _build(Config, values, "", problems)
  if resolved is not None:
    wrong = fields_of(problems)
    for fields, check in _RELATIONS:
      if not any_of(fields, wrong):
        problems += check(resolved)
  return resolved, problems


def fields_of(problems: Sequence[str]) -> set[str]:
  """The fields that problems begin with, such as "sample.eta"."""
  matches = [re.match(r"[\w.]+", problem) for problem in problems]
  return {match[0] for match in matches if match is not None}


def any_of(fields: Iterable[str], named: Set[str]) -> bool:
  """Whether any of these fields is named, by itself or by a group that it is in."""
  return any(part in named for field in fields for part in with_groups(field))


def field_type(path: str) -> Any:
  """The type of a field such as "sample.eta"; that of a group is its dataclass.

  Raises:
    UserError: if there is no such field.
  """
  kind: Any = Config
  for name, group in zip(path.split("."), ["", *with_groups(path)]):
    if not dataclasses.is_dataclass(kind):
      raise UserError(f"{shortened(path)} is not a field: {group} has no fields of its own")
    types = typing.get_type_hints(kind)
    if name not in types:
      raise UserError(not_a_field(Config, path, f"{group}.{name}".lstrip("."), types))
    kind = group_of(types[name]) or types[name]
  return kind


def _build(cls: type, values: Any, prefix: str, problems: list[str]) -> Any:
  """Fills one dataclass, and adds to `problems` what is wrong; missing fields become None."""
  if not isinstance(values, Mapping):
    problems.append(f"{prefix.rstrip('.')}={shown(values)} must be a group of fields")
    return None
  types = typing.get_type_hints(cls)
  for name in sorted(set(map(str, values)) - set(types)):
    problems.append(not_a_field(Config, prefix + name, prefix + name, types))
  missing = sorted(field.name for field in dataclasses.fields(cls) if field.name not in values
                   and field.default is field.default_factory is dataclasses.MISSING)
  problems += [f"{prefix}{name} is missing from the config" for name in missing]
  fields = {name: _field(types[name], values[name], prefix + name, problems)
            for name in types if name in values}
  return cls(**fields, **dict.fromkeys(missing))


def _field(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
  """The value of a field or a group; what is wrong with it is added to `problems`."""
  if path == "reward_fn":
    return _reward_fn(value, problems)
  group = group_of(kind)
  if group is not None:
    if group is not kind:  # it may be None
      if value is None or value == {}:
        return None
      if not isinstance(value, Mapping):
        problems.append(f"{path}={shown(value)} must be a group of fields, or None")
        return None
    return _build(group, value, path + ".", problems)
  if kind is float:
    value = _as_float(value)
  problem = _problem(kind, value, path)
  if problem is not None:
    # Arguments may be secrets.
    problems.append(f"{path}={'{…}' if isinstance(value, Mapping) else shown(value)} {problem}")
  elif isinstance(value, Mapping):  # as a resumed run reads it: config.json makes tuples lists
    value = json.loads(json.dumps(value))
  return value


def _as_float(value: Any) -> Any:
  """An integer as a float, infinite where no field may be as large; anything else as it is."""
  if isinstance(value, int) and not isinstance(value, bool):
    return float(value) if abs(value) < 2**31 else math.inf
  return value


def _problem(kind: Any, value: Any, path: str) -> str | None:
  """What a single field (not a group) must be, or None if its value is right."""
  if typing.get_origin(kind) is Mapping:
    return _argument_problem(value)
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    return f"must be of type {kind.__name__}"
  if isinstance(value, str) and not _is_usable(value):
    return (f"must have no NUL and no half of a surrogate pair, at most {_MAX_TEXT} bytes, and at "
            f"most {_MAX_NAME} between two slashes")
  if kind is int and abs(value) >= 2**31:
    return "must be below 2147483648"
  if kind is float and not math.isfinite(value):
    return "must be a finite number"
  is_right, text = _RULES.get(path, (lambda value: True, ""))
  return None if is_right(value) else text


def _argument_problem(value: Any) -> str | None:
  """What a function's arguments must be, or None if they are right."""
  if not isinstance(value, Mapping):
    return "must be a dict"
  try:
    json.dumps(value)
  except (TypeError, ValueError, RecursionError) as error:
    return (f"must hold nothing but texts, numbers, None, lists and dicts, which config.json can "
            f"hold ({error})")
  others = [key for key in _keys(value) if not isinstance(key, str)]
  if others:
    return f"must have texts as the keys of dicts, as config.json has, not {shown(others[0])}"
  return None


def _keys(value: Any) -> Iterator[Any]:
  """The keys of a dict and of all dicts nested in it; of a list, those of the dicts in it."""
  if isinstance(value, Mapping):
    yield from value
  for item in value.values() if isinstance(value, Mapping) else value:
    if isinstance(item, (Mapping, list, tuple)):
      yield from _keys(item)


def _is_usable(text: str) -> bool:
  """Whether the operating system accepts a text, even as a path."""
  try:
    encoded = text.encode("utf-8", "surrogateescape")  # as paths are
  except UnicodeEncodeError:
    return False
  return (b"\0" not in encoded and len(encoded) <= _MAX_TEXT
          and all(len(name) <= _MAX_NAME for name in encoded.split(b"/")))


def _reward_fn(value: Any, problems: list[str]) -> str | dict[str, float]:
  """A function's name, or functions' names and their weights."""
  if isinstance(value, str) and value:
    return value
  if not isinstance(value, Mapping) or not value:
    problems.append(f"reward_fn={shown(value)} must be the name of a reward function, or a dict "
                    "of names and weights")
    return {}
  weights: dict[str, float] = {}
  for name, given in value.items():
    weight = _as_float(given)
    if not isinstance(name, str):
      problems.append(f"reward_fn: {shown(name)} must be the name of a reward function")
    elif isinstance(weight, float) and 0 < abs(weight) <= _LARGEST_WEIGHT:
      weights[name] = weight
    else:
      problems.append(f"reward_fn: the weight {shown(given)} of {shown(name)} must be a number "
                      f"from -{_LARGEST_WEIGHT:g} to {_LARGEST_WEIGHT:g} other than 0")
  return weights


def _check_timesteps(cfg: Config) -> list[str]:
  timesteps = cfg.num_train_timesteps
  if timesteps < 1:
    return [
        f"train.timestep_fraction={cfg.train.timestep_fraction} of sample.num_steps="
        f"{cfg.sample.num_steps} trains no timestep; must be at least "
        f"{math.ceil(1e4 / cfg.sample.num_steps) / 1e4}"]  # rounded up, so that it will do
  if timesteps % cfg.train.timesteps_per_batch:
    return [
        f"train.timesteps_per_batch={cfg.train.timesteps_per_batch} must divide the "
        f"{timesteps} trained timesteps (sample.num_steps × train.timestep_fraction)"]
  return []


def _check_guidance(cfg: Config) -> list[str]:
  if cfg.train.cfg or cfg.sample.guidance_scale <= 1:
    return []
  return [
      f"train.cfg=False with sample.guidance_scale={cfg.sample.guidance_scale}: the "
      "update would score another policy than the sampler's; set train.cfg=True, or "
      "sample.guidance_scale=1.0 to do without guidance"]


def _check_batches(cfg: Config) -> list[str]:
  problems = []
  if cfg.sample.batch_size % cfg.train.batch_size:
    problems.append(
        f"sample.batch_size={cfg.sample.batch_size} must be a multiple of "
        f"train.batch_size={cfg.train.batch_size}")
  per_device = cfg.sample.batch_size * cfg.sample.num_batches_per_epoch
  per_step = cfg.train.batch_size * cfg.train.gradient_accumulation_steps
  if per_device % per_step:
    problems.append(
        f"sample.batch_size × sample.num_batches_per_epoch = {per_device} samples per "
        "device and epoch must be a multiple of train.batch_size × "
        f"train.gradient_accumulation_steps = {per_step}")
  return problems


def _check_statistics(cfg: Config) -> list[str]:
  tracking = cfg.per_prompt_stat_tracking
  if tracking is None or tracking.min_count <= tracking.buffer_size:
    return []
  return [
      f"per_prompt_stat_tracking.min_count={tracking.min_count} can never be reached; "
      f"must be at most buffer_size={tracking.buffer_size}"]


def _check_processes(cfg: Config) -> list[str]:
  problems = []
  distributed = cfg.distributed
  if distributed.process_id >= distributed.num_processes:
    problems.append(
        f"distributed.process_id={distributed.process_id} must be below "
        f"distributed.num_processes={distributed.num_processes}")
  if distributed.num_processes > 1 and not distributed.coordinator_address:
    problems.append(
        f"distributed.num_processes={distributed.num_processes}: "
        "distributed.coordinator_address must say where process 0 is")
  return problems


def _check_model(cfg: Config) -> list[str]:
  model = cfg.pretrained.model
  if os.path.isfile(os.path.expanduser(model)):
    return [f"pretrained.model={model!r} is a file; must be {model_names.FORMATS}. A folder is "
            "what diffusers makes of it: StableDiffusionPipeline.from_single_file(file)"
            ".save_pretrained(folder)"]
  if model_names.is_hub_id(model) or model_names.is_local(model):
    return []
  return [f"pretrained.model={model!r} does not exist; must be {model_names.FORMATS}"]


def _check_init_from(cfg: Config) -> list[str]:
  if cfg.use_lora or not cfg.lora.init_from:
    return []
  return [f"lora.init_from={cfg.lora.init_from!r} with use_lora=False would not be used; must "
          "be empty, or use_lora=True"]


def _check_init_from_exists(cfg: Config) -> list[str]:
  hint = ("; a run that has a checkpoint is resumed without it: lora.init_from='' and lora.rank as "
          "in its config.json") if cfg.resume_from else ""
  return [line + hint for line in _check_exists("lora.init_from", cfg.lora.init_from)]


def _check_resume(cfg: Config) -> list[str]:
  if cfg.resume_from == "auto":
    return [] if cfg.run_name else [
        "resume_from='auto' continues the run of that name; run_name must not be empty"]
  return _check_exists("resume_from", cfg.resume_from)


def _check_exists(name: str, path: str) -> list[str]:
  missing = path and not os.path.exists(os.path.expanduser(path))
  return [f"{name}={path!r} does not exist"] if missing else []


def _check_home(name: str, path: str) -> list[str]:
  try:
    pathlib.Path(path).expanduser()
  except RuntimeError:
    return [f"{name}={path!r} begins with the home folder of a user who is not known here"]
  return []


# Checks across fields: those that a check reads, and the check.
_RELATIONS: Sequence[tuple[tuple[str, ...], Callable[[Config], list[str]]]] = (
    (("sample.num_steps", "train.timestep_fraction", "train.timesteps_per_batch"),
     _check_timesteps),
    (("train.cfg", "sample.guidance_scale"), _check_guidance),
    (("sample.batch_size", "sample.num_batches_per_epoch", "train.batch_size",
      "train.gradient_accumulation_steps"), _check_batches),
    (("per_prompt_stat_tracking.buffer_size", "per_prompt_stat_tracking.min_count"),
     _check_statistics),
    (("distributed.process_id", "distributed.num_processes",
      "distributed.coordinator_address"), _check_processes),
    (("pretrained.model",), _check_model),
    (("lora.init_from",), _check_init_from_exists),
    (("lora.init_from", "use_lora"), _check_init_from),
    (("resume_from", "run_name"), _check_resume),
    (("logdir",), lambda cfg: _check_home("logdir", cfg.logdir)),
    (("compilation_cache",),
     lambda cfg: _check_home("compilation_cache", cfg.compilation_cache)),
)
