"""A controller keeps the mean cost at its target, whatever happens to the scores."""

import copy
import json
import math
import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from erde_hub import BudgetController
from erde_hub.errors import CheckpointError, ConfigError, InputTypeError, NotSupportedError, ShapeError, ThresholdError
from erde_hub.export.metadata import FileInfo
from erde_hub.policies import SetSizePolicy, create_policy
from tests.fakes.networks import images, wrap

COSTS = [30, 55, 80, 100]
TARGET = 60.0


class Session:
    """Routes scores, (E, N) in the place of images, as a session of three early exits and ten classes would."""

    def __init__(self, policy="entropy", threshold=(1.0, 1.0, 1.0)):
        names = ["a", "b", "c", "classifier"]
        labels = {k: str(k) for k in range(10)}
        self.info = FileInfo("0", policy, [*threshold], [0.0, math.inf], names, COSTS, labels, [3, 8, 8])
        self.above = policy != "entropy"

    def __call__(self, scores, threshold):
        own = np.asarray(threshold)[:, None]
        exits = scores >= own if self.above else scores < own
        index = np.concatenate([exits, np.ones_like(exits[:1])]).argmax(0)
        return SimpleNamespace(exit_index=index, cost=np.take(COSTS, index))


def scores_of(difficulty, seed, policy="entropy"):
    """Scores (3, N) of samples of a difficulty (N,); later exits are more confident."""
    noise = np.random.default_rng(seed).normal(0, 1, (3, len(difficulty)))
    unsure = 1 / (1 + np.exp(-(difficulty + noise - 0.8 * np.arange(3)[:, None] - 1)))
    return {"entropy": unsure * math.log(10), "confidence": 1 - 0.9 * unsure, "margin": 1 - unsure}[policy]


def drift(kind, samples, seed):
    steps = {"none": np.zeros(samples), "jump": np.full(samples, 3.0), "slow": np.linspace(0, 3, samples)}
    return steps[kind] + np.random.default_rng(seed + 1000).normal(0, 2, samples)


def costs_of(call, scores, batch):
    return np.concatenate([call(scores[:, i : i + batch]).cost for i in range(0, scores.shape[1], batch)])


@pytest.mark.parametrize(
    ("policy", "kind", "batch"),
    [("entropy", kind, batch) for kind in ("none", "jump", "slow") for batch in (1, 16)]
    + [("confidence", "slow", 16), ("margin", "jump", 16)],
)
def test_cost_keeps_to_the_target_after_500_samples(policy, kind, batch):
    session = Session(policy, {"entropy": [0.8] * 3, "confidence": [0.7] * 3, "margin": [0.65] * 3}[policy])
    scores = scores_of(drift(kind, 2500, seed=0), 0, policy)
    costs = costs_of(BudgetController(session, target_macs=TARGET), scores, batch)
    assert costs[500:].mean() == pytest.approx(TARGET, rel=0.03)
    if kind != "none":
        frozen = costs_of(lambda x: session(x, session.info.threshold), scores, 500)
        assert frozen[500:].mean() > 1.1 * TARGET


def test_error_of_the_mean_is_bounded_by_how_far_the_level_moved():
    controller = BudgetController(Session(), target_macs=TARGET, step=0.05)
    scores = scores_of(drift("slow", 1000, seed=3), 3)
    moved, costs = [0.0], []
    for sample in range(1000):
        costs.append(controller(scores[:, sample : sample + 1]).cost[0])
        moved.append(controller.state_dict()["shift"])
        missed = (np.mean(costs) - TARGET) / (COSTS[-1] - COSTS[0])
        assert missed == pytest.approx(moved[-1] / (0.05 * (sample + 1)), abs=1e-9)
    assert controller.samples == 1000


@pytest.mark.parametrize("policy", ["entropy", "confidence"])
def test_bounds_hold_and_steps_are_bounded(policy):
    low, high = (0.4, 1.5) if policy == "entropy" else (0.5, 0.9)
    controller = BudgetController(
        Session(policy, [0.6, 0.7, 0.8]), target_macs=TARGET, bounds=(low, high), step=1.0, max_step=2.0
    )
    for exits in ([3] * 100, [0] * 100, [3]):
        before = controller.state_dict()["shift"]
        for _ in range(20):
            controller.update(exits)
            assert all(low <= value <= high for value in controller.thresholds)
            assert abs(controller.state_dict()["shift"] - before) <= min(len(exits) * 1.0, 2.0) + 1e-12
            before = controller.state_dict()["shift"]
    controller.update([3] * 1000), controller.update([3] * 1000)
    assert controller.thresholds == pytest.approx([high if policy == "entropy" else low] * 3)
    for _ in range(9):  # back within a few batches: nothing piled up at the bound
        controller.update([0] * 1000)
    assert controller.thresholds == pytest.approx([low if policy == "entropy" else high] * 3)


