"""What is said where memory or disk space runs out."""

import ast
import contextlib
import dataclasses
import errno

import jax
import jax.numpy as jnp
import pytest
from small_model import small_config

from ddpo_jax import cli, dry_run, resource_errors, train
from ddpo_jax.config import resolve
from ddpo_jax.errors import UserError
from ddpo_jax.user_functions import calling


def allocate_too_much():
  jnp.zeros((2**46,), jnp.float32).block_until_ready()


@pytest.mark.parametrize("field", ("logdir", "resume_from"))  # which says where the run is
@pytest.mark.parametrize("inside", (True, False))
def test_a_run_folder_that_is_lost_is_one_line(tmp_path, inside, field):
  (tmp_path / "logs").mkdir()
  cfg = resolve(small_config(**{field: str(tmp_path / "logs")}))
  lost = PermissionError(errno.EACCES, "Permission denied",
                         str(tmp_path / ("logs" if inside else "mine") / "rewards.jsonl"))
  with pytest.raises(UserError if inside else PermissionError, match="Permission denied.*rewards"):
    with resource_errors.with_advice(cfg):
      raise lost


def test_out_of_memory_says_what_to_lower(capsys, monkeypatch):
  config = resolve(small_config())
  monkeypatch.setattr(train, "train", lambda cfg: allocate_too_much())
  assert cli.exit_status(lambda: cli.train(config)) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line == (
      "out of memory; try, in this order: train.gradient_checkpointing='blocks'; "
      "train.batch_size=1 with train.gradient_accumulation_steps=2; "
      "sample.decode_batch_size=2; sample.batch_size=2 with sample.num_batches_per_epoch=2; "
      "mixed_precision='fp16'")


def test_images_that_are_decoded_one_by_one_anyway_are_no_advice():
  values = resolve(small_config()).to_dict()
  values["sample"]["batch_size"] = values["train"]["batch_size"] = 1
  assert "decode" not in resource_errors.out_of_memory(resolve(values))


def test_out_of_memory_of_a_dry_run(monkeypatch):
  """Another run may use the GPU, on which it puts a reward's network."""
  monkeypatch.setattr(dry_run, "dry_run", lambda cfg: allocate_too_much())
  with pytest.raises(UserError, match="^out of memory"):
    cli.dry_run(resolve(small_config()))


@pytest.mark.parametrize("error", (OSError(errno.ENOSPC, "No space left on device"), MemoryError()))
@pytest.mark.parametrize("users", (True, False))
def test_what_a_users_function_lacks_is_not_the_runs(error, users):
  error = type(error)(*error.args)
  with pytest.raises(type(error) if users else UserError):
    with resource_errors.with_advice(resolve(small_config())):
      with calling("reward_fn='mine:f'") if users else contextlib.nullcontext():
        raise error


def test_a_users_function_shares_the_devices():
  with pytest.raises(UserError, match="^out of memory"):
    with resource_errors.with_advice(resolve(small_config())), calling("reward_fn='mine:f'"):
      allocate_too_much()


@pytest.mark.parametrize("message", (
    "RESOURCE_EXHAUSTED: ran out of memory trying to instantiate command buffer",
    "FAILED_PRECONDITION: DNN library initialization failed.",
    "INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"))
def test_memory_that_jax_has_taken_from_others_is_said_to_be_that(capsys, monkeypatch, message):
  """To give JAX more of it would make it worse."""
  def fails(cfg):
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(train, "train", fails)
  assert cli.exit_status(lambda: cli.train(resolve(small_config()))) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "another program may use it" in line and "XLA_CLIENT_MEM_FRACTION=0.65" in line


@pytest.mark.parametrize("name", resource_errors._MEMORY_FRACTIONS)
def test_the_variable_to_lower_is_the_one_that_is_set(monkeypatch, name):
  """JAX refuses both together."""
  monkeypatch.setenv(name, "0.9")
  with pytest.raises(UserError, match=f" {name}=0.65"):
    with resource_errors.with_advice(resolve(small_config())):
      raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory")


@pytest.mark.parametrize("message,is_said", (
    ("FAILED_PRECONDITION: DNN library initialization failed.", True),
    ("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory", False)))
