"""Tests and bounds for the mean of a bounded loss, from a finite sample and without assumptions on its distribution.

Every p-value here is for the hypothesis "the expected loss is above ``bound``"; small ones support the bound.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

#: Fractions of the largest safe bet over which :func:`betting_p_values` averages.
_BETS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.55, 0.8, 1.0)


def hoeffding_bentkus_p_values(means: Tensor, samples: int, bound: float, binary: bool) -> Tensor:
    """P-values from the mean of losses in [0, 1].

    The smaller one of Hoeffding's exp(-n h(min(r, a), a)), h(a, b) = a log(a/b) + (1 - a) log((1 - a)/(1 - b)), and
    Bentkus' e P(Bin(n, a) <= ceil(n r)), without the factor e where losses are 0 or 1 and the binomial is exact.

    Args:
        means: Mean losses r, one per candidate.
        samples: Number n of samples of each.
        bound: The bound a, in (0, 1).
        binary: Losses are 0 or 1.

    References:
        Bates et al., Distribution-free, risk-controlling prediction sets, 2021, arXiv 2101.02703; Angelopoulos et al.,
        Learn then test, 2021, arXiv 2110.01052, section 3.2. Deviations: none.
    """
    from scipy.stats import binom  # noqa: PLC0415 - takes a second to import

    means = means.double()
    low = means.clamp(max=bound)
    divergence = torch.special.xlogy(low, low / bound) + torch.special.xlogy(1 - low, (1 - low) / (1 - bound))
    hoeffding = (-samples * divergence).exp()
    count = (samples * means - 1e-9).ceil().clamp(0, samples).long()  # a mean times n is whole up to rounding
    bentkus = torch.from_numpy(binom.cdf(count.numpy(), samples, bound)) * (1.0 if binary else math.e)
    return torch.minimum(hoeffding, bentkus)


def betting_p_values(losses: Tensor, bound: float, weights: Tensor | None = None) -> Tensor:
    """P-values from single losses in [-1, 1], sharper than those of means where losses hardly vary or cancel out.

    Betting a fraction b of the wealth against the hypothesis at every sample gives prod(1 + b (bound - loss)) at the
    end, which is 1 or less on average if the hypothesis is true, for every b in [0, 1 / (1 - bound)]. So is the average
    over several b, and by Markov's inequality its inverse is a p-value. The order of the samples is immaterial.

    Shape:
        losses: (C, N). weights: (N,), how many samples each column stands for. Returns (C,).

    References:
        Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, 2024, arXiv 2010.09686,
        section 4.4 (grid Kelly). Deviations: one-sided, and a fixed grid that is denser near 0.
    """
    weights = losses.new_ones(losses.shape[1]) if weights is None else weights
    return _wealth_p_values(lambda bet: torch.log1p(bet * (bound - losses.double())) @ weights.double(), bound)


def betting_p_values_of_counts(lost: Tensor, won: Tensor, samples: int, bound: float) -> Tensor:
    """The same where losses are 1, -1 or 0: from how many samples lose and how many win, each (C,)."""

    def log_wealth(bet: float) -> Tensor:
        equal = samples - lost - won
        return (
            lost * math.log1p(bet * (bound - 1)) + won * math.log1p(bet * (bound + 1)) + equal * math.log1p(bet * bound)
        )

    return _wealth_p_values(log_wealth, bound)


def _wealth_p_values(log_wealth: Callable[[float], Tensor], bound: float) -> Tensor:
    wealth = torch.stack([log_wealth(share * (1 - 1e-9) / (1 - bound)) for share in _BETS])
    return (math.log(len(_BETS)) - wealth.logsumexp(0)).exp().clamp(max=1.0)


@functools.lru_cache(maxsize=100_000)
def difference_p_value(lost: int, won: int, samples: int, bound: float, level: float = 0.1) -> float:
    """P-value from the numbers of samples that lose and that win, each by 1; exact, and with gains counted.

    Outcomes are ordered by how far lost - won is below its expectation n a, in standard deviations: the score
    t = (lost - won - n a) / sqrt(max(lost + won, n a) - n a^2) of the bound a. If a sample loses with probability a + q
    and wins with probability q, the probability of a score of at most t is summed exactly. The unknown q is taken as
    the worst one between confidence limits of the fraction of wins, and the probability that these fail is added
    (Berger and Boos).
    A score hardly depends on q, so that the worst one costs little; it is searched at 16 places. The limits fail
    with a fiftieth of the level at which the p-value will be tested, and 0.002 at most.

    References:
        Berger and Boos, P values maximized over a confidence set for the nuisance parameter, 1994, JASA 89.
        Sidik, Exact unconditional tests for testing non-inferiority in matched-pairs design, 2003, Statistics in
        Medicine 22. Deviations: the variance of the score is that of the number of samples that differ.
    """
    if lost - won >= samples * bound:
        return 1.0
    score = max((lost - won - samples * bound) / float(_deviation(torch.tensor(lost + won), samples, bound)), _LOWEST)
    missed = min(_NUISANCE_LEVEL, level / 50)
    highest = min(upper_limit(won, samples, missed / 2), (1 - bound) / 2)
    lowest = min(upper_limit(won - 1, samples, 1 - missed / 2), highest) if won else 0.0  # the lower limit
    wins = torch.linspace(lowest, highest, 16, dtype=torch.float64)
    return min(1.0, missed + float(_tails(score, samples, bound, wins).max()))


class AcceptanceRegion:
    """The outcomes of which :func:`difference_p_value` is at most a level, by the most losses for each number of wins.

    Among outcomes with as many wins a p-value rises with the losses, since the score does and the limits of the
    fraction of wins stay. One search for a number of wins then decides for all outcomes with that many.

    Args:
        samples: Number of samples.
        bound: The bound.
        level: In (0, 1).
    """

    def __init__(self, samples: int, bound: float, level: float) -> None:
        self.samples, self.bound, self.level = samples, bound, level
        self._most: dict[int, int] = {}

    def __contains__(self, outcome: tuple[int, int]) -> bool:
        """Returns whether so many losses and wins are accepted."""
        lost, won = outcome
        if won not in self._most:
            self._most[won] = self._most_losses(won)
        return lost <= self._most[won]

    def _most_losses(self, won: int) -> int:
        """The most losses that are accepted with so many wins, -1 if none; searched around a normal test's result."""
        from scipy.stats import norm  # noqa: PLC0415

        def accepted(lost: int) -> bool:
            return difference_p_value(lost, won, self.samples, self.bound, self.level) <= self.level

        expected, lost, quantile = self.samples * self.bound, float(won), float(norm.ppf(self.level))
        for _ in range(4):
            variance = max(lost + won, expected) - expected * self.bound
            lost = won + expected + quantile * variance**0.5
        low = high = max(int(lost), 0)
        step = 1
        if accepted(low):
            while accepted(low + step):
                low, step = low + step, 2 * step
            high = low + step
        else:
            while high >= step and not accepted(high - step):
                high, step = high - step, 2 * step
            low = max(high - step, -1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if accepted(middle) else (low, middle)
        return low


@functools.lru_cache(maxsize=256)
def acceptance_region(samples: int, bound: float, level: float) -> AcceptanceRegion:
    """The region, which remembers what it was asked."""
    return AcceptanceRegion(samples, bound, level)


#: Largest chance that the fraction of wins is outside the limits between which :func:`difference_p_value` looks.
_NUISANCE_LEVEL = 0.002
#: Lower scores count as this one, so that their p-values are the larger ones of it.
_LOWEST = -7.0


def upper_limit(count: int, samples: int, level: float) -> float:
    """Clopper and Pearson's upper confidence limit of a probability, from ``count`` of so many samples."""
    from scipy.stats import beta  # noqa: PLC0415

    return 1.0 if count >= samples else float(beta.ppf(1 - level, count + 1, samples - count))


def _deviation(differing: Tensor, samples: int, bound: float) -> Tensor:
    """Standard deviation of losses - wins at the bound, from how many samples lose or win; n a of them at least."""
    return (differing.double().clamp(min=samples * bound) - samples * bound**2).sqrt()


def _tails(score: float, samples: int, bound: float, wins: Tensor) -> Tensor:
    """P(score of losses and wins <= score) of a multinomial with fractions ``bound + wins`` and ``wins``, for several.

    Losses plus wins are m, binomial; of m, losses are binomial again and at most k, the largest number whose score is
    low enough. From m - 1 to m this k stays or rises by 1 (a fall is evened out, so that losing less or winning more
    stays in the region, and the bound itself is the worst of the hypothesis). The distribution function at k
    follows from that for m - 1 by adding or taking off one mass.
    """
    some = (bound + 2 * wins)[:, None]
    part = (bound + wins)[:, None] / some
    width = 10 * (samples * some * (1 - some)).sqrt() + 20
    low = max(0, int((samples * some - width).min()))
    high = min(samples, int((samples * some + width).max()) + 1)
    m = torch.arange(low, high + 1, dtype=torch.float64)
    k = ((m + samples * bound + score * _deviation(m, samples, bound) + 1e-9) / 2).floor().cummax(0).values
    below = torch.arange(max(int(k[0]) + 1, 0), dtype=torch.float64)
    first = _masses(m[0].expand(len(below)), below, part).sum(1, keepdim=True)
    steps = -part * _masses(m[:-1], k[:-1], part)
    steps += torch.where(k[1:] > k[:-1], _masses(m[1:], k[1:], part), 0.0)
    at_most_k = torch.cat([first, steps], 1).cumsum(1).clamp(0, 1)
    return (_masses(torch.tensor(float(samples), dtype=torch.float64), m, some) * at_most_k).sum(1)


def _masses(trials: Tensor, count: Tensor, probability: Tensor) -> Tensor:
    """Binomial probabilities; 0 outside 0 to the number of trials."""
    from scipy.stats import binom  # noqa: PLC0415

    return torch.from_numpy(binom.pmf(count.numpy(), trials.numpy(), probability.numpy()))


def smallest_bound(p_value: Callable[[float], float], level: float, low: float) -> float:
    """Returns the smallest bound in [low, 1] that a test accepts at a level, by bisection; 1 where it accepts none."""
    left, right = low, 1 - 1e-9
    if p_value(right) > level:
        return 1.0
    for _ in range(26):
        middle = (left + right) / 2
        left, right = (left, middle) if p_value(middle) <= level else (middle, right)
    return right


def conformal_risk(losses: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns (n R + 1) / (n + 1) of each candidate, R its mean loss made to rise along the candidates.

    The last candidate where this is at most a bound has an expected loss below the bound, on average over the draw of
    the n samples; for a single draw nothing is said.

    Shape:
        losses: (C, N) in [0, 1], from the safest candidate to the boldest. weights: (N,), how many samples each column
            stands for. Returns (C,).

    References:
        Angelopoulos et al., Conformal risk control, 2022, arXiv 2208.02814, equation 4 and the remark on losses that do
        not rise: each sample's running maximum takes their place. Deviations: none.
    """
    weights = losses.new_ones(losses.shape[1]) if weights is None else weights
    rising = losses.cummax(0).values.double()
    return (rising @ weights.double() + 1) / (weights.double().sum() + 1)
