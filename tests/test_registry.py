"""Tables: built-in names, users' own, and misses that help."""

from __future__ import annotations

import inspect

import pytest

from erde_hub import heads, losses, policies
from erde_hub._registry import Entry, Registry, check_init
from erde_hub.errors import ConfigError, UnknownArgumentError, UnknownNameError


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


MEMBERS = [
    *(losses.get_loss(name) for name in losses.list_losses()),
    *(losses.get_addition(name) for name in losses.list_additions()),
    *(policies.get_policy(name) for name in policies.list_policies()),
    *(heads.get_head(name) for name in heads.list_heads()),
]


@pytest.mark.parametrize("entry", MEMBERS, ids=lambda entry: entry.cls.__name__)
def test_every_member_names_the_nearest_argument_when_it_is_built_directly(entry):
    names = list(inspect.signature(entry.cls).parameters)
    wrong = f"{names[-1]}_" if names else "x"
    hint = rf"; did you mean '{names[-1]}'\?" if names else ""
    with pytest.raises(UnknownArgumentError, match=rf"^{entry.cls.__name__} has no argument '{wrong}'{hint}"):
        entry.cls(**{wrong: 1})
    assert issubclass(UnknownArgumentError, ConfigError)
    assert issubclass(UnknownArgumentError, TypeError)


def test_signatures_and_open_keywords_stay_as_they_are():
    parameters = inspect.signature(losses.ERDELoss).parameters
    assert list(parameters)[:2] == ["temperature", "kl_weight"]
    assert parameters["temperature"].default == 2.0
    before = Anything.__init__
    check_init(Anything)
    assert Anything.__init__ is before
    with pytest.raises(TypeError, match="positional"):
        losses.ERDELoss(*range(20))


class OwnLoss(losses.KDLoss):
    def __init__(self, sharpness: float = 1.0) -> None:
        super().__init__()
        self.sharpness = sharpness


def test_a_users_own_loss_does_so_too():
    with pytest.raises(ConfigError, match="OwnLoss has no argument 'sharpnes'; did you mean 'sharpness'"):
        OwnLoss(sharpnes=2.0)
    assert OwnLoss(2.0).sharpness == 2.0
