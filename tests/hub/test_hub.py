"""Publishing and loading over HTTP: the real client against a Hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
import transformers
from huggingface_hub.utils import httpx
from safetensors.torch import save

import erde_hub.backbones.cifar_resnet  # noqa: F401 - registers resnet*_cifar
from erde_hub import EarlyExitWrapper
from erde_hub._published_weights import check_backbone_weights
from erde_hub.errors import CheckpointError, ConfigError
from erde_hub.hub import publish_checkpoint
from erde_hub.scripts import push
from erde_hub.scripts.common.command_line import clean_errors
from tests.fakes.hub_server import Hub, environment, running
from tests.fakes.networks import images, wrap

ROOT = Path(__file__).resolve().parents[2]


Run = Callable[..., tuple[str, str]]
#: Reads scripts, forks for each of them, and says how it ended.
FORKS = """
import json, os, sys, traceback
import huggingface_hub, timm, transformers
import erde_hub.hub, erde_hub.scripts.push, tests.fakes.networks
for line in sys.stdin:
    script, variables, *files = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        huggingface_hub.constants.HF_HUB_OFFLINE = "HF_HUB_OFFLINE" in variables
        os.environ.update(variables)
        try:
            exec(script, {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def hub_and_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, subprocess.Popen[str]]]:
    """A Hub, and Python that knows it: huggingface_hub reads its variables once, when it is imported."""
    path = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "recipes"))
    with running() as hub:
        env = {**os.environ, "PYTHONPATH": path, **environment(hub, str(tmp_path_factory.mktemp("home")))}
        command = [sys.executable, "-c", FORKS]
        with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as python:
            yield hub, python
            python.stdin.close()


@pytest.fixture
def hub(hub_and_python: tuple[Hub, subprocess.Popen[str]]) -> Hub:
    hub = hub_and_python[0]
    for kept in (hub.repositories, hub.blobs, hub.requests, hub.drop):
        kept.clear()
    return hub


@pytest.fixture
def run(hub_and_python: tuple[Hub, subprocess.Popen[str]], tmp_path: Path) -> Run:
    """Runs a script in a process of its own with that Hub; returns what it printed, and what it logged."""

    def run(script: str, **variables: str) -> tuple[str, str]:
        python, files = hub_and_python[1], [tmp_path / "printed", tmp_path / "logged"]
        for file in files:
            file.write_text("")
        python.stdin.write(json.dumps([script, variables, *map(str, files)]) + "\n")
        python.stdin.flush()
        ended = python.stdout.readline()
        printed, logged = (file.read_text() for file in files)
        assert ended == "0\n", logged[-3000:]
        return printed.strip(), logged

    return run


PUSH = """
from tests.fakes.networks import wrap
from erde_hub import EarlyExitWrapper
from huggingface_hub.errors import HfHubHTTPError
model = wrap("resnet", id2label=list("abcde"))
try:
    model.push_to_hub("org/exits", token="hf_wrong")
except HfHubHTTPError as error:
    print(error.response.status_code, end=" ")
try:
    EarlyExitWrapper.from_pretrained("org/missing")
except OSError as error:
    print("org/missing" in str(error), end=" ")
model.push_to_hub("org/exits", private=True, token="hf_loopback")
print("done")
"""
LOAD = """
import torch
from tests.fakes.networks import images
from erde_hub import EarlyExitWrapper
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
model = EarlyExitWrapper.from_pretrained("org/exits", token="hf_loopback", threshold=0.3)
auto = AutoModelForImageClassification.from_pretrained("org/exits", token="hf_loopback")
AutoImageProcessor.from_pretrained("org/exits", token="hf_loopback")
assert not model.training and model.threshold == 0.3 and model.config.id2label[4] == "e"
with torch.no_grad():
    print(hash(tuple(auto(images("resnet", 3), threshold=0).logits.flatten().tolist())))
"""


