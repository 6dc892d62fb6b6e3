"""One of two processes that resume while the second meets trouble. Started by test_processes.

    python -m tests.resuming FOLDER COORDINATOR INDEX
"""

import dataclasses
import errno
import json
import pathlib
import sys
import types

from flax import nnx
import jax
import jax.numpy as jnp

from configs import demo
from ddpo_jax import build, checkpoint, diagnostics, distributed, resume, update
from ddpo_jax.batches import BatchPlan
from ddpo_jax.config import resolve
from ddpo_jax.errors import UserError

NEWEST = 3


def make_trainer(run):
  """What resuming asks of a trainer, without a model."""
  config = demo.get_config()
  config.resume_from = str(run)
  cfg = resolve(config)
  mesh = jax.sharding.Mesh(jax.devices(), ("data",))
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  params = nnx.State({"weights": nnx.LoRAParam(jnp.ones(5))})
  state = update.init_state(params, update.make_optimizer(1e-3, weight_decay=0), False)
  return types.SimpleNamespace(
      cfg=cfg, plan=BatchPlan.create(cfg, jax.device_count()),
      state=jax.device_put(state, replicated), stat_tracker=None, combiner=None,
      watch=diagnostics.Watch(cfg), skipped_in_a_row=0)


def save(trainer, run):
  checkpointer = checkpoint.Checkpointer(run, 10)
  for epoch in range(NEWEST + 1):
    state, meta = resume.checkpoint_of(trainer)
    checkpointer.save(epoch, dataclasses.replace(state, step=state.step + epoch), meta)
  checkpointer.close()


def failing_once(function, error):
  """The function, of which the first call raises."""
  errors = [error]

  def call(*arguments):
    if errors:
      raise errors.pop()
    return function(*arguments)

  return call


def outcome(call):
  """What a call returns, or the name of what it raises."""
  try:
    return call()
  except Exception as error:
    return type(error).__name__


def main(folder, coordinator, index):
  jax.distributed.initialize(coordinator, 2, index)
  run = pathlib.Path(folder)
  trainer = make_trainer(run)
  save(trainer, run)
  restore, find_all = checkpoint.restore, checkpoint.find_all
  if index == 1:
    checkpoint.restore = failing_once(restore, UserError("cannot be read now"))
  unreadable = outcome(lambda: resume.resume(trainer, run))
  if index == 1:
    checkpoint.restore = failing_once(restore, checkpoint.DamagedError("damaged"))
    checkpoint.find_all = lambda path: (find_all(path)[0], [0])  # its view of the disk is old
  epoch, damaged = resume.resume(trainer, run)
  resume.set_aside_damaged(run, damaged)
  steps = int(trainer.state.step)

  model = build.open_model(trainer.cfg)
  if index == 1:
    model = dataclasses.replace(model, read=failing_once(model.read, OSError(errno.EIO, "")))
  build.compile_programs = lambda *arguments: (None, None)
  built = outcome(lambda: build.build(trainer.cfg, trainer.plan, lambda rng: ("", {}), {}, model))
  assert distributed.is_main() == (index == 0)
  shared = [distributed.is_shared(run / "cache"), distributed.is_shared(run / f"cache_{index}")]
  print(json.dumps([unreadable, epoch, steps, built, *shared]))


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
