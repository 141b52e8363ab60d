import threading

import pytest
from torch import nn

from erde_hub.engine.recomputation import is_recomputing, recomputing, without_recomputation


def flagged():
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    module.grad_checkpointing = True
    module[1].gradient_checkpointing = True
    return module


def test_both_spellings_are_found_and_restored():
    module = flagged()
    assert recomputing(module) == [(module, "grad_checkpointing"), (module[1], "gradient_checkpointing")]
    with without_recomputation(module):
        assert not is_recomputing(module)
    assert len(recomputing(module)) == 2


def test_restored_after_an_exception_and_inside_itself():
    module = flagged()
    with without_recomputation(module):
        with without_recomputation(module):
            assert not is_recomputing(module)
        assert not is_recomputing(module), "the inner call must not switch it on for the outer one"
    assert is_recomputing(module)

    with pytest.raises(KeyError), without_recomputation(module):
        raise KeyError
    assert is_recomputing(module)


def test_two_threads_do_not_switch_it_on_under_each_other():
    module = flagged()
    inside, done = threading.Event(), threading.Event()
    seen = []

    def other():
        with without_recomputation(module):
            inside.set()
            done.wait(10)
            seen.append(is_recomputing(module))

    thread = threading.Thread(target=other)
    with without_recomputation(module):
        thread.start()
        assert inside.wait(10)
    assert not is_recomputing(module), "the other thread still runs"
    done.set()
    thread.join()
    assert seen == [False]
    assert is_recomputing(module)
