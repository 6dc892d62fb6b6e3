"""Batch arithmetic: samples and optimizer steps, per device, step and epoch."""

from __future__ import annotations

import dataclasses

from ddpo_jax.config import Config


@dataclasses.dataclass(frozen=True)
class BatchPlan:
  """The numbers of samples and steps of a run.

  Its sizes are of one of JAX's devices, which on a CPU is a core; the config's are of one GPU, or
  of the whole CPU.
  """

  num_epochs: int
  num_devices: int  # JAX's, in the mesh
  devices_per_batch: int  # that share one batch of the config: the CPU's cores, else 1
  sample_batch_size: int  # samples of a batch on each device
  train_batch_size: int  # likewise
  gradient_accumulation_steps: int
  num_inner_epochs: int
  samples_per_epoch: int
  train_batch_size_total: int  # samples of an optimizer step, on all devices
  steps_per_inner_epoch: int
  num_train_timesteps: int
  device: str = "device"  # its name

  @classmethod
  def create(cls, cfg: Config, num_devices: int, devices_per_batch: int = 1) -> BatchPlan:
    """Does the arithmetic of a resolved config, whose sizes are known to divide.

    Args:
      cfg: the config.
      num_devices: in the mesh.
      devices_per_batch: that share one batch of the config; divides both batch sizes.
    """
    sample_batch = cfg.sample.batch_size // devices_per_batch
    train_batch = cfg.train.batch_size // devices_per_batch
    samples = sample_batch * cfg.sample.num_batches_per_epoch * num_devices
    total = train_batch * cfg.train.gradient_accumulation_steps * num_devices
    return cls(
        num_epochs=cfg.num_epochs, num_devices=num_devices, devices_per_batch=devices_per_batch,
        sample_batch_size=sample_batch, train_batch_size=train_batch,
        gradient_accumulation_steps=cfg.train.gradient_accumulation_steps,
        num_inner_epochs=cfg.train.num_inner_epochs, samples_per_epoch=samples,
        train_batch_size_total=total, steps_per_inner_epoch=samples // total,
        num_train_timesteps=cfg.num_train_timesteps)

  @property
  def devices_of_config(self) -> int:
    """How many devices the config's sizes are each for one of."""
    return self.num_devices // self.devices_per_batch

  @property
  def sizes(self) -> dict[str, int]:
    """What a resumed run must have as before, on whatever devices."""
    return {"images_per_epoch": self.samples_per_epoch,
            "images_per_optimizer_step": self.train_batch_size_total}

  @property
  def optimizer_steps_per_epoch(self) -> int:
    return self.steps_per_inner_epoch * self.num_inner_epochs

  def describe(self, heading: str = "Running training") -> str:
    """What is printed before training, as ddpo-pytorch does."""
    cores = self.devices_per_batch
    shared = f" ({cores} cores share each batch)" if cores > 1 else ""
    lines = {
        "Number of epochs": self.num_epochs,
        "Devices": f"{self.devices_of_config} x {self.device}{shared}",
        "Sample batch size per device": self.sample_batch_size * self.devices_per_batch,
        "Train batch size per device": self.train_batch_size * self.devices_per_batch,
        "Gradient accumulation steps": self.gradient_accumulation_steps,
        "Images per epoch": self.samples_per_epoch,
        "Images per optimizer step (all devices, accumulated)":
            self.train_batch_size_total,
        "Timesteps trained per image": self.num_train_timesteps,
        "Optimizer steps per inner epoch": self.steps_per_inner_epoch,
        "Inner epochs": self.num_inner_epochs,
    }
    return "\n".join([f"***** {heading} *****",
                      *(f"  {name} = {value}" for name, value in lines.items())])
