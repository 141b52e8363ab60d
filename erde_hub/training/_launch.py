"""The processes of a run: is the group the one that was asked for, how many threads has each, when should it stop.

What ``accelerate launch`` (1.15) starts on a machine without GPUs, as tried:

======================================================  =======================================  ==================
command                                                 environment of the script                processes
======================================================  =======================================  ==================
``--num_processes 2``, with or without ``--cpu``        ``MASTER_ADDR``, no ``WORLD_SIZE``       one, alone
``--multi_gpu --num_processes 2``, plain ``torchrun``   ``WORLD_SIZE=2``, rank by rank           two, each alone
the same with ``ACCELERATE_USE_CPU=true``               ``WORLD_SIZE=2``, rank by rank           two, over gloo
======================================================  =======================================  ==================

The second kind is the dangerous one: two processes that both take themselves for rank 0 and write the same folder.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from torch import nn

from erde_hub._cores import available_cores
from erde_hub.errors import ConfigError, LaunchError

from .arguments import DistillationArguments

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Folder of a run that holds what trackers write.
LOGS = "logs"

_CPU_COMMAND = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {processes} SCRIPT ..."
_MACHINES = (
    "; on several machines add --num_machines M --machine_rank R --main_process_ip ADDRESS --main_process_port PORT,"
    " with --num_processes counting all machines"
)


def create_accelerator(args: DistillationArguments) -> Accelerator:
    """Builds the Accelerator of a run, checks that the launcher's processes found each other, and sets CPU threads.

    A script that trains twice (teacher, student) builds one and hands it to both Distillers.

    Raises:
        LaunchError: The environment promises more processes than Accelerate has; the message has the right command.
        ConfigError: The precision or the tracker cannot be had here.
    """
    check_launch(os.environ)
    running = AcceleratorState._shared_state.get("_mixed_precision")  # of an Accelerator that this process has already
    precision = args.mixed_precision or running or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if running not in (None, precision):
        raise ConfigError(
            f"mixed_precision {precision!r} was asked for, but this process already runs in {running!r}: Accelerate"
            " keeps one precision per process, so train with the same one or in another process"
        )
    if precision == "fp16" and (_on_cpu(os.environ) or not torch.accelerator.is_available()):
        raise ConfigError(
            "mixed_precision 'fp16' needs a GPU (Accelerate would ignore it): on a CPU use 'bf16' or 'no'"
        )
    if args.report_to not in (None, "all") and args.report_to not in map(str, get_available_trackers()):
        raise ConfigError(f"report_to {args.report_to!r} is not installed: `pip install {args.report_to}`")
    output_dir = args.output_dir or "."
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=args.report_to,
            project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=str(Path(output_dir) / LOGS)),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=args.find_unused_parameters)],
        )
    except ValueError as error:  # bf16 on a GPU that has none, and the like
        raise ConfigError(f"Accelerate cannot train like this here (mixed_precision {precision!r}): {error}") from error
    check_launch(os.environ, accelerator)
    set_cpu_threads(args.cpu_threads)
    return accelerator


def check_launch(env: Mapping[str, str], accelerator: Accelerator | None = None) -> None:
    """Compares what the launcher announced with what Accelerate found; see the module for the cases.

    Without an accelerator only the environment is looked at, before a process group is built on a mistake.
    """
    announced = int(env.get("WORLD_SIZE") or 1)
    if accelerator is None:
        by_accelerate = "ACCELERATE_DYNAMO_BACKEND" in env
        if by_accelerate and "WORLD_SIZE" not in env and "MASTER_ADDR" in env:
            raise LaunchError(
                "accelerate launch was told to start several processes but started this one alone, as it does on a"
                f" CPU; use: {_CPU_COMMAND.format(processes=2)}{_MACHINES} (if one process is meant and MASTER_ADDR"
                " comes from your cluster, unset MASTER_ADDR)"
            )
        return
    if accelerator.num_processes != announced and (announced > 1 or accelerator.num_processes > 1):
        raise LaunchError(
            f"the launcher started {announced} processes (WORLD_SIZE), but Accelerate sees"
            f" {accelerator.num_processes} and every process would take itself for rank 0; without GPUs use:"
            f" {_CPU_COMMAND.format(processes=announced)}{_MACHINES}"
        )


def set_cpu_threads(threads: int) -> int:
    """Sets the number of threads of this process and returns it.

    ``accelerate launch`` sets OMP_NUM_THREADS=1 for its children, which leaves all cores but one idle. 0 undoes that:
    the cores this process may use, shared among the processes of this machine. Where no launcher is involved, 0 leaves
    torch's own choice alone.
    """
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if threads == 0 and launched and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        threads = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def _on_cpu(env: Mapping[str, str]) -> bool:
    return env.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "t", "y")


def run_on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Runs a function on the main process and hands its result, or its exception, to all processes."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:  # noqa: BLE001 - raised below, on every process
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome, from_process=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather(accelerator: Accelerator, value: T) -> list[T]:
    """Returns the values of all processes, on all processes."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


#: What backends say in the processes that are left when another one has ended.
_LOST = re.compile(r"gloo|Connection (closed|reset)|remote process exited|collective operation timeout", re.IGNORECASE)


@contextmanager
def lost_process_named() -> Iterator[None]:
    """Says in one sentence that another process of the run has ended, where the backend shows its own source lines.

    Raises:
        LaunchError: An exchange with another process broke.
    """
    try:
        yield
    except RuntimeError as error:
        if not torch.distributed.is_initialized() or not _LOST.search(str(error)):
            raise
        raise LaunchError(
            f"another process of this run ended, so process {torch.distributed.get_rank()} stops: look for its own"
            " message above, or whether it was killed (for memory, say); checkpoints are kept, and --resume continues"
            " the newest one"
        ) from error


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the weights are spread over the processes, by FSDP or DeepSpeed."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def share_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Gives the model of every process the buffers of rank 0's.

    Each process has its own batch-norm statistics; those of rank 0 are saved, so the others read with them too.
    """
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


class StopRequest(AbstractContextManager["StopRequest"]):
    """Notices that the training should save and stop: SIGTERM, SIGINT, or a launcher that died.

    ``accelerate launch`` does not pass SIGTERM on when it starts one process: it dies and leaves the training process
    running, whose parent then changes. A second Ctrl-C raises KeyboardInterrupt at once. Handlers are set only in the
    main thread (Python allows no other) and are put back at the end.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
        self._parent = os.getppid() if launched else None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def __bool__(self) -> bool:
        return self._signal is not None or self._orphaned()

    @property
    def reason(self) -> str:
        """What asked for the stop, for the log."""
        if self._signal is not None:
            return self._signal.name
        return "its launcher died" if self._orphaned() else "another process asked for it"

    def _orphaned(self) -> bool:
        return self._parent is not None and os.getppid() != self._parent

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # A launcher may pass on the Ctrl-C that the terminal has sent to everybody: that is still the first one.
        if self._signal is not None and number == signal.SIGINT and time.monotonic() - self._since > 1.0:
            raise KeyboardInterrupt
        if self._signal is None:
            self._signal, self._since = signal.Signals(number), time.monotonic()
