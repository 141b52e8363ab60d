"""The model card: README.md of a checkpoint, rendered from the contents of its ``results.json`` and nothing else."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from erde_hub.calibration.choice import describe_confidence
from erde_hub.errors import ConfigError, MissingDependencyError
from erde_hub.evaluation.formatting import duration, mmacs, percent, threshold_label, thresholds_of, with_point
from erde_hub.evaluation.results_file import mean_milliseconds, validate_results
from erde_hub.losses import get_addition, get_loss, list_additions, list_losses

#: Accuracy that a cheap operating point may lose against the full network, as a fraction.
TOLERANCE = 0.01

#: Operating points in the table; sweep.csv has all.
ROWS = 5

#: Numbers of an exit that reports of earlier versions lack.
_TRUST = ("nll", "ece")

#: For the widget on the Hub: a sentence that topics and sentiments both fit.
_TEXT = "The home team won an exciting final."

_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_HUB_DATA = re.compile(r"[\w.-]+/[\w.-]+")

#: arXiv number of a method to the rest of its citation: key, title, authors, year.
_PAPERS = {
    "2510.04856": (
        "guidez2025erde",
        "{ERDE}: Entropy-Regularized Distillation for Early-exit",
        'Guidez, Martial and Duffner, Stefan and Alpou, Yannick and R{\\"o}th, Oscar and Garcia, Christophe',
        2025,
    ),
    "1503.02531": (
        "hinton2015distilling",
        "Distilling the Knowledge in a Neural Network",
        "Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
        2015,
    ),
    "1709.01686": (
        "teerapittayanon2016branchynet",
        "{BranchyNet}: Fast Inference via Early Exiting from Deep Neural Networks",
        "Teerapittayanon, Surat and McDanel, Bradley and Kung, H. T.",
        2016,
    ),
    "2311.13621": ("su2023eakd", "{EA-KD}: Entropy-based Adaptive Knowledge Distillation", "Su and others", 2023),
    "2310.18590": (
        "tiwari2023readouts",
        "Using Early Readouts to Mediate Featural Bias in Distillation",
        "Tiwari, Rishabh and others",
        2023,
    ),
    "2203.08679": ("zhao2022dkd", "Decoupled Knowledge Distillation", "Zhao, Borui and others", 2022),
    "1412.6550": ("romero2014fitnets", "{FitNets}: Hints for Thin Deep Nets", "Romero, Adriana and others", 2014),
    "1905.08094": ("zhang2019teacher", "Be Your Own Teacher", "Zhang, Linfeng and others", 2019),
    "2605.01732": ("egad2026", "{EGAD}: Entropy-Guided Adaptive Token Distillation", None, 2026),
    "2311.05931": (
        "jazbec2024nested",
        "Early-Exit Neural Networks with Nested Prediction Sets",
        "Jazbec, Metod and others",
        2024,
    ),
}


def render_model_card(
    results: Mapping[str, Any], *, repo_id: str | None = None, license: str | None = "apache-2.0"
) -> str:
    """Renders the README.md of a checkpoint: Hub metadata, results, how to load it, training, limits, citation.

    Args:
        results: Contents of ``results.json``; see :func:`~erde_hub.evaluation.build_results`.
        repo_id: Where the model is published, ``"org/name"``; without it the card speaks of a local folder.
        license: Licence of the weights, as the Hub spells it; None leaves it out.

    Raises:
        ResultsError: See :func:`~erde_hub.evaluation.validate_results`.
        ConfigError: ``repo_id`` is no repository name.
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingDependencyError(
            "rendering a model card needs jinja2: install it with `pip install jinja2`"
        ) from error
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ConfigError(f"repo_id {repo_id!r} is no repository name such as 'org/name': {error}") from error
    results = validate_results(results)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    policy, among = results["student"].get("policy"), thresholds_of(results)
    environment.filters |= {**_FILTERS, "threshold": lambda threshold: threshold_label(threshold, policy, among)}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(_context(results, repo_id, license))
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


#: Figures of a run that a card shows where they were drawn, with what is said in their place.
_FIGURES = {
    "frontier_ms.png": "Accuracy against mean milliseconds of one sample per call: threshold sweep and single exits",
    "contact_sheet.png": "Test images that take each exit at the stored threshold, with their predictions",
    "shares.png": "Fraction of the samples that takes each exit, against a shared threshold and the cost that it saves",
    "slices.png": "Accuracy per slice of the test data, with early exits and at all layers, worst first",
    "sets.png": "Size, coverage and nestedness of prediction sets over their error rate; dotted: what was asked for",
    "reliability.png": "Accuracy against confidence at each exit, with its expected calibration error",
}


