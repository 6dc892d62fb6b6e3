"""Every field there is, with its default. Other configs start from this one.

    python scripts/train.py --config configs/base.py

Field names and defaults are ddpo-pytorch's; those marked (new) are added.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()

  # ---- general ----
  # Name of the run, and of its folder in `logdir`; empty: made from the time.
  config.run_name = ""
  # Seed of everything random: prompts, noise, LoRA's initial weights, shuffles.
  config.seed = 42
  # Where runs are kept.
  config.logdir = "logs"
  # Number of epochs; each samples images, then trains on them.
  config.num_epochs = 100
  # Save a checkpoint every so many epochs. The last epoch is always saved.
  config.save_freq = 20
  # (new) Every so many epochs draw the same prompts from the same noise, to see the change
  # on the same pictures; also before the first epoch and after the last. 0: never.
  config.eval_freq = 10
  # Keep at most so many checkpoints.
  config.num_checkpoint_limit = 5
  # What the networks compute in: "no" (float32), "fp16" or "bf16". LoRA weights,
  # log-probabilities, loss and optimizer are float32 in any case.
  config.mixed_precision = "fp16"
  # Allow TF32 matrix products in float32 code on GPUs of Ampere and later.
  config.allow_tf32 = True
  # Continue a run: its folder (the newest checkpoint is taken) or one checkpoint. (new)
  # "auto": the run of this run_name if there is one, else start it.
  config.resume_from = ""
  # Train LoRA weights only. Without it the whole UNet is trained, which takes far more
  # memory and makes large checkpoints.
  config.use_lora = True
  # (new) Folder for compiled programs, so that the next start is quick. "auto" is the
  # user's cache folder, "" keeps none.
  config.compilation_cache = "auto"

  # ---- pretrained model ----
  config.pretrained = pretrained = ml_collections.ConfigDict()
  # A folder in diffusers' format, a hub id, or "tiny" (new): the model in this package.
  # (The id that ddpo-pytorch names has left the hub; this is its successor.)
  pretrained.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
  # Branch, tag or commit of a hub id.
  pretrained.revision = "main"

  # ---- LoRA (new) ----
  config.lora = lora = ml_collections.ConfigDict()
  # Rank of each update.
  lora.rank = 4
  # Start from the LoRA weights in this safetensors file (its rank is used).
  lora.init_from = ""

  # ---- sampling ----
  config.sample = sample = ml_collections.ConfigDict()
  # Number of denoising steps.
  sample.num_steps = 50
  # Noise of each DDIM step, in (0, 1]; 1 is DDPM's. 0 would have no log-probability.
  sample.eta = 1.0
  # Classifier-free guidance weight; up to 1 means no guidance.
  sample.guidance_scale = 5.0
  # Images sampled at a time, per device. (In half precision they are denoised as many at a time
  # as training has in a microbatch: train.batch_size * train.timesteps_per_batch.)
  sample.batch_size = 1
  # Batches per epoch. Images per epoch: num_batches_per_epoch * batch_size * devices.
  sample.num_batches_per_epoch = 2
  # (new) Images decoded at a time, per device; lower it if decoding runs out of memory.
  sample.decode_batch_size = 8

  # ---- training ----
  config.train = train = ml_collections.ConfigDict()
  # Samples in one forward and backward pass, per device; must divide sample.batch_size.
  train.batch_size = 1
  # ddpo-pytorch's 8-bit Adam; not supported here.
  train.use_8bit_adam = False
  # AdamW.
  train.learning_rate = 3e-4
  train.adam_beta1 = 0.9
  train.adam_beta2 = 0.999
  train.adam_weight_decay = 1e-4
  train.adam_epsilon = 1e-8
  # Batches of samples whose gradients are added up before an optimizer step (each over
  # all its trained timesteps).
  train.gradient_accumulation_steps = 1
  # Clip the gradient to this global norm.
  train.max_grad_norm = 1.0
  # Passes over an epoch's samples.
  train.num_inner_epochs = 1
  # Apply guidance in the update too. Must be True wherever sampling is guided.
  train.cfg = True
  # Clip advantages to ±adv_clip_max.
  train.adv_clip_max = 5.0
  # PPO's clip range. Log-probabilities are means over a latent's elements, so ratios
  # move little: 1e-4 is not a misprint.
  train.clip_range = 1e-4
  # Train on this fraction of each sample's timesteps, chosen at random.
  train.timestep_fraction = 1.0
  # (new) Timesteps of a sample that share a forward and backward pass: fills the device
  # where batch_size is small. Does not change the gradient.
  train.timesteps_per_batch = 1
  # (new) "none", "blocks" (recompute inside resnets and attentions) or "full": less
  # memory for more computation.
  train.gradient_checkpointing = "none"
  # (new) In half precision and TF32 two compiled programs round differently, which moves
  # ratios by as much as the clip range (docs/gpu.md). With this sampler and update are one
  # program. Before the first optimizer step of each epoch the largest |ratio - 1| is measured;
  # above a tenth of the clip range, the log-probabilities of the other steps are recomputed: one
  # more forward pass. In plain float32 it has no effect.
  train.recompute_log_probs = True
  # (new) Where the two are one program (above) that trains LoRA on every timestep: compute the
  # gradient of an epoch's first optimizer step while sampling, from the same forward pass.
  train.gradient_while_sampling = True
  # (new) Stop when more than so many optimizer steps in a row had a loss or gradient that was
  # not finite (each of them is skipped). 0 stops at the first.
  train.max_skipped_steps = 10

  # ---- prompts ----
  # A function of ddpo_jax/prompts.py, or your own as "package.module:function". Another one
  # on the command line does not get this config's prompt_fn_kwargs; the same holds below for
  # reward_fn and reward_kwargs.
  config.prompt_fn = "imagenet_animals"
  config.prompt_fn_kwargs = ml_collections.ConfigDict()

  # ---- rewards ----
  # A function of ddpo_jax/rewards, or your own as "package.module:function". (new) Or
  # several with weights, {"aesthetic_score": 1.0, "jpeg_compressibility": 0.2}: each is
  # standardised by its own mean and deviation over the run before it is weighted.
  config.reward_fn = config_dict.FieldReference(
      "jpeg_compressibility", field_type=object)  # not str: a dict may take its place
  # (new) Its keyword arguments; with several functions, a dict for each under its name. On
  # the command line reward_kwargs.strength=2, or reward_kwargs.aesthetic_score.model=folder; in a
  # config config.reward_kwargs["package.module:function"] = {"strength": 2}, for its dots.
  config.reward_kwargs = ml_collections.ConfigDict(allow_dotted_keys=True)

  # ---- per-prompt statistics ----
  # Rewards are standardised by the mean and deviation of their own prompt. None, which the
  # command line takes as well: by those of the whole epoch.
  config.per_prompt_stat_tracking = ml_collections.ConfigDict()
  # Rewards remembered for each prompt.
  config.per_prompt_stat_tracking.buffer_size = 16
  # Use the epoch's mean and deviation for a prompt with fewer rewards than this.
  config.per_prompt_stat_tracking.min_count = 16

  # ---- Weights & Biases (new) ----
  config.wandb = wandb = ml_collections.ConfigDict()
  # "online", "offline" or "disabled".
  wandb.mode = "disabled"
  wandb.project = "ddpo-jax"
  # ---- TensorBoard (new) ----
  # Event files in the run's folder; needs tensorboardX.
  config.tensorboard = False

  # ---- several processes (new) ----
  # Each runs this program on its own devices; see docs/scaling.md.
  config.distributed = distributed = ml_collections.ConfigDict()
  # Find the other processes by what SLURM, Open MPI or Kubernetes says of them.
  distributed.detect = True
  # Or say it here, the same for all but the last: "host:port" of process 0 (any free
  # port), how many processes there are, and which one this is.
  distributed.coordinator_address = ""
  distributed.num_processes = 1
  distributed.process_id = 0
  # Seconds to wait for all of them.
  distributed.timeout = 300

  return config
