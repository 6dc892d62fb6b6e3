"""The reader of the aesthetic predictor's file: its numbers, and what it refuses."""

import hashlib
import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from conftest import SHARED_DATA
from ddpo_jax.rewards.aesthetic_head import SHA256, load_head
from ddpo_jax.types import UserError

torch = pytest.importorskip("torch")
PUBLIC = SHARED_DATA / "sac+logos+ava1-l14-linearMSE.pth"


@pytest.fixture
def head(tmp_path):
  """A small head in a file as torch writes it: (path, its state dict)."""
  torch.manual_seed(0)
  state = {"layers.0.weight": torch.randn(5, 8), "layers.0.bias": torch.randn(5),
           "layers.2.weight": torch.randn(1, 5), "layers.2.bias": torch.randn(1)}
  torch.save(state, tmp_path / "head.pth")
  return tmp_path / "head.pth", state


@pytest.mark.skipif(not PUBLIC.exists(), reason="the public predictor's file is not here")
def test_public_head_gives_the_references_scores(golden):
  arrays = golden("d_aesthetic_head")
  weight, bias = load_head(PUBLIC)
  scores = arrays["embeds"].astype(np.float64) @ weight + bias
  np.testing.assert_allclose(scores, arrays["scores_f64"], rtol=1e-6)


def test_layers_become_one_map(head):
  path, state = head
  weight, bias = load_head(path, sha256=None)
  x = torch.randn(4, 8)
  hidden = x @ state["layers.0.weight"].T + state["layers.0.bias"]
  expected = hidden @ state["layers.2.weight"].T + state["layers.2.bias"]
  np.testing.assert_allclose(x.numpy() @ weight + bias, expected[:, 0], rtol=1e-5)


def test_another_file_is_refused_by_its_hash(head):
  path, _ = head
  with pytest.raises(UserError, match=f"must be {SHA256}"):
    load_head(path)
  load_head(path, hashlib.sha256(path.read_bytes()).hexdigest().upper())


class Evil:
  def __init__(self, *call):
    self._call = call

  def __reduce__(self):
    return self._call


@pytest.mark.parametrize("name,call", [
    ("system", (os.system, ("touch {marker}",))), ("eval", (eval, ("open({marker!r}, 'w')",))),
    ("getattr", (getattr, (os, "system"))), ("numpy", (np.ones, (3,)))])
def test_hostile_pickles_run_nothing(tmp_path, name, call):
  marker = tmp_path / "marker"
  function, arguments = call
  arguments = tuple(a.format(marker=str(marker)) if isinstance(a, str) else a
                    for a in arguments)
  content = pickle.dumps({"layers.0.weight": Evil(function, arguments)}) if name != "getattr" \
      else b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR."
  write_archive(tmp_path / "evil.pth", content)
  with pytest.raises(UserError, match="which was not loaded"):
    load_head(tmp_path / "evil.pth", sha256=None)
  assert not marker.exists()


def write_archive(path, content, **storages):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", content)
    for key, data in storages.items():
      archive.writestr(f"archive/data/{key.removeprefix('_')}", data)


def test_every_cut_off_file_is_refused(head, tmp_path):
  data = head[0].read_bytes()
  for end in range(0, len(data), 97):
    (tmp_path / "cut.pth").write_bytes(data[:end])
    with pytest.raises(UserError):
      load_head(tmp_path / "cut.pth", sha256=None)


def test_damaged_bytes_never_crash(head, tmp_path):
  """Flipped bytes give the declared error, or numbers; never another exception."""
  data, rng = head[0].read_bytes(), np.random.default_rng(0)
  for _ in range(500):
    damaged = bytearray(data)
    for position in rng.integers(len(data), size=rng.integers(1, 6)):
      damaged[position] = rng.integers(256)
    (tmp_path / "bad.pth").write_bytes(damaged)
    try:
      load_head(tmp_path / "bad.pth", sha256=None)
    except UserError as error:
      assert "\n" not in str(error)


def repack(source, target, change):
  """Copies an archive with its members changed by `change(name, content)`."""
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
    for name in old.namelist():
      content = change(name, old.read(name))
      if content is not None:
        new.writestr(name, content)


@pytest.mark.parametrize("change,message", [
    (lambda n, c: c[:-4] if n.endswith("data/0") else c, "storage 0 has 156 bytes"),
    (lambda n, c: c + b"1234" if n.endswith("data/0") else c, "bytes; must have"),
    (lambda n, c: None if n.endswith("data/1") else c, "cannot be read"),
    (lambda n, c: None if n.endswith("data.pkl") else c, "no data.pkl"),
    (lambda n, c: b" " * 70000 if n.endswith("data.pkl") else c, "70000 bytes"),
    (lambda n, c: c.replace(b"FloatStorage", b"DoubleStorag") if n.endswith(".pkl") else c,
     "DoubleStorag"),
])
def test_wrong_members(head, tmp_path, change, message):
  repack(head[0], tmp_path / "new.pth", change)
  with pytest.raises(UserError, match=message):
    load_head(tmp_path / "new.pth", sha256=None)


@pytest.mark.parametrize("state,message", [
    ({"other": torch.zeros(2, 2)}, "must have layers.N.weight"),
    ({"layers.0.weight": torch.zeros(1, 2)}, "must have layers.N.weight"),
    ({"layers.0.weight": torch.zeros(3, 2), "layers.0.bias": torch.zeros(3)}, "do not fit"),
    ({"layers.0.weight": torch.zeros(1, 2).half(), "layers.0.bias": torch.zeros(1)},
     "HalfStorage"),
    ({"layers.0.weight": torch.zeros(4, 1).T, "layers.0.bias": torch.zeros(1)}, ""),
    ([torch.zeros(2)], "named tensors"), ({}, "must have layers"),
])
def test_other_contents(tmp_path, state, message):
  torch.save(state, tmp_path / "x.pth")
  if not message:  # transposed, but of one row: still contiguous in effect
    load_head(tmp_path / "x.pth", sha256=None)
    return
  with pytest.raises(UserError, match=message):
    load_head(tmp_path / "x.pth", sha256=None)


def test_a_tensor_outside_its_storage(tmp_path, head):
  buffer = io.BytesIO()
  torch.save({"layers.0.weight": torch.zeros(6, 1).T.expand(2, 6).T}, buffer)
  (tmp_path / "strided.pth").write_bytes(buffer.getvalue())
  with pytest.raises(UserError, match="does not lie in its storage"):
    load_head(tmp_path / "strided.pth", sha256=None)