#: Rows of the table of slices, the worst ones.
_SLICES = 10


def _context(results: Mapping[str, Any], repo_id: str | None, license: str | None) -> dict[str, Any]:
    student, teacher, per_exit = results["student"], results.get("teacher"), results["per_exit"]
    cheap = _cheapest(results)
    latency = _latency(results)
    times = [] if latency is None else latency["times"]
    loss = _without_defaults(results.get("loss"))
    static = results.get("static_student")
    names = {"teacher": teacher, "student": student, "student without exits": static}
    return {
        "card_data": _card_data(results, repo_id, license).to_yaml(),
        "title": _title(results, repo_id),
        "repo": repo_id or "path/to/this/folder",
        "erde_hub": results["erde_hub"],
        "versions": results.get("versions", {}),
        "args": results["args"],
        "student": student,
        "teacher": teacher,
        "networks": [(name, part) for name, part in names.items() if part is not None],
        "dataset": results["dataset"],
        "split_lines": _split_lines(results["dataset"], _kind(results)),
        "kind": _kind(results),
        "task": _task(results),
        "size_words": _size_words(results),
        "metrics": {"split": "test", "samples": None, "ece_bins": "", "ece_binning": "", **results.get("metrics", {})},
        "per_exit": [
            {**dict.fromkeys(_TRUST), **row, "times": [own[e] for own in times]} for e, row in enumerate(per_exit)
        ],
        "exits": len(per_exit),
        "final": per_exit[-1],
        "sweep": [
            {**row, "mark": " \\*" * stored, "times": [mean_milliseconds(row["exit_share"], own) for own in times]}
            for row, stored in _rows(results)
        ],
        "slices": results.get("slices", [])[:_SLICES],
        "figures": [entry for entry in _FIGURES.items() if entry[0] in results.get("figures", [])],
        "point": results.get("operating_point"),
        "choice": results.get("threshold_choice"),
        "cheap": cheap,
        "example_threshold": _literal(cheap["threshold"] if cheap else 0.5, thresholds_of(results)),
        "latency": latency,
        "loss": loss,
        "training": results.get("training"),
        "trained_with": _trained_with(loss, teacher),
        "limits": _limits(results),
        "citation": _citation(results),
    }


def _card_data(results: Mapping[str, Any], repo_id: str | None, license: str | None) -> ModelCardData:
    student, data_name = results["student"], _plain(results["dataset"]["name"])
    task = _task(results)
    policy, among = student.get("policy"), thresholds_of(results)
    on_hub = _HUB_DATA.fullmatch(data_name) is not None
    point, full = results.get("operating_point"), max(results["sweep"], key=lambda row: row["mean_macs"])
    evaluations = [
        EvalResult(
            task_type=task,
            task_name=task.capitalize().replace("-", " "),
            dataset_type=data_name,
            dataset_name=data_name,
            dataset_split=_plain(results.get("metrics", {}).get("split", "test")),
            metric_type="accuracy",
            metric_value=round(row["accuracy"], 6),
            metric_name=f"Accuracy, threshold {(label := threshold_label(row['threshold'], policy, among))},"
            f" {mmacs(row['mean_macs'])} MMACs",
            metric_args={
                "threshold": label if label in ("never", "always") else row["threshold"],
                "mean_macs": round(row["mean_macs"]),
            },
        )
        for row in (full, *([] if point is None or point["threshold"] == full["threshold"] else [point]))
    ]
    loss = results.get("loss") or {}
    tags = ["erde_hub", "early-exit", task, "dynamic-neural-networks"]
    if results.get("teacher") is not None and loss.get("name") != "ce":
        tags.append("knowledge-distillation")
    if "name" in loss:
        tags.append(_plain(loss["name"]))
    return ModelCardData(
        library_name="erde_hub",
        pipeline_tag=task,
        license=license,
        base_model=_plain(base) if isinstance(base := student.get("base_model"), str) else base,
        datasets=[data_name] if on_hub else None,
        metrics=["accuracy"],
        tags=tags,
        **({"widget": widget} if (widget := _widget(results)) else {}),
        model_name=repo_id.split("/")[-1] if repo_id else _plain(student["architecture"]),
        eval_results=evaluations,
    )


