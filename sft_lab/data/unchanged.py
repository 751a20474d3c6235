"""Files that stay the same while they are read, once or several times, or an error.

What is made of a file is kept under the digest of its contents. Were it to change between the digest and the reading,
something else than the digest says would be kept, and found again for as long as the cache lives.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from sft_lab.errors import PreflightError


class Version(NamedTuple):
    """What is different in a file that was written to, or put in the place of another."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int  # also of a file that was moved away and back, or got its old time of modification again

    @classmethod
    def of(cls, file: Path | BufferedReader) -> Version:
        """That of a path, or of a file that is open, whatever lies at its path by now."""
        stat = file.stat() if isinstance(file, Path) else os.fstat(file.fileno())
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def require(path: Path, version: Version | None, file: BufferedReader | None = None) -> None:
    """
    Raises:
        PreflightError: the file, or the one that is open, is not of this version, where one is given.
    """
    try:
        same = version is None or Version.of(file or path) == version
    except OSError:
        same = False
    if not same:
        raise changed(str(path))


def changed(name: str) -> PreflightError:
    return PreflightError(f"{name}: changed while it was read (allowed: a file that nothing writes to meanwhile)")


@contextmanager
def opened(path: Path, version: Version | None = None) -> Iterator[BufferedReader]:
    """The bytes of a file.

    Raises:
        PreflightError: it is not of this version, when it is opened or once the block has ended well.
    """
    with open(path, "rb") as file:
        require(path, version, file)
        yield file
        require(path, version, file)
