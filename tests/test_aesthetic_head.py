"""The aesthetic head against its golden scores, and every way its file can be wrong."""

import collections
import hashlib
import io
import os
import pathlib
import pickle
import unittest.mock
import zipfile

import conftest
import huggingface_hub
import numpy as np
import pytest

from ddpo_jax.errors import UserError
from ddpo_jax.rewards import aesthetic_head
from ddpo_jax.rewards.aesthetic_head import load_aesthetic_head, read_tensors

PUBLIC = conftest.SHARED_DATA / "sac+logos+ava1-l14-linearMSE.pth"
needs_public_file = pytest.mark.skipif(
    not PUBLIC.is_file(), reason=f"needs the public head's file as {PUBLIC}")
WIDTHS = (6, 5, 4, 1)  # inputs, layers' outputs


def sha256(path):
  return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def make_layers(seed=0):
  """The tensors of a small head: linear layers at 0, 2, 4, as dropout is in between."""
  rng = np.random.default_rng(seed)
  return {f"layers.{2 * i}.{part}": rng.normal(size=shape).astype(np.float32)
          for i, (n, m) in enumerate(zip(WIDTHS[:-1], WIDTHS[1:]))
          for part, shape in (("weight", (m, n)), ("bias", (m,)))}


class Stub:
  """Pickles as the call of a global of another name, which pickle itself cannot write."""

  def __init__(self, name, *args):
    self.name, self.args = name, args


class TorchPickler(pickle._Pickler):
  """Writes, in Python and without torch, the pickle that torch writes; protocol 2."""

  def __init__(self, file):
    super().__init__(file, protocol=2)

  def save(self, obj, save_persistent_id=True):
    if isinstance(obj, Stub):
      self.write(b"c" + obj.name.replace("/", "\n").encode() + b"\n")
      if obj.args:
        super().save(obj.args[0])
        self.write(b"R")
    else:
      super().save(obj, save_persistent_id)

  def persistent_id(self, obj):
    return obj.pid if isinstance(obj, Storage) else None


class Storage:

  def __init__(self, *pid):
    self.pid = pid


def tensor(key, shape, *, strides=None, offset=0, kind="torch/FloatStorage", size=None,
           function="torch._utils/_rebuild_tensor_v2", tag="storage", hooks=None):
  """A tensor as torch describes it, or with something wrong about it."""
  contiguous = tuple(int(np.prod(shape[i + 1:])) for i in range(len(shape)))
  storage = Storage(tag, Stub(kind), key, "cuda:0",
                    int(np.prod(shape)) if size is None else size)
  return Stub(function, (storage, offset, shape, contiguous if strides is None else strides,
                         False, collections.OrderedDict() if hooks is None else hooks))


def write(content, members=(), *, compression=zipfile.ZIP_STORED, folder="archive"):
  """A torch file: `content` is an object to pickle, or a pickle's bytes."""
  if not isinstance(content, bytes):
    buffer = io.BytesIO()
    TorchPickler(buffer).dump(content)
    content = buffer.getvalue()
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w", compression) as archive:
    archive.writestr(f"{folder}/data.pkl", content)
    for name, data in dict(members).items():
      archive.writestr(f"{folder}/{name}", data)
  return buffer.getvalue()


def write_layers(layers, **kwargs):
  described = {name: tensor(str(i), array.shape) for i, (name, array) in
               enumerate(layers.items())}
  members = {f"data/{i}": array.tobytes() for i, array in enumerate(layers.values())}
  return write(collections.OrderedDict(described), {**members, "version": "3\n"}, **kwargs)


def load(data, tmp_path):
  """Loads a head from a file whose hash the user vouches for."""
  path = tmp_path / "head.pth"
  path.write_bytes(data)
  return load_aesthetic_head(path, sha256(path))


