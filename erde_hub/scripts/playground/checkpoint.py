"""A checkpoint as the page sees it: needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from erde_hub.calibration import ThresholdChoice
from erde_hub.calibration.choice import TARGETS, describe_bound, describe_confidence
from erde_hub.errors import ConfigError, NotSupportedError
from erde_hub.evaluation import load_results
from erde_hub.modeling.wrapper import EarlyExitWrapper
from erde_hub.policies.recorded import score_exits
from erde_hub.scripts.common import configure_logging, load_model
from erde_hub.scripts.common.exit_times import known_exit_times, measure_exits
from erde_hub.scripts.common.run_data import RESULTS_FILE, run_file
from erde_hub.tasks import REGRESSION

from .networks import Answers, Network, pictures_of, promise_of, slider


def open_checkpoint(source: str) -> Network:
    """Opens a checkpoint from a folder or the Hub, with its report if it has one.

    Raises:
        CheckpointError: There is none, or it is damaged.
        NotSupportedError: It does not classify images or texts.
        ResultsError: Its report is damaged.
    """
    configure_logging(True)
    model = load_model(source).eval()
    if model.config.problem_type == REGRESSION or model.config.task != "classification" or not len(model.heads):
        raise NotSupportedError(f"{source!r} is no classifier with early exits, which the page is for")
    policy, config = model.policy, model.config
    text = model.main_input_name == "input_ids"
    tokenizer = AutoTokenizer.from_pretrained(source) if text else None
    report = run_file(source, RESULTS_FILE)
    results = None if report is None else load_results(report)

    @torch.inference_mode()
    def answer(samples: Sequence[Any]) -> Answers:
        if tokenizer is not None:
            length = (config.input_size or (None,))[0]
            inputs = tokenizer(list(samples), padding=True, truncation=True, max_length=length, return_tensors="pt")
        else:
            inputs = {"pixel_values": model.image_processor()(list(samples), return_tensors="pt")["pixel_values"]}
        logits = torch.stack(model(**inputs, output_all_exits=True).exit_logits)
        scores = score_exits(logits, policy)
        if not policy.uses_threshold:  # it exits always or never
            scores = torch.where(policy.compare(scores, 0.0), torch.inf, -torch.inf)
        return Answers(logits.double().softmax(-1).numpy(), scores.double().numpy())

    return Network(
        name=Path(source).name,
        kind="text" if text else "image",
        exit_names=model.exit_names,
        macs=list(model.exit_table().cumulative_macs),
        milliseconds=known_exit_times(results) or _measure(model),
        class_names=[config.id2label[i] for i in range(len(config.id2label))],
        policy=str(config.policy),
        exits_above=policy.leaves_above or not policy.uses_threshold,
        threshold=model.threshold if policy.uses_threshold else 0.0,
        slider=_slider(model) if policy.uses_threshold else None,
        promise=_promise(model) or promise_of(results),
        results=results,
        answer=answer,
        pictures=pictures_of(results, partial(run_file, source)),
    )


def _slider(model: EarlyExitWrapper) -> tuple[float, float, float]:
    """The policy's own thresholds, from no sample exiting to all, and the stored ones."""
    policy, stored = model.policy, model.threshold
    own = policy.grid(len(model.config.id2label), len(model.heads))
    own = own[1:] if abs(own[0]) >= policy.never_threshold > 1 else own  # no score comes near
    values = [v for v in [*own, *np.atleast_1d(stored).tolist()] if abs(v) < 1e7]
    return slider(min(values), max(values) if max(values) > min(values) else min(values) + 1, policy.whole_thresholds)


def _promise(model: EarlyExitWrapper) -> str | None:
    if not model.config.threshold_profile:
        return None
    choice = ThresholdChoice.from_dict(model.config.threshold_profile)
    samples = " ".join(filter(None, [f"the {choice.samples:,}", choice.split, "samples"]))
    if choice.confidence is None:
        return f"The stored threshold was chosen on {samples}: {choice.rule}."
    what = f"{TARGETS[choice.target]} at most {describe_bound(choice.target, choice.bound)}"
    never = " So few cannot show that of any early exit: no sample exits early." if choice.never_exits else ""
    confident = f"with {describe_confidence(choice.confidence)} confidence"
    return f"The stored threshold promises: {what}, {confident}, for data like {samples} that it was chosen on.{never}"


def _measure(model: EarlyExitWrapper) -> list[float] | None:
    try:
        measured = measure_exits(model, ["torch"], [torch.get_num_threads()], rounds=20, seconds=1.0)
    except ConfigError:  # it is certain of every random input
        return None
    return list(measured["settings"][0]["exit_milliseconds"])
