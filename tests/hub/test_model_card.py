"""The model card: metadata that the Hub reads, text that follows from the results, no place on the machine."""

import ast
import json
import re
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

from erde_hub.errors import ConfigError, MissingDependencyError, ResultsError
from erde_hub.evaluation.formatting import duration, mmacs, percent, threshold_label
from erde_hub.hub import render_model_card
from erde_hub.losses import get_addition, get_loss, list_additions, list_losses


def make_results(**changes):
    rows = [
        (0.0, 0.92, 50e6, [0, 0, 1]),
        (0.4, 0.915, 24e6, [0.5, 0.25, 0.25]),
        (1.0, 0.88, 12e6, [0.9, 0.1, 0.0]),
    ]
    sweep = [
        {"threshold": t, "accuracy": a, "mean_macs": m, "exit_share": s, "ece": 0.0312, "nll": 0.25, "brier": 0.1}
        for t, a, m, s in rows
    ]
    return {
        "erde_hub": "0.1.0",
        "versions": {"torch": "2.9.0"},
        "args": {"epochs": 12, "seed": 3, "lr": 0.1, "note": "a|b", "unset": None},
        "teacher": {
            "architecture": "resnet18_cifar",
            "backbone_kwargs": {"width": 32},
            "exits": ["layer1", "layer2"],
            "macs": 553_000_000,
            "params": 2_800_000,
            "accuracy": 0.945,
        },
        "student": {
            "architecture": "resnet10_cifar",
            "exits": ["layer1", "layer2"],
            "head": "fc",
            "policy": "entropy",
            "threshold": 0.4,
            "macs": 50_000_000,
            "params": 323_450,
            "accuracy": 0.92,
            "teacher_exits": [0, 1, 2],
        },
        "dataset": {
            "name": "uoft-cs/cifar10",
            "fingerprint": "beef",
            "num_classes": 10,
            "input_size": [3, 32, 32],
            "train": 45_000,
            "validation": 5_000,
            "test": 10_000,
            "split": {"validation": {"rows": 5000, "rule": "stratified part of train", "fraction": 0.1, "seed": 0}},
        },
        "loss": {"name": "erde", "temperature": 2.0},
        "training": {"epochs": 12, "seconds": 725.0},
        "metrics": {"split": "test", "samples": 10_000, "ece_bins": 15, "ece_binning": "right-closed"},
        "per_exit": [
            {"exit": "layer1", "accuracy": 0.7, "macs": 8_000_000, "ece": 0.05, "nll": 1.0},
            {"exit": "layer2", "accuracy": 0.87, "macs": 22_000_000, "ece": 0.04, "nll": 0.5},
            {"exit": "classifier", "accuracy": 0.92, "macs": 50_000_000, "ece": 0.0312, "nll": 0.25},
        ],
        "sweep": sweep,
        "fine_sweep": [{**sweep[1], "threshold": 0.53, "accuracy": 0.9104, "mean_macs": 20e6}],
        "matched_cost": [
            {"of": "student", "share": 0.25, "macs": 12.5e6, "accuracy": None},
            {"of": "student", "share": 0.5, "macs": 25e6, "accuracy": 0.915},
        ],
        "operating_point": sweep[1],
        **changes,
    }


MINIMAL = {
    "erde_hub": "0.1.0",
    "args": {},
    "student": {"architecture": "net", "exits": ["a"], "macs": 2, "accuracy": 0.5},
    "dataset": {"name": "digits", "num_classes": 10},
    "per_exit": [{"exit": "a", "accuracy": 0.4, "macs": 1}, {"exit": "classifier", "accuracy": 0.5, "macs": 2}],
    "sweep": [{"threshold": 0.0, "accuracy": 0.5, "mean_macs": 2.0, "exit_share": [0.0, 1.0]}],
}