@needs_public_file
def test_golden(golden):
  arrays = golden("d_aesthetic_head")
  head = load_aesthetic_head(PUBLIC)
  assert head.in_features == 768
  assert [k.shape[1] for k in head.kernels] == [1024, 128, 64, 16, 1]
  error = np.abs(np.asarray(head(arrays["embeds"]), np.float64) - arrays["scores_f64"]).max()
  print(f"aesthetic head: largest error {error:.2e}")
  assert error < 1e-5


@needs_public_file
def test_public_file_as_torch_reads_it():
  torch = pytest.importorskip("torch")
  ours = read_tensors(PUBLIC.read_bytes(), PUBLIC)
  expected = torch.load(PUBLIC, map_location="cpu", weights_only=True)
  assert list(ours) == list(expected)
  for name, array in ours.items():
    np.testing.assert_array_equal(array, expected[name].numpy())


def test_layers_in_their_order(tmp_path):
  """By number, whatever the order in the file."""
  layers = make_layers()
  head = load(write_layers(dict(reversed(layers.items()))), tmp_path)
  x = np.random.default_rng(1).normal(size=(3, WIDTHS[0])).astype(np.float32)
  expected = x
  for i in (0, 2, 4):
    expected = expected @ layers[f"layers.{i}.weight"].T + layers[f"layers.{i}.bias"]
  np.testing.assert_allclose(head(x), expected[:, 0], rtol=1e-5)


def test_files_that_torch_writes(tmp_path):
  """With the attributes of a state dict; two tensors may share a storage."""
  torch = pytest.importorskip("torch")
  torch.manual_seed(0)
  model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 1))
  state = torch.nn.ModuleDict({"layers": model}).state_dict()
  assert state._metadata
  torch.save(state, tmp_path / "head.pth")
  head = load_aesthetic_head(tmp_path / "head.pth", sha256(tmp_path / "head.pth"))
  x = torch.randn(5, 6)
  np.testing.assert_allclose(head(x.numpy()), model(x)[:, 0].detach(), atol=1e-6)

  shared = torch.arange(12, dtype=torch.float32)
  torch.save({"a": shared[2:8].reshape(2, 3), "b": shared[8:]}, tmp_path / "shared.pth")
  arrays = read_tensors((tmp_path / "shared.pth").read_bytes(), "shared.pth")
  np.testing.assert_array_equal(arrays["a"], [[2, 3, 4], [5, 6, 7]])
  np.testing.assert_array_equal(arrays["b"], [8, 9, 10, 11])


class Hostile:

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


def protocol_0(mark):
  return f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()


@pytest.mark.parametrize("make", [
    lambda mark: pickle.dumps({"layers.0.weight": Hostile(os.system, f"touch {mark}")}, 2),
    lambda mark: pickle.dumps(Hostile(os.system, f"touch {mark}")),
    lambda mark: pickle.dumps(Hostile(eval, f"open({str(mark)!r}, 'w')"), 2),
    lambda mark: pickle.dumps(Hostile(exec, f"open({str(mark)!r}, 'w')"), 2),
    protocol_0,
    # A name beside an allowed one, and one reached through it.
    lambda mark: b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n.",
    lambda mark: b"\x80\x02ccollections\nOrderedDict.fromkeys\n.",
    lambda mark: b"\x80\x02cbuiltins\ngetattr\n.",
    # Operations that tensors do not need: an instance, a name from the stack, an extension.
    lambda mark: b"(S'" + str(mark).encode() + b"'\niposix\nmkdir\n.",
    lambda mark: b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    lambda mark: b"\x80\x02\x82\x01.",
])
def test_hostile_pickles_execute_nothing(make, tmp_path):
  mark = tmp_path / "executed"
  with pytest.raises(UserError, match="tensors do not need"):
    load(write(make(mark)), tmp_path)
  assert not mark.exists()


def test_the_hostile_pickle_would_execute(tmp_path):
  """So that the test above shows something: pickle itself does run it."""
  pickle.loads(protocol_0(tmp_path / "executed"))
  assert (tmp_path / "executed").exists()


