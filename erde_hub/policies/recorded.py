"""Policies applied to recorded logits: every exit's scores at once, then which exit samples take at any threshold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from erde_hub.errors import RecordsError
from erde_hub.records import ExitRecords, row_chunks

from .base import ExitPolicy


def score_exits(logits: Tensor, policy: ExitPolicy) -> Tensor:
    """Scores every sample at every early exit, as the running model would: in float32.

    Args:
        logits: Of every exit, the last one included (it has no score); log-probabilities give the same scores.
        policy: Gives the scores.

    Shape:
        logits: (E, N, K). Returns (E - 1, N).
    """
    early, samples = logits.shape[0] - 1, logits.shape[1]
    if early == 0:
        return torch.empty(0, samples)
    parts = []
    with torch.no_grad():
        for rows in row_chunks(samples, early * logits.shape[2]):
            log_probs = logits[:early, rows].log_softmax(-1)
            seen = [log_probs[: e + 1] if policy.uses_history else log_probs[e : e + 1] for e in range(early)]
            parts.append(torch.stack([policy.score(history) for history in seen]))
    return torch.cat(parts, 1)


def features_of(records: ExitRecords, name: str) -> list[Tensor]:
    """Returns the features of records of a regression.

    Args:
        records: Of any kind.
        name: Who needs them.

    Raises:
        ConfigError: Records of classes.
        RecordsError: Records without features.
    """
    records.require_regression(name)
    if records.features is None:
        raise RecordsError(f"{name} needs features: collect the records with collect_exit_records(..., features=True)")
    return records.features


def score_features(features: Sequence[Tensor], policy: ExitPolicy) -> Tensor:
    """As :func:`score_exits`, for policies that read features.

    Shape:
        features: E tensors (N, H_e). Returns (E - 1, N).
    """
    early = features[:-1]
    if not early:
        return torch.empty(0, len(features[0]))
    parts = []
    with torch.no_grad():
        for rows in row_chunks(len(features[0]), max(feature.shape[1] for feature in early)):
            terms = [policy.density_terms(e, feature[rows]) for e, feature in enumerate(early)]
            parts.append(torch.stack([policy.score(torch.stack(terms[: e + 1])) for e in range(len(early))]))
    return torch.cat(parts, 1)


def exit_indices(scores: Tensor, policy: ExitPolicy, thresholds: Sequence[float]) -> Tensor:
    """Returns the exit that each sample takes: the first whose score passes, otherwise the last.

    Shape:
        scores: (E - 1, N), from :func:`score_exits`. thresholds: E - 1 numbers. Returns (N,) int64.
    """
    active = torch.ones(scores.shape[1], dtype=torch.bool)
    index = torch.zeros(scores.shape[1], dtype=torch.int64)
    for score, threshold in zip(scores, thresholds, strict=True):
        if not policy.never_leaves(threshold):
            active &= policy.compare(score, threshold).logical_not()
        index += active
    return index
