"""Tables: built-in names, users' own, and misses that help."""

from __future__ import annotations

import pytest

from erde_hub._registry import Entry, Registry
from erde_hub.errors import ConfigError, UnknownNameError


class Tea:
    def __init__(self, size, *, sugar=0):
        self.size, self.sugar = size, sugar


class Anything:
    def __init__(self, **kwargs):
        self.kwargs = kwargs


@pytest.fixture
def table():
    table: Registry = Registry("drink")
    table.register("tea", Tea, "leaves and water", "Lu Yu, 760")
    return table


def test_members(table):
    assert table.get("tea") == Entry("tea", Tea, "leaves and water", "Lu Yu, 760")
    assert table.create("tea", 2, sugar=1).sugar == 1
    table.register("anything", Anything, "whatever")
    assert table.create("anything", milk=True).kwargs == {"milk": True}
    assert table.names() == ["tea", "anything"]
    assert [entry.cls for entry in table.entries()] == [Tea, Anything]


def test_a_duplicate_name_raises_and_keeps_the_first(table):
    with pytest.raises(ConfigError, match=r"drink 'tea' is already registered \(Tea\)"):
        table.register("tea", Anything, "mine")
    assert table.get("tea").cls is Tea


@pytest.mark.parametrize("name", ["te", "Tea", "tee"])
def test_a_miss_lists_what_exists_and_the_nearest(table, name):
    with pytest.raises(UnknownNameError, match=rf"unknown drink '{name}'; did you mean 'tea'\? \(available: tea\)"):
        table.get(name)
    with pytest.raises(ValueError, match="available"):
        table.create(name)


@pytest.mark.parametrize("name", [None, 3, ["tea"]])
def test_a_name_that_is_no_name(table, name):
    with pytest.raises(UnknownNameError, match="unknown drink"):
        table.get(name)


def test_arguments_that_do_not_exist(table):
    with pytest.raises(ConfigError, match=r"drink 'tea' has no argument 'suger'; did you mean 'sugar'\?"):
        table.create("tea", 2, suger=1)
    with pytest.raises(ConfigError, match="no argument 'size'"):  # given already
        table.create("tea", 2, size=3)