def test_what_distinguishes_the_exits_is_kept_and_a_closed_exit_stays_closed():
    controller = BudgetController(Session(threshold=[0.0, 0.5, 1.0]), target_macs=70)
    controller.update([3] * 10)
    closed, first, second = controller.thresholds
    assert closed == 0.0
    assert 0.5 < first < second < math.log(10)
    with pytest.raises(ConfigError, match="from 55 to 100"):  # nobody exits at the first
        BudgetController(Session(threshold=[0.0, 0.5, 1.0]), target_macs=50)


def test_state_continues_where_it_was():
    scores = scores_of(drift("slow", 600, seed=1), 1)
    one, other = (BudgetController(Session(threshold=[math.inf, 0.5, 1.0]), target_macs=TARGET) for _ in range(2))
    costs_of(one, scores[:, :300], 8)
    state = json.loads(json.dumps(one.state_dict(), allow_nan=False))
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert other.thresholds == one.thresholds
    np.testing.assert_array_equal(costs_of(other, scores[:, 300:], 8), costs_of(one, scores[:, 300:], 8))
    assert (other.recent_cost, other.samples) == (one.recent_cost, 600)


@pytest.mark.parametrize(
    "change",
    [
        {"shift": math.nan}, {"shift": "much"}, {"samples": -1}, {"samples": 1.5}, {"recent_cost": None},
        {"recent_cost": -1.0}, {"costs": [1, 2]}, {"costs": None}, {"first_threshold": [0.1, 1.0, 1.0]}, {"costs": 1},
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused_and_changes_nothing(change):
    controller = BudgetController(Session(), target_macs=TARGET)
    controller.update([0, 3, 3])
    state = controller.state_dict()
    for damaged in (state | change, {}, None, [1]):
        with pytest.raises(CheckpointError):
            controller.load_state_dict(damaged)
    assert controller.state_dict() == state


def test_a_stored_shift_beyond_the_bounds_is_brought_within_them():
    controller = BudgetController(Session(), target_macs=TARGET, bounds=(0.5, 1.5))
    controller.update([0])
    controller.load_state_dict(controller.state_dict() | {"shift": 1e9})
    assert controller.thresholds == pytest.approx([1.5] * 3)
    controller.update([0] * 1000)
    assert controller.thresholds[0] < 1.5


def test_threads_lose_no_update():
    controller = BudgetController(Session(), target_macs=TARGET, step=1e-4)

    def work():
        for _ in range(400):
            controller.update([0, 3])
            assert all(0 <= value <= math.log(10) for value in controller.thresholds)

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert controller.samples == 8 * 400 * 2
    # 65 on average, 5 above the target, of a range of 70.
    assert controller.state_dict()["shift"] == pytest.approx(6400 * 1e-4 * 5 / 70)


def test_model_is_called_at_the_present_thresholds():
    model = wrap("resnet")
    x = images("resnet", 16)
    costs = model.exit_table().cumulative_macs
    controller = BudgetController(model, target_macs=(costs[0] + costs[1]) / 2, threshold=2.29)
    with torch.no_grad():
        for _ in range(30):
            before = controller.thresholds
            out = controller(x)
            assert torch.equal(out.exit_index, model(x, threshold=before).exit_index)
    assert controller.samples == 30 * 16
    assert controller.thresholds != [2.29] * len(controller.thresholds)
    assert model.threshold != controller.thresholds  # the stored one stays
    for given in ({"threshold": 0.3}, {"return_dict": False}):
        with pytest.raises(ConfigError, match="leave threshold= and return_dict= out"):
            controller(x, **given)
    for copies in (copy.deepcopy, pickle.dumps):
        with pytest.raises(NotSupportedError, match=r"state_dict\(\)"):
            copies(controller)
    model.train()
    with pytest.raises(ThresholdError, match=r"model.eval\(\)"):
        controller(x)
    model.eval().set_policy(create_policy("confidence"))
    with pytest.raises(ConfigError, match="policy is 'confidence' now, the controller was made for 'entropy'"):
        controller(x)


def test_milliseconds_in_place_of_macs():
    controller = BudgetController(Session(), target_milliseconds=2.0, exit_milliseconds=[1.0, 1.5, 2.0, 3.0])
    costs = costs_of(controller, scores_of(drift("jump", 2000, seed=2), 2), 4)
    times = np.take([1.0, 1.5, 2.0, 3.0], np.searchsorted(COSTS, costs))
    assert times[500:].mean() == pytest.approx(2.0, rel=0.03)
    assert controller.recent_cost == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ConfigError, "give one target"),
        ({"target_macs": 60, "target_milliseconds": 1}, ConfigError, "give one target"),
        ({"target_milliseconds": 1}, ConfigError, "go together"),
        ({"target_macs": 60, "exit_milliseconds": [1, 2, 3, 4]}, ConfigError, "go together"),
        ({"target_milliseconds": 1, "exit_milliseconds": [1, 2]}, ShapeError, "2 numbers for 4 exits"),
        ({"target_milliseconds": 1, "exit_milliseconds": [1, 2, 4, 3]}, ConfigError, "rising"),
        ({"target_macs": 10}, ConfigError, "from 30 to 100"),
        ({"target_macs": 101}, ConfigError, "from 30 to 100"),
        ({"target_macs": math.nan}, ConfigError, "target_macs"),
        ({"target_macs": "60"}, InputTypeError, "target_macs"),
        ({"target_macs": 60, "step": 0}, ConfigError, "step"),
        ({"target_macs": 60, "max_step": -1.0}, ConfigError, "max_step"),
        ({"target_macs": 60, "bounds": (1.0, 0.5)}, ConfigError, "the lower one first"),
        ({"target_macs": 60, "bounds": (0.5, math.inf)}, ConfigError, "two finite"),
        ({"target_macs": 60, "bounds": 0.5}, ConfigError, "two finite"),
        ({"target_macs": 60, "bounds": (-1.0, 0.5)}, ThresholdError, "-1.0"),
        ({"target_macs": 60, "bounds": (0.5, 9.0)}, ConfigError, "outside the scores of policy 'entropy', 0 to 2.303"),
        ({"target_macs": 60, "bounds": (1.5, 2.0)}, ConfigError, "leave out the first thresholds"),
        ({"target_macs": 60, "threshold": [1.0, 2.0]}, ThresholdError, "3 early exits"),
        ({"target_macs": 60, "threshold": 0.0}, ConfigError, "no sample exit early"),
    ],
)
def test_arguments_that_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        BudgetController(Session(), **arguments)


