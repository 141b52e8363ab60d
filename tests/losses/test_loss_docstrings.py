"""The examples in the docstrings run, and say what they print."""

import doctest
import importlib
import pkgutil

import pytest

from erde_hub import losses

MODULES = [module.name for module in pkgutil.iter_modules(losses.__path__, "erde_hub.losses.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    modules = [importlib.import_module(name) for name in MODULES]
    assert sum(len(test.examples) for module in modules for test in doctest.DocTestFinder().find(module)) >= 10
