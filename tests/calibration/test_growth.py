"""Memory of fits, searches and sweeps grows linearly: 33 exits, 21,841 classes and 200,000 samples, each by itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CODE = """
import resource, sys, torch, warnings
from erde_hub.calibration import MIECalibrator, TemperatureCalibrator, choose_threshold
from erde_hub.evaluation import ExitRecords, compare_records, curve_area, per_exit_metrics, sweep_thresholds
from erde_hub.policies import get_policy
from erde_hub.policies.recorded import score_exits
from erde_hub.prediction_sets import AVCSClassifier, ConformalClassifier

name, (exits, samples, classes) = sys.argv[1], map(int, sys.argv[2:])
logits, labels = torch.empty(exits, samples, classes), torch.arange(samples) % classes
for e in range(exits):
    logits[e].normal_()[torch.arange(samples), labels] += 2 + 4 * e / exits
records = ExitRecords(
    logits, labels, torch.arange(samples), [str(e) for e in range(exits)], list(range(1, exits + 1)),
    [str(k) for k in range(classes)],
)
missing = {"allow_missing_classes": True}
does = {
    "temperature": lambda: TemperatureCalibrator.fit(records, [0.5, 1.0, 2.0], **missing).calibrate(logits),
    "mie": lambda: MIECalibrator.fit(records, [0.5, 1.0, 2.0], **missing).calibrate(logits),
    "threshold": lambda: choose_threshold(records, max_accuracy_drop=0.01, **missing),
    "thresholds per exit": lambda: choose_threshold(records, max_accuracy_drop=0.01, per_exit=True, **missing),
    "guaranteed": lambda: choose_threshold(records, max_accuracy_drop=0.05, confidence=0.9, per_exit=True, **missing),
    "eefp": lambda: get_policy("eefp").cls.fit(records, **missing),
    "eenet": lambda: get_policy("eenet").cls.fit(records, epochs=1, restarts=1, **missing),
    "set_size": lambda: score_exits(logits, get_policy("set_size").cls.fit(records, **missing)),
    "conformal": lambda: ConformalClassifier.fit(records).sets(logits),
    "avcs": lambda: AVCSClassifier.fit(records).sets(logits),
    "sweep": lambda: (sweep_thresholds(records), per_exit_metrics(records)),
    "area": lambda: curve_area(records, resamples=10),
    "drift": lambda: compare_records(records, records, "entropy", 0.5),
}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
does[name]()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, logits.numel() * 4 / 2**20)
"""

_NAMES = (
    "temperature", "mie", "threshold", "thresholds per exit", "guaranteed", "eefp", "eenet", "set_size", "conformal",
    "avcs", "sweep", "area", "drift",
)  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("exits", "samples", "classes"), [(33, 4000, 100), (2, 600, 21_841), (2, 200_000, 20)])
@pytest.mark.parametrize("name", _NAMES)
def test_memory_grows_with_the_logits_and_no_faster(name, exits, samples, classes):
    sizes = [name, str(exits), str(samples), str(classes)]
    run = subprocess.run([sys.executable, "-c", _CODE, *sizes], capture_output=True, text=True, check=True)
    grown, logits = map(float, run.stdout.split())
    allowed = 3 * logits + (650 if name == "eenet" else 250)  # its optimizer holds 512 weights per class four times
    assert grown < allowed, f"{grown:.0f} MiB beyond the {logits:.0f} MiB of logits"
