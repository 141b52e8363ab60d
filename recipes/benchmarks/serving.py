"""Measures what a server answers: requests a second and latencies, with exits on and off, from clients on this machine.

    python recipes/benchmarks/serving.py --model runs/digits-1 --output serving.json

The server is a process of its own, `erde-hub serve`; the clients are threads of this one, each with one connection, and
send the next request when the last one is answered. They share the machine's cores with the server. Images are noise,
as PNG: which exits it takes the numbers say, and --threshold sets.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.hf_argparser import HfArg

from erde_hub._tables import format_table
from erde_hub.errors import CheckpointError, ConfigError
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.results_files import write_results
from erde_hub.scripts.common.served import Served, open_served


@dataclass
class ServingBenchmark:
    """What is measured, and where the numbers go."""

    model: str = HfArg(help="folder or Hub repository of a checkpoint of images, or an ONNX file")
    threshold: float | None = HfArg(default=None, help="of the runs with exits on; default: the stored one")
    never: float = HfArg(default=0.0, help="a threshold at which no sample exits: 0 of entropy, 2 of confidence")
    image_size: int = HfArg(default=32, help="height and width of the images that are sent")
    clients: int = HfArg(default=16, help="connections at once")
    requests: int = HfArg(default=2000, help="requests per run")
    rounds: int = HfArg(default=3, help="runs of either kind, in turns, after one of each to warm up")
    cpu_threads: int = HfArg(default=1, help="CPU threads of the network")
    output: str | None = HfArg(default=None, help="JSON file for the numbers")

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("clients", "requests", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Reply:
    """What a request got: its number, the status, the JSON, and the seconds that it took."""

    number: int
    status: int
    answer: Any
    seconds: float


#: Query, content type and body of a request.
Question = tuple[str, str, bytes]


def ask_all(port: int, clients: int, requests: int, questions: Sequence[Question]) -> list[Reply]:
    """Sends requests from several clients at once; returns the replies in the order of the requests.

    Request n asks question n modulo their number. One without a reply raises what its client met.
    """
    replies: list[Reply] = []
    errors: list[BaseException] = []

    def run(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            for number in range(first, requests, clients):
                query, content_type, body = questions[number % len(questions)]
                began = time.perf_counter()
                connection.request("POST", f"/predict{query}", body, {"Content-Type": content_type})
                response = connection.getresponse()
                answer = json.loads(response.read())
                replies.append(Reply(number, response.status, answer, time.perf_counter() - began))
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=(first,)) for first in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sorted(replies, key=lambda reply: reply.number)


@contextmanager
def server_process(model: str, cpu_threads: int) -> Iterator[int]:
    """Runs `erde-hub serve` in a process of its own; gives its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parents[1] / "serve.py"
    flags = ["--model", model, "--port", str(port), "--cpu_threads", str(cpu_threads)]
    process = subprocess.Popen([sys.executable, str(script), *flags])
    try:
        while not _is_up(port):
            if process.poll() is not None:
                raise CheckpointError(f"the server of {model!r} ended before it answered, see above")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def _is_up(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def png(pixels: np.ndarray) -> bytes:
    """Returns uint8 pixels (H, W, 3) as a file."""
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "PNG")
    return stored.getvalue()


def measure(args: ServingBenchmark, served: Served) -> dict[str, Any]:
    """Returns requests per second and latencies in milliseconds of every round, exits on and off."""
    if served.kind != "image":
        raise ConfigError("this benchmark sends images, the checkpoint reads texts")
    generator = np.random.default_rng(0)
    files = [png(generator.integers(0, 256, (args.image_size, args.image_size, 3), dtype=np.uint8)) for _ in range(64)]
    stored = "" if args.threshold is None else f"?threshold={args.threshold}"
    thresholds = {"on": stored, "off": f"?threshold={args.never}"}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in thresholds}
    with server_process(args.model, args.cpu_threads) as port:
        for round_ in range(args.rounds + 1):
            for name, query in thresholds.items():
                began = time.perf_counter()
                questions = [(query, "image/png", file) for file in files]
                replies = ask_all(port, args.clients, args.requests, questions)
                seconds = time.perf_counter() - began
                latencies = [1000 * reply.seconds for reply in replies]
                full = served.macs[-1]
                row = {
                    "requests_per_second": len(replies) / seconds,
                    "p50_milliseconds": float(np.quantile(latencies, 0.5)),
                    "p99_milliseconds": float(np.quantile(latencies, 0.99)),
                    "macs_share": statistics.fmean(reply.answer["macs"] for reply in replies) / full,
                }
                if round_ > 0:
                    rows[name].append(row)
    return rows


def main() -> None:
    """Measures, prints, writes."""
    args, _ = parse_arguments({"benchmark": ServingBenchmark}, __doc__)
    rows = measure(args, open_served(args.model))
    names = list(rows["on"][0])
    middle = {kind: {name: statistics.median(row[name] for row in own) for name in names} for kind, own in rows.items()}
    table = [(kind, *(f"{middle[kind][name]:.3g}" for name in names)) for kind in rows]
    print(format_table(("exits", *names), table))
    settings = {"clients": args.clients, "requests": args.requests, "cpu_threads": args.cpu_threads}
    write_results(args.output, {"settings": settings, "rounds": rows, "median": middle})


if __name__ == "__main__":
    run_script(main)
