"""The command line: overrides, and one clear line for every mistake."""

import functools
import itertools
import json
import pathlib
import subprocess
import sys

import pytest

from ddpo_jax import cli
from ddpo_jax.config import PerPromptStatTrackingConfig
from ddpo_jax.errors import Interrupted, UserError

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


@pytest.mark.parametrize("text,value", [
    ("false", False), ("TRUE", True), ("none", None), ("2", 2), ("[1, 'a']", [1, "a"]),
    ("two words", "two words"), ("'3'", "3"), ("truely", "truely"),
])
def test_values_of_arguments(text, value):
  cfg = read("--config", DEMO, f"--config.reward_kwargs.x={text}")
  assert cfg.reward_kwargs["x"] == value and type(cfg.reward_kwargs["x"]) is type(value)


@pytest.mark.parametrize("field,text,value", [
    ("num_epochs", "1e3", 1000), ("num_epochs", "7.0", 7), ("sample.eta", "1", 1.0),
    ("use_lora", "True", True), ("use_lora", "false", False), ("tensorboard", "1", True),
    ("run_name", "12", "12"), ("run_name", "None", "None"),
])
def test_values_are_of_the_fields_type(field, text, value):
  cfg = read("--config", DEMO, f"--config.{field}={text}")
  found = functools.reduce(getattr, field.split("."), cfg)
  assert found == value and type(found) is type(value)


def test_groups():
  for text in ("None", "none", "{}"):
    assert read("--config", DEMO, f"--config.per_prompt_stat_tracking={text}"
                ).per_prompt_stat_tracking is None
  cfg = read("--config", DEMO, "--config.sample={'num_steps': 12}",
             "--config.per_prompt_stat_tracking=None",
             "--config.per_prompt_stat_tracking={'buffer_size': 3, 'min_count': 2}")
  assert (cfg.sample.num_steps, cfg.sample.batch_size) == (12, 128)
  assert cfg.per_prompt_stat_tracking == PerPromptStatTrackingConfig(
      buffer_size=3, min_count=2)
  # The last value counts, in a group that was none as well, and of whatever type it is.
  with pytest.raises(UserError) as error:
    read("--config", DEMO, "--config.per_prompt_stat_tracking=None",
         "--config.per_prompt_stat_tracking.min_count=1",
         "--config.per_prompt_stat_tracking.buffer_size=3",
         "--config.per_prompt_stat_tracking.buffer_size=x")
  assert str(error.value) == "per_prompt_stat_tracking.buffer_size='x' must be of type int"


def test_none_is_no_arguments():
  for text in ("None", "none", "{}"):
    cfg = read("--config", f"{ROOT / 'configs' / 'dgx.py'}:prompt_image_alignment",
               f"--config.reward_kwargs={text}")
    assert cfg.reward_kwargs == {}


def test_fields_that_depend_on_others_follow_them(tmp_path):
  file = tmp_path / "steps.py"
  file.write_text("from configs import demo\ndef get_config():\n  c = demo.get_config()\n"
                  "  c.num_epochs = c.sample.get_ref('num_steps') * 2\n  return c\n")
  assert read("--config", str(file), "--config.sample.num_steps=4").num_epochs == 8


def permuted(*arguments):
  return list(itertools.permutations(arguments))


@pytest.mark.parametrize("arguments", [
    *permuted("prompt_fn=from_file", "prompt_fn_kwargs.path=p.txt"),
    *permuted("prompt_fn=from_file", "prompt_fn_kwargs={'path': 'p.txt'}"),
])
def test_another_function_has_its_own_arguments_only(arguments):
  cfg = read("--config", DEMO, *(f"--config.{argument}" for argument in arguments))
  assert cfg.prompt_fn_kwargs == {"path": "p.txt"}


def test_the_same_function_keeps_its_arguments():
  cfg = read("--config", DEMO, "--config.prompt_fn=tiny_shapes", "--config.reward_fn=clip_score",
             "--config.prompt_fn_kwargs.pool=4")
  assert cfg.prompt_fn_kwargs == {"max_count": 1, "pool": 4}
  dgx = f"{ROOT / 'configs' / 'dgx.py'}:prompt_image_alignment"
  assert read("--config", dgx).reward_kwargs
  assert read("--config", dgx, "--config.reward_fn=clip_score").reward_kwargs == {}