def split_card(card):
    """The metadata and the text, read as the Hub reads them."""
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def test_metadata():
    data, _ = split_card(render_model_card(make_results(), repo_id="org/erde-resnet10-cifar10"))
    assert data["library_name"] == "erde_hub"
    assert data["pipeline_tag"] == "image-classification"
    assert data["datasets"] == ["uoft-cs/cifar10"]
    assert data["metrics"] == ["accuracy"]
    assert data["license"] == "apache-2.0"
    assert {"erde_hub", "early-exit", "knowledge-distillation", "erde"} <= set(data["tags"])
    assert "base_model" not in data
    (index,) = data["model-index"]
    assert index["name"] == "erde-resnet10-cifar10"
    (result,) = index["results"]
    assert result["task"]["type"] == "image-classification"
    assert result["dataset"] == {"name": "uoft-cs/cifar10", "type": "uoft-cs/cifar10", "split": "test"}
    assert [metric["value"] for metric in result["metrics"]] == [0.92, 0.915], "all layers, and the stored threshold"
    assert result["metrics"][1]["args"] == {"threshold": 0.4, "mean_macs": 24_000_000}
    assert result["metrics"][1]["name"] == "Accuracy, threshold 0.4, 24.0 MMACs"


def test_the_hub_client_reads_it_back():
    card = ModelCard(render_model_card(make_results()))
    assert card.data.library_name == "erde_hub"
    assert len(card.data.eval_results) == 2
    assert card.data.eval_results[0].metric_value == 0.92


def test_local_data_and_a_known_base_model():
    results = make_results()
    results["dataset"]["name"] = "my birds"
    results["student"]["base_model"] = "timm/convnext_atto.d2_in1k"
    data, text = split_card(render_model_card(results, license=None))
    assert "datasets" not in data
    assert "license" not in data
    assert data["base_model"] == "timm/convnext_atto.d2_in1k"
    assert data["model-index"][0]["name"] == "resnet10_cifar"
    assert "path/to/this/folder" in text


def test_text_holds_the_numbers_in_one_format():
    _, text = split_card(render_model_card(make_results(), repo_id="org/name"))
    assert "| layer2 | 87.0 | 22.0 | 0.500 | 0.040 |" in text
    assert "| 0.4 \\* | 91.5 | 24.0 | 48.0 | 50.0 / 25.0 / 25.0 |" in text
    assert "**91.5 % accuracy at 24.0 MMACs**" in text
    # From the fine sweep: 0.9104 loses less than a point, 0.88 more.
    assert "threshold 0.53: 91.0 % at 20.0 MMACs, 40.0 % of the full cost" in text
    parts = "2 early exits, 94.5 % at 553.0 MMACs in all layers, 2,800,000 parameters"
    assert f"- teacher: `resnet18_cifar` (width=32), {parts}\n" in text
    assert (
        "- student: `resnet10_cifar`, 2 early exits, 92.0 % at 50.0 MMACs in all layers, 323,450 parameters\n" in text
    )
    assert "learned from the teacher's exits 0, 1, 2" in text
    assert "ECE has 15 right-closed bins" in text
    assert "10,000 images of the test split" in text
    assert "by distillation (`erde`) from `resnet18_cifar`" in text
    assert "- validation: 5,000 images, rule stratified part of train, fraction 0.1, seed 0" in text
    assert "- duration: 12 min 5 s" in text
    assert "unset" not in text
    assert "![" in text
    assert "](frontier.png)" in text
    assert "2510.04856" in text
    assert "BranchyNet" in text
    assert "(seed 3)" in text
    assert "2.30 nats" in text
    assert "Latency was not measured" in text


def test_the_table_keeps_five_rows_and_the_stored_one():
    rows = make_results()["sweep"]
    costs = [50e6, 49e6, 40e6, 30e6, 29e6, 20e6, 12e6]
    sweep = [{**rows[1], "threshold": n / 10, "mean_macs": cost} for n, cost in enumerate(costs)]
    text = render_model_card(make_results(sweep=sweep, operating_point=sweep[4], fine_sweep=[]))
    labels = re.findall(r"^\| ([\d.]+(?: \\\*)?) \| 91\.5 \|", text, flags=re.MULTILINE)
    assert labels == ["0", "0.2", "0.4 \\*", "0.5", "0.6"], "both ends, and what lies far from the others in cost"