def _widget(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the Hub's page offers to try: a sentence, or an image that is published with the model."""
    if _kind(results) == "text":
        return [{"text": _TEXT}]
    name = "sample.png"
    return [{"src": name, "example_title": "An image of the test set"}] if name in results.get("figures", []) else []


def _kind(results: Mapping[str, Any]) -> str:
    """What one sample is called."""
    kind = results["dataset"].get("kind")
    return kind if kind in ("text", "token") else "image"


def _task(results: Mapping[str, Any]) -> str:
    """As the Hub and pipelines call it."""
    return "text-generation" if _kind(results) == "token" else f"{_kind(results)}-classification"


def _size_words(results: Mapping[str, Any]) -> str:
    size = results["dataset"].get("input_size")
    if not size:
        return ""
    if _kind(results) == "token":
        return f", blocks of {size[0]} tokens"
    if _kind(results) == "text":
        return f", texts of up to {size[0]} tokens"
    return f", images of {' x '.join(map(str, size[1:]))} pixels"


def _title(results: Mapping[str, Any], repo_id: str | None) -> str:
    if repo_id:
        return repo_id.split("/")[-1]
    early = len(results["per_exit"]) > 1
    return f"{results['student']['architecture']}{' with early exits' if early else ''}, {results['dataset']['name']}"


def _trained_with(loss: Mapping[str, Any] | None, teacher: Mapping[str, Any] | None) -> str:
    name = (loss or {}).get("name")
    if teacher is None or name is None or name == "ce":
        return " with cross-entropy" if name == "ce" else ""
    joined = [key for key, value in (loss or {}).items() if isinstance(value, Mapping)]
    return f" by distillation (`{_code(' + '.join([name, *joined]))}`) from `{_code(teacher['architecture'])}`"


def _cheapest(results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The cheapest row that loses at most the tolerance against the last exit."""
    if len(results["per_exit"]) == 1:
        return None
    enough = results["per_exit"][-1]["accuracy"] - TOLERANCE
    rows = [row for row in (*results["sweep"], *results.get("fine_sweep", [])) if row["accuracy"] >= enough]
    return min(rows, key=lambda row: row["mean_macs"], default=None)


def _split_lines(dataset: Mapping[str, Any], kind: str) -> list[str]:
    """One line per part of the data: how many samples, from where, by which rule."""
    split = dataset.get("split")
    sizes = {name: {"rows": dataset[name]} for name in ("train", "validation", "test") if dataset.get(name) is not None}
    lines = []
    for name, how in {**sizes, **(split if isinstance(split, Mapping) else {})}.items():
        if not isinstance(how, Mapping):
            lines.append(f"{_text(name)}: {_value(how)}")
            continue
        facts = dict(how)
        words = [f"{_number(facts.pop('rows'))} {kind}s"] if isinstance(facts.get("rows"), int) else []
        words += [f"{_text(key)} {_value(value)}" for key, value in facts.items() if not isinstance(value, Mapping)]
        lines.append(f"{_text(name)}: {', '.join(words)}")
    return lines


def _limits(results: Mapping[str, Any]) -> list[str]:
    student, classes = results["student"], results["dataset"]["num_classes"]
    early = len(results["per_exit"]) > 1
    lines = [_text(warning) for warning in results.get("warnings", [])]
    if "latency" not in results:
        lines.append(
            "Latency was not measured. MACs say what is computed, not how long it takes: that depends on the hardware"
            " and on the batch, from which samples leave at different times."
        )
    if early:
        lines.append(
            "The operating points describe the test data. A threshold for use should be chosen on data that were"
            " neither trained nor tested on."
        )
    if early and student.get("policy") == "entropy":
        lines.append(
            f"The entropy of {classes} classes is at most {math.log(classes):.2f} nats: thresholds do not carry over to"
            " data with another number of classes."
        )
    unsupported = [row["slice"] for row in results.get("slices", []) if row.get("promise", "holds") != "holds"]
    if unsupported:
        names = ", ".join(_text(name) for name in unsupported[:10]) + (", ..." if len(unsupported) > 10 else "")
        lines.append(
            f"Slices of the test data that do not support the guarantee of the threshold by themselves: {names}."
        )
    seed = results["args"].get("seed")
    lines.append(
        f"These are the numbers of one training run{f' (seed {_value(seed)})' if seed is not None else ''}; how much"
        " another seed would change them was not measured."
    )
    if results.get("teacher") is not None and results.get("static_student") is None:
        lines.append("No network of the same size trained without exits was run for comparison.")
    kind = _kind(results)
    if kind == "text":
        lines.append("Cost is counted for texts of the greatest length. Shorter ones cost less, at every exit alike.")
    if kind == "token":
        lines.append(
            "Accuracy, NLL and operating points are of next tokens in given text. What early exits do to text that the"
            " model writes itself was not measured."
        )
    lines.append(
        f"Tested on {kind}s of {_text(results['dataset']['name'])} only. The model answers every {kind} with one of its"
        f" {classes} classes; other kinds of {kind}s{', corruptions' * (kind == 'image')} and unknown classes were not"
        " tested."
    )
    return lines


def _without_defaults(loss: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The name of a loss and its arguments that are not the defaults; all of them where the loss is not known here."""
    if loss is None or loss.get("name") not in list_losses():
        return None if loss is None else dict(loss)
    parameters = inspect.signature(get_loss(loss["name"]).cls).parameters
    usual = {key: parameter.default for key, parameter in parameters.items()}
    return {key: value for key, value in loss.items() if key not in usual or usual[key] != value}


def _citation(results: Mapping[str, Any]) -> str:
    """BibTeX of what the exits are trained with, of their heads and of their policy."""
    loss = results.get("loss") or {}
    added = [key for key, value in loss.items() if isinstance(value, Mapping)]
    sources = [get_loss(loss["name"]).reference] if loss.get("name") in list_losses() else []
    sources += [get_addition(key).reference for key in added if key in list_additions()]
    if results["student"].get("head", "fc") == "fc":
        sources.append("arXiv 2510.04856")
    if results["student"].get("policy") == "entropy" and len(results["per_exit"]) > 1:
        sources.append("arXiv 1709.01686")
    numbers = dict.fromkeys(source.removeprefix("arXiv ") for source in sources)
    return "\n\n".join(_bibtex(number, *_PAPERS[number]) for number in numbers if number in _PAPERS)


def _bibtex(number: str, key: str, title: str, authors: str | None, year: int) -> str:
    fields = {"title": title, "author": authors, "year": year, "eprint": number, "archivePrefix": "arXiv"}
    lines = [f"  {name:<13} = {{{value}}}," for name, value in fields.items() if value is not None]
    return "\n".join([f"@misc{{{key},", *lines, "}"])


def _rows(results: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], bool]]:
    """Rows of the table, and of each whether it is stored: that one, both ends, and others far apart in cost."""
    rows = with_point(results["sweep"], results.get("operating_point"))
    costs = [row["mean_macs"] for row, _ in rows]
    kept = {i for i, (_, stored) in enumerate(rows) if stored} | {costs.index(min(costs)), costs.index(max(costs))}
    while len(kept) < min(ROWS, len(rows)):
        others = [i for i in range(len(rows)) if i not in kept]
        kept.add(max(others, key=lambda i: min(abs(costs[i] - costs[j]) for j in kept)))
    return [rows[i] for i in sorted(kept)]