def test_rewards_that_stay_keep_their_arguments(tmp_path):
  file = tmp_path / "several.py"
  file.write_text("from configs import demo\ndef get_config():\n  c = demo.get_config()\n"
                  "  c.reward_fn = {'a': 1.0, 'b': 1.0}\n"
                  "  c.reward_kwargs = {'a': {'x': 1}, 'b': {'y': 2}}\n  return c\n")
  cfg = read("--config", str(file), "--config.reward_fn={'a': 2.0, 'c': 1.0}",
             "--config.reward_kwargs.a.z=3")
  assert cfg.reward_kwargs == {"a": {"x": 1, "z": 3}}


@pytest.mark.parametrize("argument,kwargs", [
    ("jpeg_compressibility.quality=3", {"jpeg_compressibility": {"quality": 3}}),
    ("my.rewards:redness.strength=2", {"my.rewards:redness": {"strength": 2}}),
    ("my.rewards:redness={'strength': 2}", {"my.rewards:redness": {"strength": 2}}),
])
def test_arguments_of_one_of_several_rewards(argument, kwargs):
  cfg = read("--config", DEMO, f"--config.reward_kwargs.{argument}",
             "--config.reward_fn={'my.rewards:redness': 1.0, 'jpeg_compressibility': 0.2}")
  assert cfg.reward_kwargs == kwargs


def test_all_overrides_that_are_wrong_are_said_at_once():
  with pytest.raises(UserError) as error:
    read("--config", DEMO, "--config.seed=abc", "--config.num_epochs=1.5",
         "--config.sample.eta=0", "--config.sampel.eta=1", "--config.seed.x=1",
         "--config.prompt_fn=nope")
  lines = str(error.value).splitlines()
  for start in ("seed='abc' must be of type int", "num_epochs='1.5' must be of type int",
                "sample.eta=0.0 must be in", "sampel.eta is not a field; did you mean sample.eta?",
                "seed.x is not a field: seed has no fields of its own", "prompt_fn='nope'"):
    assert sum(line.startswith(start) for line in lines) == 1, (start, lines)
  assert len(lines) == 6


@pytest.mark.parametrize("source,experiment,message", [
    ("def get_config():\n  c = demo.get_config()\n  c.sampel.num_steps = 3\n", "",
     r"AttributeError: 'sampel' .*, line 4\)"),
    ("def get_config():\n  return nope\n", "", r"NameError: name 'nope' .*, line 3\)"),
    ("def get_config():\n  return demo.get_config('foo')\n", "",
     r"there is no experiment 'foo'; .*, line 3\)"),
    ("def get_config(\n", "", r"SyntaxError: .*, line 2\)"),
    ("import no_such_module\n", "", r"No module named 'no_such_module' .*, line 2\)"),
    ("", "", "has no get_config; must define"),
    ("def get_config():\n  return demo.get_config()\n", ":foo", "has no experiments; must be"),
    ("def get_config(name):\n  return name\n", "", "must name an experiment"),
    ("def get_config():\n  return {}\n", "", "returned a dict; must be a ConfigDict"),
])
def test_mistakes_in_a_config_file(tmp_path, source, experiment, message):
  file = tmp_path / "mine.py"
  file.write_text(f"from configs import demo\n{source}")
  with pytest.raises(UserError, match=message) as error:
    read(f"--config={file}{experiment}")
  assert str(error.value).startswith(f"--config={file}{experiment}: ")
  assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("argument,said", [
    ("reward_fn={jpeg_compressibility:1}", "reward_fn='{jpeg_compressibility:1}'"),
    ("reward_fn=jpeg_compressibility:1.5", "reward_fn='jpeg_compressibility:1.5'"),
    ("sample={num_steps:3}", "sample='{num_steps:3}'"),
    ("reward_kwargs={key:secret}", "reward_kwargs"),
    ("per_prompt_stat_tracking={min_count:3}", "per_prompt_stat_tracking='{min_count:3}'"),
])
def test_dicts_whose_quotes_a_shell_took_away(argument, said):
  with pytest.raises(UserError) as error:
    read("--config", DEMO, f"--config.{argument}")
  field = said.partition("=")[0]
  assert str(error.value) == (
      f"{said} is not a dict; must be quoted for the shell: "
      f"--config.{field}=\"{{'name': 1.0}}\"")