def test_a_cudnn_that_does_not_start_may_be_the_wrong_one(message, is_said):
  """XLA has this one message where its version does not fit, and where it finds no memory."""
  with pytest.raises(UserError) as error:
    with resource_errors.with_advice(resolve(small_config())):
      raise jax.errors.JaxRuntimeError(message)
  assert ("cuDNN cannot be used" in str(error.value)) == is_said


@pytest.mark.parametrize("reward,kwargs,expected", (
    ("pick_score", {}, ["reward_kwargs.dtype='float16'"]),
    ("pick_score", {"dtype": "bfloat16"}, []), ("jpeg_compressibility", {}, []),
    ({"clip_score": 1.0, "jpeg_compressibility": 1.0}, {},
     ["reward_kwargs.clip_score.dtype='float16'"])))
def test_a_rewards_network_takes_memory_too(reward, kwargs, expected):
  cfg = dataclasses.replace(resolve(small_config()), reward_fn=reward, reward_kwargs=kwargs)
  assert [line for line in resource_errors._smaller(cfg) if "reward" in line] == expected


@pytest.mark.parametrize("backend,batch_size,precision,expected", (
    ("gpu", 8, "no", "XLA_CLIENT_MEM_FRACTION=0.9 .*; --batch_size=4; --mixed_precision=fp16; "),
    ("cpu", 1, "fp16", "try, in this order: another device")))
def test_out_of_memory_of_sampling(monkeypatch, backend, batch_size, precision, expected):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  with pytest.raises(UserError, match=f"^out of memory.*{expected}"):
    with resource_errors.with_sampling_advice(batch_size, precision):
      allocate_too_much()
  with pytest.raises(UserError, match="another program may use it"):
    with resource_errors.with_sampling_advice(batch_size, precision):
      raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory")
  with pytest.raises(ZeroDivisionError):
    with resource_errors.with_sampling_advice(batch_size, precision):
      raise ZeroDivisionError


@pytest.mark.parametrize("variable", (None, *resource_errors._MEMORY_FRACTIONS))
def test_out_of_memory_of_a_gpu(monkeypatch, variable):
  """JAX leaves a quarter of it alone, if nobody has said how much it may take."""
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  if variable is not None:
    monkeypatch.setenv(variable, "0.9")
  line = resource_errors.out_of_memory(resolve(small_config()))
  assert ("XLA_CLIENT_MEM_FRACTION=0.9 " in line) == (variable is None)


def test_what_is_to_be_lowered_is_a_valid_config():
  """Until nothing is left: each piece of advice, taken, resolves."""
  cfg = resolve(small_config())
  values = cfg.to_dict()
  values["sample"]["batch_size"], values["train"]["batch_size"] = 12, 6
  values["train"]["timestep_fraction"], values["use_lora"] = 1.0, False
  values["train"]["timesteps_per_batch"] = 2
  for _ in range(20):
    advice = list(resource_errors._smaller(resolve(values)))
    if not advice:
      break
    for setting in advice[0].split(" with "):
      field, _, text = setting.partition("=")
      group = values
      *groups, name = field.split(".")
      for each in groups:
        group = group[each]
      group[name] = ast.literal_eval(text)
  assert not advice
  plan = resolve(values)
  assert plan.sample.batch_size * plan.sample.num_batches_per_epoch == 12
  assert plan.train.batch_size * plan.train.gradient_accumulation_steps == 6


def test_full_disk_is_one_line(capsys, monkeypatch):
  def full(cfg):
    with open("/dev/full", "w") as file:
      file.write("x")

  monkeypatch.setattr(train, "train", full)
  assert cli.exit_status(lambda: cli.train(resolve(small_config()))) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "the disk is full" in line and "resume_from" in line


def test_other_errors_keep_their_traceback(monkeypatch):
  def wrong(cfg):
    raise ZeroDivisionError

  monkeypatch.setattr(train, "train", wrong)
  with pytest.raises(ZeroDivisionError):
    cli.train(resolve(small_config()))


def test_real_out_of_memory_of_jax():
  with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
    allocate_too_much()