def _latency(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Milliseconds of one sample per call: of each exit, and on average at the stored threshold."""
    latency, point = results.get("latency"), results.get("operating_point")
    if not latency:
        return None
    settings = latency["settings"]
    times = [row["exit_milliseconds"] for row in settings]
    names = [f"{row['runtime']}, {row['threads']} thread{'s' if row['threads'] != 1 else ''}" for row in settings]
    mean = None if point is None else mean_milliseconds(point["exit_share"], times[0])
    return {"cpu": latency["cpu"], "names": names, "times": times, "point": mean, "full": times[0][-1]}


def _plain(value: Any) -> str:
    """Words on one line: a line break could end the metadata."""
    return re.sub(r"\s+", " ", str(value)).strip()


def _text(value: Any) -> str:
    """Words for running text and tables: nothing in them is read as Markdown or HTML."""
    return re.sub(r"([\\|`*<>\[\]#])", r"\\\1", _plain(value))


def _code(value: Any) -> str:
    """Words that go between single backticks."""
    return re.sub(r"[`|\s]+", " ", str(value)).strip()


def _value(value: Any) -> str:
    """An argument: short numbers, lists and mappings in one line."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_text(key)}={_value(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(entry) for entry in value) or "none"
    return _text(value)


def _literal(threshold: Any, among: Sequence[float]) -> str:
    """A threshold as Python source."""
    if isinstance(threshold, (list, tuple)):
        return f"[{', '.join(_literal(value, among) for value in threshold)}]"
    label = threshold_label(threshold, among=among)
    return f'float("{label}")' if math.isinf(float(label)) else label


def _number(value: int) -> str:
    return f"{value:,}"


def _decimal(value: float | str | None) -> str:
    return "-" if value is None else f"{float(value):.3f}"


def _kwargs(kwargs: Mapping[str, Any] | None) -> str:
    return f" ({_value(kwargs)})" if kwargs else ""


def _tick(name: str) -> str:
    return f"`{name}`"


_FILTERS = {
    "code": _code,
    "confidence": describe_confidence,
    "decimal": _decimal,
    "duration": duration,
    "kwargs": _kwargs,
    "mmacs": mmacs,
    "number": _number,
    "percent": percent,
    "text": _text,
    "tick": _tick,
    "value": _value,
}
