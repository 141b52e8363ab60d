"""Every policy is a pure function of log-probabilities; each means what its definition says."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from erde_hub.errors import ConfigError, ShapeError, ThresholdError, UnknownNameError
from erde_hub.policies import (
    EntropyPolicy,
    ExitPolicy,
    create_policy,
    get_policy,
    list_policies,
    plain_threshold,
    register_policy,
)
from tests.fakes.networks import leaves, score
from tests.fakes.policies import PLAIN, make_policy

SCORED = ["entropy", "confidence", "margin", "patience"]


def random_log_probs(exits=3, batch=6, classes=4, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(exits, batch, classes, generator=generator)).log_softmax(-1)


# Contract over the table


@pytest.mark.parametrize("name", list_policies())
def test_a_mask_per_sample_without_side_effects(name):
    policy, log_probs = make_policy(name), random_log_probs()
    before = log_probs.clone()
    state = copy.deepcopy(policy.state_dict())
    threshold = policy.default_threshold
    mask = policy(log_probs, threshold)
    assert mask.shape == (6,)
    assert mask.dtype == torch.bool
    assert torch.equal(policy(log_probs, threshold), mask)
    assert torch.equal(log_probs, before)
    assert policy.state_dict().keys() == state.keys()
    order = torch.randperm(6)
    assert torch.equal(policy(log_probs[:, order], threshold), mask[order])
    for i in range(6):
        assert policy(log_probs[:, i : i + 1], threshold).tolist() == [bool(mask[i])]
    assert policy(log_probs[:, :0], threshold).shape == (0,)
    assert policy(log_probs, torch.tensor(threshold)).tolist() == mask.tolist()


@pytest.mark.parametrize("name", list_policies())
def test_history_is_read_only_where_declared(name):
    policy = make_policy(name, classes=2)
    differs = False
    for seed in range(20):
        log_probs = random_log_probs(seed=seed, classes=2)
        whole = policy.score(log_probs)
        alone = policy.score(log_probs[-1:])
        if not policy.uses_history:
            assert torch.equal(whole, alone)
        differs = differs or not torch.equal(whole, alone)
    assert differs == policy.uses_history


@pytest.mark.parametrize("name", list_policies())
@pytest.mark.parametrize("classes", [2, 3, 100])
def test_any_number_of_classes_and_saturated_answers(name, classes):
    policy = make_policy(name, classes=classes)
    logits = torch.zeros(2, 3, classes)
    logits[:, 0, 0] = 1e4
    logits[:, 1, 1] = float("inf")  # a NaN row
    log_probs = logits.log_softmax(-1)
    value = policy.score(log_probs)
    assert torch.isfinite(value[[0, 2]]).all()
    if policy.uses_threshold:
        assert not policy(log_probs, policy.threshold_range[0])[1], "NaN never leaves"
        assert not policy(log_probs, policy.threshold_range[1])[1]


@pytest.mark.parametrize("name", list_policies())
def test_never_leaves_keeps_its_word(name):
    policy = make_policy(name, classes=5)
    low, high = policy.threshold_range
    seen = False
    for threshold in (low, 0.0, 0.5, 1.0, 1.0001, 1.5, 5.0, 1e8, high):
        if low <= threshold <= high and policy.never_leaves(threshold):
            seen = True
            logits = torch.zeros(4, 4, 5)
            logits[:, 0, 0] = 1e6
            assert not policy(logits.log_softmax(-1), threshold).any()
            assert not policy(random_log_probs(classes=5), threshold).any()
    assert seen or name == "always"


@pytest.mark.parametrize("name", list_policies())
def test_copies_and_low_precision(name):
    policy, log_probs = make_policy(name), random_log_probs()
    expected = policy(log_probs, policy.default_threshold)
    for again in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert torch.equal(again(log_probs, policy.default_threshold), expected)
    assert policy(log_probs.double(), policy.default_threshold).tolist() == expected.tolist()


@pytest.mark.parametrize("name", list_policies())
def test_thresholds_are_checked(name):
    policy = make_policy(name)
    low, high = policy.threshold_range
    assert policy.check_threshold(policy.default_threshold, 3) == [policy.default_threshold] * 3
    assert policy.check_threshold([low, high, 1.0], 3) == [low, high, 1.0]
    assert policy.check_threshold((1, 1), 2) == [1.0, 1.0]
    bad_ones = [math.nan, [1.0, math.nan, 1.0]]
    if not math.isinf(low):
        bad_ones += [low - 0.1, [low - 0.1, 1.0, 1.0], -math.inf]
    for bad in bad_ones:
        with pytest.raises(ThresholdError, match=f"{type(policy).__name__}: give a number in") as caught:
            policy.check_threshold(bad, 3)
        assert isinstance(caught.value, ValueError)
    for bad in ([1.0, 1.0], [1.0] * 4, []):
        with pytest.raises(ThresholdError, match=f"got {len(bad)} thresholds for 3 early exits"):
            policy.check_threshold(bad, 3)
    for bad in ("1", None, True, [True, 1, 1], ["1", 1, 1], {}, {1.0, 2.0}, 10**400, 1j, "inf", ["inf", 1.0, 1.0]):
        with pytest.raises(ThresholdError, match="must be a number or one number per early exit"):
            policy.check_threshold(bad, 3)
    with pytest.raises(ThresholdError, match=r"got \['inf', 1\.0\]; a text is no number: write float\('inf'\)"):
        plain_threshold(["inf", 1.0])


def test_numbers_of_other_libraries_are_numbers():
    for given_, plain in (
        (np.float32(0.5), 0.5), (np.int64(2), 2.0), (np.array([0.5, 1.0]), [0.5, 1.0]), (torch.tensor(0.5), 0.5),
        (torch.tensor([0.5]), [0.5]), (3, 3.0), ((1, 2.5), [1.0, 2.5]),
        ([torch.tensor(0.5), np.float32(1)], [0.5, 1.0]),
    ):  # fmt: skip
        found = plain_threshold(given_)
        assert found == plain
        assert type(found) is type(plain)


@pytest.mark.parametrize("name", list_policies())
def test_shapes_are_checked(name):
    with pytest.raises(ShapeError, match=r"\(exits so far, N, K\), got shape \(6, 4\)"):
        make_policy(name)(random_log_probs()[0], 0.5)


def test_the_table():
    learned = ["eefp", "eenet", "set_size"]
    assert list_policies() == ["entropy", "confidence", "margin", "patience", *learned, "never", "always"]
    with pytest.raises(UnknownNameError, match="unknown policy 'entropyy'; did you mean 'entropy'"):
        create_policy("entropyy")
    for name in list_policies():
        if name not in PLAIN:
            with pytest.raises(ConfigError, match=r"learned and has nothing to decide with yet: fit it"):
                create_policy(name)
        with pytest.raises(ConfigError, match=f"policy '{name}' has no argument 'k'"):
            create_policy(name, k=3)
        assert get_policy(name).summary
    with pytest.raises(ConfigError, match="'entropy' is already registered"):
        register_policy("entropy", ExitPolicy, "mine")


# Definitions


@given(
    name=st.sampled_from(SCORED),
    seed=st.integers(0, 10_000),
    exits=st.integers(1, 5),
    classes=st.integers(2, 12),
    spread=st.sampled_from([0.01, 1.0, 5.0, 60.0]),
)
def test_scores_follow_the_definitions(name, seed, exits, classes, spread):
    log_probs = random_log_probs(exits, 4, classes, seed, spread)
    found = create_policy(name).score(log_probs)
    for n in range(4):
        assert float(found[n]) == pytest.approx(score(name, list(log_probs[:, n])), rel=1e-4, abs=1e-5)


def test_at_equality():
    sure = torch.tensor([[[0.75, 0.25]]], dtype=torch.float64).log()
    entropy = float(create_policy("entropy").score(sure))
    assert not create_policy("entropy")(sure, entropy)  # strictly below
    assert create_policy("entropy")(sure, math.nextafter(entropy, 2))
    for name in ("confidence", "margin"):
        policy = create_policy(name)
        value = float(policy.score(sure))
        assert policy(sure, value)  # at least
        assert not policy(sure, math.nextafter(value, 2))


def test_numbers_worked_by_hand():
    log_probs = torch.tensor([[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]]).log()
    assert create_policy("entropy").score(log_probs).tolist() == pytest.approx([1.5 * math.log(2), 0, math.log(3)])
    assert create_policy("confidence").score(log_probs).tolist() == pytest.approx([0.5, 1, 1 / 3])
    assert create_policy("margin").score(log_probs).tolist() == pytest.approx([0.25, 1, 0], abs=1e-7)


def test_entropy_zero_never_leaves_and_more_than_log_k_always_does():
    policy = create_policy("entropy")
    log_probs = torch.tensor([[[0.0, -1e9], [math.log(0.5)] * 2]])
    assert policy(log_probs, 0.0).tolist() == [False, False]
    assert policy(log_probs, 1e-12).tolist() == [True, False]
    assert policy(log_probs, 0.7).tolist() == [True, True]
    assert policy(log_probs, math.inf).tolist() == [True, True]


def test_patience_counts_agreements():
    answers = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]])  # exits x samples
    log_probs = torch.nn.functional.one_hot(answers, 3).float().mul(9).log_softmax(-1)
    policy = create_policy("patience")
    found = [policy.score(log_probs[: e + 1]).tolist() for e in range(4)]
    assert found == [[0, 0, 0, 0], [0, 1, 1, 1], [1, 2, 0, 2], [2, 3, 1, 0]]

    def exit_of(patience):
        taken = torch.full((4,), 4)
        for e in reversed(range(4)):
            taken[policy(log_probs[: e + 1], patience)] = e
        return taken.tolist()

    # k agreements need k + 1 exits
    assert exit_of(1) == [2, 1, 1, 1]
    assert exit_of(2) == [3, 2, 4, 2]
    assert exit_of(3) == [4, 3, 4, 4]
    assert exit_of(math.inf) == [4, 4, 4, 4]


def test_patience_does_not_agree_with_nan():
    log_probs = random_log_probs(3, 1, 3)
    log_probs[:] = log_probs[:1]
    assert create_policy("patience").score(log_probs).tolist() == [2.0]
    log_probs[1, 0, 1] = math.nan
    assert create_policy("patience").score(log_probs).tolist() == [0.0]
    log_probs[2, 0, 1] = math.nan
    assert create_policy("patience").score(log_probs).tolist() == [0.0]


@pytest.mark.parametrize("name", [n for n in list_policies() if not get_policy(n).cls.uses_history])
def test_an_exit_by_itself_is_scored_as_the_last_of_several(name):
    log_probs = random_log_probs()
    log_probs[-1, 0, 1] = -math.inf
    policy = create_policy(name)
    assert torch.equal(policy.score_last(log_probs[-1]), policy.score(log_probs))
    first = policy.compare(policy.score(log_probs)[1].item(), 0.5)
    assert isinstance(first, bool)
    assert first == bool(policy.compare(policy.score(log_probs), 0.5)[1])


@pytest.mark.parametrize("name", [n for n in list_policies() if not get_policy(n).cls.uses_history])
def test_one_sample_is_scored_as_in_a_batch(name):
    log_probs = random_log_probs()[-1]
    log_probs[0] = torch.tensor([0.0] + [-math.inf] * (log_probs.shape[1] - 1))
    log_probs[1, 1] = -math.inf
    log_probs[2, 0] = math.nan
    policy = create_policy(name)
    alone = torch.tensor([policy.score_one(row[None]) for row in log_probs])
    torch.testing.assert_close(alone, policy.score_last(log_probs), rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("method", ["score", "score_last"])
def test_short_cuts_of_a_parent_do_not_speak_for_a_subclass(method):
    def flat(self, log_probs):
        return log_probs.new_full(log_probs.shape[-2:-1], 7.0)

    def twice(self, log_probs):
        return 2 * getattr(EntropyPolicy, method)(self, log_probs)

    log_probs = random_log_probs()
    double = type("Double", (EntropyPolicy,), {method: twice})()
    entropy = EntropyPolicy().score(log_probs)
    torch.testing.assert_close(double.score(log_probs), 2 * entropy)
    torch.testing.assert_close(double.score_last(log_probs[-1]), 2 * entropy)
    assert double.score_one(log_probs[-1][:1]) == pytest.approx(2 * entropy[0].item())
    policy = type("Flat", (EntropyPolicy,), {method: flat})()
    assert policy.score_last(log_probs[-1]).tolist() == [7.0] * log_probs.shape[1]
    assert policy.score(log_probs).tolist() == [7.0] * log_probs.shape[1]
    assert policy.score_one(log_probs[-1][:1]) == 7.0


def test_entropy_of_one_sample_with_any_number_of_classes():
    policy = EntropyPolicy()
    for classes in (2, 1000, 20_000):
        log_probs = (torch.randn(8, classes) * torch.logspace(-3, 3, 8)[:, None]).log_softmax(-1)
        alone = torch.tensor([policy.score_one(row[None]) for row in log_probs])
        torch.testing.assert_close(alone, policy.score_last(log_probs), rtol=1e-5, atol=1e-5)


def test_the_constant_ones():
    log_probs = random_log_probs()
    assert not create_policy("never")(log_probs, 0.5).any()
    assert create_policy("always")(log_probs, 0.5).all()


# Golden vectors


def test_golden_threshold_policies(golden):
    data = golden("exit_policy")
    case = next(c for c in data["cases"] if c["name"] == "threshold_policies")
    logits = torch.tensor(case["inputs"]["logits"], dtype=torch.float64)
    cost = torch.tensor(case["inputs"]["cumulative_cost"], dtype=torch.float64)
    rtol, atol = data["tolerance"]["float64_rtol"], data["tolerance"]["float64_atol"]
    names = {"entropy": "entropy", "max_prob": "confidence", "margin": "margin"}
    log_probs = logits.log_softmax(-1)
    for golden_name, name in names.items():
        expected = torch.tensor(case["expected"]["scores"][golden_name], dtype=torch.float64)
        found = torch.stack([create_policy(name).score(log_probs[: e + 1]) for e in range(len(logits))])
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    checked = 0
    for row in case["expected"]["policies"]:
        if row["score"] not in names:
            continue  # normalised_confidence is no policy of the table
        policy = create_policy(names[row["score"]])
        for dtype in (torch.float64, torch.float32):
            taken = torch.full((logits.shape[1],), len(logits) - 1)
            for e in reversed(range(len(logits) - 1)):
                taken[policy(log_probs.to(dtype)[: e + 1], row["thresholds"][e])] = e
            answers = logits[taken, torch.arange(logits.shape[1])].argmax(-1)
            assert taken.tolist() == row["exit_index"]
            assert answers.tolist() == row["prediction"]
            assert torch.bincount(taken, minlength=len(logits)).tolist() == row["exit_counts"]
            assert float(cost[taken].mean()) == pytest.approx(row["mean_cost"], rel=rtol)
        checked += 1
    assert checked == 6


def test_golden_budget_thresholds_route_as_recorded(golden):
    data = golden("exit_policy")
    policy = create_policy("confidence")
    for case in data["cases"]:
        if "test_logits" not in case["inputs"]:
            continue
        log_probs = torch.tensor(case["inputs"]["test_logits"], dtype=torch.float64).log_softmax(-1)
        for budget in case["expected"]["budgets"]:
            taken = torch.full((log_probs.shape[1],), len(log_probs) - 1)
            for e in reversed(range(len(log_probs) - 1)):
                threshold = max(0.0, budget["thresholds"][e])  # -1e8 and 1e8 mean everybody and nobody
                taken[policy(log_probs[: e + 1], policy.check_threshold(threshold, 1)[0])] = e
            assert taken.tolist() == budget["test_exit_index"]


def test_the_reference_of_the_other_tests_agrees_at_the_edges():
    assert not leaves("entropy", 0.5, 0.5)
    assert leaves("confidence", 0.5, 0.5)
    assert not leaves("margin", math.nan, 0.0)


def test_patience_counts_in_whole_numbers():
    policy = create_policy("patience")
    assert policy.check_threshold(2, 3) == [2.0, 2.0, 2.0]
    assert policy.check_threshold(math.inf, 1) == [math.inf]
    with pytest.raises(ThresholdError, match=r"threshold 2\.5 is no whole number"):
        policy.check_threshold([1, 2.5], 2)
