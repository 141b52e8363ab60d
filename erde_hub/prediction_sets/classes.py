"""Sets of classes, from the logits of every exit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from erde_hub._arguments import check_flag, check_number, check_whole
from erde_hub.errors import ConfigError, RecordsError, ShapeError, unknown_name
from erde_hub.records import ExitRecords, check_held_out, check_kind, row_chunks
from erde_hub.stored_sets import StoredSets

from .base import SetMetrics, check_alpha

#: Least number of draws of all labels together that the coverage of thresholds is measured on.
_LABEL_DRAWS = 20_000


def concentrations(logits: Tensor, relu_threshold: Sequence[float] | Tensor) -> Tensor:
    """Evidence for each class: its logit where that reaches the exit's threshold and is positive, else 0.

    Shape:
        logits: (E, N, K). relu_threshold: (E,). Returns (E, N, K) float64.
    """
    z = logits.double()
    tau = torch.as_tensor(relu_threshold, dtype=torch.float64)
    if tau.shape != (len(z),):
        raise ShapeError(f"there must be one relu_threshold per exit, {len(z)}, got shape {tuple(tau.shape)}")
    return torch.where((z >= tau[:, None, None]) & (z > 0), z, 0.0)


def dirichlet_draws(concentration: Tensor, generator: torch.Generator) -> Tensor:
    """One draw of class probabilities per exit and sample, restricted to the classes with evidence, 0 elsewhere.

    Shape:
        concentration: (E, N, K). Returns (E, N, K) float64.
    """
    gamma = torch._standard_gamma(concentration.clamp_min(1e-300), generator=generator)
    gamma = torch.where(concentration > 0, gamma, 0.0)
    return gamma / gamma.sum(-1, keepdim=True).clamp_min(1e-300)


def avcs_ratios(concentration: Tensor, draws: Tensor) -> Tensor:
    """Running product R_t(y) of predictive probability over drawn probability; infinite once a class has no evidence.

    Shape:
        concentration, draws: (E, N, K). Returns (E, N, K).
    """
    total = concentration.sum(-1, keepdim=True)
    predictive = concentration / total.clamp_min(1e-300)
    factor = torch.where((concentration > 0) & (draws > 0), predictive / draws.clamp_min(1e-300), math.inf)
    log_factor = factor.log()
    gone = factor.isinf().cummax(0).values
    return torch.where(gone, math.inf, torch.where(gone, 0.0, log_factor).cumsum(0).exp())


def avcs_sets(logits: Tensor, relu_threshold: Sequence[float] | Tensor, draws: Tensor, alpha: float) -> Tensor:
    """Raw sets {y: R_t(y) <= 1/alpha}; only their running intersection is nested, see :func:`running_intersection`.

    Shape:
        logits, draws: (E, N, K). Returns (E, N, K) bool.
    """
    return avcs_ratios(concentrations(logits, relu_threshold), draws) <= 1 / check_alpha(alpha)


def running_intersection(sets: Tensor) -> Tensor:
    """Classes that are in the sets of an exit and of all before it, (E, N, K) bool."""
    return sets.long().cummin(0).values.bool()


class AVCSClassifier:
    """Nested prediction sets for a classifier with exits, from its logits alone.

    A set may be empty: the exits contradict each other.

    Args:
        relu_threshold: One per exit, see :func:`concentrations`.
        alpha: Error rate.
        seed: Of the draws. The sets are random, and every call of :meth:`sets` continues the sequence of draws, so that
            samples given one at a time are independent; the same seed gives the same sequence.

    Attributes:
        fitted_coverage: Smallest coverage of an exit on the records of the fit, over the draws of the fit; below
            1 - alpha where no thresholds reach that.

    References:
        Jazbec et al., Early-exit neural networks with nested prediction sets, 2024, arXiv 2311.05931, and its released
        code. Deviations: thresholds are tuned on held-out records only, where the code tunes on all test samples; the
        running intersection is always taken.
    """

    def __init__(self, relu_threshold: Sequence[float], alpha: float = 0.05, seed: int = 0) -> None:
        self.relu_threshold = [float(value) for value in relu_threshold]
        self.alpha = check_alpha(alpha)
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self.fitted_coverage: float | None = None

    @classmethod
    def fit(
        cls,
        records: ExitRecords,
        alpha: float = 0.05,
        *,
        start: float = 1.0,
        step: float = 0.5,
        seed: int = 0,
    ) -> AVCSClassifier:
        """Raises the thresholds, exit by exit, while the coverage at every exit stays above 1 - alpha.

        Where the first thresholds do not reach it, 0 is taken for all exits, which gives the widest sets there are;
        with logits of a small scale these may still fall short, and ``fitted_coverage`` of the result says so. Coverage
        is about the labels alone, so only their probabilities are drawn, with the distribution that
        :func:`dirichlet_draws` gives them, several times where samples are few.

        Args:
            records: Held-out.
            alpha: Error rate.
            start: First threshold of every exit.
            step: By which one is raised.
            seed: Of the draws.

        Raises:
            DataError: The records are of the training split, or too few.
        """
        check_kind(records)
        records.require_classes("AVCSClassifier")
        records = check_held_out(records)
        check_whole("seed", seed, 0)
        held = _HeldLabels(records.logits, records.labels, seed)
        limit = -math.log(check_alpha(alpha))

        def coverage(thresholds: Sequence[float]) -> float:
            return float(held.within(thresholds, limit)[-1].double().mean())

        check_number("start", start, zero=True)
        first = start if coverage([start] * records.num_exits) > 1 - alpha else 0.0
        thresholds = search_relu_thresholds(coverage, records.num_exits, alpha, first, step)
        found = cls(thresholds, alpha, seed)
        found.fitted_coverage = coverage(thresholds)
        return found

    def sets(self, logits: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns nested sets.

        Args:
            logits: Raw logits of all exits.
            draws: Class probabilities drawn before, in place of new ones.

        Shape:
            logits: (E, N, K). Returns (E, N, K) bool.
        """
        parts = []
        for rows in row_chunks(logits.shape[1], len(logits) * logits.shape[2]):
            part = logits[:, rows]
            if draws is None:
                own = dirichlet_draws(concentrations(part, self.relu_threshold), self._generator)
            else:
                own = draws[:, rows]
            parts.append(running_intersection(avcs_sets(part, self.relu_threshold, own, self.alpha)))
        return torch.cat(parts, 1) if parts else torch.zeros(logits.shape, dtype=torch.bool)


