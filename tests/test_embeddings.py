"""Prompts are embedded once, one by one, by an encoder that then leaves the device."""

import dataclasses
import gc
import weakref

import jax
import numpy as np
import pytest
from small_model import small_config

from ddpo_jax import embeddings, train
from ddpo_jax.batches import BatchPlan
from ddpo_jax.config import resolve
from ddpo_jax.embeddings import PromptEncoder
from ddpo_jax.prompts import get_prompt_fn
from ddpo_jax.rewards import get_rewards

PROMPTS = ["a cat", "", "a dog on a very long leash", "a cat"]


@pytest.fixture
def encoder(tiny_sd, monkeypatch):
  """An encoder that notes how many prompts it has embedded."""
  encoder = PromptEncoder(tiny_sd)
  encode, encoder.count, encoder.given = encoder._encode, 0, []

  def counted(weights, token_ids):
    encoder.count += 1
    encoder.given.append(jax.tree.leaves(weights)[0])
    return encode(weights, token_ids)

  encoder._encode = counted
  return encoder


def test_embeddings_are_the_text_encoders(tiny_sd, encoder):
  expected = tiny_sd.text_encoder(tiny_sd.tokenize(PROMPTS))
  np.testing.assert_allclose(encoder(PROMPTS), expected, rtol=1e-5, atol=1e-6)


def test_every_distinct_prompt_is_embedded_once(encoder):
  first = encoder(PROMPTS)
  assert encoder.count == 3
  np.testing.assert_array_equal(encoder(PROMPTS[::-1]), first[::-1])
  assert encoder.count == 3


def test_an_embedding_does_not_depend_on_the_others(tiny_sd, encoder):
  together = encoder(PROMPTS)
  for prompt, embedding in zip(PROMPTS, together):
    np.testing.assert_array_equal(PromptEncoder(tiny_sd)([prompt])[0], embedding)


def test_the_encoder_waits_in_host_memory(encoder):
  for _ in range(2):
    assert {type(leaf) for leaf in jax.tree.leaves(encoder._weights)} == {np.ndarray}
    encoder(PROMPTS)
  # And is on the device while it embeds, not taken there for each prompt.
  first, *others = encoder.given
  assert isinstance(first, jax.Array) and all(each is first for each in others)


def test_only_so_many_are_remembered(encoder, monkeypatch):
  monkeypatch.setattr(embeddings, "_REMEMBERED", 2)
  all_three = encoder(PROMPTS)
  np.testing.assert_array_equal(encoder(PROMPTS[1:3]), all_three[1:3])
  assert encoder.count == 3  # the two that were asked for last are known
  np.testing.assert_array_equal(encoder(["a cat"]), all_three[:1])
  assert encoder.count == 4


def test_what_was_asked_for_again_is_not_forgotten_first(encoder, monkeypatch):
  monkeypatch.setattr(embeddings, "_REMEMBERED", 2)
  for prompt in ("a", "b", "a", "c", "a"):
    encoder([prompt])
  assert encoder.count == 3


def test_a_prompt_that_is_too_long_is_said_once(encoder, capfd):
  encoder(["a cat " * 37 + "a", "a dog"])  # 75 tokens, the start's and the end's
  assert capfd.readouterr() == ("", "")
  encoder(["a dog", "a cat " * 38, "a pig " * 50])
  encoder(["a hen " * 60])
  out, err = capfd.readouterr()
  (line,) = out.splitlines()
  assert "78 tokens" in line and "the first 77" in line and "'a cat a cat" in line
  assert not err  # the tokenizer's own warning, which is of another use


def test_the_trainer_keeps_no_second_copy_of_the_weights():
  """What was read from the files goes when the weights are where training needs them."""
  cfg = resolve(small_config())
  model, held = train.open_model(cfg), []

  def read():
    models = model.read()
    held.extend(map(weakref.ref, (models, models.unet, models.vae, models.text_encoder)))
    return models

  table = jax.tree.leaves(model.shapes.text_encoder.embeddings.token_embedding)[0].shape
  trainer = train.build(cfg, BatchPlan.create(cfg, 1), get_prompt_fn("simple_animals"),
                        get_rewards(cfg.reward_fn, {}), dataclasses.replace(model, read=read))
  gc.collect()
  assert [part() for part in held] == [None] * 4
  weights = jax.tree.leaves((trainer.frozen_unet, trainer.worker._frozen, trainer.state))
  assert table not in [weight.shape for weight in weights]
