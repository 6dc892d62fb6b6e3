"""Annotations, which nothing else evaluates."""

import importlib
import inspect
import pkgutil
import typing

import pytest

import ddpo_jax

MODULES = [module.name for module in pkgutil.walk_packages(ddpo_jax.__path__, "ddpo_jax.")]


@pytest.mark.parametrize("name", MODULES)
def test_annotations_can_be_evaluated(name):
  """What is misspelt in one, or not in quotes, is found by no linter: they are shapes."""
  module = importlib.import_module(name)
  for _, member in inspect.getmembers(module, lambda x: getattr(x, "__module__", "") == name):
    functions = [member]
    if inspect.isclass(member):
      functions = [f for f in vars(member).values() if inspect.isfunction(f)]
    for function in filter(callable, functions):
      typing.get_type_hints(function, localns={"ArrayTree": object})  # of optax
