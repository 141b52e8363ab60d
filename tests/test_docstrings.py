"""The examples in the docstrings of the core run as they stand."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import timm
import torch

import erde_hub

CORE = [
    name
    for _, name, _ in pkgutil.walk_packages(erde_hub.__path__, "erde_hub.")
    if name.split(".")[1] not in ("training", "evaluation", "export", "hub", "losses")  # tested beside their own tests
    and name != "erde_hub.scripts.playground.page"  # needs gradio, an extra
]
PUBLIC = {name: getattr(erde_hub, name) for name in erde_hub.__all__}
EXAMPLES = [
    pytest.param(example, id=example.name)
    for name in CORE
    for example in doctest.DocTestFinder().find(
        importlib.import_module(name), extraglobs={"timm": timm, "torch": torch, **PUBLIC}
    )
    if example.examples
]


def test_there_are_examples():
    assert any("EarlyExitWrapper" in parameter.id for parameter in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example):
    torch.set_num_threads(1)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(example)
    assert runner.failures == 0
