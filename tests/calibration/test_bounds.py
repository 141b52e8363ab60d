"""Tests of means against MAPIE, exact sums, and what they promise under the hypothesis."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch

from erde_hub.calibration import attainable_confidence, samples_without_loss
from erde_hub.calibration.guarantees import LossTest
from erde_hub.calibration.p_values import (
    AcceptanceRegion,
    betting_p_values,
    betting_p_values_of_counts,
    conformal_risk,
    difference_p_value,
    hoeffding_bentkus_p_values,
    smallest_bound,
)

mapie = pytest.importorskip("mapie.risk_control.methods")
fwer = pytest.importorskip("mapie.risk_control.fwer_control")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("samples", [20, 500, 10_000])
@pytest.mark.parametrize("bound", [0.003, 0.01, 0.2])
def test_hoeffding_bentkus_is_mapies(samples, bound, binary):
    counts = np.unique(np.linspace(0, min(samples, 3 * samples * bound + 5), 12).astype(int))
    counts = counts[np.ceil(samples * (counts / samples)) == counts]  # MAPIE rounds 49.0000001 up
    means = counts / samples
    if not binary:
        means = means * 0.7
    expected = mapie.compute_hoeffding_bentkus_p_value(means, samples, bound, binary)[:, 0]
    found = hoeffding_bentkus_p_values(torch.tensor(means), samples, bound, binary)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-300)


def test_conformal_risk_is_mapies_where_losses_rise():
    losses = (torch.rand(200, 1) < torch.linspace(0, 0.4, 30)).float()
    _, expected = mapie.get_r_hat_plus(losses.numpy(), np.arange(30), "crc", None, None, None)
    np.testing.assert_allclose(conformal_risk(losses.T).numpy(), expected, rtol=1e-6)


def test_conformal_risk_of_losses_that_fall_again_keeps_their_highest():
    losses = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert conformal_risk(losses).tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3])


def region(score, samples, bound):
    """All (losses, wins) whose score is low enough, and those that lose less or win more than one of these."""

    def low_enough(losses, wins):
        differing = max(losses + wins, samples * bound)
        deviation = math.sqrt(differing - samples * bound**2)
        return losses - wins - samples * bound <= score * deviation + 1e-9

    inside = set()
    for losses in reversed(range(samples + 1)):
        for wins in range(samples - losses + 1):
            less = {(losses + 1, wins), (losses + 1, wins - 1), (losses, wins - 1)}
            if low_enough(losses, wins) or less & inside:
                inside.add((losses, wins))
    return inside


def multinomial_mass(pairs, samples, lose, win):
    mass = 0.0
    for losses, wins in pairs:
        rest = samples - losses - wins
        ways = math.comb(samples, losses) * math.comb(samples - losses, wins)
        mass += ways * lose**losses * win**wins * (1 - lose - win) ** rest
    return mass


@pytest.mark.parametrize(("lost", "won", "samples", "bound", "wins"), [
    (5, 6, 40, 0.1, 0.2), (1, 0, 60, 0.05, 0.02), (14, 11, 60, 0.1, 0.3), (2, 0, 50, 0.1, 1e-9), (4, 14, 40, 0.2, 0.3),
    (0, 0, 30, 0.02, 0.01),
])  # fmt: skip
def test_the_tail_of_a_score_is_the_sum_over_all_counts(lost, won, samples, bound, wins):
    from erde_hub.calibration.p_values import _tails  # noqa: PLC0415

    deviation = math.sqrt(max(lost + won, samples * bound) - samples * bound**2)
    score = (lost - won - samples * bound) / deviation
    pairs = region(score, samples, bound)
    assert (lost, won) in pairs
    found = _tails(score, samples, bound, torch.tensor([0.0, wins], dtype=torch.float64))
    assert float(found[1]) == pytest.approx(multinomial_mass(pairs, samples, bound + wins, wins), rel=1e-9, abs=1e-13)
    # The bound itself is the worst of the hypothesis: more losses make the region less likely.
    worse = multinomial_mass(pairs, samples, bound + wins + 0.02, wins)
    assert worse < multinomial_mass(pairs, samples, bound + wins, wins)


def test_the_exact_test_rejects_a_true_hypothesis_in_no_more_than_its_level_summed_over_all_outcomes():
    for samples, bound, wins in ((40, 0.1, 0.0), (50, 0.1, 0.11), (40, 0.2, 0.07)):
        outcomes = [(a, b) for a in range(samples + 1) for b in range(min(samples - a, 20) + 1)]
        small = [(a, b) for a, b in outcomes if difference_p_value(a, b, samples, bound) <= 0.1]
        mass = multinomial_mass(small, samples, bound + wins, wins)
        assert mass <= 0.1 + 1e-9, (samples, bound, wins)
        assert wins < 0.05 or mass > 0.06, "not much smaller than it has to be"


def test_p_values_of_every_kind_are_rarely_small_when_the_bound_is_exceeded():
    """Losses at the bound exactly: a share of at most 0.1 (and its sampling error) of p-values is below 0.1."""
    generator = torch.Generator().manual_seed(1)
    for bound, wins, samples in ((0.05, 0.0, 100), (0.02, 0.02, 400), (0.05, 0.02, 700)):
        u = torch.rand(1500, samples, generator=generator)
        losses = (u < bound + wins).float() - (u > 1 - wins).float()
        lost, won = (losses > 0).sum(1), (losses < 0).sum(1)
        exact = torch.tensor(
            [difference_p_value(int(a), int(b), samples, bound) for a, b in zip(lost, won, strict=True)]
        )
        found = {"betting": betting_p_values(losses, bound), "exact": exact}
        if not wins:
            found["hb"] = hoeffding_bentkus_p_values(losses.mean(1), samples, bound, binary=True)
        for name, p_values in found.items():
            share = (p_values <= 0.1).double().mean()
            assert share <= 0.1 + 3 * (0.09 / 1500) ** 0.5, (name, bound, wins, share)
    assert (exact <= 0.1).double().mean() > 0.04, "not much smaller than it has to be"


def test_betting_does_not_see_the_order_and_gets_sure():
    losses = torch.cat([torch.zeros(1, 3000), torch.ones(1, 5)], 1)
    shuffled = losses[:, torch.randperm(3005)]
    assert betting_p_values(losses, 0.01).item() == pytest.approx(betting_p_values(shuffled, 0.01).item())
    assert betting_p_values(losses, 0.01).item() < 0.01
    losses[0, :3] = -1
    counts = torch.tensor([5.0]), torch.tensor([3.0])
    assert betting_p_values_of_counts(*counts, 3005, 0.01).item() == pytest.approx(
        betting_p_values(losses, 0.01).item()
    )
    assert betting_p_values(torch.ones(1, 50), 0.01).item() == 1.0


def test_gains_count_in_the_exact_test():
    assert difference_p_value(60, 0, 5000, 0.01) == 1.0  # more lost than allowed
    assert difference_p_value(60, 30, 5000, 0.01) < 0.06
    assert difference_p_value(30, 0, 5000, 0.01) < 0.01


def test_the_exact_test_serves_high_confidences_too():
    assert difference_p_value(5, 0, 5000, 0.01) > 0.001  # what it spends on the unknown share of wins
    assert difference_p_value(5, 0, 5000, 0.01, level=0.001) < 0.001
    losses = torch.cat([torch.zeros(1, 5000), torch.cat([torch.ones(5), torch.zeros(4995)])[None]])
    assert LossTest("exact", 0.999).last_accepted(losses, 0.01) == 1
    assert LossTest("exact", 0.999).supported_bound(losses) < 0.01


@pytest.mark.parametrize(("samples", "bound", "level"), [
    (30, 0.02, 0.1), (250, 0.1, 0.4), (2000, 0.01, 0.1), (9000, 0.07, 0.001),
])  # fmt: skip
def test_the_region_holds_the_outcomes_whose_p_values_are_small(samples, bound, level):
    region, rng = AcceptanceRegion(samples, bound, level), random.Random(samples)
    for _ in range(12):
        won = min(int(rng.expovariate(1 / (samples * bound))), samples)
        edge = next(k for k in itertools.count() if (k, won) not in region)
        for lost in {edge - 1, edge, rng.randint(0, edge), edge + rng.randint(0, samples // 10)} - {-1}:
            small = difference_p_value(lost, won, samples, bound, level) <= level
            assert ((lost, won) in region) == small, (lost, won)
    assert (0, 0) not in AcceptanceRegion(20, 0.02, 0.1), "20 samples without a loss say nothing of 2 %"
    assert (0, 20) in AcceptanceRegion(20, 0.02, 0.1)


def test_samples_without_loss_is_where_the_test_begins_to_accept():
    for bound in (0.005, 0.01, 0.1):
        for confidence in (0.8, 0.9, 0.99):
            needed = samples_without_loss(bound, confidence)
            for samples, accepted in ((needed, True), (needed - 1, False)):
                p_value = hoeffding_bentkus_p_values(torch.zeros(1), samples, bound, binary=True).item()
                assert (p_value <= 1 - confidence + 1e-12) == accepted
            assert attainable_confidence(bound, needed) >= confidence - 1e-9
            assert attainable_confidence(bound, needed - 1) < confidence


def test_the_smallest_bound_is_the_inverse():
    found = smallest_bound(lambda a: float(hoeffding_bentkus_p_values(torch.tensor([0.02]), 500, a, True)), 0.1, 1e-9)
    assert float(hoeffding_bentkus_p_values(torch.tensor([0.02]), 500, found, True)) == pytest.approx(0.1, rel=1e-5)
    assert smallest_bound(lambda a: 1.0, 0.1, 0.0) == 1.0


def test_fixed_sequence_is_mapies():
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        risks = torch.linspace(0, 0.05, 25)[:, None]
        losses = (torch.rand(25, 800, generator=generator) < risks).float()
        losses[0] = 0
        p_values = mapie.compute_hoeffding_bentkus_p_value(losses.double().mean(1).numpy(), 800, 0.02, True)[:, 0]
        accepted = fwer.control_fwer(p_values[1:], 0.1, "fixed_sequence")
        assert LossTest("ltt", 0.9).last_accepted(losses, 0.02) == len(accepted)
