"""Whether a config continues a run, or describes another one."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from ddpo_jax import files, model_names, prompts
from ddpo_jax.batches import BatchPlan
from ddpo_jax.config import Config, PerPromptStatTrackingConfig
from ddpo_jax.errors import UserError
from ddpo_jax.redaction import is_secret

# Fields that may differ when a run is resumed.
_MAY_CHANGE = ("run_name", "logdir", "num_epochs", "save_freq", "eval_freq",
               "num_checkpoint_limit", "resume_from", "compilation_cache", "wandb",
               "tensorboard", "distributed", "sample.decode_batch_size",
               "train.max_skipped_steps", "train.gradient_checkpointing",
               "train.timesteps_per_batch", "train.gradient_while_sampling",
               # Only what they come to must be the same: `check_sizes`.
               "sample.batch_size", "sample.num_batches_per_epoch", "train.batch_size",
               "train.gradient_accumulation_steps")
# Of a reward's arguments: where and how it is computed, not what it is. Nor are its secrets.
_ARGUMENTS_MAY_CHANGE = ("url", "timeout", "time_limit", "backoff", "max_parallel",
                         "batch_size", "api_key_env")


def check_continues(cfg: Config, saved: Mapping[str, Any], where: str) -> None:
  """Refuses to continue a run as another one.

  Args:
    cfg: of the run to be.
    saved: the config that a checkpoint holds, as read from JSON.
    where: the checkpoint, for the message.

  Raises:
    UserError: one line for every field that contradicts.
  """
  before, now = _flat(saved), _flat(cfg.to_dict())
  value = lambda values, name: repr(values[name]) if name in values else "nothing"
  problems = [
      f"{name}={value(now, name)} contradicts {where}, which has {value(before, name)}; set it "
      "back, or start a new run (lora.init_from takes exported weights)"
      for name in {**now, **before} if _contradicts(name, now, before, cfg)]
  if problems:
    raise UserError("\n".join(problems))


def check_sizes(cfg: Config, plan: BatchPlan, meta: Mapping[str, Any], where: str) -> None:
  """Refuses to go on with another number of images per epoch or optimizer step than before.

  Batch sizes may change with the number of devices.

  Args:
    cfg: of the run to be.
    plan: what its sizes come to on the devices there are.
    meta: what a checkpoint holds beside the state.
    where: the checkpoint, for the message.

  Raises:
    UserError: one line for each number that is another one.
  """
  before = meta["sizes"]
  products = {
      "images_per_epoch": f"sample.batch_size={cfg.sample.batch_size} × "
                          f"sample.num_batches_per_epoch={cfg.sample.num_batches_per_epoch}",
      "images_per_optimizer_step":
          f"train.batch_size={cfg.train.batch_size} × "
          f"train.gradient_accumulation_steps={cfg.train.gradient_accumulation_steps}"}
  problems = [
      f"{products[name]} × {plan.devices_of_config} devices makes {number} "
      f"{name.replace('_', ' ')}, which contradicts {where}, with {before[name]}; must make as "
      "many, or start a new run"
      for name, number in plan.sizes.items() if number != before[name]]
  if problems:
    raise UserError("\n".join(problems))


def _contradicts(name: str, now: Mapping[str, Any], before: Mapping[str, Any], cfg: Config) -> bool:
  """Whether a field is not as it was, and has to be."""
  if any(name == free or name.startswith(f"{free}.") for free in _MAY_CHANGE):
    return False
  if name == "lora.rank" and cfg.lora.init_from:  # the rank of that file is taken
    return False
  if name == "lora.init_from" and not cfg.lora.init_from:  # it may be gone: it is not read again
    return False
  if name == "pretrained.model":
    now_absolute, before_absolute = (model_names.absolute(each[name]) for each in (now, before))
    return now_absolute != before_absolute and not model_names.is_moved(now[name], before[name])
  if name == "lora.init_from":
    return files.absolute(now[name]) != files.absolute(before[name])
  if name in now and name in before:
    if name == "prompt_fn_kwargs":
      return _draws_other_prompts(cfg.prompt_fn, now[name], before[name])
    return _written(now[name]) != _written(before[name])
  # One of them does not have it: a field of another version, or a reward's argument.
  return name.startswith("reward_kwargs.")


def _draws_other_prompts(prompt_fn: str, now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
  """Whether a prompt function has other arguments; its files may be called otherwise, or moved."""
  now, before = (prompts.absolute_paths(prompt_fn, each) for each in (now, before))
  return now.keys() != before.keys() or any(
      _written(now[name]) != _written(before[name])
      and not prompts.is_moved(prompt_fn, name, now[name], before[name]) for name in now)


def _written(value: Any) -> str:
  return json.dumps(value, sort_keys=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """The fields by their full names, of a reward's arguments those that may not change."""
  flat: dict[str, Any] = {}
  for name, value in values.items():
    if name == "reward_kwargs":
      flat.update(_flat_arguments(value, isinstance(values.get("reward_fn"), Mapping)))
    elif name == "per_prompt_stat_tracking" and value is None:
      # None and a group of fields have no name in common, by which they could contradict.
      flat.update({f"{name}.{field.name}": None
                   for field in dataclasses.fields(PerPromptStatTrackingConfig)})
    elif isinstance(value, Mapping) and not name.endswith(("_kwargs", "reward_fn")):
      flat.update(_flat(value, f"{prefix}{name}."))
    else:
      flat[prefix + name] = value
  return flat


def _flat_arguments(arguments: Mapping[str, Any], of_several: bool,
                    prefix: str = "reward_kwargs.") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in arguments.items():
    if of_several and isinstance(value, Mapping):
      flat.update(_flat_arguments(value, False, f"{prefix}{name}."))
    elif name not in _ARGUMENTS_MAY_CHANGE and not is_secret(name):
      flat[prefix + name] = value
  return flat
