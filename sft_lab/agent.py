"""Starts the ranks of a run on this machine through Accelerate, watches over them, and says how they ended.

The ranks are `python -m sft_lab.worker RUN_DIR`. What a rank has to say of its end stands in the run directory
(`verdict`), so that a failure is told as it would be of a single process; a rank that could not say anything is told
by the signal or the exit code it died of.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

import psutil

from sft_lab.callbacks import STOPPING, echoes
from sft_lab.console import say
from sft_lab.errors import Interrupted, RunError
from sft_lab.runs import RunDirectory
from sft_lab.schema import Config

log = logging.getLogger("sft_lab")

_WORKER = "sft_lab.worker"
_PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds


def run(config: Config, run: RunDirectory, node: int = 0, nodes: int = 1, address: str = "", port: int = 0) -> None:
    """Start this machine's ranks and wait for their end.

    Args:
        node: which of `nodes` machines this is, whose ranks meet at `address` and `port`, on the first of them.

    Raises:
        RunError: a rank failed or died before the run was complete, more often than distributed.max_restarts.
        Interrupted: a signal ended it.
        Pruned: a search has given the trial up.
    """
    from accelerate.commands.launch import multi_gpu_launcher
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    died = ""
    offline = _environment("HF_HUB_OFFLINE", "1")  # what ranks read of the hub was fetched before
    with _passing_signals_on(run), _quietly(), offline:
        try:
            multi_gpu_launcher(_arguments(config, run, node, nodes, address, port))
        except ChildFailedError as error:
            died = _how(error)
    run.raise_verdict()
    if died and run.completed:
        log.warning("%s, after the run was complete", died)
    elif died:
        if node == 0:
            say(f"`python -m sft_lab resume {run.path}` goes on")
        raise RunError(died)


def _arguments(config: Config, run: RunDirectory, node: int, nodes: int, address: str, port: int) -> Any:
    """What `accelerate launch` would make of its command line, without the user's own default_config.yaml."""
    from accelerate.commands.launch import launch_command_parser

    d = config.distributed
    words = ["--multi_gpu", "--num_processes", str(d.num_processes), "--max_restarts", str(d.max_restarts)]
    words += ["--num_machines", str(nodes), "--machine_rank", str(node)]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) * nodes // d.num_processes)
    words += ["--num_cpu_threads_per_process", str(threads)]
    if nodes > 1:
        words += ["--main_process_ip", address, "--main_process_port", str(port), "--rdzv_backend", "c10d"]
        words += ["--rdzv_conf", f"is_host={int(node == 0)}"]
    else:
        words += ["--main_process_port", "0"]
    arguments = launch_command_parser().parse_args([*words, "--module", _WORKER, str(run.path), str(os.getpid())])
    arguments.signals_to_handle = "SIGHUP,SIGQUIT"  # of the others we take care: they leave time to save
    arguments.standalone = nodes == 1  # the agent then holds the store, which so outlives the ranks
    arguments.monitor_interval = 0.1
    return arguments


def _how(error: Any) -> str:
    """The rank that died first, not those that lost their connection for that."""

    def order(item: Any) -> tuple[int, int]:
        code = item[1].exitcode
        return (2 if code == -signal.SIGTERM else 0 if code < 0 else 1), item[1].timestamp  # SIGTERM: from the agent

    failures = sorted(error.failures.items(), key=order)
    rank, failure = failures[0]
    if failure.exitcode < 0:
        return f"rank {rank} was killed by {signal.Signals(-failure.exitcode).name}"
    said = failure.message.get("message", failure.message) if isinstance(failure.message, dict) else failure.message
    return f"rank {rank} failed with exit code {failure.exitcode}: {said}"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """What torch's agent knows of its ranks, we tell; and ranks that another one's death leaves waiting end soon."""
    logger = logging.getLogger("torch.distributed.elastic")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with _environment(_PATIENCE, os.environ.get(_PATIENCE) or "10"):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """What the ranks inherit, and this process has for so long."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _passing_signals_on(run: RunDirectory) -> Iterator[None]:
    """The ranks save at the end of their step; the second signal kills them."""
    heard, is_echo = False, echoes()

    def pass_on(signum: int, frame: Any) -> None:
        nonlocal heard
        if is_echo():
            return
        run.write_verdict(Interrupted(signum))  # so that none that dies of it is started again
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if _WORKER in process.cmdline():
                    process.send_signal(signal.SIGKILL if heard else signum)
        heard = True

    before = {signum: signal.signal(signum, pass_on) for signum in STOPPING}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