def test_what_a_pickle_sets_does_not_last(tmp_path):
  """Attributes of the outer dict cannot stand in for its methods, nor alter ours."""
  pickled = (b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsccollections\n"
             b"OrderedDict\nsb.")  # an OrderedDict whose .items is OrderedDict itself
  assert read_tensors(write(pickled), "file") == {}
  pickled = (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__K\x00sb"
             b"}.")  # the function gets an attribute; the content is an empty dict
  assert read_tensors(write(pickled), "file") == {}
  assert load(write_layers(make_layers()), tmp_path).in_features == WIDTHS[0]


@pytest.mark.parametrize("change,message", [
    (dict(kind="torch/HalfStorage"), "torch.HalfStorage"),
    (dict(kind="collections/OrderedDict"), "not float32"),
    (dict(function="torch._utils/_rebuild_tensor"), "torch._utils._rebuild_tensor,"),
    (dict(tag="module"), "not a storage"),
    (dict(strides=(1, 5)), "strides"),
    (dict(strides=(6,)), "strides"),
    (dict(strides=(0, 0)), "strides"),
    (dict(offset=1), "ends after its storage"),
    (dict(offset=-1), "more than numbers"),
    (dict(shape=(5, -6)), "shape"),
    (dict(shape=(5, 6.0)), "BINFLOAT"),
    (dict(shape=(True, 30)), "shape"),
    (dict(shape=(2**40, 2**40)), "shape"),
    (dict(shape=(1,) * 9), "axes"),
    (dict(size=29), "ends after its storage"),
    (dict(size=31), "has 120 bytes; must be 124"),
    (dict(size=2**40), "without a number or a size"),
    (dict(key="../0"), "without a number or a size"),
    (dict(key="7"), "None bytes"),
    (dict(hooks={"a": 1}), "more than numbers"),
])
def test_wrong_tensors_are_refused(change, message):
  values = dict(key="0", shape=(5, 6), size=30, **{"strides": (6, 1)})
  if "shape" in change:
    values["strides"] = None
    values["size"] = 30
  described = tensor(**{**values, **change})
  with pytest.raises(UserError, match=message) as error:
    read_tensors(write({"layers.0.weight": described}, {"data/0": bytes(120)}), "file")
  assert "\n" not in str(error.value) and "file" in str(error.value)


@pytest.mark.parametrize("change,message", [
    (lambda t: t.pop("layers.2.bias"), "no layers.2.bias"),
    (lambda t: t.update({"layers.2.weight": t["layers.0.weight"]}), "layers.2.weight has"),
    (lambda t: t.update({"layers.2.bias": t["layers.0.bias"]}), "layers.2.bias has"),
    (lambda t: t.update({"layers.4.weight": t["layers.4.weight"][0]}), "layers.4.weight has"),
    (lambda t: [t.pop("layers.4.weight"), t.pop("layers.4.bias")], "4 outputs; must be 1"),
    (lambda t: t.update({"scale": t["layers.0.bias"]}), "'scale'"),
    (lambda t: t.update({"layers.0.bias": np.float32([0, 1, np.nan, 2, 3])}), "not finite"),
    (lambda t: t.clear(), "no layers.0.weight"),
])
def test_wrong_layers_are_refused(change, message, tmp_path):
  layers = make_layers()
  change(layers)
  with pytest.raises(UserError, match=message):
    load(write_layers(layers), tmp_path)


def test_other_content_is_refused():
  for content, message in (([1, 2], "uses EMPTY_LIST"), ({"a": 1}, "a int"),
                           ({3: tensor("0", (1,))}, "holds 3"), ((), "a tuple"),
                           (b"\x80\x02", "cannot be read"), (b"", "cannot be read"),
                           (b"\x80\x02}r\xff\xff\xff\x7f.", "memo index")):
    with pytest.raises(UserError, match=message):
      read_tensors(write(content, {"data/0": bytes(4)}), "file")


def test_every_truncation_is_refused():
  whole = write_layers(make_layers())
  for length in range(0, len(whole), 37):
    with pytest.raises(UserError, match="cannot be read"):
      read_tensors(whole[:length], "file")