def test_milliseconds_come_first():
    settings = [
        {"runtime": "torch", "threads": 1, "exit_milliseconds": [1.0, 2.0, 4.0]},
        {"runtime": "onnxruntime", "threads": 8, "exit_milliseconds": [0.5, 1.0, 2.0]},
    ]
    latency = {"cpu": "a|b", "exits": ["layer1", "layer2", "classifier"], "settings": settings}
    _, text = split_card(render_model_card(make_results(latency=latency)))
    assert "In time: **2.000 ms** instead of 4.000 ms (torch, 1 thread, one image per call, a\\|b)." in text
    assert text.index("**2.000 ms**") < text.index("frontier.png")
    assert "| threshold | accuracy % | ms, torch, 1 thread | ms, onnxruntime, 8 threads | mean MMACs |" in text
    assert "| 0.4 \\* | 91.5 | 2.000 | 1.000 | 24.0 |" in text  # 0.5 x 1 + 0.25 x 2 + 0.25 x 4
    assert "| layer2 | 87.0 | 2.000 | 1.000 | 22.0 |" in text
    assert "Latency was not measured" not in text


def test_an_image_that_is_published_is_offered_to_the_widget():
    data, _ = split_card(render_model_card(make_results(figures=["sample.png"])))
    assert [entry["src"] for entry in data["widget"]] == ["sample.png"]


@pytest.mark.parametrize("name", list_losses())
def test_every_loss_is_cited_and_every_addition(name):
    source = get_loss(name).reference.removeprefix("arXiv ")
    cited = render_model_card(make_results(loss={"name": name})).partition("## Citation")[2]
    assert cited.count("@misc{") == cited.count("  title ") == cited.count("  eprint ")
    assert cited.count(f"= {{{source}}}") == 1
    for addition in list_additions():
        card = render_model_card(make_results(loss={"name": name, addition: {"weight": 1.0}}))
        assert get_addition(addition).reference.removeprefix("arXiv ") in card.partition("## Citation")[2]


def test_a_text_gets_a_widget_and_results_come_before_use():
    results = make_results()
    results["dataset"] |= {"kind": "text", "input_size": [64]}
    results["student"]["input_size"] = [64]
    data, text = split_card(render_model_card(results))
    assert list(data["widget"][0]) == ["text"]
    assert text.index("## Results") < text.index("## Use") < text.index("## Each exit alone")
    assert "widget" not in split_card(render_model_card(make_results()))[0]


def test_says_how_the_stored_threshold_was_chosen():
    choice = {"rule": "cheapest within a point", "split": "validation", "samples": 5000}
    text = render_model_card(make_results(threshold_choice=choice))
    assert "chosen: cheapest within a point, on the 5,000 images of the validation split." in text
    assert "chosen: given." in render_model_card(make_results(threshold_choice={"rule": "given"}))
    assert "How the threshold was chosen" not in render_model_card(make_results())


def test_a_threshold_at_which_nobody_leaves_says_why_and_warnings_are_limits():
    choice = {"rule": "a point", "never_exits": True, "advice": "Nobody leaves: 3 samples."}
    text = render_model_card(make_results(threshold_choice=choice, warnings=["the last exit is bad"]))
    assert "chosen: a point. Nobody leaves: 3 samples." in text
    assert "## Limits\n\n- the last exit is bad\n" in text


def test_the_stored_threshold_is_a_marked_row():
    point = {**make_results()["sweep"][1], "threshold": 0.7, "accuracy": 0.905}
    text = render_model_card(make_results(operating_point=point))
    assert "`entropy`; \\* is the stored threshold." in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| 0.")]
    assert [row[0] for row in rows] == ["| 0.4", "| 0.7 \\*"]
    assert rows[1][1] == "90.5"
    without = render_model_card({**make_results(), "operating_point": None})
    assert "\\*" not in without


