"""The LAION aesthetic predictor's head, and how to read its file without torch.

The file is a zip archive: `data.pkl`, a pickle that describes the tensors, and one member
of raw bytes for each of them. A pickle is a program, so this one is checked before it
runs: only the operations that describe tensors, and only three names, none of which
stands for code of another package.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import io
import math
import os
import pathlib
import pickle
import pickletools
import re
from typing import Any
import zipfile

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np

from ddpo_jax.errors import UserError
from ddpo_jax.files import expand_home
from ddpo_jax.messages import one_line

HEAD_REPOSITORY = "trl-lib/ddpo-aesthetic-predictor"
HEAD_FILE = "aesthetic-model.pth"
HEAD_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"

_MAX_FILE_BYTES = 64 * 2**20  # the public file has 3.7 MB
_MAX_PICKLE_BYTES = 2**16  # there 1207
_MAX_MEMBERS = 256

# What torch writes for tensors in a dict: constants, tuples, dicts, its memo, a call of a
# global, and attributes of the outer dict (its `_metadata`).
_OPCODES = frozenset((
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "BINUNICODE",
    "BININT", "BININT1", "BININT2", "LONG1", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "SETITEM", "SETITEMS", "BINPUT",
    "LONG_BINPUT", "BINGET", "LONG_BINGET"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AestheticHead:
  """Linear layers without activations: dropout between them is for training only."""

  kernels: tuple[jax.Array, ...]  # of each layer, [in, out]
  biases: tuple[jax.Array, ...]  # of each layer, [out]

  @property
  def in_features(self) -> int:
    return self.kernels[0].shape[0]

  def __call__(self, embeddings: jax.Array) -> jax.Array:
    """Scores normalised CLIP image embeddings: [B, in] -> [B] float32, mostly 1 to 10."""
    x = embeddings.astype(jnp.float32)
    for kernel, bias in zip(self.kernels, self.biases, strict=True):
      x = jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST) + bias
    return x[:, 0]


def load_aesthetic_head(path: str | os.PathLike | None = None,
                        sha256: str = HEAD_SHA256) -> AestheticHead:
  """Loads the head from a local file, or from the hub where `path` is None.

  Args:
    path: a file that `torch.save` wrote, of tensors `layers.N.weight` [out, in] and
      `layers.N.bias` [out], applied in the order of N.
    sha256: of the file, 64 hexadecimal digits.

  Raises:
    UserError: if the file is missing, another one, or holds anything but such layers.
  """
  if not re.fullmatch(r"[0-9a-fA-F]{64}", str(sha256)):
    raise UserError(f"reward_kwargs.head_sha256={sha256!r} must be 64 hexadecimal digits")
  file = _download() if path is None else expand_home(path)
  data = _read_file(file)
  found = hashlib.sha256(data).hexdigest()
  if found != str(sha256).lower():
    raise UserError(f"reward_kwargs.head={str(file)!r} has the SHA-256 {found}; must be "
                    f"{sha256}; if this is the file you mean, give its own as "
                    "reward_kwargs.head_sha256")
  return _head_from(file, read_tensors(data, file))


def read_tensors(data: bytes, source: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads a dict of float32 tensors that `torch.save` wrote, running nothing.

  Args:
    data: the file's content.
    source: the file's name, for messages.

  Raises:
    UserError: if the file holds anything else, or is damaged.
  """
  try:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      return _read_archive(archive, len(data))
  except _Refused as error:
    raise UserError(f"{source} is refused: {error}") from None
  except Exception as error:  # zipfile and pickle raise a different type for each damage
    raise UserError(f"{source} cannot be read as a file of torch tensors: "
                    f"{one_line(error)}") from error


class _Refused(Exception):
  """What a file asks for, and may not have."""


