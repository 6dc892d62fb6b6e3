"""Bytes from strangers: whatever they are, the declared error or a right result, and no code run.

    pytest tests/test_fuzz.py                               # a few seconds for each
    pytest tests/test_fuzz.py --hypothesis-profile=long     # 20,000 inputs for each
"""

import hashlib
import io
import json
import pathlib
import pickle
import struct
import tempfile

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
from safetensors.numpy import save

from configs import base
from ddpo_jax import cli, lora, model_size, prompts, validation
from ddpo_jax.config import inspect_config, resolve
from ddpo_jax.errors import UserError
from ddpo_jax.models import hub
from ddpo_jax.rewards import aesthetic_head, llava, remote

ROOT = pathlib.Path(__file__).parents[1]

RAN = []


class Code:
  """Its pickle calls a function when it is read."""

  def __reduce__(self):
    return RAN.append, (1,)


@pytest.fixture(autouse=True)
def no_code_ran():
  yield
  assert not RAN


@pytest.fixture(scope="module")
def file():
  """One path, in memory where there is such a folder: it is written thousands of times."""
  shm = pathlib.Path("/dev/shm")
  with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
    yield pathlib.Path(folder) / "bytes"


def damaged(whole):
  """Bytes of all kinds: a valid file with some exchanged, cut off or put in; or any."""
  def change(data):
    bytes_, edits, cut = data
    result = bytearray(bytes_)
    for place, new in edits:
      at = place % (len(result) + 1)
      result[at:at + len(new)] = new
    return bytes(result[:cut] if cut is not None else result)
  edits = st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=8)),
                   max_size=6)
  cut = st.none() | st.integers(0, 2**12)
  changed = st.tuples(st.sampled_from(whole), edits, cut).map(change)
  return st.one_of(changed, changed, st.binary(max_size=300))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=3), max_leaves=8)


# ---- safetensors: headers and indices ----


