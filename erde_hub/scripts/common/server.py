"""The HTTP side of ``erde-hub serve``: requests become batches, answers JSON, faults status codes. Needs Starlette."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from erde_hub.budget import BudgetController
from erde_hub.errors import ErdeError, ThresholdError

from .served import Served

_logger = logging.getLogger(__name__)

#: Classes of an answer, and answers whose latencies are kept.
CLASSES, KEPT = 5, 10_000


class Batcher:
    """Runs the network on what has arrived while it ran: alone a request does not wait, many share a batch.

    Args:
        answer: See :class:`Served`.
        batch_size: Largest batch.
        max_waiting: Requests that may wait; further ones get status 503.
    """

    def __init__(self, answer: Callable[..., Any], batch_size: int, max_waiting: int) -> None:
        self.answer = answer
        self.batch_size = batch_size
        self.waiting: asyncio.Queue[tuple[Any, list[float], asyncio.Future[Any]]] = asyncio.Queue(max_waiting)

    async def ask(self, row: Any, threshold: list[float]) -> tuple[NDArray[Any], int]:
        """Returns logits (K,) and the exit of one row."""
        future = asyncio.get_running_loop().create_future()
        try:
            self.waiting.put_nowait((row, threshold, future))
        except asyncio.QueueFull:
            raise HTTPException(503, "too many requests are waiting", {"Retry-After": "1"}) from None
        return await future

    async def run(self) -> None:
        """Answers batch after batch until it is cancelled."""
        while True:
            batch = [await self.waiting.get()]
            while len(batch) < self.batch_size and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            rows, thresholds, futures = zip(*batch, strict=True)
            try:
                logits, index = await asyncio.to_thread(self.answer, list(rows), np.array(thresholds, np.float64))
                answers: Sequence[Any] = list(zip(logits, index.tolist(), strict=True))
            except Exception:  # whatever it is, those who wait get an answer
                _logger.exception("the network failed on a batch of %d", len(batch))
                answers = [None] * len(batch)
            for future, answer in zip(futures, answers, strict=True):
                if future.done():  # nobody waits any more
                    continue
                if answer is None:
                    future.set_exception(HTTPException(500, "the network failed; the server's log says how"))
                else:
                    future.set_result(answer)


class Metrics:
    """What /metrics tells: exits taken, their mean cost, latencies of the last answers, and refusals."""

    def __init__(self, served: Served, controller: BudgetController | None = None) -> None:
        self.served = served
        self.controller = controller
        self.exits = [0] * len(served.exit_names)
        self.refused: Counter[int] = Counter()
        self.seconds: deque[float] = deque(maxlen=KEPT)
        self.total_seconds = 0.0

    def add(self, exit_index: int, seconds: float) -> None:
        """Counts an answer."""
        self.exits[exit_index] += 1
        self.seconds.append(seconds)
        self.total_seconds += seconds

    def text(self) -> str:
        """Returns the text format of Prometheus."""
        answered = sum(self.exits)
        lines = ["# HELP erde_hub_exits_total Samples that took each exit.", "# TYPE erde_hub_exits_total counter"]
        names = [name.replace("\\", r"\\").replace('"', r"\"") for name in self.served.exit_names]
        lines += [f'erde_hub_exits_total{{exit="{n}"}} {count}' for n, count in zip(names, self.exits, strict=True)]
        lines += ["# HELP erde_hub_exit_share Share of the answered samples.", "# TYPE erde_hub_exit_share gauge"]
        shares = [count / max(answered, 1) for count in self.exits]
        lines += [f'erde_hub_exit_share{{exit="{n}"}} {share:.6g}' for n, share in zip(names, shares, strict=True)]
        mean = sum(share * macs for share, macs in zip(shares, self.served.macs, strict=True))
        lines += ["# HELP erde_hub_mean_macs Mean multiply-accumulates per sample.", "# TYPE erde_hub_mean_macs gauge"]
        lines += [f"erde_hub_mean_macs {mean:.9g}"]
        lines += ["# HELP erde_hub_refused_total Requests without an answer.", "# TYPE erde_hub_refused_total counter"]
        lines += [f'erde_hub_refused_total{{status="{status}"}} {n}' for status, n in sorted(self.refused.items())]
        lines += [f"# HELP erde_hub_latency_seconds From the whole body to the answer; quantiles of the last {KEPT:,}."]
        lines += ["# TYPE erde_hub_latency_seconds summary"]
        for q in (0.5, 0.9, 0.99):
            value = float(np.quantile(self.seconds, q)) if self.seconds else math.nan
            lines.append(f'erde_hub_latency_seconds{{quantile="{q}"}} {value:.6g}'.replace("nan", "NaN"))
        lines += [
            f"erde_hub_latency_seconds_sum {self.total_seconds:.6f}",
            f"erde_hub_latency_seconds_count {answered}",
        ]
        if self.controller is not None:
            lines += _budget_lines(self.controller, names)
        return "\n".join(lines) + "\n"


def _budget_lines(controller: BudgetController, names: Sequence[str]) -> list[str]:
    """Metrics of a controller; its samples are the requests without a threshold of their own."""
    recent = math.nan if controller.recent_cost is None else controller.recent_cost
    lines = ["# HELP erde_hub_budget_target Mean cost per sample that is kept.", "# TYPE erde_hub_budget_target gauge"]
    lines += [f'erde_hub_budget_target{{unit="{controller.unit}"}} {controller.target:.9g}']
    lines += ["# HELP erde_hub_budget_recent_cost Mean cost of about the last 500 samples without a threshold."]
    lines += ["# TYPE erde_hub_budget_recent_cost gauge"]
    lines += [f'erde_hub_budget_recent_cost{{unit="{controller.unit}"}} {recent:.9g}'.replace("nan", "NaN")]
    lines += ["# HELP erde_hub_threshold Threshold of an exit now.", "# TYPE erde_hub_threshold gauge"]
    pairs = zip(names, controller.thresholds, strict=False)
    return lines + [f'erde_hub_threshold{{exit="{name}"}} {value:.9g}'.replace("inf", "+Inf") for name, value in pairs]


def create_app(
    served: Served,
    *,
    batch_size: int = 32,
    max_waiting: int = 1024,
    max_body_bytes: int = 10_000_000,
    controller: BudgetController | None = None,
) -> Starlette:
    """Makes the application.

    Args:
        served: What answers.
        batch_size: Largest batch.
        max_waiting: Requests that may wait; further ones get status 503.
        max_body_bytes: Larger bodies get status 413.
        controller: Gives the threshold of requests without one of their own, and learns from what they cost.
    """
    batcher, metrics = Batcher(served.answer, batch_size, max_waiting), Metrics(served, controller)

    async def predict(request: Request) -> JSONResponse:
        try:
            own = _threshold(request, served)
            body = await _body(request, max_body_bytes)
            began = time.perf_counter()
            row = await run_in_threadpool(_prepare, served, request.headers.get("content-type", ""), body)
            default = served.threshold if controller is None else controller.thresholds
            logits, index = await batcher.ask(row, [*default] if own is None else own)
            if controller is not None and own is None:
                controller.update([index])
            answer = _describe(served, logits, index)
        except HTTPException as error:
            metrics.refused[error.status_code] += 1
            raise
        metrics.add(index, time.perf_counter() - began)
        return JSONResponse(answer)

    async def health(request: Request) -> JSONResponse:
        threshold = [t if math.isfinite(t) else str(t) for t in served.threshold]
        what = {"model": served.name, "kind": served.kind, "exits": [*served.exit_names], "threshold": threshold}
        return JSONResponse({"status": "ok", **what})

    async def tell_metrics(request: Request) -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    async def refuse(request: Request, error: Any) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()

    routes = [
        Route("/predict", predict, methods=["POST"]),
        Route("/health", health),
        Route("/metrics", tell_metrics),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: refuse})


async def _body(request: Request, limit: int) -> bytes:
    body = bytearray()
    with contextlib.suppress(ClientDisconnect):
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise HTTPException(413, f"the body is larger than {limit:,} bytes")
        return bytes(body)
    raise HTTPException(400, "the connection ended before the body did")


def _threshold(request: Request, served: Served) -> list[float] | None:
    texts = request.query_params.getlist("threshold")
    if not texts:
        return None
    try:
        numbers = [float(text) for text in texts]
        return served.check_threshold(numbers[0] if len(numbers) == 1 else numbers)
    except (ValueError, ThresholdError) as error:
        raise HTTPException(400, f"threshold: {error}"[:500]) from error


def _prepare(served: Served, content_type: str, body: bytes) -> Any:
    try:
        return served.prepare(content_type.partition(";")[0].strip().lower(), body)
    except ErdeError as error:
        raise HTTPException(400, str(error)[:500]) from error


def _describe(served: Served, logits: NDArray[Any], index: int) -> dict[str, Any]:
    z = logits.astype(np.float64)
    if not np.isfinite(z).all():
        raise HTTPException(500, "the network's answer to this input is not finite")
    probs = np.exp(z - z.max())
    probs /= probs.sum()
    best = np.argsort(-probs, kind="stable")[:CLASSES].tolist()
    answer = {
        "label": served.class_names[best[0]],
        "classes": [{"label": served.class_names[k], "probability": float(probs[k])} for k in best],
        "exit": served.exit_names[index],
        "exit_index": index,
        "macs": served.macs[index],
    }
    if served.sets is not None:
        (inside,) = served.sets.sets(z[None], np.array([index]))
        labels = [served.class_names[k] for k in inside.nonzero()[0]]
        answer["set"] = {"labels": labels, "alpha": served.sets.alpha}
    return answer
