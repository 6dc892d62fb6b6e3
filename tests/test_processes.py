"""Two real processes of two devices each, over gloo."""

import importlib.machinery
import json
import os
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from runs import (
    finish,
    free_address,
    metrics_of,
    small_command,
    start,
    start_two,
    wait_for_epochs,
    weights_of,
    without_times,
)
from small_model import small_config

from ddpo_jax import checkpoint, distributed, validation
from ddpo_jax.config import resolve
from ddpo_jax.errors import Interrupted, UserError
from ddpo_jax.validation import _DRAWS

EPOCHS = 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run of two processes that nothing happened to: the folder that holds it."""
  logdir = tmp_path_factory.mktemp("processes")
  codes, errors = finish(start_two(small_command(logdir, "whole")))
  assert codes == [0, 0], errors
  return logdir


def test_as_one_process(whole):
  """Two processes of two devices draw and learn what one process of four does."""
  codes, errors = finish([start(small_command(whole, "one"), 4)])
  assert codes == [0], errors
  two, one = (metrics_of(whole / name) for name in ("whole", "one"))
  assert [line["epoch"] for line in two] == list(range(EPOCHS))
  half = "reward/tests.runs:brightness/half_mean"
  for name in ("reward_mean", "reward_min", "reward_max", half):
    np.testing.assert_allclose(*([line[name] for line in run] for run in (two, one)),
                               rtol=1e-5, err_msg=name)
  rewards = json.loads((whole / "whole" / "rewards.jsonl").read_text().splitlines()[0])
  info = rewards["info"]["tests.runs:brightness"]
  np.testing.assert_allclose(info["half"], np.array(rewards["rewards"]) / 2, rtol=1e-5)
  # Of each batch of eight samples the first half are process 0's.
  own = [i % 8 < 4 for i in range(16)]
  assert info["prompt"] == [p if mine else None for p, mine in zip(rewards["prompts"], own)]
  two, one = (weights_of(whole / name) for name in ("whole", "one"))
  assert np.linalg.norm(two - one) < 1e-5 * np.linalg.norm(one)


def test_half_precision_as_one_process(whole):
  """Sampler and update are one program there, on all devices of both: its own ratio is 1.

  On every timestep, so that the first gradient is computed while sampling.

  Cores are shared otherwise by one process, and in bf16 what that rounds the other way shows: in
  a twentieth of two optimizer steps, which change the weights by 6e-3, and on CPUs with matrix
  units (AMX) in the images as well.
  """
  options = ("--config.mixed_precision=bf16", "--config.num_epochs=1",
             "--config.sample.num_steps=4", "--config.train.timestep_fraction=1.0")
  codes, errors = finish(start_two(small_command(whole, "half_two", *options)))
  assert codes == [0, 0], errors
  codes, errors = finish([start(small_command(whole, "half_one", *options), 4)])
  assert codes == [0], errors
  (two,), (one,) = (metrics_of(whole / name) for name in ("half_two", "half_one"))
  assert two["sampler_drift"] == one["sampler_drift"] == 0.0
  np.testing.assert_allclose(two["reward_mean"], one["reward_mean"], rtol=1e-3)
  two, one = (weights_of(whole / name, 0) for name in ("half_two", "half_one"))
  assert np.linalg.norm(two - one) < 1e-3 * np.linalg.norm(one)


def test_a_signal_to_one_stops_both_and_resumes_exactly(whole):
  """SIGTERM reaches one process only, as where one machine of several is taken away."""
  options = "--config.resume_from=auto"
  processes = start_two(small_command(whole, "stopped", options))
  wait_for_epochs(processes, whole / "stopped", 1)
  processes[1].send_signal(signal.SIGTERM)
  codes, errors = finish(processes)
  assert codes == [143, 143], errors
  assert len(metrics_of(whole / "stopped")) < EPOCHS
  codes, errors = finish(start_two(small_command(whole, "stopped", options)))
  assert codes == [0, 0], errors
  stopped, never_stopped = (metrics_of(whole / name) for name in ("stopped", "whole"))
  assert without_times(stopped) == without_times(never_stopped)
  assert weights_of(whole / "stopped").tobytes() == weights_of(whole / "whole").tobytes()


def test_a_reward_that_fails_on_one_stops_both(whole):
  """The other does not wait for its rewards for ever. Started as SLURM would."""
  failing = small_command(whole, "failed",
                          "--config.reward_fn=tests.runs:fails_on_process_one")
  codes, errors = finish([
      start(failing, 2, SLURM_JOB_ID=str(os.getpid()), SLURM_STEP_NODELIST="localhost",
            SLURM_NTASKS="2", SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in (0, 1)])
  assert codes == [1, 1]
  assert "OtherProcessFailed" in errors[0]
  assert "the server is gone" in errors[1]


def test_a_device_that_fails_on_one_ends_both(whole):
  """To save would take both, and the other waits in the optimizer step."""
  started = time.monotonic()
  codes, errors = finish(start_two(small_command(
      whole, "device", "--config.save_freq=1",
      "--config.reward_fn=tests.runs:loses_its_device_on_process_one")))
  assert codes[1] == 1 and codes[0] != 0, errors
  assert time.monotonic() - started < 150  # JAX's heartbeat, and what a run takes
  assert "the device is gone" in errors[1] and "Process 1 ends without saving" in errors[1]
  assert checkpoint.saved_epochs(whole / "device") == [0]


def test_a_device_that_fails_before_the_first_epoch_ends_both(whole):
  """In the evaluation: neither waits the five minutes for which JAX waits for processes to end."""
  started = time.monotonic()
  codes, errors = finish(start_two(small_command(
      whole, "no_device", "--config.prompt_fn=tests.runs:no_device_on_process_one")))
  assert codes[1] == 1 and codes[0] != 0, errors
  assert time.monotonic() - started < 150
  assert "the device is gone" in errors[1] and "Process 1 ends without saving" in errors[1]


@pytest.mark.parametrize("after,saved", [(_DRAWS + 8 + 3, []), (_DRAWS + 8 + 16 + 3, [0])])
def test_a_prompt_that_fails_on_one_stops_both(whole, after, saved):
  """In the first epoch, of the prompts of all; or in the second: the first is saved, by both."""
  name = f"no_prompt_{after}"
  prompt_fn = "--config.prompt_fn=tests.runs:no_more_prompts_on_process_one"
  codes, errors = finish(start_two(small_command(
      whole, name, prompt_fn, f"--config.prompt_fn_kwargs={{'after': {after}}}",
      "--config.eval_freq=0")))
  assert codes == [1, 1], errors
  assert "OtherProcessFailed" in errors[0]
  assert "no such prompt" in errors[1]
  assert checkpoint.saved_epochs(whole / name) == saved


def test_trouble_of_one_with_what_is_read_reaches_both(tmp_path):
  """Neither waits for the other for ever, nor goes on from another epoch; without a model."""
  address = free_address()
  processes = [start(["-m", "tests.resuming", str(tmp_path), address, str(i)], devices=2,
                     stdout=subprocess.PIPE) for i in (0, 1)]
  outputs = [process.communicate(timeout=300) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  first, second = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
  # Of four checkpoints the second process finds the newest damaged: both take that of epoch 2.
  assert first == ["OtherProcessFailed", 3, 2, "OtherProcessFailed", True, False]
  assert second == ["UserError", 3, 2, "OSError", True, False]
  folder = tmp_path / "checkpoints"
  assert {path.name for path in folder.iterdir()} == {"0", "1", "2", "3.damaged"}
  assert not list(tmp_path.glob("cache*/*"))  # by which it was seen whether they are shared


def test_processes_have_equally_many_devices(monkeypatch):
  devices = [types.SimpleNamespace(process_index=i) for i in (0, 1, 1, 1)]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  with pytest.raises(UserError, match="the 2 processes have 1, 3 devices; all must have the same"):
    distributed.check_devices()
  del devices[2:]
  distributed.check_devices()


def test_prompts_that_processes_could_not_agree_on_are_refused(monkeypatch):
  """One process has only to be told that a resumed run would have other ones."""
  cfg = resolve(small_config(prompt_fn="my:own"))
  validation._check_draws_from_rng(cfg, ["a cat", "a dog"])
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  validation._check_draws_from_rng(cfg, ["a cat", "a cat"])
  with pytest.raises(UserError, match="prompt_fn='my:own' returned 'a cat' and 'a dog' for the sa"):
    validation._check_draws_from_rng(cfg, ["a cat", "a cat", "a dog"])


@pytest.mark.parametrize("environment, expected", (
    ({}, False),
    ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, False),  # salloc's own shell
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, False),  # sbatch's
    ({"SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, True),
    ({"SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # any pod
))
def test_clusters_are_recognised(environment, expected):
  assert distributed.started_by_cluster(environment) is expected


@pytest.mark.parametrize("installed", (False, True))
def test_kubernetes_is_asked_where_its_package_is_installed(monkeypatch, installed):
  package = types.ModuleType("kubernetes")
  package.__spec__ = importlib.machinery.ModuleSpec("kubernetes", None)
  monkeypatch.setitem(sys.modules, "kubernetes", package if installed else None)
  environment = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
  assert distributed.started_by_cluster(environment) is installed
  del environment["JOB_COMPLETION_INDEX"]  # any pod
  assert not distributed.started_by_cluster(environment)


@pytest.fixture
def join(monkeypatch):
  """Joins by a config's fields, a cluster's environment, and a JAX that may fail: what it got."""
  def make(changes, environment=types.MappingProxyType({}), error=None):
    calls = []

    def initialize(**kwargs):
      calls.append(kwargs)
      if error:
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(os, "environ", os.environ.copy() | environment)
    changes = {f"distributed.{name}": value for name, value in changes.items()}
    distributed.initialize(resolve(small_config(**changes)).distributed)
    return calls

  return make


GIVEN = {"coordinator_address": "localhost:1", "num_processes": 4, "process_id": 2}


def test_jax_is_told_of_the_processes_or_asks_the_cluster(join):
  cluster = {"OMPI_COMM_WORLD_SIZE": "2"}
  assert join(GIVEN | {"timeout": 7}) == [GIVEN | {"initialization_timeout": 7}]
  assert not join({})
  assert join({"detect": True, "timeout": 7}, cluster) == [{"initialization_timeout": 7}]
  assert not join({"detect": False}, cluster)


def test_processes_that_do_not_meet_say_why_in_a_line(join):
  with pytest.raises(UserError, match=r"^distributed.detect=True: .*\(an old SLURM\); set "):
    join({}, {"OMPI_COMM_WORLD_SIZE": "2"}, ValueError("an old SLURM"))
  with pytest.raises(UserError, match=r"^distributed.coordinator_address='localhost:1': .* in 7 s; "
                                      r"all .*\(too late\)$"):
    join(GIVEN | {"timeout": 7}, error=RuntimeError("too late\nmuch more"))


def test_it_is_known_what_all_processes_have_raised(monkeypatch):
  """They can save together then: none waits in a collective."""
  together = KeyError("a prompt")
  with pytest.raises(KeyError), distributed.raising_together():
    raise together
  assert distributed.raised_on_all(KeyError())  # of one process
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert not distributed.raised_on_all(KeyError())
  for error in (together, distributed.OtherProcessFailed(), Interrupted(15), FloatingPointError()):
    assert distributed.raised_on_all(error)


@pytest.mark.parametrize("environment, expected", (
    ({}, False),
    ({"SLURM_STEP_TASKS_PER_NODE": "1"}, True),
    ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, True),
    ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, False),
    ({"SLURM_STEP_TASKS_PER_NODE": "2,1(x3)"}, False),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, False),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "CUDA_VISIBLE_DEVICES": "3"}, True),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "ROCR_VISIBLE_DEVICES": "3"}, True),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "HIP_VISIBLE_DEVICES": "3"}, True),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "CUDA_VISIBLE_DEVICES": "2,3"}, False),
))
def test_a_process_alone_on_its_machine_has_all_its_gpus(monkeypatch, environment, expected):
  """JAX by itself gives a process of these launchers the GPU of its number on the machine."""
  def initialize(**kwargs):
    jax.config.update("jax_cuda_visible_devices", "0")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  monkeypatch.setattr(os, "environ", os.environ.copy() | environment)
  before = jax.config.values["jax_cuda_visible_devices"]
  cfg = resolve(small_config(**{"distributed.coordinator_address": "localhost:1"})).distributed
  try:
    jax.config.update("jax_cuda_visible_devices", "2,3")  # the user's choice
    distributed.initialize(cfg)
    assert (jax.config.values["jax_cuda_visible_devices"] == "2,3") is expected
  finally:
    jax.config.update("jax_cuda_visible_devices", before)