@pytest.mark.slow
def test_upload_private_and_load_with_a_bad_line(hub, run):
    """A refused token, a dropped connection on the way up and down, a private repository; then without the Hub."""
    hub.drop = {r"POST /preupload/": 1, r"GET /resolve/[^/]+/model\.safetensors": 1}
    assert run(PUSH)[0] == "401 True done"
    assert list(hub.repositories) == ["org/exits"]
    repository = hub.repositories["org/exits"]
    assert repository.private
    files = repository.commits[repository.refs["main"]]
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= set(files)
    card = files["README.md"].decode()
    assert card.startswith("---")
    assert "early-exit" in card
    assert json.loads(files["config.json"])["model_type"] == "early_exit"

    answers, _ = run(LOAD)
    assert all(left == 0 for left in hub.drop.values())
    with torch.no_grad():
        here = wrap("resnet", id2label=list("abcde"))(images("resnet", 3), threshold=0).logits
    assert answers == str(hash(tuple(here.flatten().tolist())))
    asked = len(hub.requests)
    assert run(LOAD, HF_HUB_OFFLINE="1")[0] == answers
    assert len(hub.requests) == asked


PUSH_FOLDER = """
import runpy, sys
sys.argv = ["push.py", "--model", {folder!r}, "--repo_id", "org/run", "--revision", "second", "--private"]
runpy.run_path({recipe!r}, run_name="__main__")
from erde_hub import EarlyExitWrapper
print(EarlyExitWrapper.from_pretrained("org/run", revision="second").num_exits)
"""


@pytest.mark.slow
def test_a_run_is_published_with_its_card(hub, run, tmp_path):
    folder = tmp_path / "run"
    wrap("resnet").save_pretrained(folder)
    results = ROOT / "recipes" / "results" / "digits.json"
    shutil.copy(results, folder / "results.json")
    shutil.copy(ROOT / "model_cards" / "digits" / "frontier.png", folder)
    (folder / "optimizer.bin").write_bytes(b"no part of the model")
    script = PUSH_FOLDER.format(folder=str(folder), recipe=str(ROOT / "recipes" / "push.py"))
    assert run(script, HF_TOKEN="hf_loopback")[0].splitlines()[-1] == "4"
    repository = hub.repositories["org/run"]
    assert repository.private
    files = repository.commits[repository.refs["second"]]
    assert {"config.json", "model.safetensors", "README.md", "results.json", "frontier.png"} <= set(files)
    assert "optimizer.bin" not in files
    assert set(repository.commits[repository.refs["main"]]) == {".gitattributes"}
    card = files["README.md"].decode()
    assert 'from_pretrained("org/run")' in card
    assert "library_name: erde_hub" in card


