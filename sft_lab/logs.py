"""train.log: what this project and the libraries below it have to say, kept off the terminal but for our own words."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

_LIBRARIES = ("transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "py.warnings")


class _Terminal(logging.Handler):
    """Our own messages, plainly, on standard error; a traceback is for the file."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            return
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        with contextlib.suppress(OSError):  # nobody is there to read it any more
            print(f"{prefix}{record.getMessage()}", file=sys.stderr, flush=True)


class _File(logging.FileHandler):
    """A full disk is for the run to tell, not for each line that finds no room."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class RunLog(logging.handlers.MemoryHandler):
    """Holds what is logged until the run directory is there to take it."""

    def __init__(self) -> None:
        super().__init__(capacity=100_000, flushLevel=logging.CRITICAL + 1)

    def open(self, path: Path, rank: int = 0) -> None:
        """From now on into this file, to which the other ranks write too."""
        file = _File(path, encoding="utf-8")
        by = f" rank {rank}" if rank else ""
        file.setFormatter(logging.Formatter(f"%(asctime)s{by} %(levelname)s %(name)s: %(message)s"))
        self.setTarget(file)
        self.flush()
        self.capacity = 0  # from now on every record goes through at once

    def close(self) -> None:
        target = self.target
        super().close()
        if target is not None:
            target.close()


@contextlib.contextmanager
def run_log(terminal: bool = True) -> Iterator[RunLog]:
    """Send our and the libraries' log records and warnings to a `RunLog`, and quieten their progress bars.

    Args:
        terminal: whether this process is the one that speaks there.
    """
    log = RunLog()
    ours = logging.getLogger("sft_lab")
    ours.setLevel(logging.INFO)
    listeners: list[tuple[logging.Logger, logging.Handler]] = [(ours, _Terminal())] if terminal else []
    listeners = [*listeners, *((logging.getLogger(name), log) for name in ("sft_lab", *_LIBRARIES))]
    for logger, handler in listeners:
        logger.addHandler(handler)
    _quieten()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            logging.captureWarnings(True)
            yield log
    finally:
        logging.captureWarnings(False)
        for logger, handler in listeners:
            logger.removeHandler(handler)
        log.close()


def _quieten() -> None:
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    logging.getLogger("py.warnings").propagate = False
