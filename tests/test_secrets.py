"""Keys, tokens and passwords in a config are in nothing that a run writes or says."""

import json
import pathlib
import shlex

import pytest

from configs import base
from ddpo_jax import cli, tracking
from ddpo_jax.config import resolve
from ddpo_jax.errors import UserError
from ddpo_jax.overrides import redacted_command
from ddpo_jax.redaction import redacted
from ddpo_jax.report import write_report
from ddpo_jax.resume_checks import check_continues
from ddpo_jax.rewards import get_reward, get_rewards

SECRET = "sk-12345"


def with_secrets(tmp_path):
  config = base.get_config()
  config.logdir, config.run_name = str(tmp_path), "run"
  config.pretrained.model = "tiny"
  config.reward_kwargs = {"api_key": SECRET, "url": f"http://me:{SECRET}@host:1/v1?key={SECRET}",
                          "nested": {"token": SECRET, "tokenizer": "clip"},
                          "api_key_env": "MY_KEY"}
  return resolve(config)


def test_nothing_written_has_a_secret(tmp_path):
  cfg = with_secrets(tmp_path)
  assert cfg.reward_kwargs["api_key"] == SECRET  # the reward itself gets it
  tracker = tracking.Tracker(tmp_path / "run", cfg)
  write_report(tmp_path / "run")
  tracker.close()
  for path in (tmp_path / "run").rglob("*"):
    assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
  written = json.loads((tmp_path / "run" / "config.json").read_text())["reward_kwargs"]
  assert written == {"api_key": "***", "url": "http://me:***@host:1/v1?key=***",
                     "nested": {"token": "***", "tokenizer": "clip"}, "api_key_env": "MY_KEY"}


def test_a_run_with_secrets_is_resumed(tmp_path):
  cfg = with_secrets(tmp_path)
  check_continues(cfg, json.loads(json.dumps(cfg.to_dict())), "the checkpoint")


def test_a_runs_config_file_asks_for_its_secrets(tmp_path):
  file, cfg = tmp_path / "config.json", with_secrets(tmp_path)
  file.write_text(json.dumps(cfg.to_dict()))
  command = ["train.py", f"--config={file}"]
  with pytest.raises(UserError, match=r"^reward_kwargs holds '\*\*\*'.*give it again, as --config"):
    cli.read_config(command)
  again = cli.read_config([*command, f"--config.reward_kwargs={cfg.reward_kwargs}"])
  assert again.reward_kwargs == cfg.reward_kwargs


@pytest.mark.parametrize("call", [
    lambda: get_reward("jpeg_compressibility", api_key=SECRET),
    lambda: get_rewards({"jpeg_compressibility": 1.0}, {"api_key": SECRET}),
    lambda: get_reward("llava_bertscore", url=f"http://me:{SECRET}@127.0.0.1:9")])
def test_no_message_has_a_secret(call):
  with pytest.raises(UserError) as error:
    call()
  assert SECRET not in str(error.value)


@pytest.mark.parametrize("name", ("api_key", "API_KEY", "apikey", "hf_token", "password",
                                  "client-secret", "credentials", "auth", "accessToken", "pwd",
                                  "api-key", "OpenAIKey", "HFToken"))
def test_names_of_secrets(name):
  assert redacted({name: SECRET}) == {name: "***"}
  assert redacted({name: ""}) == {name: ""}


@pytest.mark.parametrize("url", (
    "http://me:{}@host/v1", "https://{}@host/v1", "https://host/v1?access_token={}",
    "https://host?n=3&api-key={}", "https://host?subscription-key={}#x", "https://host?code={}",
    "https://host?a=b&X-Amz-Signature={}&c=d", "https://proxy/?url=https://host/v1?token={}",
    "http://me:a@{}@host", "https://host#access_token={}", "https://host?a=1;token={}&CODE={}"))
def test_urls_are_shown_without_secrets(url):
  (shown,) = redacted([url.format(SECRET, SECRET)])
  assert SECRET not in shown and shown in (url.format("***", "***"), "http://me:***@host")


@pytest.mark.parametrize("kind", (list, tuple))
def test_what_lies_in_lists_is_hidden_too(kind):
  url, shown = (f"http://me:{word}@host" for word in (SECRET, "***"))
  assert redacted({"urls": kind([url, {"token": SECRET}])}) == {
      "urls": kind([shown, {"token": "***"}])}


def test_paths_and_names_stay():
  values = {"path": str(pathlib.Path("/a:b@c")), "tokenizer": "x", "model": "a/b", "n": 3,
            "url": "http://host:8000/v1?model=a&encode=b", "keys": "x", "author": "me",
            "auth": True, "sig": 0.5, "mail": "http://host:80?x=a@b", "s3": "s3://b@ucket/path"}
  assert redacted(values) == values


@pytest.mark.parametrize("option", (
    ["--config.reward_kwargs.api_key={}"], ["--config.reward_kwargs.api_key", "{}"],
    ["--config.reward_kwargs={{'api_key': '{}', 'n': 3}}"],
    ["--config.reward_kwargs.url=http://host?token={}"],
    ["--config.reward_kwargs.url", "http://host?token={}"]))
def test_commands_are_written_down_without_secrets(option):
  command = ["benchmark.py", "--rounds=2", *(word.format(SECRET) for word in option), "--profile"]
  shown = shlex.split(redacted_command(command))
  assert shown == ["benchmark.py", "--rounds=2", *(word.format("***") for word in option),
                   "--profile"]


def test_a_key_may_end_as_base64_does():
  command = redacted_command(["benchmark.py", "--config.reward_kwargs.api_key", f"{SECRET}="])
  assert shlex.split(command) == ["benchmark.py", "--config.reward_kwargs.api_key", "***"]