def test_what_is_not_published(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        publish_checkpoint(tmp_path, "org/name")
    with pytest.raises(ConfigError, match="no repository name"):
        publish_checkpoint(tmp_path, "not a name")
    model = wrap("resnet")
    model.save_pretrained(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        publish_checkpoint(tmp_path, "org/name")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        publish_checkpoint(tmp_path, "org/name")


# Heads alone


def published(hub: Hub) -> tuple[torch.nn.Module, str]:
    torch.manual_seed(7)
    backbone = timm.create_model("resnet10_cifar", num_classes=5, width=8)
    data = save({k: v.contiguous() for k, v in backbone.state_dict().items()})
    hub.publish("org/backbone", {"model.safetensors": data})
    return backbone, hashlib.sha256(data).hexdigest()


HEADS = """
import json, shutil, torch
from pathlib import Path
import timm
from tests.fakes.networks import images, spread
from safetensors.torch import load_file
from erde_hub import EarlyExitWrapper
folder = Path({folder!r})
torch.manual_seed(7)
backbone = timm.create_model("resnet10_cifar", num_classes=5, width=8)
model = spread(EarlyExitWrapper(backbone, exits=["layer1", "layer2"], backbone_kwargs={{"width": 8}})).eval()
model.save_pretrained(folder / "heads", heads_only=True, backbone_weights={{"repo_id": "org/backbone"}})
keys = load_file(folder / "heads" / "model.safetensors").keys()
assert keys and all(key.startswith("heads.") for key in keys), keys
again = EarlyExitWrapper.from_pretrained(folder / "heads", threshold=0.5)
assert again.threshold == 0.5
with torch.no_grad():
    x = images("resnet", 4)
    assert torch.equal(again(x, threshold=1.2).logits, model(x, threshold=1.2).logits)
again.save_pretrained(folder / "whole")
assert EarlyExitWrapper.from_pretrained(folder / "whole").config.backbone_weights is None
model.backbone.fc.weight.data.add_(1)  # a classifier of its own goes with the heads
model.save_pretrained(folder / "classifier", heads_only=True, backbone_weights={{"repo_id": "org/backbone"}})
again = EarlyExitWrapper.from_pretrained(folder / "classifier")
assert torch.equal(again.backbone.fc.weight, model.backbone.fc.weight)
config = json.loads((folder / "heads" / "config.json").read_text())
config["backbone_weights"]["sha256"] = "0" * 64  # as if other weights had been published since
shutil.copytree(folder / "heads", folder / "other")
(folder / "other" / "config.json").write_text(json.dumps(config))
try:
    EarlyExitWrapper.from_pretrained(folder / "other")
except Exception as error:
    print(type(error).__name__, "has the hash" in str(error), end=" ")
model.backbone.layer1[0].conv1.weight.data.add_(1)
try:
    model.save_pretrained(folder / "trained", heads_only=True, backbone_weights={{"repo_id": "org/backbone"}})
except Exception as error:
    print(type(error).__name__, "layer1.0.conv1.weight" in str(error), (folder / "trained").exists())
"""


HEADS_OF_OTHERS = """
import json, sys
from pathlib import Path
import timm, torch, transformers
from tests.fakes.networks import spread
from erde_hub import EarlyExitWrapper
from huggingface_hub import HfApi
from safetensors.torch import load_file, save

folder, api = Path({folder!r}), HfApi(token="hf_loopback")
transformers.logging.set_verbosity_warning()

# an encoder without classifier and pooler, of which the first two of three layers are used
sizes = dict(vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=16, max_position_embeddings=32)
config = transformers.BertConfig(num_hidden_layers=3, **sizes)
transformers.BertModel(config, add_pooling_layer=False).push_to_hub("org/encoder", token="hf_loopback")
backbone = transformers.AutoModelForSequenceClassification.from_pretrained(
    "org/encoder", num_labels=3, num_hidden_layers=2
)
model = spread(EarlyExitWrapper(backbone, exits=["bert.encoder.layer.0"])).eval()
model.save_pretrained(folder / "texts", heads_only=True)
stored = set(load_file(folder / "texts" / "model.safetensors"))
assert {{"backbone.classifier.weight", "backbone.classifier.bias", "backbone.bert.pooler.dense.bias"}} < stored, stored
assert not any("encoder" in name or "embeddings" in name for name in stored), stored
tokens = dict(input_ids=torch.randint(0, 50, (6, 7)), attention_mask=torch.ones(6, 7, dtype=torch.long))
state = torch.get_rng_state()
again = EarlyExitWrapper.from_pretrained(folder / "texts")
with torch.no_grad():
    for threshold in (0, 1.05):
        assert torch.equal(again(**tokens, threshold=threshold).logits, model(**tokens, threshold=threshold).logits)
model.backbone.bert.encoder.layer[1].output.dense.weight.data.add_(1)
refused = []
for weights in ({{"repo_id": "org/encoder"}}, {{"repo_id": "timm/resnet10t.c3_in1k"}}):
    api.create_repo("timm/resnet10t.c3_in1k", exist_ok=True)
    if "timm" in weights["repo_id"]:
        other = {{"conv.weight": torch.zeros(1)}}
        api.upload_file(path_or_fileobj=save(other), path_in_repo="model.safetensors", **weights)
    try:
        model.save_pretrained(folder / "no", heads_only=True, backbone_weights=weights)
    except Exception as error:
        refused.append((type(error).__name__, "layer.1.output" in str(error), "none of the backbone" in str(error)))
assert refused == [("CheckpointError", True, False), ("CheckpointError", False, True)], refused

# a tag of timm, for five classes of one's own
network = timm.create_model("resnet10t.c3_in1k")
published = save({{name: tensor.contiguous() for name, tensor in network.state_dict().items()}})
api.upload_file(path_or_fileobj=published, path_in_repo="model.safetensors", repo_id="timm/resnet10t.c3_in1k")
network = timm.create_model("resnet10t.c3_in1k", pretrained=True, num_classes=5)
model = spread(EarlyExitWrapper(network, exits=["layer1"], input_size=(3, 32, 32))).eval()
model.freeze_backbone()
model.save_pretrained(folder / "tag", heads_only=True, backbone_weights={{"timm_tag": "resnet10t.c3_in1k"}})
assert json.loads((folder / "tag" / "config.json").read_text())["backbone_weights"]["timm_tag"] == "resnet10t.c3_in1k"
assert not any("layer2" in name for name in load_file(folder / "tag" / "model.safetensors"))
api.create_repo("org/heads")
api.upload_folder(repo_id="org/heads", folder_path=folder / "tag")

# in shards, on devices, in other types
model.push_to_hub("org/shards", token="hf_loopback", max_shard_size="4MB")
assert "model.safetensors.index.json" in api.list_repo_files("org/shards")
images = torch.randn(4, 3, 32, 32)
kinds = [{{}}, {{"device_map": "cpu"}}, {{"device_map": "auto"}}, {{"dtype": "auto"}}, {{"dtype": torch.bfloat16}}]
for repository in ("org/heads", "org/shards"):
    for kind in kinds:
        loaded = EarlyExitWrapper.from_pretrained(repository, **kind)
        dtype = kind.get("dtype") if isinstance(kind.get("dtype"), torch.dtype) else torch.float32
        assert {{p.dtype for p in loaded.parameters()}} == {{dtype}}, (repository, kind)
        assert {{p.device.type for p in loaded.parameters()}} == {{"cpu"}}
        with torch.no_grad():
            mine, theirs = model(images, threshold=1.5), loaded(images.to(dtype), threshold=1.5)
        if dtype == torch.float32:
            assert torch.equal(mine.logits, theirs.logits) and torch.equal(mine.exit_index, theirs.exit_index)
        else:
            torch.testing.assert_close(mine.logits, theirs.logits.float(), atol=0.05, rtol=0.05)
print("done")
"""


PLACES = """
from tests.fakes.networks import wrap

torch.manual_seed(7)
backbone = timm.create_model("resnet10_cifar", num_classes=5, width=8)
model = EarlyExitWrapper(backbone, exits=["layer1"], backbone_kwargs={{"width": 8}})
heads = dict(token="hf_loopback", heads_only=True, backbone_weights={{"repo_id": "org/backbone"}})
model.save_pretrained(folder / "pushed", push_to_hub=True, repo_id="org/saved", **heads)
model.push_to_hub("org/pushed", **heads)
model.push_to_hub("org/whole", token="hf_loopback")

# two files in one repository, of which the second is the backbone
backbone = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "second")
model = EarlyExitWrapper(backbone, exits=["bert.encoder.layer.0"])
second = {{"repo_id": "org/two", "filename": "second.safetensors"}}
api.hf_hub_download("org/two", "model.safetensors")  # so that both lie beside each other
model.save_pretrained(folder / "named", heads_only=True, backbone_weights=second)
assert all(name.startswith("heads.") for name in load_file(folder / "named" / "model.safetensors"))
again = EarlyExitWrapper.from_pretrained(folder / "named").backbone.state_dict()
assert all(torch.equal(tensor, again[name]) for name, tensor in backbone.state_dict().items())

# a config that describes far more than its shards hold
wrap("resnet").push_to_hub("org/split", max_shard_size="20KB", token="hf_loopback")
config = json.loads(Path(api.hf_hub_download("org/split", "config.json")).read_text())
times = 512 // config["backbone_kwargs"]["width"]
config["backbone_kwargs"]["width"] = 512
for feature in config["exit_features"]:
    feature["width"] *= times
api.upload_file(path_or_fileobj=json.dumps(config).encode(), path_in_repo="config.json", repo_id="org/split")
try:
    EarlyExitWrapper.from_pretrained("org/split")
except Exception as error:
    print(type(error).__name__, "but the weights are" in str(error))
"""


@pytest.mark.slow
def test_heads_alone_with_the_published_backbone(hub, run, tmp_path):
    """Heads on backbones of ours, of transformers and of timm; pushed, in shards, on devices, in other types."""
    _, digest = published(hub)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertConfig(num_hidden_layers=2, max_position_embeddings=32, num_labels=3, **sizes)
    for name in ("model", "second"):
        transformers.BertForSequenceClassification(bert).save_pretrained(tmp_path / name)
        data = (tmp_path / name / "model.safetensors").read_bytes()
        hub.publish("org/two", {f"{name}.safetensors": data})
    printed, logged = run((HEADS + HEADS_OF_OTHERS + PLACES).format(folder=str(tmp_path)))
    assert printed.splitlines()[-3:] == [
        "CheckpointError True CheckpointError True False",
        "done",
        "CheckpointError True",
    ]
    assert logged.count("LOAD REPORT") == 2  # of a call in the script and of weights that are refused; none of ours
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    assert config["backbone_weights"] == {
        "repo_id": "org/backbone",
        "revision": "main",
        "filename": "model.safetensors",
        "sha256": digest,
    }
    local = (tmp_path / "pushed" / "model.safetensors").stat().st_size
    files = {name: r.commits[r.refs["main"]] for name, r in hub.repositories.items()}
    for name in ("org/saved", "org/pushed"):
        assert len(files[name]["model.safetensors"]) == local
        assert json.loads(files[name]["config.json"])["backbone_weights"]["sha256"] == digest
    assert len(files["org/whole"]["model.safetensors"]) > len(files["org/backbone"]["model.safetensors"]) > local
    assert json.loads(files["org/whole"]["config.json"]).get("backbone_weights") is None


@pytest.mark.parametrize("offline", [True, False])
def test_publishing_without_a_network_is_one_line(offline, tmp_path, monkeypatch, capsys):
    wrap("resnet").save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["push.py", "--model", str(tmp_path), "--repo_id", "org/name"])
    if not offline:  # what the client raises where nobody answers

        def refuse(*args: object, **kwargs: object) -> None:
            raise httpx.ConnectError("[Errno 111] Connection refused")

        monkeypatch.setattr(push, "publish_checkpoint", refuse)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped, clean_errors():
        push.main()
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert said.startswith("push.py: ConfigError: the Hub could not be reached, nothing was published")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("org/name", "must be a dict"),
        ({"repo": "org/name"}, r"has no 'repo'; did you mean 'repo_id'"),
        ({"repo_id": "org/name", "timm_tag": "resnet50.a1_in1k"}, "either repo_id or timm_tag"),
        ({"revision": "main"}, "either repo_id or timm_tag"),
        ({"repo_id": "../../etc"}, r"no 'org/name'"),
        ({"repo_id": "org/name", "filename": "model.bin"}, r"must be a \.safetensors file"),
        ({"repo_id": "org/name", "filename": "../a.safetensors"}, r"must be a \.safetensors file"),
        ({"repo_id": "org/name", "revision": "../main"}, "no branch, tag or commit"),
        ({"repo_id": "org/name", "sha256": "abc"}, "64 hexadecimal digits"),
        ({"repo_id": 3}, "must be text, got 3"),
        ({"timm_tag": "resnet50.of_nobody"}, "has no weights 'resnet50.of_nobody'"),
        ({"timm_tag": "hf-hub:org/name"}, "has no weights"),
    ],
)
def test_places_of_weights_that_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        check_backbone_weights(values)


