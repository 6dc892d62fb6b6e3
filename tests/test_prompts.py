"""Prompt functions: what they draw, that it repeats, and what they refuse."""

import os
import sys

import numpy as np
import pytest

from ddpo_jax.errors import UserError
from ddpo_jax.prompts import draw_prompts, get_prompt_fn, load_lines


def two_words(rng, words=("red", "blue")):
  return f"{rng.choice(words)} {rng.integers(100)}", {"n": 1}


@pytest.mark.parametrize("name,count,first,last", [
    # Two classes are called "crane": the bird and the machine.
    ("imagenet_all", 999, "tench, Tinca tinca", None),
    ("imagenet_animals", 398, "tench, Tinca tinca", None),
    ("imagenet_dogs", 118, "Chihuahua", "Mexican hairless"),
    ("simple_animals", None, "ant", "zebra"),
])
def test_lists(name, count, first, last):
  prompts, metadata = draw_prompts(get_prompt_fn(name), 0, 0, range(3 * (count or 50)))
  lines = load_lines("imagenet_classes.txt" if "imagenet" in name else f"{name}.txt")
  assert set(prompts) <= set(lines) and set(map(str, metadata)) == {"{}"}
  everything = draw_prompts(get_prompt_fn(name), 1, 0, range(12_000))[0]
  seen = set(everything)
  assert len(seen) == (count or len(lines))
  assert first in seen
  if last:
    assert any(prompt.startswith(last) for prompt in seen)


def test_prompts_are_a_function_of_seed_epoch_and_index():
  function = get_prompt_fn("tiny_shapes")
  whole = draw_prompts(function, 3, 5, range(16))[0]
  parts = draw_prompts(function, 3, 5, range(8, 16))[0]
  assert whole[8:] == parts
  assert draw_prompts(function, 3, 6, range(16))[0] != whole
  assert draw_prompts(function, 4, 5, range(16))[0] != whole


@pytest.mark.parametrize("drawn,said", [("text", "a str"), (None, "a NoneType"),
                                        ((None, {}), "a NoneType and a dict")])
def test_what_no_prompt_is_names_the_sample(drawn, said):
  with pytest.raises(UserError, match=f"for sample 3 of epoch 1, returned {said}; must"):
    draw_prompts(lambda rng: drawn, 0, 1, [3])


def test_a_prompt_is_text_that_can_be_written_down():
  with pytest.raises(UserError, match="for sample 3 of epoch 1, returned 'a .*UTF-8"):
    draw_prompts(lambda rng: ("a \ud83d", {}), 0, 1, [3])


def test_a_prompt_function_that_exits_is_an_error():
  with pytest.raises(RuntimeError, match="^prompt_fn, for sample 3 of epoch 1, raised SystemExit"):
    draw_prompts(lambda rng: sys.exit(0), 0, 1, [3])


def test_a_prompt_function_that_finds_nothing_is_an_error():
  """As if there were no more samples, the others were left out."""
  nothing = lambda rng: next(name for name in ("cat", "dog") if name == "cow")
  with pytest.raises(RuntimeError, match="^prompt_fn, for sample 3 of epoch 1, raised StopIter"):
    draw_prompts(nothing, 0, 1, [3])


def test_file_by_path(tmp_path):
  """The reference crashes on any file that is not its own."""
  path = tmp_path / "prompts.txt"
  path.write_text("a cat\n\n  a dog \na cow\n")
  function = get_prompt_fn("from_file", path=str(path), low=1)
  assert set(draw_prompts(function, 0, 0, range(20))[0]) == {"a dog", "a cow"}


@pytest.mark.parametrize("content", ("\ufeffa cat\r\na\u2028dog", "a cat\n\na\u2028dog\r\n"))
def test_files_of_any_editor(tmp_path, content):
  path = tmp_path / "prompts.txt"
  path.write_bytes(content.encode())
  function = get_prompt_fn("from_file", path=str(path))
  assert set(draw_prompts(function, 0, 0, range(20))[0]) == {"a cat", "a\u2028dog"}


@pytest.mark.parametrize("content", ("", "\n \n"))
def test_empty_file_is_refused(tmp_path, content):
  path = tmp_path / "prompts.txt"
  path.write_text(content)
  with pytest.raises(UserError, match="is empty"):
    get_prompt_fn("from_file", path=str(path))(np.random.default_rng(0))