@dataclasses.dataclass(frozen=True)
class _Storage:
  """A member of the archive that holds `size` float32 numbers."""

  key: str
  size: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """A tensor that starts `offset` numbers into its storage, rows last."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]


def _read_archive(archive: zipfile.ZipFile, file_bytes: int) -> dict[str, np.ndarray]:
  members = archive.infolist()
  if len(members) > _MAX_MEMBERS:
    raise _Refused(f"it has {len(members)} members; must be at most {_MAX_MEMBERS}")
  for entry in members:
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
      raise _Refused(f"member {entry.filename!r} is compressed or encrypted")
    if entry.file_size > file_bytes:
      raise _Refused(f"member {entry.filename!r} is larger than the file")
  sizes = {entry.filename: entry.file_size for entry in members}
  if len(sizes) != len(members):
    raise _Refused("two members have the same name")
  pickles = [name for name in sizes if re.fullmatch(r"[^/]+/data\.pkl", name)]
  if len(pickles) != 1:
    raise _Refused(f"it has {len(pickles)} members NAME/data.pkl; must be one")
  folder = pickles[0].removesuffix("data.pkl")
  if sizes[pickles[0]] > _MAX_PICKLE_BYTES:
    raise _Refused(f"data.pkl has {sizes[pickles[0]]} bytes; must be at most "
                   f"{_MAX_PICKLE_BYTES}")
  if f"{folder}byteorder" in sizes and archive.read(f"{folder}byteorder") != b"little":
    raise _Refused("its numbers are not little-endian")

  tensors = _read_pickle(archive.read(pickles[0]))
  arrays = {}
  for name, tensor in tensors.items():
    storage = tensor.storage
    member = f"{folder}data/{storage.key}"
    if sizes.get(member) != 4 * storage.size:
      raise _Refused(f"the storage of {name} has {sizes.get(member)} bytes; must be "
                     f"{4 * storage.size}")
    numbers = np.frombuffer(archive.read(member), "<f4")
    count = math.prod(tensor.shape)
    arrays[name] = numbers[tensor.offset:tensor.offset + count].reshape(tensor.shape)
  return arrays


def _read_pickle(data: bytes) -> Mapping[str, _Tensor]:
  """Runs a pickle that can only describe tensors."""
  for opcode, argument, _ in pickletools.genops(data):
    if opcode.name not in _OPCODES:
      raise _Refused(f"its pickle uses {opcode.name}, which tensors do not need")
    # The memo is an array: one huge index would fill the memory.
    if opcode.name in ("BINPUT", "LONG_BINPUT") and (argument or 0) > len(data):
      raise _Refused(f"its pickle has a memo index of {argument}")
  content = _Unpickler(io.BytesIO(data)).load()
  if not isinstance(content, dict):
    raise _Refused(f"it holds a {type(content).__name__}; must be a dict of tensors")
  content = dict(dict.items(content))  # without attributes that the pickle may have set
  for name, tensor in content.items():
    if not isinstance(name, str) or not isinstance(tensor, _Tensor):
      raise _Refused(f"it holds {name!r:.50}, a {type(tensor).__name__}; must hold only "
                     "named tensors")
  return content


class _Unpickler(pickle.Unpickler):
  """Knows three names; two of them stand for things of our own."""

  def __init__(self, file: io.BytesIO):
    super().__init__(file)
    # Made anew each time, so that nothing a pickle does to one of them lasts.
    self._float_storage = object()
    self._globals = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _tensor(*args),
        ("torch", "FloatStorage"): self._float_storage,
    }

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in self._globals:
      raise _Refused(f"its pickle asks for {module}.{name}, which tensors do not need")
    return self._globals[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
      raise _Refused("its pickle names something that is not a storage")
    _, kind, key, _, size = pid
    if kind is not self._float_storage:
      raise _Refused("it has a storage that is not float32")
    if not isinstance(key, str) or not re.fullmatch(r"[0-9]{1,9}", key) or not _is_count(size):
      raise _Refused("it has a storage without a number or a size")
    return _Storage(key, size)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any,
            hooks: Any, metadata: Any = None) -> _Tensor:
  """What stands for torch's function of seven arguments; checks them all."""
  del requires_grad
  if hooks or metadata or not isinstance(storage, _Storage) or not _is_count(offset):
    raise _Refused("it has a tensor that holds more than numbers")
  if not all(isinstance(x, tuple) and all(map(_is_count, x)) for x in (shape, strides)):
    raise _Refused("it has a tensor whose shape or strides are not counts")
  if len(shape) > 4:
    raise _Refused(f"it has a tensor of {len(shape)} axes; must be at most 4")
  contiguous = tuple(math.prod(shape[i + 1:]) for i in range(len(shape)))
  if strides != contiguous:
    raise _Refused(f"it has a tensor of shape {shape} and strides {strides}; must be "
                   f"{contiguous}")
  if offset + math.prod(shape) > storage.size:
    raise _Refused(f"it has a tensor of shape {shape} at {offset}, which ends after its "
                   f"storage of {storage.size}")
  return _Tensor(storage, offset, shape)


