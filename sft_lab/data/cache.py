"""Prepared tokens on disk, keyed on what changes them and on nothing else.

An entry is a directory that appears whole, made by one process while others that want it wait. Its key.json says what
it was made from, so that a miss can say what is different this time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sft_lab import embedded
from sft_lab.runs import read_json, whole_directory, write_json

log = logging.getLogger("sft_lab")

_LOOKED_AT = 100  # entries that a miss is compared with, the newest first
Key = dict[str, Any]


def get(key: Key, build: Callable[[Path], None]) -> tuple[Path, str]:
    """The entry of `key`, filled by `build(folder)` where there is none, and in words whether there was one."""
    root = embedded.cache_root() / "data"
    root.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    entry, lock = root / digest, FileLock(root / f"{digest}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        log.info("waiting for another process that prepares the same data")
        lock.acquire()
    try:
        if (entry / "key.json").is_file():
            return entry, f"cache hit, {entry}"
        why = _why_missed(key, root)
        for left in root.glob(f".{digest}.*.tmp"):  # of a process that was killed, since we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        with whole_directory(entry, "facts.json") as folder:
            build(folder)
            write_json(folder / "key.json", key)
        return entry, f"cache miss ({why}), now in {entry}"
    finally:
        lock.release()


def _why_missed(key: Key, root: Path) -> str:
    """What differs from the most similar entry of the same files."""
    entries = sorted(root.glob("*/key.json"), key=lambda file: file.stat().st_mtime, reverse=True)[:_LOOKED_AT]
    same = [other for other in map(read_json, entries) if other.get("places") == key["places"]]
    if not same:
        return "this data was not prepared before"
    fewest = min([_differences(key, other) for other in same], key=len)
    return f"changed: {', '.join(sorted(fewest))}"


def _differences(key: Key, other: Key) -> set[str]:
    """What is different, without what only follows from that."""
    names = {name for name in key.keys() | other.keys() if key.get(name) != other.get(name)}
    if "streaming" in names:  # of a stream other things are compared than contents
        names.discard("contents")
    if None in (key.get("seed"), other.get("seed")) and len(names) > 1:  # what draws came or went, and the seed with it
        names.discard("seed")
    return names


def digest_of(*texts: str) -> str:
    """A short digest of texts, for a key."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:".encode())
        digest.update(text.encode("utf-8", errors="surrogatepass"))
    return digest.hexdigest()[:16]
