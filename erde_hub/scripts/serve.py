"""Serves a checkpoint or an ONNX file over HTTP, on this machine: batches requests, takes a threshold with each.

    erde-hub serve                            # handwritten digits, with a network that comes with the package
    erde-hub serve --model runs/digits-1
    curl --data-binary @photo.jpg -H "Content-Type: image/jpeg" "http://127.0.0.1:8000/predict?threshold=0.3"

POST /predict takes an image file (JPEG, PNG, WebP, BMP, GIF), or JSON: {"pixel_values": [[[...]]]}, normalised, for
networks of images, {"text": "..."} for those of texts. ?threshold= is one number, or given once per early exit.
GET /health and /metrics (Prometheus) tell how it is. It has no password: put what has one in front of other machines.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from erde_hub.budget import BudgetController
from erde_hub.errors import ConfigError, MissingDependencyError
from erde_hub.scripts.common import configure_logging
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.served import measure_exits, open_served
from erde_hub.scripts.playground.samples import SHIPPED


@dataclass
class ServeArguments:
    """What is served, where, and how much at once."""

    model: str = HfArg(
        default=str(SHIPPED),
        help="folder or Hub repository of a checkpoint, or an ONNX file of erde-hub export; default: handwritten"
        " digits, which come with the package",
    )
    host: str = HfArg(default="127.0.0.1", help="address to listen on; 0.0.0.0 is every network of this machine")
    port: int = HfArg(default=8000, help="port")
    batch_size: int = HfArg(default=32, help="largest batch")
    max_waiting: int = HfArg(default=1024, help="requests that may wait; further ones get status 503")
    max_body_megabytes: float = HfArg(default=10.0, help="larger requests get status 413")
    cpu_threads: int = HfArg(default=0, help="CPU threads of the network, 0: one per core")
    device: str = HfArg(default="cpu", help="where a checkpoint runs, cuda for example")
    target_macs: float | None = HfArg(
        default=None, help="mean MACs per request that thresholds keep to while the images or texts change"
    )
    target_milliseconds: float | None = HfArg(
        default=None, help="the same in milliseconds of one request alone, which are measured before the server starts"
    )

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("batch_size", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.cpu_threads < 0 or self.max_body_megabytes <= 0 or not 0 < self.port < 65536:
            raise ConfigError(
                "cpu_threads must be at least 0, max_body_megabytes above 0 and port 1 to 65535, got"
                f" {self.cpu_threads}, {self.max_body_megabytes} and {self.port}"
            )


def main() -> None:
    """Opens, listens, answers."""
    args, _ = parse_arguments({"serve": ServeArguments}, __doc__ or "")
    try:
        import uvicorn  # noqa: PLC0415 - of the extra

        from erde_hub.scripts.common.server import create_app  # noqa: PLC0415 - needs Starlette
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"erde-hub serve needs {error.name}: pip install 'erde-hub[serve]'") from error
    configure_logging(True)
    listener = bind(args.host, args.port)
    served = open_served(args.model, args.cpu_threads, args.device)
    limits = {"batch_size": args.batch_size, "max_waiting": args.max_waiting}
    controller = None
    if args.target_macs is not None or args.target_milliseconds is not None:
        times = None if args.target_milliseconds is None else measure_exits(served)
        targets = {"target_macs": args.target_macs, "target_milliseconds": args.target_milliseconds}
        controller = BudgetController(served.model, exit_milliseconds=times, **targets)
    app = create_app(served, max_body_bytes=int(args.max_body_megabytes * 1e6), controller=controller, **limits)
    print(f"{served.name} answers at http://{args.host}:{args.port}/predict (/health, /metrics; Ctrl-C ends it)")
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """Takes an address, before time is spent on the network that will answer there.

    Raises:
        ConfigError: The port is taken, or the address is not one of this machine.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise ConfigError(f"cannot listen at {host}:{port} ({reason}): choose another --port, or --host") from error
    return listener


if __name__ == "__main__":
    run_script(main)
