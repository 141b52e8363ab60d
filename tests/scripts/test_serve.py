"""The server: every request gets its own answer, whatever shares its batch; what is no request gets a 4xx."""

import http.client
import json
import logging
import math
import os
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import uvicorn
from serving import ask_all, png
from starlette.testclient import TestClient
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from erde_hub import BudgetController, EarlyExitWrapper
from erde_hub.errors import ConfigError, NotSupportedError
from erde_hub.export import export_onnx
from erde_hub.scripts import serve
from erde_hub.scripts.common.served import Served, measure_exits, open_served
from erde_hub.scripts.common.server import create_app
from erde_hub.stored_sets import StoredSets
from tests.fakes.onnx_models import build
from tests.fakes.texts import text, write_encoder

GARBAGE = [
    ("", "image/png", b"\x89PNG\r\n\x1a\n and no more"), ("", "application/json", b"{"),
    ("", "application/json", b"[" * 9000),
    ("", "application/json", b'{"pixel_values": [[[1, "a"]]]}'), ("", "application/json", b'{"pixel_values": [1, 2]}'),
    ("", "application/json", b'{"pixel_values": NaN}'), ("", "application/json", b'{"text": "a dog"}'), ("", "", b""),
    ("?threshold=low", "image/png", png(np.zeros((16, 16, 3), np.uint8))), ("?threshold=-1", "image/png", b""),
    ("?threshold=1&threshold=1&threshold=1", "image/png", png(np.zeros((16, 16, 3), np.uint8))),
    ("?threshold=nan", "image/png", png(np.zeros((16, 16, 3), np.uint8))),
]  # fmt: skip


@contextmanager
def listening(served, **limits):
    """Runs the server in a thread; gives its port."""
    server = uvicorn.Server(uvicorn.Config(create_app(served, **limits), port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def ask(port, method, path, body=None, content_type="image/png"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, {"Content-Type": content_type} if body is not None else {})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """A tiny model with two early exits and preprocessing, and its file."""
    model = build("resnet8_cifar", 16, {"width": 4}, ["layer1", "layer2"], id2label=[f"class {i}" for i in range(10)])
    model.set_preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), size=(16, 16))
    return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "tiny.onnx")


@pytest.fixture(scope="module")
def served(tiny_file, tmp_path_factory):
    """The same network as a checkpoint and as an ONNX file."""
    model, file = tiny_file
    folder = tmp_path_factory.mktemp("served") / "tiny"
    model.save_pretrained(folder)
    return {"checkpoint": open_served(str(folder), 1), "file": open_served(str(file), 1)}


