"""The output behaves like any of transformers, whichever way it was filled."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from erde_hub import EarlyExitOutput

LOGITS, INDEX, LOSS = torch.ones(2, 3), torch.zeros(2), torch.tensor(1.5)


def same(one: EarlyExitOutput, two: EarlyExitOutput) -> bool:
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


def test_what_is_none_is_not_there():
    out = EarlyExitOutput(logits=LOGITS, exit_index=INDEX)
    assert list(out) == ["logits", "exit_index"]
    assert out[0] is out["logits"] is out.logits is LOGITS
    assert out.to_tuple() == (LOGITS, INDEX)
    assert out.loss is None
    assert len(EarlyExitOutput()) == 0


def test_a_loss_set_last_comes_first():
    out = EarlyExitOutput(logits=LOGITS)
    out.loss = LOSS
    assert list(out) == ["loss", "logits"]
    assert out[0] is LOSS
    out["exit_index"] = INDEX
    assert out.exit_index is INDEX


def test_copies_pickles_trees_and_gathers():
    out = EarlyExitOutput(loss=LOSS, logits=LOGITS, exit_index=INDEX)
    for copied in (copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert same(copied, out)
    leaves, spec = pytree.tree_flatten(out)
    assert len(leaves) == 3
    assert same(pytree.tree_unflatten(leaves, spec), out)
    for pairs in (dict(out), ((key, out[key]) for key in out)):  # as torch gathers the outputs of several devices
        gathered = EarlyExitOutput(pairs)
        assert same(gathered, out)
        assert gathered.logits is LOGITS


def test_nothing_can_be_taken_out():
    out = EarlyExitOutput(logits=LOGITS)
    with pytest.raises(Exception, match="pop"):
        out.pop("logits")


def test_it_says_how_many_samples_took_each_exit():
    index = torch.tensor([1] * 34 + [2] * 30)
    out = EarlyExitOutput(logits=torch.ones(64, 10), exit_index=index, num_exits=4)
    assert str(out) == "EarlyExitOutput(64 samples, exits 0/34/30/0, logits (64, 10))"
    assert out.exit_counts() == [0, 34, 30, 0]
    assert "<tr><td>1</td><td>34</td><td>53.1%</td></tr>" in out._repr_html_()
    for copied in (copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert str(copied) == str(out)
    assert EarlyExitOutput(logits=torch.ones(64, 10), exit_index=index).exit_counts() == [0, 34, 30]
    everything = EarlyExitOutput(loss=LOSS, logits=LOGITS, exit_logits=(LOGITS, LOGITS))
    assert str(everything) == "EarlyExitOutput(2 samples, logits (2, 3), all 2 exits run, loss 1.5)"
    assert everything.exit_counts() == []
    assert str(EarlyExitOutput()) == "EarlyExitOutput()"
