"""Finds a model's files: in a local folder, in this package, or on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import fnmatch
import logging
import os
import pathlib
import re

import huggingface_hub
from huggingface_hub import errors as hub_errors

from ddpo_jax.errors import UserError
from ddpo_jax.files import expand_home
from ddpo_jax.messages import one_line
from ddpo_jax.model_config import read_json
from ddpo_jax.model_names import FORMATS, TINY, TINY_FOLDER, is_hub_id

# Names of weights without their ending, by the folders that they are in.
WEIGHT_NAMES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
                "text_encoder": "model"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                    "special_tokens_map.json", "added_tokens.json")
_PICKLED = (".bin", ".ckpt")
# huggingface_hub's, and the one below it that warns of requests that failed.
_HUB_LOGGERS = ("huggingface_hub", "huggingface_hub.utils._http")


@dataclasses.dataclass(frozen=True)
class Repository:
  """A kind of model folder: what messages call it, and which of its files are needed."""

  field: str  # of the config, that names the folder
  formats: str  # what the field may hold
  probe: tuple[str, ...]  # any of them in the hub's cache shows that it was downloaded
  weights_class: str  # whose save_pretrained converts pickled weights, for messages
  patterns: tuple[str, ...]  # of the files that are needed, other than weights
  weights: tuple[str, ...] = ()  # paths without their ending

  @property
  def revision_field(self) -> str:
    return f"{self.field.rpartition('.')[0]}.revision"

  def choose(self, names: Sequence[str]) -> list[str]:
    """Of all files those that are needed, each of the weights in one variant only."""
    chosen = [name for name in names
              if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)]
    for stem in self.weights:
      chosen += _choose_weights(names, stem)
    return chosen

  def check_not_pickled(self, repo: str, names: Sequence[str]) -> None:
    """Raises UserError if weights are there in pickled form only."""
    for stem in self.weights:
      folder, _, _ = stem.rpartition("/")
      pickled = [name for name in names if name.rpartition("/")[0] == folder
                 and name.endswith(_PICKLED)]
      if pickled and not _choose_weights(names, stem):
        raise UserError(f"{self.field}={repo!r}: {_only_pickled(pickled[0], self.weights_class)}")


def model_folder(path: str | os.PathLike, revision: str | None = None,
                 repository: Repository | None = None) -> pathlib.Path:
  """The local folder of a model, downloaded if `path` is a hub id.

  Args:
    path: a folder, a hub id, or (of Stable Diffusion only) "tiny".
    revision: branch, tag or commit of a hub id.
    repository: the kind of folder; Stable Diffusion's if absent.

  Raises:
    UserError: if there is no such folder and no such repository.
  """
  repository = DIFFUSERS_REPOSITORY if repository is None else repository
  if str(path) == TINY and repository is DIFFUSERS_REPOSITORY:
    return TINY_FOLDER
  folder = expand_home(path)
  if str(path) and folder.is_dir():
    return folder
  if not is_hub_id(str(path)):
    raise UserError(f"{repository.field}={str(path)!r} does not exist; must be "
                    f"{repository.formats}")
  return _download(str(path), revision, repository)


def find_weights(folder: pathlib.Path, stem: str,
                 weights_class: str = "diffusers: DiffusionPipeline"
                 ) -> list[pathlib.Path]:
  """The safetensors files of one part: plain before `.fp16`, whole before sharded.

  Raises:
    UserError: if there are none, or an index names a file that is absent or elsewhere.
  """
  for variant in ("", ".fp16"):
    whole = folder / f"{stem}{variant}.safetensors"
    if whole.is_file():
      return [whole]
    index = folder / f"{stem}.safetensors.index{variant}.json"
    if index.is_file():
      return _shards(index)
  if any(path.name.endswith(_PICKLED) for path in folder.glob("*")):
    raise UserError(_only_pickled(folder, weights_class))
  raise UserError(f"{folder / stem}.safetensors does not exist; must hold the weights of "
                  f"{folder.name}")


def _only_pickled(where: str | os.PathLike, weights_class: str) -> str:
  return (f"{where} has only pickled weights, which can run code when read; convert them to "
          f"safetensors, for example with {weights_class}"
          ".from_pretrained(folder).save_pretrained(new_folder)")


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
  """The files that a sharded checkpoint's index names."""
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, Mapping):
    raise UserError(f"{index} has no weight_map; must map tensor names to files")
  names = sorted(set(map(str, weight_map.values())))
  for name in names:
    if name != pathlib.PurePath(name).name or not name.endswith(".safetensors"):
      raise UserError(f"{index} names {name!r}; must be a .safetensors file beside it")
    if not os.path.isfile(index.parent / name):  # also False for what is no name at all
      raise UserError(f"{index.parent / name} does not exist, but {index.name} names it")
  return [index.parent / name for name in names]