def test_tables_are_well_formed():
    _, text = split_card(render_model_card(make_results()))
    tables = re.findall(r"(?:^\|.*\|$\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        rows = [re.split(r"(?<!\\)\|", row) for row in table.splitlines()]
        assert len({len(row) for row in rows}) == 1, table
        assert re.fullmatch(r"[|:-]+", table.splitlines()[1])
        start = text.index(table)
        assert text[start - 2 : start] == "\n\n"
        assert text[start + len(table)] == "\n"
    assert "\n\n\n" not in text


def test_code_in_the_card_is_python_and_says_where_and_how():
    _, text = split_card(render_model_card(make_results(), repo_id="org/name"))
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        ast.parse(block)
    assert 'EarlyExitWrapper.from_pretrained("org/name")' in blocks[0]
    assert "threshold=0.53" in blocks[0]
    assert 'pipeline("image-classification", model="org/name")' in blocks[1]


@pytest.mark.parametrize("threshold", [[0.2, 0.4], ["inf", 0.4], 1e-7])
def test_every_kind_of_threshold(threshold):
    results = make_results(fine_sweep=[])
    for row in (results["sweep"][1], results["operating_point"]):
        row["threshold"] = threshold
    data, text = split_card(render_model_card(results))
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        ast.parse(block)
    assert data["model-index"][0]["results"][0]["metrics"][1]["args"]["threshold"] == threshold


@pytest.mark.parametrize(
    ("policy", "threshold", "word"),
    [("margin", "inf", "never"), ("margin", 1e8, "never"), ("entropy", "inf", "always")],
)
def test_a_threshold_beyond_all_scores_is_a_word(policy, threshold, word):
    results = make_results(fine_sweep=[])
    results["student"]["policy"], results["sweep"][0]["threshold"] = policy, threshold
    results["sweep"][1]["accuracy"] = 0.5  # so that the example of the card has this threshold
    card = render_model_card(results)
    assert split_card(card)[0]["model-index"][0]["results"][0]["metrics"][0]["args"]["threshold"] == word
    assert 'threshold=float("inf"))' in card
    assert "100000000" not in card


def test_the_least_that_results_may_hold():
    data, text = split_card(render_model_card(MINIMAL))
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5
    assert "Teacher" not in text
    assert "| classifier | 50.0 | 2e-06 | - | - |" in text
    single = {**MINIMAL, "per_exit": [MINIMAL["per_exit"][1]]}
    single["sweep"] = [{**MINIMAL["sweep"][0], "exit_share": [1.0]}]
    single["student"] = {**MINIMAL["student"], "exits": []}
    assert "without early exits" in render_model_card(single)


def test_static_student_and_other_losses():
    static = {"architecture": "resnet10_cifar", "macs": 49_000_000, "accuracy": 0.91, "params": 310_000}
    text = render_model_card(make_results(static_student=static, loss={"name": "kd"}))
    assert "- student without exits: `resnet10_cifar`, 0 early exits, 91.0 % at 49.0 MMACs" in text
    assert "trained without exits was run" not in text
    assert "hinton2015distilling" in text
    text = render_model_card(make_results(teacher=None, loss={"name": "ce"}))
    assert "with cross-entropy" in text
    assert "knowledge-distillation" not in text


def test_names_cannot_break_out_of_the_text():
    results = make_results()
    results["dataset"]["name"] = "x <script> | `y`\n# z"
    results["per_exit"][0]["exit"] = "a|b"
    results["student"]["architecture"] = "net`\n---\nlicense: other"
    data, text = split_card(render_model_card(results))
    assert data["license"] == "apache-2.0"
    assert "<script>" not in text.replace("\\<script", "")
    assert "\n# z" not in text
    assert "| a\\|b |" in text


def test_rendering_changes_nothing_and_repeats():
    results = make_results()
    before = json.dumps(results)
    assert render_model_card(results) == render_model_card(json.loads(before))
    assert json.dumps(results) == before


@pytest.mark.parametrize("repo_id", ["a/b/c", "org/na me", "", 'x"); import os #'])
def test_bad_repository_names(repo_id):
    with pytest.raises(ConfigError, match="repo_id"):
        render_model_card(make_results(), repo_id=repo_id)


def test_bad_results():
    with pytest.raises(ResultsError, match="per_exit"):
        render_model_card({**MINIMAL, "per_exit": []})
    with pytest.raises(ResultsError, match="place on the machine"):
        render_model_card(make_results(args={"output_dir": "/home/ada/runs"}))


def test_without_jinja2_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match="pip install jinja2"):
        render_model_card(make_results())