def test_missing_unreadable_and_out_of_range_files(tmp_path):
  rng = np.random.default_rng(0)
  binary = tmp_path / "image.jpg"
  binary.write_bytes(b"\xff\xd8\xff\xe0")
  for kwargs, message in (({"path": "no_such.txt"}, "path='no_such.txt' does not exist"),
                          ({"path": "../assets/simple_animals.txt"}, "does not exist"),
                          ({"path": str(tmp_path)}, "path='.*' is a folder; must be a text"),
                          ({"path": "x" * 300}, "does not exist"),
                          ({"path": str(binary)}, "cannot be read as text"),
                          ({"path": "simple_animals.txt", "low": 47},
                           "low=47 and high=None leave no line of .* 0 to 46"),
                          ({"path": "simple_animals.txt", "high": 48}, "high=48 must be in 0..47"),
                          ({"path": "simple_animals.txt", "low": -1}, "low=-1 must be in 0..47")):
    with pytest.raises(UserError, match=message) as error:
      get_prompt_fn("from_file", **kwargs)(rng)
    assert str(error.value).startswith("prompt_fn_kwargs.")


def test_a_pipe_is_read_where_nothing_is_resumed():
  """As a shell makes of sample.py --prompts_file <(command)."""
  end, other = os.pipe()
  os.write(other, b"a cat\n")
  os.close(other)
  with pytest.raises(UserError, match="^prompt_fn_kwargs.path='/dev/fd/.*' is a pipe"):
    get_prompt_fn("from_file", path=f"/dev/fd/{end}")(np.random.default_rng(0))
  assert load_lines(f"/dev/fd/{end}") == ["a cat"]
  os.close(end)


@pytest.mark.parametrize("name,kwargs,field", [
    ("nouns_activities", {"nouns_file": "no.txt", "activities_file": "activities_v0.txt"},
     "nouns_file='no.txt' does not exist"),
    ("nouns_activities", {"nouns_file": "simple_animals.txt", "activities_file": "no.txt"},
     "activities_file='no.txt' does not exist"),
    ("counting", {"nouns_file": "no.txt", "low": 1, "high": 2}, "nouns_file='no.txt'"),
    ("counting", {"nouns_file": "simple_animals.txt", "low": 3, "high": 2},
     "low=3 must be at least 0, and at most high=2"),
    ("tiny_shapes", {"pool": -1}, "pool=-1 must be at least 0"),
])
def test_the_argument_that_is_wrong_is_named(name, kwargs, field):
  with pytest.raises(UserError) as error:
    get_prompt_fn(name, **kwargs)(np.random.default_rng(0))
  assert str(error.value).startswith(f"prompt_fn_kwargs.{field}")


def test_short_prompts_ask_for_the_same():
  for seed in range(20):
    usual, data = get_prompt_fn("tiny_shapes")(np.random.default_rng(seed))
    short, same = get_prompt_fn("tiny_shapes", short=True)(np.random.default_rng(seed))
    assert data == same and usual == f"{short} background"
    assert short.endswith(data["background"])


def test_counting_and_activities(tmp_path):
  nouns, activities = tmp_path / "nouns.txt", tmp_path / "activities.txt"
  nouns.write_text("otter\n")
  activities.write_text("riding a bike\n")
  rng = np.random.default_rng(0)
  prompt, _ = get_prompt_fn("nouns_activities", nouns_file=str(nouns),
                            activities_file=str(activities))(rng)
  assert prompt == "an otter riding a bike"
  prompt, metadata = get_prompt_fn("counting", nouns_file=str(nouns), low=2, high=2)(rng)
  assert prompt == "two otters"
  assert metadata["answers"] == ["two", "otter"] and len(metadata["questions"]) == 2


def test_users_own():
  prompt, metadata = get_prompt_fn(f"{__name__}:two_words", words=("green",))(
      np.random.default_rng(0))
  assert prompt.startswith("green ") and metadata == {"n": 1}


def typed(rng, count: int = 1, scale: float = 1.0, name: "str | None" = None, flag=False,
          size=2, other: "NoSuchType" = 3, **rest):  # noqa: F821
  return f"{count} {scale} {name} {flag} {size} {other} {rest}", {}


def half_typed(rng, count: int = 1, flag: bool = False, late: int = None, size=2):
  return f"{count} {flag} {late} {size}", {}


