"""Tables: built-in names, users' own, and misses that help."""

from __future__ import annotations

from typing import get_args

import pytest

from erde_hub._registry import Entry, Registry
from erde_hub.errors import ConfigError, UnknownNameError
from erde_hub.heads import HeadKey, get_head, list_heads
from erde_hub.losses import LossKey, get_loss, list_losses
from erde_hub.policies import PolicyKey, get_policy, list_policies


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


@pytest.mark.parametrize(
    ("alias", "names", "get"),
    [(HeadKey, list_heads, get_head), (LossKey, list_losses, get_loss), (PolicyKey, list_policies, get_policy)],
    ids=["head", "loss", "policy"],
)
def test_editors_complete_the_keys_of_each_table(alias, names, get):
    literal, anything = get_args(alias)
    assert list(get_args(literal)) == [name for name in names() if get(name).cls.__module__.startswith("erde_hub.")]
    assert anything is str