def test_flipped_bytes_change_nothing_silently():
  """A damaged file is refused, or what it says is still the same."""
  layers = make_layers()
  whole = write_layers(layers)
  refused = 0
  for position in range(0, len(whole), 11):
    damaged = bytearray(whole)
    damaged[position] ^= 0x41
    try:
      arrays = read_tensors(bytes(damaged), "file")
    except UserError:
      refused += 1
      continue
    assert all(np.array_equal(arrays[name], layers[name]) for name in layers)
  assert refused > 50


def test_archives_of_another_kind_are_refused():
  layers = make_layers()
  with pytest.raises(UserError, match="compressed"):  # which could be a zip bomb
    read_tensors(write_layers(layers, compression=zipfile.ZIP_DEFLATED), "file")
  with pytest.raises(UserError, match="0 members NAME/data.pkl"):
    read_tensors(write_layers(layers, folder="a/b"), "file")
  with pytest.raises(UserError, match="little-endian"):
    read_tensors(write({}, {"byteorder": b"big"}), "file")
  with pytest.raises(UserError, match="at most 256"):
    read_tensors(write({}, {f"data/{i}": b"" for i in range(256)}), "file")
  with pytest.raises(UserError, match="at most 65536"):
    read_tensors(write(b"\x80\x02" + b"N0" * 40000 + b"N."), "file")
  with pytest.raises(UserError, match="cannot be read"):  # torch before 1.6
    read_tensors(pickle.dumps(0x1950a86a20f9469cfc6c), "file")


def test_size_in_the_archive_s_directory_is_not_believed():
  """A member that claims more bytes than the file has is not even read."""
  whole = bytearray(write({}, {"data/0": bytes(4)}))
  with zipfile.ZipFile(io.BytesIO(bytes(whole))) as archive:
    directory = archive.start_dir
  for offset in (20, 24):  # compressed and real size of the first member
    whole[directory + offset:directory + offset + 4] = b"\xff\xff\xff\x7f"
  with pytest.raises(UserError, match="larger than the file"):
    read_tensors(bytes(whole), "file")


def test_file_must_have_the_hash(tmp_path):
  """Nothing of another file is read; the message tells how to allow it."""
  path = tmp_path / "head.pth"
  path.write_bytes(write_layers(make_layers()))
  with unittest.mock.patch.object(aesthetic_head, "read_tensors") as reader:
    with pytest.raises(UserError, match=f"{sha256(path)}.*head_sha256"):
      load_aesthetic_head(path)
    for wrong in (None, "", "21dd590f"):
      with pytest.raises(UserError, match="head_sha256=.* must be 64 hexadecimal digits"):
        load_aesthetic_head(path, wrong)
    reader.assert_not_called()
  assert load_aesthetic_head(path, sha256(path).upper()).in_features == WIDTHS[0]


def test_missing_and_huge_files(tmp_path, monkeypatch):
  with pytest.raises(UserError, match="reward_kwargs.head=.*No such file"):
    load_aesthetic_head(tmp_path / "nothing.pth")
  with pytest.raises(UserError, match="Is a directory"):
    load_aesthetic_head(tmp_path)
  monkeypatch.setattr(aesthetic_head, "_MAX_FILE_BYTES", 99)
  (tmp_path / "huge.pth").write_bytes(bytes(100))
  with pytest.raises(UserError, match="more than 99 bytes"):
    load_aesthetic_head(tmp_path / "huge.pth")


def test_download(monkeypatch, tmp_path):
  """From the hub where no file is given; without one, the message says what to do."""
  path = tmp_path / "downloaded.pth"
  path.write_bytes(write_layers(make_layers()))
  asked = []
  monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                      lambda *args: asked.append(args) or str(path))
  load_aesthetic_head(sha256=sha256(path))
  assert asked == [("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")]
  monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                      unittest.mock.Mock(side_effect=ConnectionError("no\nnetwork")))
  with pytest.raises(UserError, match=r"cannot be downloaded \(no network\); give the path"):
    load_aesthetic_head()
