"""What W&B has on disk of a run: the .wandb logs, one a process that worked on it.

Such a log is a 7-byte header, then blocks of 32 KiB in the format of LevelDB's log
(https://github.com/google/leveldb/blob/main/doc/log_format.md): chunks of checksum, length and kind, that make up
protobuf records. A killed process leaves a log whose last record may be torn.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

_FILE_HEADER_BYTES = 7
_BLOCK_BYTES = 32768
_CHUNK_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _LAST = 1, 2, 4  # a chunk between the first and the last of its record has kind 3


def last_step(directory: Path) -> int:
    """The last step that any log under a run's wandb/ holds; -1 without one."""
    return max((_last_step_of(log) for log in _logs(directory)), default=-1)


def repair_torn_logs(directory: Path) -> None:
    """Cut each log after its last whole record; delete it where it has none.

    `wandb sync` stops at the first torn or empty log that it meets, and then leaves out what the resumed process wrote.
    """
    for log in _logs(directory):
        end = max((end for _, end in _records(log.read_bytes())), default=0)
        if end == 0:
            log.unlink()
        elif end < log.stat().st_size:
            os.truncate(log, end)


def _logs(directory: Path) -> list[Path]:
    return sorted(directory.glob("*run-*/run-*.wandb"))


def _last_step_of(log: Path) -> int:
    from wandb.proto import wandb_internal_pb2

    steps = [-1]
    for payload, _ in _records(log.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(payload)
        if record.HasField("history"):
            steps.append(record.history.step.num)
    return max(steps)


def _records(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Each whole record and the offset at which it ends."""
    position, record = _FILE_HEADER_BYTES, b""
    while True:
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _CHUNK_HEADER.size:  # too small for a chunk: padding
            position += left
        if position + _CHUNK_HEADER.size > len(data):
            return
        _, length, kind = _CHUNK_HEADER.unpack_from(data, position)
        position += _CHUNK_HEADER.size + length
        if kind == 0 or position > len(data):
            return
        chunk = data[position - length : position]
        record = chunk if kind in (_FULL, _FIRST) else record + chunk
        if kind in (_FULL, _LAST):
            yield record, position