@pytest.mark.parametrize("index", [[4], [-1], [0.0], [True], "0", None, 3, np.array([0.5]), np.array([[0]])])
def test_exits_that_are_none_are_refused(index):
    controller = BudgetController(Session(), target_macs=60)
    with pytest.raises(InputTypeError, match="from 0 to 3"):
        controller.update(index)
    assert controller.samples == 0


def test_policies_and_models_that_it_cannot_steer():
    with pytest.raises(NotSupportedError, match="'patience' in a file"):
        BudgetController(Session("patience"), target_macs=60)
    with pytest.raises(NotSupportedError, match="'patience' has no thresholds"):
        BudgetController(wrap("resnet", policy="patience", threshold=1), target_macs=1e6)
    with pytest.raises(InputTypeError, match="Linear"):
        BudgetController(torch.nn.Linear(2, 2), target_macs=60)
    decoder = SimpleNamespace(exit_table=None, policy=None, config=SimpleNamespace(task="causal_lm"))
    with pytest.raises(NotSupportedError, match="causal_lm"):
        BudgetController(decoder, target_macs=60)


def test_a_learned_policy_moves_within_bounds_that_are_given():
    model = wrap("resnet")
    model.set_policy(SetSizePolicy(model.num_exits))
    costs = model.exit_table().cumulative_macs
    with pytest.raises(ConfigError, match="give bounds"):
        BudgetController(model, target_macs=costs[1])
    controller = BudgetController(model, target_macs=costs[1], bounds=(0.5, 10.5))
    before = controller.thresholds
    controller.update([model.num_exits - 1])
    assert all(old < new <= 10.5 for old, new in zip(before, controller.thresholds, strict=True))