class _HeldLabels:
    """Whether labels are in the sets of all exits, for a search that changes the threshold of one exit at a time.

    The probability of one class in a Dirichlet draw is a Beta draw, of its concentration and the sum of the others'.

    Args:
        logits: Of all exits.
        labels: Of the samples.
        seed: Of the draws.

    Shape:
        logits: (E, N, K). labels: (N,).
    """

    def __init__(self, logits: Tensor, labels: Tensor, seed: int) -> None:
        self.logits, self.labels, self.seed = logits, labels, seed
        self.draws = math.ceil(_LABEL_DRAWS / len(labels))
        self.known: dict[tuple[int, float], Tensor] = {}

    def within(self, thresholds: Sequence[float], limit: float) -> Tensor:
        """Returns whether the logarithm of the ratio stayed at or below a limit up to each exit, (E, draws, N) bool."""
        terms = torch.stack([self.log_factor(e, value) for e, value in enumerate(thresholds)])
        return (terms.cumsum(0) <= limit).long().cummin(0).values.bool()

    def log_factor(self, exit_index: int, threshold: float) -> Tensor:
        """Returns the logarithm of the predictive over the drawn probability, (draws, N); infinite without evidence."""
        key = (exit_index, threshold)
        if key not in self.known:
            parts = []
            for rows in row_chunks(len(self.labels), self.logits.shape[2]):
                evidence = concentrations(self.logits[exit_index, None, rows], [threshold])[0]
                parts.append(torch.stack([evidence.gather(1, self.labels[rows, None])[:, 0], evidence.sum(1)]))
            own, total = torch.cat(parts, 1)
            generator = torch.Generator().manual_seed(self.seed * len(self.logits) + exit_index)
            shapes = torch.stack([own, total - own]).clamp_min(1e-300)[:, None].expand(2, self.draws, -1)
            label, others = torch._standard_gamma(shapes.contiguous(), generator=generator)
            drawn = label / (label + torch.where(total > own, others, 0.0)).clamp_min(1e-300)
            factor = own / total.clamp_min(1e-300) / drawn.clamp_min(1e-300)
            self.known[key] = torch.where((own > 0) & (drawn > 0), factor.log(), math.inf)
        return self.known[key]


