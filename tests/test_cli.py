"""The command line: overrides, and one clear line for every mistake."""

import pathlib
import subprocess
import sys

import pytest

from ddpo_jax import cli
from ddpo_jax.types import Interrupted, UserError

ROOT = pathlib.Path(__file__).parents[1]
DEMO = str(ROOT / "configs" / "demo.py")


def read(*arguments):
  return cli.read_config(["train.py", *arguments])


def test_overrides():
  cfg = read("--config", f"{DEMO}:incompressibility", "--config.sample.batch_size=128",
             "--config.train.learning_rate", "2e-4", "--config.run_name=x",
             "--config.use_lora=False", "--config.prompt_fn_kwargs.pool=4",
             "--config.reward_kwargs.strength=2.5")
  assert cfg.reward_fn == "jpeg_incompressibility"
  assert (cfg.sample.batch_size, cfg.train.learning_rate) == (128, 2e-4)
  assert (cfg.run_name, cfg.use_lora) == ("x", False)
  assert cfg.prompt_fn_kwargs["pool"] == 4
  assert cfg.reward_kwargs == {"strength": 2.5}


def test_several_rewards_on_the_command_line():
  spec = "{'my_rewards:redness': 1.0, 'jpeg_compressibility': 0.2}"
  cfg = read("--config", DEMO, f"--config.reward_fn={spec}",
             "--config.reward_kwargs.my_rewards:redness={'strength': 2}")
  assert cfg.reward_fn == {"my_rewards:redness": 1.0, "jpeg_compressibility": 0.2}
  assert cfg.reward_kwargs == {"my_rewards:redness": {"strength": 2}}


@pytest.mark.parametrize("arguments,message", [
    ([], "--config is missing"),
    (["--config=configs/none.py"], "does not exist"),
    ([f"--config={DEMO}:foo"], "compressibility, incompressibility"),
    ([f"--config={ROOT / 'configs' / 'base.py'}:foo"], "takes 0 positional"),
    ([f"--config={DEMO}", "--config.sample.batchsize=2"], "batch_size"),
    ([f"--config={DEMO}", "--config.sampel.batch_size=2"], "sampel is not a field"),
    ([f"--config={DEMO}", "--config.sample.batch_size=two"], "'two'"),
    ([f"--config={DEMO}", "--config.use_lora=3"], "use_lora"),
    ([f"--config={DEMO}", "--config.seed"], "has no value"),
    ([f"--config={DEMO}", "--confg=3"], "'--confg=3' is not an option"),
    ([f"--config={DEMO}", "extra"], "'extra' is not an option"),
    ([f"--config={DEMO}", "--config.sample.eta=0.0"], r"sample.eta=0.0 must be in \(0, 1\]"),
])
def test_mistakes(arguments, message):
  with pytest.raises(UserError, match=message) as error:
    read(*arguments)
  assert "\n" not in str(error.value)


def test_exit_statuses(monkeypatch, capsys):
  assert cli.main(["train.py"]) == 2
  assert "--config is missing" in capsys.readouterr().err
  assert cli.main(["train.py", "--help"]) == 0

  def interrupted(config):
    raise Interrupted(15)

  monkeypatch.setattr(cli, "train", interrupted)
  assert cli.main(["train.py", f"--config={DEMO}"]) == 143


@pytest.mark.parametrize("argument,message", [
    ("--config.reward_fn=nope", "jpeg_compressibility"),
    ("--config.prompt_fn=nope", "tiny_shapes"),
    ("--config.prompt_fn_kwargs.path=x", "prompt_fn='tiny_shapes'"),
    ("--config.reward_fn=no_such_module:f", "cannot be imported"),
])
def test_process_says_one_line_and_exits_2(argument, message, tmp_path):
  """Before any model is loaded, and leaving no run folder behind."""
  done = subprocess.run(
      [sys.executable, str(ROOT / "scripts" / "train.py"), f"--config={DEMO}", argument,
       f"--config.logdir={tmp_path / 'logs'}"], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2
  assert message in done.stderr and len(done.stderr.splitlines()) == 1
  assert not (tmp_path / "logs").exists()