entries = st.dictionaries(
    st.sampled_from(["__metadata__", "a", "b.weight", "../c", ""]),
    json_values | st.fixed_dictionaries({
        "dtype": st.sampled_from(["F32", "F16", "I64", "BOOL", "X", "F8_E4M3"]),
        "shape": st.lists(st.integers(-1, 2**64), max_size=3) | st.just([2]),
        "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3) | st.just([0, 8])}),
    max_size=3)


def with_header(header, data=b"\0" * 8):
  text = json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + data


@given(content=damaged([save({"a": np.ones(2, np.float32)}),
                        save({"b.weight": np.ones((2, 3), np.float16)})])
       | entries.map(with_header))
def test_safetensors_header(file, content):
  file.write_bytes(content)
  try:
    model_size.read_header("lora.init_from", file)
  except UserError as error:
    assert "lora.init_from" in str(error)


@given(content=damaged([b'{"weight_map": {"a": "x.safetensors", "b": "../y.safetensors"}}'])
       | json_values.map(lambda v: json.dumps({"weight_map": v}).encode())
       | st.dictionaries(st.text(max_size=4), st.sampled_from(
           ["../x.safetensors", "/etc/passwd.safetensors", "..", "a/b.safetensors",
            "x.safetensors", "\0.safetensors", "x" * 300 + ".safetensors"])
           | json_values).map(lambda v: json.dumps({"weight_map": v}).encode()))
def test_safetensors_index(file, content):
  index = file.parent / "model.safetensors.index.json"
  index.write_bytes(content)
  try:
    found = hub._shards(index)
  except UserError:
    return
  assert all(path.parent == file.parent for path in found)


# ---- LoRA files ----


@pytest.fixture(scope="module")
def unet(tiny_sd):
  return tiny_sd.unet


@pytest.fixture(scope="module")
def lora_names(unet):
  return [name for name, _ in lora.attention_projections(unet)]


@given(data=st.data())
def test_lora_file(file, unet, lora_names, data):
  shape = st.lists(st.integers(0, 5), max_size=3).map(tuple)
  suffix = st.sampled_from([".lora_A.weight", ".lora_B.weight", ".alpha", ".lora.down.weight",
                            ""])
  name = st.builds(lambda a, b: f"unet.{a}{b}", st.sampled_from(lora_names[:3]), suffix)
  tensors = st.dictionaries(name | st.text(max_size=5), shape.map(
      lambda s: np.full(s, np.nan, np.float32)), max_size=4).map(save)
  file.write_bytes(data.draw(tensors | damaged(
      [save({f"unet.{lora_names[0]}.lora_A.weight": np.ones((2, 3), np.float32)})])))
  with pytest.raises(UserError):  # none of them has all the weights
    lora.import_lora(unet, file)


# ---- the head's file and a server's reply: pickles ----


@pytest.fixture(scope="module")
def whole_head():
  torch = pytest.importorskip("torch")
  stream = io.BytesIO()
  torch.save({"layers.0.weight": torch.ones(1, 3), "layers.0.bias": torch.zeros(1)}, stream)
  return stream.getvalue()


@given(data=st.data())
def test_head_file(whole_head, data):
  content = data.draw(damaged([whole_head, pickle.dumps(Code()), pickle.dumps({"a": Code()})]))
  try:
    tensors = aesthetic_head.read_tensors(content, "head")
  except UserError:
    return
  assert all(isinstance(array, np.ndarray) for array in tensors.values())


opcodes = st.lists(st.sampled_from(
    [b"(", b".", b"0", b"1", b"2", b"}", b"]", b")", b"l", b"d", b"t", b"s", b"u", b"a", b"e",
     b"N", b"K\x01", b"M\xff\xff", b"X\x01\0\0\0x", b"cos\nsystem\n", b"R", b"b", b"o",
     b"q\0", b"h\0", b"r\xff\xff\xff\x7f", b"p2147483647\n", b"Q", b"Pid\n", b"\x80\x04",
     b"\x93", b"\x94", b"\x8a\xff", b"\x8c\x01o", b"I01\n", b"L99999999999999999999L\n"]),
    max_size=20).map(b"".join)


@given(content=opcodes.map(lambda ops: b"\x80\x04" + ops + b".") | damaged(
    [pickle.dumps({"outputs": [["a"]], "recall": [[0.5]]}), pickle.dumps(Code()),
     pickle.dumps({"outputs": Code()}), pickle.dumps({"outputs": np.ones(2)})]))
def test_server_reply(content):
  try:
    reply = llava.read_reply(content)
    table = llava._table(reply, "outputs", llava._text, 1, 1)
  except remote.ReplyError as error:
    assert len(str(error)) < 2000
    return
  assert isinstance(table[0][0], str)


# ---- prompt files ----


@given(content=st.binary(max_size=200) | st.text(max_size=80).map(
    lambda text: text.encode("utf-8", "surrogatepass")))
def test_prompt_file(file, content):
  file.write_bytes(content)
  prompts.load_lines.cache_clear()
  try:
    lines = prompts.load_lines(str(file))
  except UserError as error:
    assert "prompt file" in str(error)
    return
  assert lines and all(line == line.strip() and line for line in lines)


# ---- configs ----


def _names(values, prefix=""):
  for name, value in values.items():
    yield prefix + name
    if isinstance(value, dict):
      yield from _names(value, f"{prefix}{name}.")


FIELDS = sorted(_names(base.get_config().to_dict()))


@given(changes=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), json_values
                               | st.sampled_from([10**5000, "~x", "\0", "a/b", "x" * 5000]),
                               min_size=1, max_size=3))
def test_config_values(changes):
  values = base.get_config().to_dict()
  for field, value in changes.items():
    group = values
    *groups, name = field.split(".")
    for each in groups:
      group = group.get(each) if isinstance(group, dict) else None
    if isinstance(group, dict):
      group[name] = value
  try:
    resolve(values)
  except UserError as error:
    assert all(len(line) < 1000 for line in str(error).splitlines())
  inspect_config(values)


@given(arguments=st.lists(st.builds(
    lambda name, sign, value: f"--config.{name}{sign}{value}",
    st.sampled_from(FIELDS) | st.text(max_size=5), st.sampled_from(["=", "", " "]),
    st.text(max_size=10) | st.sampled_from(["{", "{'a': 1}", "None", "-1", "1e999", "[1]",
                                            "9" * 5000, "(" * 300])),
    min_size=1, max_size=2))
def test_config_overrides(monkeypatch_module, arguments):
  try:
    cli.read_config(["train.py", f"--config={ROOT / 'configs' / 'base.py'}", *arguments])
  except UserError as error:
    assert str(error)


@pytest.fixture(scope="module")
def monkeypatch_module():
  """What lies outside of the config is not looked at a thousand times."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(validation, "other_problems", lambda cfg, wrong: [])
    yield patch


def test_the_hash_of_a_head_is_asked_for_first(file):
  """A file that is not the one expected is not even looked into."""
  file.write_bytes(pickle.dumps(Code()))
  with pytest.raises(UserError, match="SHA-256"):
    aesthetic_head.load_aesthetic_head(file, hashlib.sha256(b"").hexdigest())
