"""LAION's aesthetic predictor: the head's weights, read from a torch file without torch.

The public file is a zip archive with a pickle in it. A pickle can run any code when it is
loaded; this reader knows three names, builds arrays from them, and refuses all others.
"""

from __future__ import annotations

import collections
import hashlib
import io
import math
import os
import pathlib
import pickle
from typing import Any
import zipfile

import numpy as np

from ddpo_jax.types import UserError

SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
_MAX_FILE_BYTES = 64 * 2**20
_MAX_PICKLE_BYTES = 2**16
_ADVICE = "must be the aesthetic predictor's weights, such as aesthetic-model.pth"


def load_head(path: str | os.PathLike, sha256: str | None = SHA256
              ) -> tuple[np.ndarray, np.ndarray]:
  """Reads the head: layers without activations, and so one affine map.

  Args:
    path: a file that `torch.save` wrote, with `layers.N.weight` and `layers.N.bias`.
    sha256: of the file, in hexadecimal; None accepts any file.

  Returns:
    weight [D] and bias [], float64: the score of an embedding x is x · weight + bias.

  Raises:
    UserError: if the file cannot be read, is not the one asked for, or holds anything but
      such layers.
  """
  path = pathlib.Path(path)
  try:
    if path.stat().st_size > _MAX_FILE_BYTES:
      raise UserError(f"{path} has {path.stat().st_size} bytes; {_ADVICE}")
    data = path.read_bytes()
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error}") from error
  found = hashlib.sha256(data).hexdigest()
  if sha256 is not None and found != sha256.lower():
    raise UserError(f"{path} has SHA-256 {found}; must be {sha256} "
                    "(reward_kwargs.head_sha256; None accepts any file)")
  return _affine(path, read_tensors(path, data))


def read_tensors(path: pathlib.Path, data: bytes) -> dict[str, np.ndarray]:
  """Reads a state dict of float32 tensors; `path` is for messages.

  Raises:
    UserError: if `data` is not such a file.
  """
  try:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
      if len(names) != 1:
        raise UserError(f"{path} has no data.pkl, or several; {_ADVICE}")
      prefix = names[0].removesuffix("data.pkl")
      text = _member(archive, names[0], _MAX_PICKLE_BYTES, path)
      tensors = _TensorReader(archive, prefix, path, text).load()
  except UserError:
    raise
  except Exception as error:  # a broken archive or pickle can raise nearly any
    raise UserError(f"{path} cannot be read ({type(error).__name__}: {str(error)[:100]}); "
                    f"{_ADVICE}") from error
  if not isinstance(tensors, dict) or not all(
      isinstance(k, str) and isinstance(v, np.ndarray) for k, v in tensors.items()):
    raise UserError(f"{path} holds something else than named tensors; {_ADVICE}")
  return dict(tensors)


def _member(archive: zipfile.ZipFile, name: str, limit: int, path: pathlib.Path) -> bytes:
  """A member's bytes; refused if it says, or turns out, to be larger than `limit`."""
  if archive.getinfo(name).file_size > limit:
    raise UserError(f"{path}: {name} has {archive.getinfo(name).file_size} bytes; must have "
                    f"at most {limit}")
  with archive.open(name) as file:
    content = file.read(limit + 1)
  if len(content) > limit:
    raise UserError(f"{path}: {name} has more than {limit} bytes")
  return content


class _FloatStorage:
  """Stands for `torch.FloatStorage` in the file; never made."""


class _TensorReader(pickle.Unpickler):
  """Knows three names, and looks up no other."""

  def __init__(self, archive: zipfile.ZipFile, prefix: str, path: pathlib.Path, text: bytes):
    super().__init__(io.BytesIO(text))
    self._archive, self._prefix, self._path = archive, prefix, path
    self._known = {("collections", "OrderedDict"): collections.OrderedDict,
                   ("torch", "FloatStorage"): _FloatStorage,
                   ("torch._utils", "_rebuild_tensor_v2"): self._tensor}

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in self._known:
      raise UserError(f"{self._path} asks for {f'{module}.{name}'[:100]!r}, which was not "
                      f"loaded; {_ADVICE}")
    return self._known[module, name]

  def persistent_load(self, pid: Any) -> np.ndarray:
    """A storage: ("storage", its type, its key, its device, its number of elements)."""
    kind, storage, key, _, count = pid
    right = (kind == "storage" and storage is _FloatStorage and isinstance(key, str)
             and isinstance(count, int) and 0 <= count <= _MAX_FILE_BYTES // 4)
    if not right:
      raise UserError(f"{self._path} has a storage {str(pid)[:100]}; must be of floats")
    content = _member(self._archive, f"{self._prefix}data/{key}", 4 * count, self._path)
    if len(content) != 4 * count:
      raise UserError(f"{self._path}: storage {key} has {len(content)} bytes; must have "
                      f"{4 * count}")
    return np.frombuffer(content, "<f4")

  def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> np.ndarray:
    """What `torch._utils._rebuild_tensor_v2` makes, for contiguous tensors."""
    sizes = [offset, *shape, *stride]
    right = (isinstance(storage, np.ndarray) and len(shape) == len(stride) <= 2
             and all(isinstance(n, int) and 0 <= n < 2**31 for n in sizes))
    count = math.prod(shape) if right else 0
    contiguous = right and all(n == 1 or step == math.prod(shape[i + 1:])
                               for i, (n, step) in enumerate(zip(shape, stride)))
    if not contiguous or offset + count > storage.size:
      raise UserError(f"{self._path} has a tensor that does not lie in its storage: shape "
                      f"{str(shape)[:50]}, stride {str(stride)[:50]}; {_ADVICE}")
    return storage[offset:offset + count].reshape(shape)


def _affine(path: pathlib.Path, tensors: dict[str, np.ndarray]
            ) -> tuple[np.ndarray, np.ndarray]:
  """Multiplies the layers, from the last to the first, into one."""
  numbers = sorted({int(n.split(".")[1]) for n in tensors if n.split(".")[1:2]
                    and n.split(".")[1].isdecimal()})
  expected = {f"layers.{i}.{part}" for i in numbers for part in ("weight", "bias")}
  if not numbers or set(tensors) != expected:
    raise UserError(f"{path} has tensors {', '.join(sorted(tensors))[:200]}; must have "
                    "layers.N.weight and layers.N.bias")
  weight, bias = np.ones((1, 1)), np.zeros(1)
  for i in reversed(numbers):
    w, b = (tensors[f"layers.{i}.{part}"].astype(np.float64) for part in ("weight", "bias"))
    if w.ndim != 2 or b.shape != w.shape[:1] or w.shape[0] != weight.shape[1]:
      raise UserError(f"{path}: layers.{i} has shapes {w.shape} and {b.shape}, which do not "
                      "fit the layer after it")
    weight, bias = weight @ w, bias + weight @ b
  return weight[0], bias[0]