def test_heads_alone_need_a_published_backbone(tmp_path):
    model = wrap("resnet")
    with pytest.raises(CheckpointError, match="does not say which published weights"):
        model.save_pretrained(tmp_path / "a", heads_only=True)
    with pytest.raises(ConfigError, match="pass heads_only=True"):
        model.save_pretrained(tmp_path / "a", backbone_weights={"repo_id": "org/name"})
    with pytest.raises(CheckpointError, match="could not be had"):
        model.save_pretrained(tmp_path / "a", heads_only=True, backbone_weights={"repo_id": "org/name"})
    assert isinstance(model, EarlyExitWrapper)
    assert check_backbone_weights({"timm_tag": "resnet50.a1_in1k"})["filename"] == "model.safetensors"


@pytest.mark.parametrize("name", ["vocab.txt", "README.md", "model-2.safetensors", "frontier.png"])
def test_links_out_of_the_folder_are_not_followed(tmp_path, monkeypatch, name):
    monkeypatch.setattr("erde_hub.hub.publish.HfApi", lambda token=None: pytest.fail("nothing is sent"))
    folder, private = tmp_path / "run", tmp_path / "private"
    wrap("resnet").save_pretrained(folder)
    shutil.copy(folder / "model.safetensors", private)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(private)
    with pytest.raises(CheckpointError, match=rf"{name} is a symbolic link to a file outside .* put a copy"):
        publish_checkpoint(folder, "org/name")