def questions_of(count):
    """Images, each with a threshold of its own or the stored one."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    thresholds = [None, 0.0, 2.2, [0.0, 9.0], 9.0, [1.9, 2.25]]
    own = [thresholds[i % len(thresholds)] for i in range(count)]
    queries = ["" if t is None else "?" + "&".join(f"threshold={v}" for v in np.atleast_1d(t)) for t in own]
    return pixels, own, [(query, "image/png", png(image)) for query, image in zip(queries, pixels, strict=True)]


def expected_answers(model, pixels, thresholds):
    """The model's own answer to each image alone: class, its probability and the exit."""
    inputs = model.image_processor()(list(pixels), return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        outs = [model(x[None], threshold=t) for x, t in zip(inputs["pixel_values"], thresholds, strict=True)]
    return [(int(o.logits.argmax()), float(o.logits.softmax(-1).max()), int(o.exit_index)) for o in outs]


def assert_answered(model, replies, expected, garbage_every=None):
    for reply in replies:
        if garbage_every and reply.number % garbage_every == garbage_every - 1:
            assert 400 <= reply.status < 500, reply
            assert reply.answer["error"]
            continue
        best, probability, exit_index = expected[reply.number % len(expected)]
        assert reply.status == 200, reply
        assert (reply.answer["label"], reply.answer["exit_index"]) == (model.config.id2label[best], exit_index)
        assert reply.answer["classes"][0]["probability"] == pytest.approx(probability, abs=1e-5)
        assert reply.answer["exit"] == model.exit_names[exit_index]
        assert reply.answer["macs"] == model.exit_table().cumulative_macs[exit_index]


@pytest.mark.parametrize("kind", ["checkpoint", "file"])
def test_every_request_gets_the_answer_that_it_would_get_alone(served, tiny_file, kind):
    model, (pixels, own, questions) = tiny_file[0], questions_of(24)
    expected = expected_answers(model, pixels, own)
    assert {answer[2] for answer in expected} == {0, 1, 2}, "the questions should spread over the exits"
    with listening(served[kind], batch_size=8) as port:
        replies = ask_all(port, 6, 48, questions)
        metrics = ask(port, "GET", "/metrics")[1]
        health = json.loads(ask(port, "GET", "/health")[1])
    assert_answered(model, replies, expected)
    assert (health["status"], health["exits"], health["threshold"]) == ("ok", model.exit_names, [0.5, 0.5])
    counts = torch.bincount(torch.tensor([answer[2] for answer in expected]), minlength=3) * 2
    macs = torch.tensor(model.exit_table().cumulative_macs, dtype=torch.float64)
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    for name, count in zip(model.exit_names, counts.tolist(), strict=True):
        assert float(values[f'erde_hub_exits_total{{exit="{name}"}}']) == count
        assert float(values[f'erde_hub_exit_share{{exit="{name}"}}']) == pytest.approx(count / 48, rel=1e-5)
    assert float(values["erde_hub_mean_macs"]) == pytest.approx(float((counts * macs).sum()) / 48, rel=1e-6)
    assert (
        0
        < float(values['erde_hub_latency_seconds{quantile="0.5"}'])
        <= float(values['erde_hub_latency_seconds{quantile="0.99"}'])
    )
    assert float(values["erde_hub_latency_seconds_count"]) == 48


@pytest.mark.parametrize("kind", ["checkpoint", "file"])
def test_garbage_is_refused_and_disturbs_nobody(served, tiny_file, kind):
    _, _, good = questions_of(1)
    with listening(served[kind], max_body_bytes=20_000) as port:
        for query, content_type, body in GARBAGE:
            status, answer = ask(port, "POST", f"/predict{query}", body, content_type)
            assert (status, set(json.loads(answer))) == (400, {"error"}), (query, body[:40], answer)
            assert "/" not in json.loads(answer)["error"].replace("pixel_values must be", ""), "no path of the server"
        assert ask(port, "POST", "/predict", b"a" * 20_001)[0] == 413
        assert ask(port, "GET", "/predict")[0] == 405
        assert ask(port, "GET", "/nothing")[0] == 404
        assert ask_all(port, 1, 1, good)[0].status == 200
        metrics = ask(port, "GET", "/metrics")[1]
    assert f'erde_hub_refused_total{{status="400"}} {len(GARBAGE)}\nerde_hub_refused_total{{status="413"}} 1' in metrics


def test_normalised_floats_are_taken(served, tiny_file):
    x = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    body = json.dumps({"pixel_values": x.tolist()}).encode()
    with torch.no_grad():
        out = tiny_file[0](x[None])
    for own in served.values():
        with listening(own) as port:
            answer = json.loads(ask(port, "POST", "/predict", body, "application/json; charset=utf-8")[1])
        assert answer["exit_index"] == int(out.exit_index)
        assert answer["classes"][0]["probability"] == pytest.approx(float(out.logits.softmax(-1).max()), abs=1e-5)


def test_a_picture_that_would_fill_the_memory_is_refused(served):
    body = bytearray(png(np.zeros((16, 16, 3), np.uint8)))
    body[16:24] = (60_000).to_bytes(4, "big") + (60_000).to_bytes(4, "big")  # the header's width and height
    with listening(served["file"]) as port:
        status, answer = ask(port, "POST", "/predict", bytes(body))
    assert status == 400
    assert "image" in json.loads(answer)["error"]


@pytest.mark.parametrize("kind", ["checkpoint", "file"])
def test_a_budget_holds_for_requests_without_a_threshold(served, kind):
    own = served[kind]
    times = measure_exits(own, calls=2)
    assert len(times) == 3
    assert times == sorted(times)
    target = (own.macs[0] + own.macs[2]) / 2
    controller = BudgetController(own.model, target_macs=target, threshold=2.296, step=1.0)
    _, _, questions = questions_of(6)
    with listening(own, controller=controller) as port:
        for _ in range(20):
            assert ask(port, "POST", "/predict", questions[0][2])[0] == 200
        assert ask(port, "POST", "/predict?threshold=0", questions[0][2])[0] == 200
        metrics = ask(port, "GET", "/metrics")[1]
    assert controller.samples == 20  # whoever asks for a threshold is not counted
    assert f'erde_hub_budget_target{{unit="macs"}} {target:.9g}' in metrics
    assert f'erde_hub_budget_recent_cost{{unit="macs"}} {controller.recent_cost:.9g}' in metrics
    assert f'erde_hub_threshold{{exit="layer1"}} {controller.thresholds[0]:.9g}' in metrics
    assert own.macs[0] < controller.recent_cost < own.macs[2]


def test_answers_have_a_set_where_the_model_has(served, tiny_file):
    assert served["checkpoint"].sets is None
    with_sets = replace(served["checkpoint"], sets=StoredSets(0.1, [0.2, 0.5, math.inf]))
    _, _, questions = questions_of(1)
    with listening(with_sets) as port:
        answers = [json.loads(ask(port, "POST", f"/predict?threshold={t}", questions[0][2])[1]) for t in (9, 0)]
    assert answers[0]["exit_index"] == 0
    assert answers[0]["classes"][0]["label"] in answers[0]["set"]["labels"]
    assert 0 < len(answers[0]["set"]["labels"]) < 10
    assert answers[1]["set"] == {"labels": [f"class {k}" for k in range(10)], "alpha": 0.1}


def stub(answer):
    return Served(
        "stub", "text", ["a", "b"], ["first", "last"], [1, 2], [0.5], lambda kind, body: body, lambda t: [0.5], answer
    )


def test_a_network_that_fails_answers_everybody_and_goes_on(caplog):
    def answer(rows, thresholds):
        if b"bad" in rows:
            raise RuntimeError("out of memory")
        return np.full((len(rows), 2), np.nan if b"nan" in rows else 0.0), np.zeros(len(rows), np.int64)

    with caplog.at_level(logging.CRITICAL), listening(stub(answer)) as port:
        statuses = [ask(port, "POST", "/predict", body)[0] for body in (b"bad", b"nan", b"good")]
        metrics = ask(port, "GET", "/metrics")[1]
    assert statuses == [500, 500, 200]
    assert 'erde_hub_refused_total{status="500"} 2' in metrics


def test_requests_beyond_the_queue_are_told_to_come_again():
    inside, go = threading.Event(), threading.Event()

    def answer(rows, thresholds):
        inside.set()
        go.wait(60)
        return np.zeros((len(rows), 2)), np.zeros(len(rows), np.int64)

    with listening(stub(answer), max_waiting=1) as port:
        replies = []
        threads = [
            threading.Thread(target=lambda: replies.append(ask(port, "POST", "/predict", b"x")[0])) for _ in range(6)
        ]
        threads[0].start()
        inside.wait(60)  # the network is busy: one may wait, four are too many
        for thread in threads[1:]:
            thread.start()
        while len(replies) < 4:
            time.sleep(0.01)
        go.set()
        for thread in threads:
            thread.join()
    assert sorted(replies) == [200, 200, 503, 503, 503, 503]


def test_texts_of_any_length_share_a_batch(tmp_path):
    encoder = write_encoder(tmp_path / "encoder")
    backbone = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    model = EarlyExitWrapper(backbone, exits=2, threshold=0.69).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.save_pretrained(tmp_path / "model")
    texts = [text(row) for row in range(12)]
    with torch.no_grad():
        alone = [model(**tokenizer(own, return_tensors="pt")) for own in texts]
    questions = [("", "application/json", json.dumps({"text": own}).encode()) for own in texts]
    own = open_served(str(tmp_path / "model"), 1)
    assert len(measure_exits(own, calls=1)) == 3
    with listening(own) as port:
        replies = ask_all(port, 4, 12, questions)
        refused = [
            ask(port, "POST", "/predict", body, "application/json")[0] for body in (b'{"text": 3}', b'{"text": ""}')
        ]
        refused.append(ask(port, "POST", "/predict", b"a plain text", "text/plain")[0])
    assert refused == [400, 400, 400]
    for reply, out in zip(replies, alone, strict=True):
        assert reply.answer["exit_index"] == int(out.exit_index)
        assert reply.answer["classes"][0]["probability"] == pytest.approx(float(out.logits.softmax(-1).max()), abs=1e-5)


def test_a_regression_is_not_served(tmp_path):
    backbone = timm.create_model("resnet8_cifar", num_classes=2, width=4)
    model = EarlyExitWrapper(
        backbone, exits=["layer1"], input_size=(3, 32, 32), backbone_kwargs={"width": 4}, problem_type="regression"
    )
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(NotSupportedError, match="no classifier of images or texts"):
        open_served(str(tmp_path / "model"))


def test_the_command_keeps_a_target(call, tiny_file, monkeypatch):
    model, file = tiny_file
    apps = []
    monkeypatch.setattr(serve, "bind", lambda *_: None)
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: apps.append(server.config.app))
    macs = model.exit_table().cumulative_macs
    call(serve, "--model", file, "--target_macs", macs[1])
    metrics = TestClient(apps[0]).get("/metrics").text
    assert f'erde_hub_budget_target{{unit="macs"}} {macs[1]}' in metrics
    with pytest.raises(ConfigError, match="give one target"):
        call(serve, "--model", file, "--target_macs", macs[1], "--target_milliseconds", 1)
    with pytest.raises(ConfigError, match="cannot be met"):
        call(serve, "--model", file, "--target_milliseconds", 1e9)


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(call):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen at 127.0.0.1:{port} \(.*--port"):
            call(serve, "--model", "nowhere.onnx", "--port", port)
    with serve.bind("127.0.0.1", port) as listener:
        assert listener.getsockname()[1] == port


@pytest.mark.parametrize("flags", [["--port", "0"], ["--batch_size", "0"], ["--max_body_megabytes", "0"]])
def test_numbers_that_make_no_sense(call, flags):
    with pytest.raises(ConfigError, match=r"must be at least|port 1 to 65535"):
        call(serve, "--model", "x.onnx", *flags)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["checkpoint", "file"])
def test_sixteen_clients_lose_and_mix_up_nothing(served, tiny_file, kind):
    """ERDE_SOAK=20000 asks more."""
    model, (pixels, own, questions) = tiny_file[0], questions_of(49)
    expected = [*expected_answers(model, pixels, own), None]
    requests = int(os.environ.get("ERDE_SOAK", "2000"))
    with listening(served[kind], batch_size=16) as port:
        replies = ask_all(port, 16, requests, [one for bad in GARBAGE for one in (*questions, bad)])
    assert [reply.number for reply in replies] == [*range(requests)]
    assert_answered(model, replies, expected, garbage_every=50)