def test_dicts_that_a_shell_took_apart():
  with pytest.raises(UserError, match="'1}' is not an option; reward_fn must be quoted"):
    read("--config", DEMO, "--config.reward_fn={a:", "1}")


def test_braces_in_the_text_of_an_argument():
  cfg = read("--config", DEMO, "--config.reward_kwargs.question={prompt}?",
             "--config.reward_kwargs.opening={", "--config.reward_kwargs.closing=}",
             "--config.reward_kwargs.answers={[yes]}", "--config.reward_kwargs.times={[2]: 1}")
  assert cfg.reward_kwargs == {"question": "{prompt}?", "opening": "{", "closing": "}",
                               "answers": "{[yes]}", "times": "{[2]: 1}"}


def test_a_config_gives_arguments_to_ones_own_function_among_several(tmp_path):
  """Its name has a dot, which other groups of fields do not take."""
  file = tmp_path / "mine.py"
  file.write_text("""
from configs import demo

def get_config():
  config = demo.get_config()
  config.reward_fn = {"tests.runs:brightness": 1.0, "jpeg_compressibility": 0.5}
  config.reward_kwargs["tests.runs:brightness"] = {"strength": 2}
  return config
""")
  assert read(f"--config={file}").reward_kwargs == {"tests.runs:brightness": {"strength": 2}}
  changed = read(f"--config={file}", "--config.reward_kwargs.tests.runs:brightness.strength=3")
  assert changed.reward_kwargs == {"tests.runs:brightness": {"strength": 3}}


def test_the_config_of_a_run_is_a_config_file(tmp_path):
  """So that it is continued without all that its command line said."""
  file = tmp_path / "config.json"
  cfg = read("--config", DEMO,
             "--config.reward_fn={'jpeg_compressibility': 1, 'json.tool:main': 2}",
             "--config.reward_kwargs={'json.tool:main': {}}", "--config.seed=7",
             "--config.per_prompt_stat_tracking=None")
  file.write_text(json.dumps(cfg.to_dict()))
  assert read(f"--config={file}") == cfg
  again = read(f"--config={file}", "--config.train.learning_rate=1e-5", "--config.num_epochs=9")
  assert (again.train.learning_rate, again.num_epochs, again.seed) == (1e-5, 9, 7)
  with pytest.raises(UserError, match=":alignment: has no experiments; must be --config="):
    read(f"--config={file}:alignment")
  for text, message in (("[]", "must be the config.json"), ("{", "Expecting"),
                        ("{}", "seed is missing from the config")):
    file.write_text(text)
    with pytest.raises(UserError, match=message):
      read(f"--config={file}")
  file.with_suffix(".yaml").touch()
  with pytest.raises(UserError, match="must be a Python file .* or a run's config.json"):
    read(f"--config={file.with_suffix('.yaml')}")


def test_a_config_file_may_be_in_ones_home(tmp_path, monkeypatch):
  """A shell leaves --config=~/my.py as it is."""
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "my.py").write_text("from configs.demo import get_config\n")
  assert read("--config=~/my.py:alignment").reward_fn == "color_alignment"


def test_a_config_files_path_may_have_colons(tmp_path):
  """As that of a run has whose run_name is a time, or a setting such as "lr:3e-4"."""
  cfg = read("--config", DEMO, "--config.run_name=lr:3e-4")
  folder = tmp_path / cfg.run_name
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(cfg.to_dict()))
  assert read(f"--config={folder / 'config.json'}") == cfg
  with pytest.raises(UserError, match="config.json:alignment: has no experiments"):
    read(f"--config={folder / 'config.json'}:alignment")
  (folder / "my.py").write_text("from configs.demo import get_config\n")
  changed = read(f"--config={folder / 'my.py'}:alignment")
  assert changed.reward_fn == "color_alignment"


