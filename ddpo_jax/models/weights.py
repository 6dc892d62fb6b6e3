"""A network's weights: safetensors -> NNX, and back.

A tensor's name in the file and its path in the module differ only by the rules in
`_RENAMES` and `_LEAVES`; what they leave unmatched, on either side, is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import os
import pathlib
import re
from typing import Any, Generic, TypeVar

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from ddpo_jax.errors import UserError
from ddpo_jax.messages import one_line
from ddpo_jax.tensor_files import FLOATS, open_tensors, save_tensors

# Names found in files, and what they are called here. All are applied, in order.
_RENAMES = (
    (r"^text_model\.", ""),  # transformers before version 5
    (r"(mid_block\.attentions\.\d+)\.query\.", r"\1.to_q."),  # diffusers before 0.18
    (r"(mid_block\.attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(mid_block\.attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(mid_block\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
)
_IGNORED = (r"(^|\.)position_ids$",)  # a buffer that counts from 0
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias",
           "class_embedding": "class_embedding", "logit_scale": "logit_scale"}
_LISTED = 8  # names shown in a message before "and N more"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class LazyModel(Generic[T]):
  """A model whose files were checked, and whose weights are still to be read."""

  shapes: T  # the model, with shapes and dtypes in the place of its weights
  read: Callable[[], T]


def load_module(build: Callable[..., nnx.Module], files: Sequence[pathlib.Path],
                renames: Sequence[tuple[str, str]] = _RENAMES) -> nnx.Module:
  """Builds a module straight from its weights, one tensor at a time.

  Args:
    build: called as `build(rngs=…)`; only its shapes and dtypes are used.
    files: safetensors files that together hold each of its tensors once.
    renames: patterns found in the files' names of tensors, and what replaces them.

  Raises:
    UserError: lists tensors that are missing, unknown, there twice, or of another shape;
      or says why the config describes no network.
  """
  return open_module(build, files, renames).read()


def open_module(build: Callable[..., nnx.Module], files: Sequence[pathlib.Path],
                renames: Sequence[tuple[str, str]] = _RENAMES) -> LazyModel[nnx.Module]:
  """`load_module` without the weights: of the files it reads what tensors they hold."""
  shapes = _abstract(build, files[0].parent)
  graphdef, state = nnx.split(shapes)
  sources = _find_tensors(state, files, renames)

  def read() -> nnx.Module:
    loaded = []
    for file, found in sources.items():
      with open_tensors(str(file), file) as tensors:
        for source in found:
          shape, dtype = source.variable.shape, source.variable.dtype
          tensor = tensors.get_tensor(source.name).transpose(source.axes).reshape(shape)
          loaded.append((source.path, source.variable.replace(jnp.asarray(tensor, dtype))))
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))

  return LazyModel(shapes, read)


@dataclasses.dataclass(frozen=True)
class _Source:
  """Where a variable of a module is found in a file, and what it is there."""

  path: tuple[Any, ...]  # in the module
  variable: nnx.Variable
  name: str  # in the file
  axes: tuple[int, ...]  # in the order in which the module has them


def _find_tensors(state: nnx.State, files: Sequence[pathlib.Path],
                  renames: Sequence[tuple[str, str]]) -> dict[pathlib.Path, list[_Source]]:
  """Which of each file's tensors belongs where; raises UserError if they are not the state's."""
  paths = {_file_name(path): (path, variable) for path, variable in
           nnx.to_flat_state(state)}
  sources: dict[pathlib.Path, list[_Source]] = {file: [] for file in files}
  missing, unknown, twice, misshapen, quantized = set(paths), [], [], [], []
  for file in files:
    with open_tensors(str(file), file) as tensors:
      for name in tensors.keys():
        key = _canonical(name, renames)
        if any(re.search(pattern, key) for pattern in _IGNORED):
          continue
        if key not in paths:
          unknown.append(name)
          continue
        if key not in missing:
          twice.append(name)
          continue
        missing.remove(key)
        path, variable = paths[key]
        tensor = tensors.get_slice(name)
        shape, dtype = tensor.get_shape(), tensor.get_dtype()
        if dtype not in FLOATS:
          quantized.append(f"{name} {dtype}")
        axes = _axes(str(path[-1]), shape, variable.shape)
        if axes is None:
          misshapen.append(f"{name} {shape}, which does not fit {list(variable.shape)}")
        else:
          sources[file].append(_Source(path, variable, name, axes))
  _refuse(files, {"missing": sorted(missing), "not part of the model": unknown,
                  "there twice": twice, "misshapen": misshapen,
                  f"of another dtype than {', '.join(FLOATS)}": quantized})
  return sources


def save_module(module: nnx.Module, path: str | os.PathLike, *,
                dtype: DTypeLike | None = None) -> None:
  """Writes a module as one safetensors file that diffusers and transformers read.

  Args:
    module: any of this package's networks, without LoRA.
    path: of the file.
    dtype: to cast to; the weights' own where absent.
  """
  tensors = {}
  for variable_path, variable in nnx.to_flat_state(nnx.state(module)):
    array = np.asarray(variable[...], dtype)
    if variable_path[-1] == "kernel":
      array = array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0))
    tensors[_file_name(variable_path)] = np.asarray(array, order="C")
  save_tensors(tensors, path)


def _file_name(path: tuple[Any, ...]) -> str:
  """A variable's path in the module -> its tensor's name in the file."""
  *modules, leaf = path
  return ".".join([*map(str, modules), _LEAVES[leaf]])


def _canonical(name: str, renames: Sequence[tuple[str, str]] = _RENAMES) -> str:
  for pattern, replacement in renames:
    name = re.sub(pattern, replacement, name)
  return name


def _axes(leaf: str, found: Sequence[int], wanted: Sequence[int]
          ) -> tuple[int, ...] | None:
  """How to transpose a tensor of shape `found`; None if it then does not fit `wanted`.

  Kernels are stored output first. A linear layer and a 1×1 convolution are the same
  thing in two shapes, and files have either for the same block.
  """
  if leaf != "kernel":
    return tuple(range(len(found))) if tuple(found) == tuple(wanted) else None
  axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(len(found))
  if axes is None:
    return None
  shape = [found[axis] for axis in axes]
  as_convolution = lambda s: [1] * (4 - len(s)) + list(s)
  return axes if as_convolution(shape) == as_convolution(wanted) else None


class ConstantRngs:
  """In the place of `nnx.Rngs`, whose counter takes seconds to trace in a large module."""

  def params(self) -> jax.Array:
    return jax.random.key(0)


def _abstract(build: Callable[..., nnx.Module], folder: pathlib.Path) -> nnx.Module:
  """The module with shapes and dtypes in the place of its weights."""
  try:
    return nnx.eval_shape(lambda: build(rngs=ConstantRngs()))
  except (TypeError, ValueError, LookupError, ArithmeticError) as error:
    raise UserError(f"{folder / 'config.json'} does not describe a network: "
                    f"{one_line(error)}") from error


def _refuse(files: Iterable[pathlib.Path], named: Mapping[str, Sequence[str]]) -> None:
  """Raises UserError if there are names of tensors under any problem."""
  problems = []
  for what, names in named.items():
    if names:
      rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
      problems.append(f"{len(names)} tensors {what}: {', '.join(names[:_LISTED])}{rest}")
  if problems:
    raise UserError(f"{', '.join(map(str, files))}: {'; '.join(problems)}")
