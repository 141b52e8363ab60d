"""Records: what is collected, in which order, that models and data are left as they were, files, bad input."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from erde_hub import EarlyExitWrapper
from erde_hub.errors import (
    CheckpointWriteError,
    ConfigError,
    DataError,
    InputTypeError,
    LabelError,
    RecordsError,
    ShapeError,
)
from erde_hub.evaluation import (
    ExitRecords,
    build_results,
    collect_exit_records,
    exit_scores,
    model_fingerprint,
    route_records,
)
from erde_hub.policies import create_policy
from tests.fakes.processes import free_port, join_group, run_pair
from tests.fakes.records import FakeExits, batches


def make_records(**changes):
    values = {
        "logits": torch.randn(2, 5, 3),
        "labels": torch.tensor([0, 1, 2, 0, 1]),
        "index": torch.arange(10, 15),
        "exit_names": ["stem", "classifier"],
        "cumulative_macs": [12, 40],
        "class_names": ["cat", "dog", "eel"],
    }
    return ExitRecords(**{**values, **changes})


def test_collects_every_exit_in_eval_mode_and_in_order():
    model = FakeExits().train()
    data = batches()
    records = collect_exit_records(model, data, progress=False, info={"split": "test"})
    model.eval()
    with torch.no_grad():
        expected = [model(batch["pixel_values"], output_all_exits=True).exit_logits for batch in data]
    assert torch.equal(records.logits, torch.cat([torch.stack(exits) for exits in expected], 1))
    assert torch.equal(records.labels, torch.cat([batch["labels"] for batch in data]))
    assert records.index.tolist() == list(range(100, 110))
    assert records.exit_names == ["stem", "classifier"]
    assert records.class_names == ["cat", "dog", "eel"]
    assert records.cumulative_macs == [12, 40]
    assert records.info == {"split": "test"}
    assert (records.num_exits, records.num_samples, records.num_classes, len(records)) == (2, 10, 3, 10)
    assert not records.logits.is_inference()
    assert not records.logits.requires_grad
    assert records.logits.dtype == torch.float32


def test_modes_come_back_module_by_module_and_nothing_else_changes():
    model = FakeExits().train()
    model.norm.eval()  # frozen by hand
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect_exit_records(model, batches(), progress=False)
    assert model.training
    assert model.drop.training
    assert not model.norm.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_modes_come_back_after_an_error():
    model = FakeExits().train()
    with pytest.raises(DataError):
        collect_exit_records(model, [{"pixel_values": torch.randn(2, 4)}], features=True, progress=False)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_modes_come_back_through_train_so_that_caches_are_dropped():
    class Caching(FakeExits):
        cache = None

        def train(self, mode=True):
            super().train(mode)
            if mode:
                self.cache = None
            return self

        def forward(self, pixel_values, output_all_exits=False):
            self.cache = self.heads[0].weight.sum()
            return super().forward(pixel_values, output_all_exits)

    model = Caching().train()
    collect_exit_records(model, batches(), progress=False)
    assert model.training
    assert model.cache is None


@pytest.mark.parametrize("image", ["image", "img", "pixel_values"])
def test_generic_columns_and_tuples_give_the_same(image):
    model = FakeExits()
    data = batches()
    reference = collect_exit_records(model, data, progress=False)
    renamed = [{image: b["pixel_values"], "label": b["labels"], "note": ["x"] * len(b["labels"])} for b in data]
    pairs = [(b["pixel_values"], b["labels"]) for b in data]
    triples = [[b["pixel_values"], b["labels"], b["index"]] for b in data]
    for batch_list, index in ((renamed, range(10)), (pairs, range(10)), (triples, range(100, 110))):
        records = collect_exit_records(model, iter(batch_list), progress=False)
        assert torch.equal(records.logits, reference.logits)
        assert records.index.tolist() == list(index)


def test_features_are_the_inputs_of_the_last_linear_layers():
    model = FakeExits().eval()
    records = collect_exit_records(model, batches(), features=True, progress=False)
    assert [tuple(f.shape) for f in records.features] == [(10, 4), (10, 4)]
    for feature, layer, logits in zip(
        records.features, (model.heads[0], model.backbone[2]), records.logits, strict=True
    ):
        torch.testing.assert_close(layer(feature), logits)


def test_features_of_a_layer_that_does_not_give_the_logits_are_refused():
    class Crossed(FakeExits):
        def __init__(self):
            super().__init__()
            self.backbone = nn.ModuleDict({"fc": nn.Linear(4, 3), "middle": nn.Linear(4, 4)})  # the classifier first
            self.runner = SimpleNamespace(classifier_layer=lambda size: self.backbone["middle"])

        def forward(self, pixel_values, output_all_exits=False):
            deep = self.backbone["fc"](self.backbone["middle"](pixel_values).relu())
            return SimpleNamespace(exit_logits=(self.heads[0](pixel_values), deep))

    with pytest.raises(ConfigError, match=r"exit 'classifier' reads, and that layer does not give the exit's logits"):
        collect_exit_records(Crossed(), batches(), features=True, progress=False)
    assert len(collect_exit_records(Crossed(), batches(), progress=False)) == 10


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        ({"pixel_values": torch.zeros(2, 4)}, DataError, "no labels among its columns 'pixel_values'"),
        ({"labels": torch.zeros(2).long()}, DataError, "no images"),
        ((torch.zeros(2, 4),), DataError, "labels missing"),
        (torch.zeros(2, 4), InputTypeError, "Tensor"),
        ((["file.png"], torch.zeros(1).long()), InputTypeError, "list"),
        ((torch.zeros(2, 4), torch.zeros(3).long()), ShapeError, "(3,)"),
        ((torch.zeros(2, 4), torch.zeros(2).long(), torch.zeros(3).long()), ShapeError, "index"),
        ((torch.zeros(2, 4), torch.tensor([0, 3])), LabelError, "label 3 of row 1"),
        ((torch.zeros(2, 4), torch.zeros(2, 3)), ShapeError, "(2, 3)"),
        ((torch.zeros(2, 4), torch.zeros(2)), InputTypeError, "float32"),
        ((torch.full((2, 4), math.nan), torch.zeros(2).long()), RecordsError, "'stem' are NaN or infinite in row 0"),
    ],
)
def test_bad_batches(batch, error, words):
    with pytest.raises(error) as caught:
        collect_exit_records(FakeExits(), [batch], progress=False)
    assert words in str(caught.value)


def test_empty_loader_and_models_without_exits():
    with pytest.raises(DataError, match="no samples"):
        collect_exit_records(FakeExits(), [], progress=False)
    with pytest.raises(InputTypeError, match="EarlyExitWrapper"):
        collect_exit_records(nn.Linear(2, 2), [], progress=False)


@pytest.mark.parametrize(("name", "value"), [
    ("dataloader", None), ("features", "no"), ("accelerator", "cpu"), ("autocast_dtype", "bfloat16"), ("info", "notes"),
])  # fmt: skip
def test_options_of_another_type_are_refused_by_name(name, value):
    with pytest.raises(InputTypeError, match=f"{name} must be .*, got {value!r}"):
        collect_exit_records(**{"model": FakeExits(), "dataloader": batches(), "progress": False} | {name: value})


def test_batches_must_agree_on_having_an_index():
    first, second = batches(8)
    del second["index"]
    with pytest.raises(DataError, match="some have none"):
        collect_exit_records(FakeExits(), [first, second], progress=False)


def test_class_names_must_fit_the_logits():
    model = FakeExits()
    model.config.id2label = {0: "cat", 1: "dog"}
    with pytest.raises(ShapeError, match="class_names has 2"):
        collect_exit_records(model, batches(), progress=False)


def test_the_progress_bar_goes_to_stderr_and_can_be_switched_off(capsys):
    collect_exit_records(FakeExits(), batches(), progress=False)
    assert capsys.readouterr().err == ""
    collect_exit_records(FakeExits(), batches(), progress=True)
    assert "collecting exits" in capsys.readouterr().err


def test_autocast_leaves_float32_records():
    model = FakeExits().eval()
    exact = collect_exit_records(model, batches(), progress=False)
    torch.manual_seed(0)
    data = batches()
    records = collect_exit_records(model, data, progress=False, autocast_dtype=torch.bfloat16)
    full = collect_exit_records(model, data, progress=False)
    assert records.logits.dtype == torch.float32
    assert not torch.equal(records.logits, full.logits)
    torch.testing.assert_close(records.logits, full.logits, atol=0.05, rtol=0.05)
    assert exact.logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"logits": torch.zeros(5, 3)}, ShapeError, "(5, 3)"),
        ({"logits": torch.zeros(2, 0, 3)}, ShapeError, "(2, 0, 3)"),
        ({"labels": torch.zeros(4).long()}, ShapeError, "labels must be (5,)"),
        ({"index": torch.zeros(4).long()}, ShapeError, "index must be (5,)"),
        ({"index": torch.zeros(5)}, InputTypeError, "index"),
        ({"exit_names": ["a"]}, ShapeError, "exit_names has 1"),
        ({"class_names": ["a"]}, ShapeError, "class_names has 1"),
        ({"cumulative_macs": [1, 2, 3]}, ShapeError, "cumulative_macs has 3"),
        ({"cumulative_macs": [40, 12]}, RecordsError, "[40, 12]"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0])}, LabelError, "label 3 of row 3"),
        ({"features": [torch.zeros(5, 2)]}, ShapeError, "features has 1"),
        ({"features": [torch.zeros(5, 2), torch.zeros(5, 2, 2)]}, ShapeError, "'classifier' must be (5, width)"),
        ({"features": [torch.zeros(5, 2), torch.full((5, 2), math.inf)]}, RecordsError, "features of exit 'classif"),
    ],
)
def test_records_check_themselves(changes, error, words):
    with pytest.raises(error) as caught:
        make_records(**changes)
    assert words in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_logits_name_exit_row_and_sample(bad):
    logits = torch.zeros(2, 5, 3)
    logits[1, 3, 0] = bad
    with pytest.raises(RecordsError, match=r"'classifier' are NaN or infinite in row 3 \(sample index 13\), 1 of 5"):
        make_records(logits=logits)


def test_one_file_round_trip_is_exact(tmp_path):
    records = make_records(
        features=[torch.randn(5, 2), torch.randn(5, 7)], fingerprint="abc", info={"split": "validation"}
    )
    records.save(tmp_path / "records.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["records.safetensors"]
    loaded = ExitRecords.load(tmp_path / "records.safetensors")
    for name in ("logits", "labels", "index"):
        assert torch.equal(getattr(records, name), getattr(loaded, name))
    assert all(torch.equal(a, b) for a, b in zip(records.features, loaded.features, strict=True))
    for name in ("exit_names", "cumulative_macs", "class_names", "fingerprint", "info"):
        assert getattr(records, name) == getattr(loaded, name)
    make_records().save(tmp_path / "bare.safetensors")
    assert ExitRecords.load(tmp_path / "bare.safetensors").features is None


def test_files_that_are_no_records(tmp_path):
    with pytest.raises(RecordsError, match="no records at"):
        ExitRecords.load(tmp_path / "missing.safetensors")
    other = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(RecordsError, match=r"not 'erde_hub\.exit_records/1'"):
        ExitRecords.load(other)
    good = tmp_path / "records.safetensors"
    make_records().save(good)
    content = good.read_bytes()
    good.write_bytes(content[: len(content) // 2])
    with pytest.raises(RecordsError, match="damaged"):
        ExitRecords.load(good)
    save_file({"logits": torch.zeros(2)}, good, {"format": ExitRecords.FORMAT, "records": json.dumps({})})
    with pytest.raises(RecordsError, match="damaged"):
        ExitRecords.load(good)


def test_a_failed_save_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "records.safetensors"
    make_records().save(path)
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("erde_hub.records.save_file", full_disk)
    with pytest.raises(CheckpointWriteError, match="No space left"):
        make_records().save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["records.safetensors"]
    with pytest.raises(CheckpointWriteError, match="folder"):
        make_records().save(tmp_path / "missing" / "records.safetensors")


def test_select_rows():
    records = make_records(features=[torch.randn(5, 2), torch.randn(5, 7)])
    for rows in ([3, 0], torch.tensor([3, 0]), [-2, 0]):
        part = records.select(rows)
        assert part.index.tolist() == [13, 10]
        assert torch.equal(part.logits, records.logits[:, [3, 0]])
        assert torch.equal(part.features[1], records.features[1][[3, 0]])
    assert records.select(records.labels == 0).index.tolist() == [10, 13]
    for rows, error in (
        ([5], ShapeError),
        ([-6], ShapeError),
        ([], ShapeError),
        ([0.5], InputTypeError),
        (torch.tensor([True, False]), ShapeError),
        (torch.zeros(5, dtype=torch.bool), ShapeError),
    ):
        with pytest.raises(error):
            records.select(rows)


def test_fingerprint_follows_weights_and_nothing_else():
    model = FakeExits()
    first = model_fingerprint(model)
    model.eval()
    model.policy = nn.Linear(1, 1)  # a learned policy reads the logits, it does not change them
    assert model_fingerprint(model) == first
    with torch.no_grad():
        model.heads[0].weight[0, 0] += 1
    assert model_fingerprint(model) != first
    assert model_fingerprint(model.to(torch.bfloat16)) != first


@pytest.fixture(scope="module")
def wrapper():
    torch.manual_seed(3)
    backbone = timm.create_model("resnet8_cifar", num_classes=5, width=8)
    model = EarlyExitWrapper(backbone, exits=["layer1", "layer2"], input_size=(3, 16, 16), backbone_kwargs={"width": 8})
    model.train()
    with torch.no_grad():
        for _ in range(3):  # batch statistics that belong to the inputs
            model(torch.randn(32, 3, 16, 16))
        for head in model.heads:
            head.fc.weight *= 6  # spreads the scores
        model.backbone.get_classifier().weight *= 6
    return model.eval()


@pytest.mark.parametrize(
    ("policy", "thresholds"),
    [
        ("entropy", [0.0, 0.3, 0.8, [0.2, 1.1], 5.0, math.inf]),
        ("confidence", [0.0, 0.5, 0.9, [0.4, 0.8], math.inf]),
        ("margin", [0.2, [0.7, 0.1]]),
        ("patience", [1, 2]),
        ("never", [0.0]),
        ("always", [0.0]),
    ],
)
def test_records_route_as_the_model_does(wrapper, policy, thresholds):
    torch.manual_seed(5)
    images, labels = torch.randn(40, 3, 16, 16), torch.randint(5, (40,))
    data = [{"pixel_values": x, "labels": y} for x, y in zip(images.split(16), labels.split(16), strict=True)]
    records = collect_exit_records(wrapper, data, features=True, progress=False)
    assert records.exit_names == ["layer1", "layer2", "classifier"]
    assert records.cumulative_macs == wrapper.exit_table().cumulative_macs
    for e, head in enumerate(wrapper.heads):
        torch.testing.assert_close(head.fc(records.features[e]), records.logits[e], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        wrapper.backbone.get_classifier()(records.features[2]), records.logits[2], atol=1e-4, rtol=1e-4
    )
    if policy in ("entropy", "confidence", "margin"):  # between two scores of each exit, so that half of them pass
        middle = exit_scores(records, policy).sort(1).values[:, 19:21].mean(1).tolist()
        thresholds = [*thresholds, middle]
        assert len(route_records(records, policy, middle)[0].unique()) == 3
    original = wrapper.policy
    wrapper.policy = create_policy(policy)
    try:
        for threshold in thresholds:
            index, logits = route_records(records, policy, threshold)
            with torch.no_grad():
                live = wrapper(images, threshold=threshold)
            assert torch.equal(index, live.exit_index), (policy, threshold)
            torch.testing.assert_close(logits, live.logits, atol=1e-4, rtol=1e-4)
    finally:
        wrapper.policy = original


def test_wrapper_modes_weights_and_fingerprint_survive(wrapper, tmp_path):
    wrapper.freeze_backbone()
    wrapper.train()
    modes = [module.training for module in wrapper.modules()]
    data = [(torch.randn(4, 3, 16, 16), torch.randint(5, (4,)))]
    records = collect_exit_records(wrapper, data, progress=False)
    assert [module.training for module in wrapper.modules()] == modes
    wrapper.save_pretrained(tmp_path)
    loaded = EarlyExitWrapper.from_pretrained(tmp_path)
    assert model_fingerprint(loaded) == records.fingerprint


def collect_share(rank, folder, port):
    join_group(rank, port)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model, data = FakeExits(), batches(10, 2)
    assert (accelerator.process_index, accelerator.num_processes) == (rank, 2)
    share = [data[4], data[2], data[0]] if rank == 0 else [data[3], data[1], data[0]]  # out of order, one twice
    wrapped = accelerator.prepare(model)
    records = collect_exit_records(wrapped, share, features=True, progress=False, accelerator=accelerator)
    records.save(folder / f"rank{rank}.safetensors")
    uneven = collect_exit_records(wrapped, data if rank == 0 else [], progress=False, accelerator=accelerator)
    assert uneven.index.tolist() == list(range(100, 110))
    for batch in data:
        del batch["index"]
    with pytest.raises(DataError, match="index"):
        collect_exit_records(wrapped, data, progress=False, accelerator=accelerator)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    os._exit(0)  # gloo's threads can abort a process that ends while its cores are busy


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    run_pair(collect_share, tmp_path, free_port())
    torch.manual_seed(0)
    model, data = FakeExits(), batches(10, 2)
    one = collect_exit_records(model, data, features=True, progress=False)
    for rank in range(2):
        both = ExitRecords.load(tmp_path / f"rank{rank}.safetensors")
        assert torch.equal(both.index, one.index)
        assert torch.equal(both.labels, one.labels)
        torch.testing.assert_close(both.logits, one.logits)
        torch.testing.assert_close(both.features[1], one.features[1])
        assert both.fingerprint == one.fingerprint


def test_a_report_is_built_from_living_models(wrapper):
    data = [(torch.randn(20, 3, 16, 16), torch.randint(5, (20,)))]
    records = collect_exit_records(wrapper, data, progress=False)
    dataset = {"name": "noise", "num_classes": 5}
    results = build_results(records, wrapper, dataset, {}, teacher=wrapper, teacher_records=records)
    table = wrapper.exit_table()
    assert results["student"]["architecture"] == "resnet8_cifar"
    assert results["student"]["macs"] == results["teacher"]["macs"] == table[-1].cumulative_macs
    assert results["student"]["params"] == table[-1].cumulative_params
    assert results["student"]["exits"] == ["layer1", "layer2"]
    assert [row["exit"] for row in results["per_exit"]] == ["layer1", "layer2", "classifier"]


class ClassifierFirst(nn.Module):
    """Registers its classifier before the layer in front of it, and one that is never called behind both."""

    def __init__(self, ends_in: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.fc, self.mid = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(8, 8)
        self.spare, self.end = nn.Linear(8, 4), ends_in or nn.Identity()

    def forward(self, x):
        return self.end(self.fc(self.mid(self.a(x).relu().mean((2, 3))).relu()))


def test_features_are_what_the_classifier_reads_whatever_the_order_of_layers():
    network = ClassifierFirst()
    model = EarlyExitWrapper(network, exits=["a"], input_size=(3, 16, 16)).eval()
    batch = (torch.randn(6, 3, 16, 16), torch.randint(0, 4, (6,)))
    records = collect_exit_records(model, [batch], features=True, progress=False)
    torch.testing.assert_close(network.fc(records.features[-1]), records.logits[-1])
    scaled = EarlyExitWrapper(ClassifierFirst(nn.Softplus()), exits=["a"], input_size=(3, 16, 16)).eval()
    with pytest.raises(ConfigError, match="logits of ClassifierFirst come from no linear layer as they are"):
        collect_exit_records(scaled, [batch], features=True, progress=False)