@pytest.mark.parametrize("arguments,message", [
    ([], "--config is missing"),
    (["--config=configs/none.py"], "does not exist"),
    ([f"--config={DEMO}:foo"], "compressibility, incompressibility"),
    ([f"--config={ROOT / 'configs' / 'base.py'}:foo"], "has no experiments"),
    ([f"--config={DEMO}", "--config.sample.batchsize=2"], "batch_size"),
    ([f"--config={DEMO}", "--config.sampel.batch_size=2"],
     r"sampel.batch_size is not a field; did you mean sample.batch_size\?"),
    ([f"--config={DEMO}", "--config.sample.batch_size=two"], "'two'"),
    ([f"--config={DEMO}", "--config.use_lora=3"], "use_lora"),
    ([f"--config={DEMO}", "--config.seed"], "has no value"),
    ([f"--config={DEMO}", "--confg=3"], "'--confg=3' is not an option"),
    ([f"--config={DEMO}", "--config.=3"], "'--config.=3' is not an option"),
    ([f"--config={DEMO}", "--config.items=3"], "items is not a field"),
    ([f"--config={DEMO}", "--config.sample={'steps': 3}"], "sample.steps is not a field"),
    ([f"--config={DEMO}", "--config.sample=3"], "sample=3 must be a group of fields"),
    ([f"--config={DEMO}", "--config.per_prompt_stat_tracking=on"],
     "per_prompt_stat_tracking='on' must be a group of fields, or None"),
    ([f"--config={'x' * 300}"], "does not exist"),
    ([f"--config={ROOT / 'configs'}"], "configs' is a folder; must be a config file such as"),
    ([f"--config={DEMO}", "extra"], "'extra' is not an option"),
    ([f"--config={DEMO}", "x" * 5000], "^'x{119}… is not an option"),
    ([f"--config={DEMO}", "--config.sample.eta=0.0"], r"sample.eta=0.0 must be in \(0, 1\]"),
])
def test_mistakes(arguments, message):
  with pytest.raises(UserError, match=message) as error:
    read(*arguments)
  assert "\n" not in str(error.value)


def test_a_runs_folder_is_not_its_config(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(UserError, match=f"is a folder; must be {tmp_path}/config.json$"):
    read(f"--config={tmp_path}")


def test_other_scripts_have_other_options(capsys):
  with pytest.raises(UserError, match="'--round' is not an option; .* and those that --help lists"):
    cli.read_config(["benchmark.py", f"--config={DEMO}", "--round", "3"], "those that --help lists")


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
])
def test_one_line_and_exit_status_2(argument, message, tmp_path, monkeypatch, capsys):
  """Before any model is loaded, and leaving no run folder behind."""
  monkeypatch.setattr("ddpo_jax.train.build", lambda *args: pytest.fail("work began"))
  assert cli.main(["train.py", f"--config={DEMO}", argument,
                   f"--config.logdir={tmp_path / 'logs'}"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line
  assert not (tmp_path / "logs").exists()


def test_process_says_one_line_and_exits_2(tmp_path):
  done = subprocess.run(
      [sys.executable, str(ROOT / "scripts" / "train.py"), f"--config={DEMO}",
       "--config.reward_fn=no_such_module:f", f"--config.logdir={tmp_path / 'logs'}"],
      cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2
  assert "cannot be imported" in done.stderr and len(done.stderr.splitlines()) == 1
  assert not (tmp_path / "logs").exists()


def test_jax_is_imported_only_once_it_is_needed():
  """Help, and what is wrong with a config, are there at once."""
  modules = ("cli", "benchmark.compare", "benchmark.side", "diagnostics", "interrupt", "report")
  imports = "; ".join(f"import ddpo_jax.{module}" for module in modules)
  done = subprocess.run(
      [sys.executable, "-c", f"import sys; {imports}; print(sorted(sys.modules))"], cwd=ROOT,
      capture_output=True, text=True, check=True)
  assert not {"'jax'", "'flax'", "'torch'"} & set(done.stdout.strip("[]\n").split(", "))


def test_none_takes_a_functions_arguments_away():
  cfg = read("--config", f"{DEMO}:incompressibility", "--config.reward_kwargs.strength=2.5",
             "--config.reward_kwargs=none")
  assert cfg.reward_kwargs == {}