@pytest.mark.parametrize("name,kwargs,message", [
    ("tiny_shapes", {"max_count": "two"}, "max_count='two' must be of type int"),
    ("tiny_shapes", {"short": "no"}, "short='no' must be of type bool"),
    ("tiny_shapes", {"pool": 2.0}, "pool=2.0 must be of type int"),
    ("from_file", {"path": 123}, "path=123 must be of type str"),
    ("from_file", {"path": "x", "low": "1"}, "low='1' must be of type int or None"),
    (f"{__name__}:half_typed", {"size": "3"}, "size='3' must be of type int"),
    (f"{__name__}:half_typed", {"count": None}, "count=None must be of type int"),
    (f"{__name__}:half_typed", {"count": True}, "count=True must be of type int"),
])
def test_arguments_of_a_wrong_type_are_refused(name, kwargs, message):
  with pytest.raises(UserError) as error:
    get_prompt_fn(name, **kwargs)
  assert str(error.value) == f"prompt_fn_kwargs.{message} (prompt_fn={name!r})"


@pytest.mark.parametrize("function,kwargs", [
    ("half_typed", {"late": None, "size": 2.5, "flag": True}), ("half_typed", {"late": 3}),
    ("typed", {"other": "x", "anything": "x", "size": [1], "flag": 1}),
])
def test_arguments_that_may_do_are_taken(function, kwargs):
  assert get_prompt_fn(f"{__name__}:{function}", **kwargs)(np.random.default_rng(0))[0]


def no_generator():
  return "a cat", {}


def test_what_a_prompt_function_must_take_is_said():
  with pytest.raises(UserError, match=r"takes \(\); must take \(rng\) first$"):
    get_prompt_fn(f"{__name__}:no_generator")


@pytest.mark.parametrize("name,message", [
    ("bad:", "'' is not a function's name; must be such as 'bad:function'"),
    ("bad:a.b", "'a.b' is not a function's name; must be such as 'bad:function'"),
    ("./bad.py:", "'./bad.py' is not a module's name; must be such as 'bad:function'"),
])
def test_what_is_no_function_of_a_module(name, message):
  with pytest.raises(UserError) as error:
    get_prompt_fn(name)
  assert str(error.value) == f"prompt_fn={name!r} cannot be imported: {message}"


def test_arguments_that_a_function_takes_are_named():
  with pytest.raises(UserError, match="'max_count'; it takes: path, low, high$"):
    get_prompt_fn("from_file", path="x", max_count=1)
  with pytest.raises(UserError, match="it takes: none$"):
    get_prompt_fn("simple_animals", path="x")


@pytest.mark.parametrize("module,source,message", [
    ("./rw.py", "", r"'\./rw\.py' is not a module's name; must be such as 'rw:f'"),
    ("folder/rw", "", "must be such as 'folder.rw:f'"),
    ("rw.py", "", "must be such as 'rw:f'"),
    ("", "", "must be such as 'package.module:f'"),
    ("mine_nowhere", None, r"No module named 'mine_nowhere' \(PYTHONPATH=\. finds modules"),
    ("mine_syntax", "\ndef f(:\n", r"SyntaxError: .*mine_syntax\.py, line 2\)"),
    ("mine_name", "\n\nnope\n", r"NameError: name 'nope' .*mine_name\.py, line 3\)"),
    ("mine_import", "import no_such\n", r"No module named 'no_such' .*import\.py, line 1\)"),
    ("mine_exit", "import sys\nsys.exit(0)\n", r"SystemExit: 0 .*mine_exit\.py, line 2\)"),
    ("mine_empty", "", "has no attribute 'f'$"),
])
def test_modules_that_cannot_be_imported(tmp_path, monkeypatch, module, source, message):
  if source is not None and module.isidentifier():
    (tmp_path / f"{module}.py").write_text(source)
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(UserError, match=message) as error:
    get_prompt_fn(f"{module}:f")
  assert str(error.value).startswith(f"prompt_fn='{module}:f' cannot be imported: ")
  assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name,kwargs", [
    ("nope", {}), ("no_such_module:f", {}), (f"{__name__}:nope", {}),
    ("from_file", {}), ("tiny_shapes", {"path": "x"}), (":f", {}),
])
def test_what_cannot_be_called_is_refused(name, kwargs):
  with pytest.raises(UserError, match="prompt_fn"):
    get_prompt_fn(name, **kwargs)


def test_pool_of_tiny_shapes():
  function = get_prompt_fn("tiny_shapes", max_count=1, pool=4)
  prompts = draw_prompts(function, 0, 0, range(60))[0]
  assert 1 < len(set(prompts)) <= 4
  assert set(draw_prompts(function, 9, 3, range(60))[0]) == set(prompts)
  assert all(prompt.startswith(("a ", "an ")) for prompt in prompts)
  with pytest.raises(UserError, match="max_count=5"):
    get_prompt_fn("tiny_shapes", max_count=5)(np.random.default_rng(0))
