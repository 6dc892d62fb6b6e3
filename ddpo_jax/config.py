"""ml_collections config -> frozen, validated dataclasses; and the batch arithmetic.

Imports nothing slow, so that a mistake in a config is answered at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import json
import math
import os
import pathlib
import re
import typing
from typing import Any

import ml_collections

from ddpo_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
  model: str
  revision: str


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  rank: int
  init_from: str


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  num_steps: int
  eta: float
  guidance_scale: float
  batch_size: int
  num_batches_per_epoch: int
  decode_batch_size: int


@dataclasses.dataclass(frozen=True)
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
  timesteps_per_batch: int
  gradient_checkpointing: str
  recompute_log_probs: bool
  max_skipped_steps: int


@dataclasses.dataclass(frozen=True)
class PerPromptStatTrackingConfig:
  buffer_size: int
  min_count: int


@dataclasses.dataclass(frozen=True)
class WandbConfig:
  mode: str
  project: str


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
  detect: bool
  coordinator_address: str
  num_processes: int
  process_id: int
  timeout: int


@dataclasses.dataclass(frozen=True)
class Config:
  """The whole experiment; every field is described in configs/base.py."""

  run_name: str
  seed: int
  logdir: str
  num_epochs: int
  save_freq: int
  eval_freq: int
  num_checkpoint_limit: int
  mixed_precision: str
  allow_tf32: bool
  resume_from: str
  use_lora: bool
  compilation_cache: str
  pretrained: PretrainedConfig
  lora: LoraConfig
  sample: SampleConfig
  train: TrainConfig
  prompt_fn: str
  prompt_fn_kwargs: Mapping[str, Any]
  reward_fn: str | Mapping[str, float]
  reward_kwargs: Mapping[str, Any]
  per_prompt_stat_tracking: PerPromptStatTrackingConfig | None
  wandb: WandbConfig
  tensorboard: bool
  distributed: DistributedConfig

  def to_dict(self) -> dict[str, Any]:
    """Plain nested dicts, ready for JSON."""
    return dataclasses.asdict(self)

  @property
  def reward_weights(self) -> Mapping[str, float] | None:
    """The weight of each reward function; None if there is one, whose rewards are used raw."""
    return None if isinstance(self.reward_fn, str) else self.reward_fn

  def compilation_cache_folder(self) -> pathlib.Path | None:
    """Where compiled programs are kept between runs; None for nowhere."""
    if not self.compilation_cache:
      return None
    if self.compilation_cache != "auto":
      return pathlib.Path(self.compilation_cache).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "ddpo_jax" / "xla"


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


_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "run_name": (lambda x: x not in (".", "..") and not re.search(r"[/\\\0]", x),
                 "must be a plain folder name"),
    "seed": _within(0, 2**31, low_included=True, high_included=False),
    "logdir": (bool, "must not be empty"),
    "num_epochs": _at_least(1),
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
    "train.clip_range": _within(0, 1),
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
  problems: list[str] = []
  values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
  resolved = _build(Config, values, "", problems)
  if not problems:
    problems += _relations(resolved)
  if problems:
    raise UserError("\n".join(problems))
  return resolved


def _build(cls: type, values: Any, prefix: str, problems: list[str]) -> Any:
  """Fills one dataclass, with None for what is wrong and said so in `problems`."""
  if not isinstance(values, Mapping):
    problems.append(f"{prefix.rstrip('.')}={values!r} must be a group of fields")
    return None
  types = typing.get_type_hints(cls)
  for name in sorted(set(values) - set(types)):
    problems.append(f"{prefix}{name} is not a field; there are: {', '.join(types)}")
  for name in sorted(set(types) - set(values)):
    problems.append(f"{prefix}{name} is missing from the config")
  fields = {name: _field(types[name], values[name], prefix + name, problems)
            for name in types if name in values}
  return None if len(fields) < len(types) else cls(**fields)


def _field(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
  if path == "reward_fn":
    return _reward_fn(value, problems)
  choices = typing.get_args(kind) if typing.get_origin(kind) is not Mapping else ()
  if type(None) in choices:  # an optional group
    if value is None or value == {}:
      return None
    kind = choices[0]
  if dataclasses.is_dataclass(kind):
    return _build(kind, value, path + ".", problems)
  if typing.get_origin(kind) in (Mapping, typing.get_origin(Mapping[str, Any])):
    if not isinstance(value, Mapping):
      problems.append(f"{path}={value!r} must be a dict")
    return value
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    problems.append(f"{path}={value!r} must be of type {kind.__name__}")
    return value
  if path in _RULES:
    check, text = _RULES[path]
    if not check(value):
      problems.append(f"{path}={value!r} {text}")
  return value


def _reward_fn(value: Any, problems: list[str]) -> str | dict[str, float]:
  """A function's name, or functions' names and their weights."""
  if isinstance(value, str) and value:
    return value
  if not isinstance(value, Mapping) or not value:
    problems.append(f"reward_fn={value!r} must be the name of a reward function, or a dict "
                    "of names and weights")
    return {}
  for name, weight in value.items():
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight) or weight == 0:
      problems.append(f"reward_fn: the weight {weight!r} of {name!r} must be a finite "
                      "number other than 0")
  return dict(value)


def _relations(cfg: Config) -> list[str]:
  """What no field can be asked alone."""
  problems = []
  timesteps = int(cfg.sample.num_steps * cfg.train.timestep_fraction)
  if timesteps < 1:
    problems.append(
        f"train.timestep_fraction={cfg.train.timestep_fraction} of sample.num_steps="
        f"{cfg.sample.num_steps} trains no timestep; must be at least "
        f"{1 / cfg.sample.num_steps:.3g}")
  elif timesteps % cfg.train.timesteps_per_batch:
    problems.append(
        f"train.timesteps_per_batch={cfg.train.timesteps_per_batch} must divide the "
        f"{timesteps} trained timesteps (sample.num_steps × train.timestep_fraction)")
  if not cfg.train.cfg and cfg.sample.guidance_scale > 1:
    problems.append(
        f"train.cfg=False with sample.guidance_scale={cfg.sample.guidance_scale}: the "
        "update would score another policy than the sampler's; set train.cfg=True, or "
        "sample.guidance_scale=1.0 to do without guidance")
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
  tracking = cfg.per_prompt_stat_tracking
  if tracking is not None and tracking.min_count > tracking.buffer_size:
    problems.append(
        f"per_prompt_stat_tracking.min_count={tracking.min_count} can never be reached; "
        f"must be at most buffer_size={tracking.buffer_size}")
  distributed = cfg.distributed
  if distributed.process_id >= distributed.num_processes:
    problems.append(
        f"distributed.process_id={distributed.process_id} must be below "
        f"distributed.num_processes={distributed.num_processes}")
  if distributed.num_processes > 1 and not distributed.coordinator_address:
    problems.append(
        f"distributed.num_processes={distributed.num_processes}: "
        "distributed.coordinator_address must say where process 0 is")
  problems += _paths(cfg)
  return problems


def _paths(cfg: Config) -> list[str]:
  """What must be there before anything is loaded."""
  problems = []
  model = cfg.pretrained.model
  is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) is not None
  is_folder = bool(model) and pathlib.Path(model).expanduser().is_dir()
  if model != "tiny" and not is_folder and not is_hub_id:
    problems.append(
        f"pretrained.model={model!r} does not exist; must be a folder in diffusers' "
        "format, a hub id such as 'owner/name', or 'tiny'")
  if cfg.resume_from == "auto" and not cfg.run_name:
    problems.append("resume_from='auto' continues the run of that name; run_name must not "
                    "be empty")
  for name, path in (("lora.init_from", cfg.lora.init_from),
                     ("resume_from", cfg.resume_from)):
    if path and (name, path) != ("resume_from", "auto") and not pathlib.Path(path).expanduser().exists():
      problems.append(f"{name}={path!r} does not exist")
  return problems


# What a resumed run may have otherwise than before.
_MAY_CHANGE = ("run_name", "logdir", "num_epochs", "save_freq", "eval_freq",
               "num_checkpoint_limit", "resume_from", "compilation_cache", "wandb",
               "tensorboard", "distributed", "sample.decode_batch_size",
               "train.max_skipped_steps")


def check_continues(cfg: Config, saved: Mapping[str, Any], where: str) -> None:
  """Refuses to continue a run as another one.

  Args:
    cfg: of the run to be.
    saved: the config that a checkpoint holds, as read from JSON.
    where: the checkpoint, for the message.

  Raises:
    UserError: one line for every field that contradicts.
  """
  before, now = _flat(saved), _flat(json.loads(json.dumps(cfg.to_dict())))
  problems = [
      f"{name}={now[name]!r} contradicts {where}, which has {before[name]!r}; set it back, "
      "or start a new run (lora.init_from takes exported weights)"
      for name in now if name in before and now[name] != before[name]
      and not any(name == free or name.startswith(free + ".") for free in _MAY_CHANGE)]
  if problems:
    raise UserError("\n".join(problems))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in values.items():
    if isinstance(value, Mapping) and not name.endswith(("_kwargs", "reward_fn")):
      flat.update(_flat(value, f"{prefix}{name}."))
    else:
      flat[prefix + name] = value
  return flat


@dataclasses.dataclass(frozen=True)
class BatchPlan:
  """What the batch sizes come to on the devices there are."""

  num_epochs: int
  num_devices: int
  sample_batch_size: int  # per device
  train_batch_size: int  # per device
  gradient_accumulation_steps: int
  num_inner_epochs: int
  samples_per_epoch: int
  train_batch_size_total: int
  steps_per_inner_epoch: int
  num_train_timesteps: int

  @classmethod
  def create(cls, cfg: Config, num_devices: int) -> BatchPlan:
    """Does the arithmetic of a resolved config, whose sizes are known to divide."""
    samples = cfg.sample.batch_size * cfg.sample.num_batches_per_epoch * num_devices
    total = (cfg.train.batch_size * cfg.train.gradient_accumulation_steps * num_devices)
    return cls(
        num_epochs=cfg.num_epochs, num_devices=num_devices,
        sample_batch_size=cfg.sample.batch_size, train_batch_size=cfg.train.batch_size,
        gradient_accumulation_steps=cfg.train.gradient_accumulation_steps,
        num_inner_epochs=cfg.train.num_inner_epochs, samples_per_epoch=samples,
        train_batch_size_total=total, steps_per_inner_epoch=samples // total,
        num_train_timesteps=int(cfg.sample.num_steps * cfg.train.timestep_fraction))

  @property
  def optimizer_steps_per_epoch(self) -> int:
    return self.steps_per_inner_epoch * self.num_inner_epochs

  def describe(self) -> str:
    """What is printed before training, as ddpo-pytorch does."""
    lines = {
        "Number of epochs": self.num_epochs,
        "Number of devices": self.num_devices,
        "Sample batch size per device": self.sample_batch_size,
        "Train batch size per device": self.train_batch_size,
        "Gradient accumulation steps": self.gradient_accumulation_steps,
        "Images per epoch": self.samples_per_epoch,
        "Images per optimizer step (all devices, accumulated)":
            self.train_batch_size_total,
        "Timesteps trained per image": self.num_train_timesteps,
        "Optimizer steps per inner epoch": self.steps_per_inner_epoch,
        "Inner epochs": self.num_inner_epochs,
    }
    return "\n".join(["***** Running training *****",
                      *(f"  {name} = {value}" for name, value in lines.items())])