def _is_count(x: Any) -> bool:
  return type(x) is int and 0 <= x <= _MAX_FILE_BYTES


def _head_from(file: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> AestheticHead:
  """Puts the layers in order, and checks that each fits the one before it."""
  matches = {name: re.fullmatch(r"layers\.([0-9]{1,3})\.(weight|bias)", name)
             for name in tensors}
  unknown = [name for name, match in matches.items() if match is None]
  if unknown:
    raise UserError(f"{file} holds {unknown[0]!r:.50}; must hold layers.N.weight and "
                    "layers.N.bias only")
  numbers = sorted({int(match[1]) for match in matches.values() if match})
  layers = [(f"layers.{n}.weight", f"layers.{n}.bias") for n in numbers]
  missing = [name for layer in layers for name in layer if name not in tensors]
  if missing or not layers:
    raise UserError(f"{file} has no {(missing or ['layers.0.weight'])[0]}; must hold the "
                    "weight and bias of each layer")
  _check_shapes(file, layers, tensors)
  return AestheticHead(
      kernels=tuple(jnp.asarray(tensors[weight].T) for weight, _ in layers),
      biases=tuple(jnp.asarray(tensors[bias]) for _, bias in layers))


def _check_shapes(file: pathlib.Path, layers: Sequence[tuple[str, str]],
                  tensors: Mapping[str, np.ndarray]) -> None:
  features = None
  for weight, bias in layers:
    shape = tensors[weight].shape
    if len(shape) != 2 or features not in (None, shape[1]):
      raise UserError(f"{file}: {weight} has the shape {shape}; must be [out, "
                      f"{'in' if features is None else features}]")
    if tensors[bias].shape != shape[:1]:
      raise UserError(f"{file}: {bias} has the shape {tensors[bias].shape}; must be "
                      f"{shape[:1]}")
    features = shape[0]
  if features != 1:
    raise UserError(f"{file}: the last layer has {features} outputs; must be 1")
  for name in (name for layer in layers for name in layer):
    if not np.isfinite(tensors[name]).all():
      raise UserError(f"{file}: {name} has values that are not finite")


def _read_file(file: pathlib.Path) -> bytes:
  try:
    with open(file, "rb") as stream:
      data = stream.read(_MAX_FILE_BYTES + 1)
  except OSError as error:
    raise UserError(f"reward_kwargs.head={str(file)!r} cannot be read ({error.strerror}); "
                    f"must be the file {HEAD_FILE} of {HEAD_REPOSITORY}, or absent to "
                    "download it") from None
  if len(data) > _MAX_FILE_BYTES:
    raise UserError(f"reward_kwargs.head={str(file)!r} has more than {_MAX_FILE_BYTES} "
                    f"bytes; must be the file {HEAD_FILE} of {HEAD_REPOSITORY}")
  return data


def _download() -> pathlib.Path:
  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(HEAD_REPOSITORY, HEAD_FILE))
  except Exception as error:  # no network, in one of the ways of several HTTP libraries
    raise UserError(f"reward_kwargs.head: {HEAD_FILE} of {HEAD_REPOSITORY} cannot be "
                    f"downloaded ({one_line(error)}); give the path of a copy"
                    ) from error