def _download(repo: str, revision: str | None, kind: Repository) -> pathlib.Path:
  """Downloads what is needed of a hub repository, each weight in one variant only."""
  try:
    with retries_in_one_line():
      names = huggingface_hub.list_repo_files(repo, revision=revision)
      kind.check_not_pickled(repo, names)
      return pathlib.Path(huggingface_hub.snapshot_download(
          repo, revision=revision, allow_patterns=kind.choose(names)))
  except UserError:
    raise
  except hub_errors.GatedRepoError:
    raise UserError(f"{kind.field}={repo!r} is gated: accept its terms on the hub and "
                    "log in with `hf auth login`") from None
  except hub_errors.RevisionNotFoundError:
    raise UserError(f"{kind.revision_field}={revision!r} does not exist in {repo!r}; must "
                    "be a branch, tag or commit") from None
  except hub_errors.RepositoryNotFoundError:
    raise UserError(f"{kind.field}={repo!r} is neither a local folder nor a public "
                    "hub repository; if it is private, run `hf auth login`") from None
  except hub_errors.HFValidationError:
    raise UserError(f"{kind.field}={repo!r} does not exist, and is not a hub id such as "
                    "'owner/name'") from None
  except Exception as error:  # no network, in one of the ways of several HTTP libraries
    return _from_cache(repo, revision, kind, error)


@contextlib.contextmanager
def retries_in_one_line() -> Iterator[None]:
  """Collapses the hub library's warnings that it tries again into one line.

  Its logger has a handler of its own and passes on to the root's, which has one as soon as
  orbax is imported: it said everything twice, two lines for each of five tries.
  """
  library, requests = (logging.getLogger(name) for name in _HUB_LOGGERS)
  if any(isinstance(each, _FirstRetry) for each in requests.filters):  # in another context
    yield
    return
  propagate, first = library.propagate, _FirstRetry()
  library.propagate = False
  requests.addFilter(first)
  try:
    yield
  finally:
    requests.removeFilter(first)
    library.propagate = propagate


class _FirstRetry(logging.Filter):
  """Lets through the first of the warnings of requests that failed, in other words."""

  _seen = False

  def filter(self, record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if "thrown while requesting" not in text and not text.startswith("Retrying in"):
      return True
    if self._seen:
      return False
    self._seen = True
    record.msg, record.args = f"The hub does not answer, trying again: {text}", ()
    return True


def _from_cache(repo: str, revision: str | None, kind: Repository, error: Exception
                ) -> pathlib.Path:
  """What an earlier download left; `snapshot_download` would ask for every file."""
  for name in kind.probe:
    found = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
    if isinstance(found, str):
      return pathlib.Path(found).parents[name.count("/")]
  raise UserError(f"{kind.field}={repo!r} is not a local folder, and cannot be "
                  f"downloaded ({one_line(error)}); give a folder that holds the model"
                  ) from error


def _choose_weights(names: Sequence[str], stem: str) -> list[str]:
  """The files that hold one part's weights, plain before `.fp16`."""
  for variant in ("", ".fp16"):
    pattern = (rf"{stem}{variant}(-\d+-of-\d+)?\.safetensors|"
               rf"{stem}\.safetensors\.index{variant}\.json|"
               rf"{stem}-\d+-of-\d+{variant}\.safetensors")
    found = [n for n in names if re.fullmatch(pattern, n)]
    if found:
      return found
  return []


DIFFUSERS_REPOSITORY = Repository(
    field="pretrained.model",
    formats=FORMATS,
    probe=("unet/config.json",), weights_class="diffusers: DiffusionPipeline",
    patterns=("model_index.json", "scheduler/scheduler_config.json", "tokenizer/*.json",
              "tokenizer/*.txt", *(f"{part}/config.json" for part in WEIGHT_NAMES)),
    weights=tuple(f"{part}/{stem}" for part, stem in WEIGHT_NAMES.items()))
CLIP_REPOSITORY = Repository(
    field="reward_kwargs.model",
    formats="a folder in transformers' format or a hub id such as 'owner/name'",
    probe=("config.json",), weights_class="transformers: CLIPModel",
    patterns=("config.json", "preprocessor_config.json", "processor_config.json",
              *_TOKENIZER_FILES),
    weights=("model",))
TOKENIZER_REPOSITORY = dataclasses.replace(
    CLIP_REPOSITORY, field="reward_kwargs.tokenizer",
    probe=("tokenizer.json", "vocab.json"), patterns=_TOKENIZER_FILES, weights=())