def search_relu_thresholds(
    coverage: Callable[[Sequence[float]], float],
    num_exits: int,
    alpha: float,
    start: float | Sequence[float] = 1.0,
    step: float = 0.5,
) -> list[float]:
    """Greedy search of the released code: raise, and undo the step after which coverage is not above 1 - alpha.

    Args:
        coverage: Takes thresholds, returns the smallest coverage over the exits.
        num_exits: Number of exits.
        alpha: Error rate.
        start: First thresholds.
        step: By which one is raised.
    """
    check_number("step", step, zero=False)
    found = [float(start)] * num_exits if isinstance(start, (int, float)) else [float(value) for value in start]
    if not coverage(found) > 1 - alpha:
        return found  # as wide as it gets
    for e in range(num_exits):
        while coverage(found) > 1 - alpha:
            found[e] += step
            if found[e] > 1e4:
                raise RecordsError("no threshold lowers the coverage: are these the logits of these labels?")
        found[e] -= step
    return found


class ConformalClassifier:
    """Split conformal sets for each exit by itself: adaptive (APS) or regularised adaptive (RAPS) prediction sets.

    The classes are taken in order of probability while the sum of those before, a random part of the class itself and
    a penalty per class beyond the first ones stay below a quantile over the calibration samples. At an exit that is
    fixed beforehand the truth is in the set with probability 1 - alpha; sets of different exits are not nested and do
    not hold it at once.

    Args:
        quantiles: One per exit.
        alpha: Error rate.
        penalty: Per class beyond ``free``; 0 for APS.
        free: Number of classes without penalty.
        seed: Of the random parts, one per sample and exit. Every call of :meth:`sets` continues the sequence, so that
            samples given one at a time have parts of their own; the same seed gives the same sequence.
        randomized: False takes no part of the class itself. Sets are then a little larger, and the same input always
            gives the same set: what a model stores, see :meth:`~erde_hub.EarlyExitWrapper.set_prediction_sets`.
        routed: Quantiles are of the samples that took each exit, see :meth:`fit`.

    References:
        Romano et al., Classification with valid and adaptive coverage, 2020, arXiv 2006.02544; Angelopoulos et al.,
        Uncertainty sets for image classifiers using conformal prediction, 2021, arXiv 2009.14193. Deviations: the
        best class is always in.
    """

    def __init__(
        self,
        quantiles: Sequence[float],
        alpha: float = 0.05,
        penalty: float = 0.0,
        free: int = 0,
        seed: int = 0,
        randomized: bool = True,
        routed: bool = False,
    ) -> None:
        self.quantiles = [float(value) for value in quantiles]
        self.alpha, self.penalty, self.free, self.seed = check_alpha(alpha), float(penalty), int(free), seed
        self.randomized, self.routed = check_flag("randomized", randomized), check_flag("routed", routed)
        self._generator = torch.Generator().manual_seed(seed)
        if self.penalty < 0 or self.free < 0:
            raise ConfigError(f"penalty and free must not be negative, got {penalty!r} and {free!r}")

    @classmethod
    def fit(
        cls,
        records: ExitRecords,
        alpha: float = 0.05,
        method: Literal["aps", "raps"] = "aps",
        seed: int = 0,
        *,
        randomized: bool = True,
        exit_index: Tensor | None = None,
    ) -> ConformalClassifier:
        """Takes the quantiles from held-out records; ``raps`` has a penalty of 0.01 beyond five classes.

        Args:
            records: Held-out; of a model with a calibrator, calibrated.
            alpha: Error rate.
            method: ``aps`` or ``raps``.
            seed: Of the random parts.
            randomized: See the class.
            exit_index: (N,), the exit that each sample takes at a threshold, as
                :func:`~erde_hub.evaluation.route_records` returns it. Each exit's quantile is then that of the samples
                that take it, and the truth is in the set with probability 1 - alpha whichever exit a sample takes at
                that threshold, provided that the threshold was chosen on other samples. None takes all samples.

        Raises:
            DataError: The records are of the training split, or too few.
            ShapeError: ``exit_index`` does not fit the records, from which repeated samples are removed first.
        """
        if method not in ("aps", "raps"):
            raise unknown_name("method", method, ("aps", "raps"))
        penalty, free = (0.01, 5) if method == "raps" else (0.0, 0)
        check_kind(records)
        records.require_classes("ConformalClassifier")
        records = check_held_out(records)
        samples = records.num_samples
        if exit_index is not None and exit_index.shape != (samples,):
            raise ShapeError(
                f"exit_index must have one exit for each of {samples} distinct samples, got {exit_index.shape}"
            )
        routed = exit_index is not None
        found = cls([math.inf] * records.num_exits, alpha, penalty, free, seed + 1, randomized, routed)
        generator = torch.Generator().manual_seed(seed)
        for e, logits in enumerate(records.logits):
            parts = found._parts((samples, 1), generator)
            scores = torch.cat(
                [
                    found.scores(logits[rows], parts[rows]).gather(1, records.labels[rows, None])[:, 0]
                    for rows in row_chunks(*logits.shape)
                ]
            )
            if exit_index is not None:
                scores = scores[exit_index == e]
            rank = math.ceil((len(scores) + 1) * (1 - check_alpha(alpha)))
            if rank <= len(scores):
                found.quantiles[e] = float(scores.sort().values[rank - 1])
        return found

    def _parts(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if not self.randomized:
            return torch.zeros(shape, dtype=torch.float64)
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def stored(self) -> StoredSets:
        """Returns what a model stores.

        Raises:
            ConfigError: The sets are random.
        """
        if self.randomized:
            raise ConfigError(
                "these sets have a random part, so that the same input would get other answers: fit those of a model"
                " with ConformalClassifier.fit(records, randomized=False)"
            )
        return StoredSets(self.alpha, list(self.quantiles), self.penalty, self.free, self.routed)

    def scores(self, logits: Tensor, parts: Tensor) -> Tensor:
        """How much probability is taken before a class is in, with a part of its own and penalties.

        Shape:
            logits: (N, K). parts: (N, 1) in [0, 1]. Returns (N, K) float64.
        """
        probs, order, before = probability_before(logits.double().softmax(-1))
        ranks = torch.arange(1, probs.shape[-1] + 1, dtype=torch.float64)
        sums = before + parts * probs + self.penalty * (ranks - self.free).clamp_min(0)
        return torch.empty_like(sums).scatter_(-1, order, sums)

    def sets(self, logits: Tensor) -> Tensor:
        """Returns each exit's own sets; the best class is always in.

        Shape:
            logits: (E, N, K). Returns (E, N, K) bool.
        """
        if len(logits) != len(self.quantiles):
            raise ShapeError(
                f"these sets were fitted for {len(self.quantiles)} exits, got {len(logits)}: fit them anew"
            )
        random = self._parts((*logits.shape[:2], 1), self._generator)
        found = torch.empty(logits.shape, dtype=torch.bool)
        for e, limit in enumerate(self.quantiles):
            for rows in row_chunks(*logits.shape[1:]):
                found[e, rows] = self.scores(logits[e, rows], random[e, rows]) <= limit
        return found.scatter_(2, logits.argmax(-1, keepdim=True), True)


def probability_before(probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts classes by probability, as adaptive prediction sets (APS) take them.

    Returns:
        The falling probabilities, the classes in that order, and the sum of all larger probabilities: 0 for the best.

    Shape:
        probs: (..., K). Returns three tensors (..., K).

    References:
        Romano et al., Classification with valid and adaptive coverage, 2020, arXiv 2006.02544.
    """
    values, order = probs.sort(dim=-1, descending=True, stable=True)
    return values, order, values.cumsum(-1) - values


def set_metrics(sets: Tensor, labels: Tensor) -> SetMetrics:
    """Sizes, coverage and nestedness of sets.

    Shape:
        sets: (E, N, K) bool, raw or nested. labels: (N,).
    """
    held = sets.gather(2, labels[None, :, None].expand(len(sets), -1, 1))[..., 0]
    nested = running_intersection(sets)
    size, kept = sets.sum(-1).double(), nested.sum(-1).double()
    consistency = torch.where(size > 0, kept / size.clamp_min(1), (kept == 0).double())
    so_far = held.long().cummin(0).values
    return SetMetrics(
        size.mean(1).tolist(),
        held.double().mean(1).tolist(),
        so_far.double().mean(1).tolist(),
        consistency.mean(1).tolist(),
    )
