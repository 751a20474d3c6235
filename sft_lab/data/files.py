"""Rows of local files: which files a path means, and every row of one, read lazily in memory that stays flat.

A row that cannot be read is a problem of that row, so that the rest can be used; a file that is broken as a whole is
a PreflightError that names the file, the reason and the row where reading got to.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow

from sft_lab.data.columnar_files import read_arrow, read_parquet
from sft_lab.data.splits import require_one_split
from sft_lab.data.text_files import Rows, read_csv, read_json, read_jsonl, read_txt
from sft_lab.data.unchanged import Version, require
from sft_lab.errors import PreflightError

_READERS: dict[str, Callable[[Path, Version | None], Rows]] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".json": read_json,
    ".json.gz": read_json,
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_txt,
    ".txt.gz": read_txt,
}
KINDS = ", ".join(_READERS)
_PLACES = "a file, a directory, a glob such as shards/*.jsonl"
_METADATA = ("dataset_info.json", "dataset_infos.json")  # what tools leave beside data


def files_of(path: str) -> list[Path]:
    """The files of a path that is a file, a directory or a glob such as "shards/*.jsonl", sorted.

    Of a directory: all files of a known kind below it, hidden ones left out; where `datasets` saved it, its data only.

    Raises:
        PreflightError: it is none of them, holds no file of a known kind, files of several splits, or cannot be looked
            into.
    """
    place = Path(path).expanduser()
    try:
        if place.is_dir():
            found = _files_below(place)
            if not found:
                raise PreflightError(f"{path}: a directory without a file of a known kind (allowed: {KINDS})")
            require_one_split(path, place, found)
            return found
        if not place.exists() and any(sign in path for sign in "*?["):
            matches = [Path(name) for name in glob.glob(str(place), recursive=True)]  # noqa: PTH207  Path's is relative only
            found = sorted(match for match in matches if match.is_file())
            if not found:
                raise PreflightError(f"{path}: no file matches (allowed: {KINDS})")
            fixed = itertools.takewhile(lambda part: not any(sign in part for sign in "*?["), place.parts[:-1])
            require_one_split(path, Path(*fixed), found)
        elif place.exists():
            found = [place]
        else:
            raise PreflightError(f"{path}: no such file or directory{_nearest(place)} (allowed: {_PLACES})")
    except OSError as error:
        raise PreflightError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    for file in found:
        _reader(file)
    return found


def read_file(path: Path, version: Version | None = None) -> Rows:
    """Every row of a file as (number from 1, value, problem), lazily; value is None where there is a problem.

    Raises:
        PreflightError: while reading; it is missing, of no known kind, empty, broken as a whole, or of another version.
    """
    number = 0
    try:
        with closing(_reader(path)(path, version)) as rows:
            for number, value, problem in rows:
                yield number, value, problem
    except (
        OSError,
        EOFError,
        zlib.error,
        pyarrow.ArrowException,
        UnicodeDecodeError,
    ) as error:  # the last: column names
        where = f"row {number + 1}: " if number else ""
        raise PreflightError(f"{path}: {where}{_reason(path, error)}") from None
    if not number:
        raise PreflightError(f"{path}: holds no row")


def fingerprint(paths: Sequence[Path]) -> str:
    """The sha256 of a file's bytes, as `sha256sum` gives it; of several files the sha256 of their sha256s, in order."""
    digests = [digest(path)[0] for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def digest(path: Path) -> tuple[str, Version]:
    """The sha256 of a file's bytes, and the version of the file that has it."""
    try:
        with open(path, "rb") as file:
            version = Version.of(file)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            require(path, version, file)
            return found, version
    except OSError as error:
        raise PreflightError(f"{path}: {_reason(path, error)}") from None


def version(path: Path) -> Version:
    """
    Raises:
        PreflightError: there is no such file, or it cannot be looked at.
    """
    try:
        return Version.of(path)
    except OSError as error:
        raise PreflightError(f"{path}: {_reason(path, error)}") from None


# ---------------------------------------------------------------------------------------------------------- places


def _files_below(folder: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """`above` holds the directories on the way here, so that a link to one of them ends."""
    own = folder.resolve()
    if own in above:
        return []
    entries = sorted(folder.iterdir())
    names = [entry.name for entry in entries]
    if "dataset_dict.json" in names:  # its splits are not mixed, for one of them may be held out
        splits = _saved(folder / "dataset_dict.json", "splits")
        allowed = ", ".join(str(folder / split) for split in splits)
        raise PreflightError(f"{folder}: holds data sets of several splits (allowed: one of {allowed})")
    if "state.json" in names and "dataset_info.json" in names:
        return [folder / file["filename"] for file in _saved(folder / "state.json", "_data_files")]
    found = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += _files_below(entry, (*above, own))
        elif _ending(entry) and entry.name not in _METADATA:
            found.append(entry)
    return found


def _saved(path: Path, key: str) -> Any:
    """What `Dataset.save_to_disk` wrote down under a key."""
    try:
        return json.loads(path.read_bytes())[key]
    except (ValueError, KeyError, TypeError) as error:
        raise PreflightError(f"{path}: not as `datasets` saves it ({error!r})") from None


def _ending(path: Path) -> str | None:
    return next((ending for ending in _READERS if path.name.lower().endswith(ending)), None)


def _reader(path: Path) -> Callable[[Path, Version | None], Rows]:
    ending = _ending(path)
    if ending is None:
        near = difflib.get_close_matches(path.suffix.lower(), _READERS, n=1, cutoff=0.7)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise PreflightError(f"{path}: no known kind of file{hint} (allowed: {KINDS})")
    return _READERS[ending]


def _nearest(place: Path) -> str:
    """The name that is nearest to the first part of the path that is not there."""
    while not place.parent.is_dir():
        place = place.parent
    near = difflib.get_close_matches(place.name, [entry.name for entry in place.parent.iterdir()], n=1)
    return f"; did you mean {place.parent / near[0]}?" if near else ""


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    container = {".gz": "gzip", ".parquet": "Parquet", ".arrow": "Arrow"}.get(path.suffix.lower(), "file")
    first_line = str(error).strip().partition("\n")[0]
    return f"broken {container} ({first_line or type(error).__name__})"