def test_thresholds_near_one_are_told_apart_and_the_example_gives_its_row():
    rows = make_results()["sweep"]
    sweep = [{**row, "threshold": t} for row, t in zip(rows, (1.0, 0.999934, 0.99981), strict=True)]
    student = {**make_results()["student"], "policy": "eefp", "threshold": 0.999934}
    card = render_model_card(make_results(sweep=sweep, operating_point=sweep[1], fine_sweep=[], student=student))
    for line in ("| 1 |", "| 0.999934 \\* |", "| 0.99981 |", "threshold=0.999934)", "threshold 0.999934, 24.0 MMACs"):
        assert line in card


def test_formats():
    assert [percent(value) for value in (0, 0.92345, 1)] == ["0.0", "92.3", "100.0"]
    assert [mmacs(value) for value in (0, 1234, 1.234e6, 12.34e6, 1297.83e6)] == [
        "0.0",
        "0.00123",
        "1.23",
        "12.3",
        "1297.8",
    ]
    assert [threshold_label(value) for value in (0.0, 2.0, 0.30000000000000004, "inf", [0.1, "inf"])] == [
        "0",
        "2",
        "0.3",
        "inf",
        "0.1 / inf",
    ]
    near_one = [0.99981, 0.999934, 0.999936, 0.9999999, 1.0]
    labels = [threshold_label(value, "eefp", [*near_one, 0.5]) for value in near_one]
    assert [float(label) for label in labels] == near_one
    assert threshold_label(0.5534041, "entropy", [0.4, 0.5534041, 0.6]) == "0.553", "no more digits than it takes"
    assert threshold_label(0.5534041, "entropy", [0.5533]) == "0.553404"
    assert threshold_label(0.1 + 0.2, "entropy", [0.3]) == "0.3", "float noise is no neighbour"
    assert [duration(value) for value in (0.5, 42, 725, 7380)] == ["0.5 s", "42 s", "12 min 5 s", "2 h 3 min"]


def places_of(value, place=()):
    """Paths to all plain values of a tree, one of each list."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from places_of(entry, (*place, key))
    elif isinstance(value, list):
        yield from places_of(value[0], (*place, 0)) if value else ()
    else:
        yield place


@pytest.mark.parametrize("payload", [
    "X\n\n<img src=x onerror=alert(1)>\n\n[a](javascript:alert(1))", "``` `<img src=x onerror=alert(1)>`",
    '")\n__import__("os").system("onerror")  #',
])  # fmt: skip
def test_no_value_of_the_results_becomes_markdown_html_or_python(payload):
    results = make_results() | {"warnings": ["w"], "threshold_choice": {"rule": "r", "split": "s", "samples": 3}}
    results["metrics"] = {"split": "test", "samples": 5, "ece_bins": 15, "ece_binning": "right-closed"}
    tried = 0
    for place in places_of(results):
        changed = json.loads(json.dumps(results))
        part = changed
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = payload
        try:
            text = render_model_card(changed)
        except (ResultsError, TypeError, ValueError):
            continue
        tried += 1
        body = text[text.index("\n---\n", 4) :]
        blocks = re.findall(r"```python\n(.*?)```", body, flags=re.S)
        assert not any("onerror" in block for block in blocks), place
        plain = re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", body, flags=re.S))
        assert not re.search(r"(?<!\\)<img", plain), place
        assert not re.search(r"(?<!\\)\[a\]\(", plain), place
    assert tried > 25
