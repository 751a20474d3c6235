"""Where rows come from: files, the hub, the embedded generator; one source, or several to be mixed."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft_lab.data import cache, files, unchanged
from sft_lab.data.columnar_files import values
from sft_lab.data.unchanged import Version
from sft_lab.errors import PreflightError, RunError, SftLabError
from sft_lab.schema import DataConfig, LocationConfig, SourceConfig

_BATCH = 16  # rows of a hub data set that are Python objects at a time


@dataclass
class RawRow:
    """A row as read, or the reason it could not be."""

    place: int  # of the run's places, counted from 0
    number: int  # counted from 1; in .jsonl the line
    value: Any = None
    problem: str | None = None


@dataclass(frozen=True)
class Place:
    """Rows that are read in one go: a file, a split of a hub data set, generated rows."""

    name: str
    fingerprint: str
    read: Callable[[], Iterator[tuple[int, Any, str | None]]]
    size_bytes: int = 0
    require_unchanged: Callable[[], None] = lambda: None  # raises PreflightError


@dataclass
class Source:
    """Rows of one format, as many of them as the config asks for."""

    config: SourceConfig
    places: list[Place]
    first_place: int  # the number of its first place among the run's

    @property
    def ignored(self) -> frozenset[str]:
        """Columns, and keys of messages, that count as absent."""
        return frozenset(self.config.ignore_columns)

    def __iter__(self) -> Iterator[RawRow]:
        mask = self._sampled()
        taken = 0
        for index, row in enumerate(self._all()):
            if mask is not None and not mask[index]:
                continue
            if 0 <= self.config.max_rows <= taken:
                return
            taken += 1
            yield row

    def count(self) -> int:
        """Reads everything once."""
        return sum(1 for _ in self)

    def _all(self) -> Iterator[RawRow]:
        for number, place in enumerate(self.places, start=self.first_place):
            yield from (RawRow(number, *row) for row in place.read())

    def _sampled(self) -> np.ndarray | None:
        """Which rows the seed draws, the same whatever else takes part."""
        if self.config.sample == 1:
            return None
        total = sum(1 for _ in self._all())
        mask = np.zeros(total, dtype=bool)
        drawn = np.random.default_rng(self.config.seed).permutation(total)[: round(self.config.sample * total)]
        mask[drawn] = True
        return mask


def training(data: DataConfig) -> list[Source]:
    """The sources of the training rows: one, or those of a mixture.

    Raises:
        PreflightError: a file is missing or of no known kind.
        RunError: the hub cannot be reached or has no such data set.
    """
    if data.source == "requests":
        return [Source(_single(data), [_requests(data, held_out=False)], 0)]
    if data.source != "mixture":
        return [Source(_single(data), _places(data, data.path, data.split, data.streaming), 0)]
    sources: list[Source] = []
    first = 0
    for config in data.sources.values():
        seed = config.seed if config.seed >= 0 else data.seed
        places = _places(config, config.path, config.split)
        ignored = [*data.ignore_columns, *config.ignore_columns]
        sources.append(Source(SourceConfig(**{**vars(config), "seed": seed, "ignore_columns": ignored}), places, first))
        first += len(places)
    return sources


def held_out(data: DataConfig, first_place: int) -> Source | None:
    """The source of held-out rows where the config names one of their own; raises as `training` does."""
    config = _single(data)
    if data.source == "requests":
        return Source(config, [_requests(data, held_out=True)], first_place) if data.eval_rows > 0 else None
    if data.eval_path:
        return Source(config, _file_places(data.eval_path), first_place)
    if data.eval_split:
        return Source(config, _places(data, data.path, data.eval_split), first_place)
    return None


def _single(data: DataConfig) -> SourceConfig:
    return SourceConfig(
        path=data.path, format=data.format, columns=data.columns, ignore_columns=data.ignore_columns, seed=data.seed
    )


def _places(location: LocationConfig, path: str, split: str, streaming: bool = False) -> list[Place]:
    return [_hub(location, split, streaming)] if location.source == "hub" else _file_places(path, streaming)


def _file_places(path: str, streaming: bool = False) -> list[Place]:
    return [_file(file, streaming) for file in files.files_of(path)]


def _file(file: Path, streaming: bool) -> Place:
    """Of data that streams not every byte is read beforehand: its size and time stand for its contents."""
    if streaming:
        version = files.version(file)
        fingerprint = f"{version.size}:{version.modified_ns}"
    else:
        fingerprint, version = files.digest(file)
    read = functools.partial(files.read_file, file, version)
    return Place(str(file), fingerprint, read, version.size, functools.partial(unchanged.require, file, version))


def _hub(location: LocationConfig, split: str, streaming: bool) -> Place:
    from datasets import load_dataset

    before = _local_versions(location.path)
    try:
        dataset = load_dataset(
            location.path, location.name or None, split=split, revision=location.revision, streaming=streaming
        )
    except SftLabError:  # a signal's
        raise
    except Exception as error:  # whatever the hub client raises, its first line is what the person needs
        raise RunError(f"data.path={location.path}: the hub gave no such data set ({_first_line(error)})") from error

    def require_unchanged() -> None:
        if _local_versions(location.path) != before:
            raise unchanged.changed(place)

    place = f"{location.path}[{split}]"
    try:
        require_unchanged()
    except PreflightError:
        if not streaming:
            _forget(dataset)
        raise

    def read() -> Iterator[tuple[int, Any, str | None]]:
        number = 0
        try:
            for table in dataset.with_format("arrow").iter(batch_size=_BATCH):  # sounds and pictures stay as they are
                for row in itertools.chain.from_iterable(map(values, table.to_batches())):
                    number += 1
                    yield (number, *row)
        except SftLabError:
            raise
        except Exception as error:
            raise RunError(f"{place}: row {number + 1}: cannot be read ({_first_line(error)})") from error

    if streaming:  # only what was asked for is known of it, and of files that lie here size and time
        local = [f"{file}:{version.size}:{version.modified_ns}" for file, version in before.items()]
        fingerprint = ":".join([location.name, location.revision, *([cache.digest_of(*local)] if local else [])])
        return Place(place, fingerprint, read, require_unchanged=require_unchanged)
    return Place(place, str(dataset._fingerprint), read, dataset.data.nbytes)


def _local_versions(path: str) -> dict[str, Version]:
    """Of the files of a data set that lies in a directory here."""
    files_below = sorted(Path(path).rglob("*")) if Path(path).is_dir() else []
    return {str(file.relative_to(path)): Version.of(file) for file in files_below if file.is_file()}


def _forget(dataset: Any) -> None:
    """Remove what `datasets` made of files and would take for theirs the next time."""
    from datasets import config

    for folder in {Path(file["filename"]).parent for file in dataset.cache_files}:
        if folder.is_relative_to(config.HF_DATASETS_CACHE):
            shutil.rmtree(folder, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _requests(data: DataConfig, held_out: bool) -> Place:
    from sft_lab.data.requests import generate

    rows = generate(data.train_rows, max(data.eval_rows, 0), data.seed)[held_out]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return Place(
        "requests/eval" if held_out else "requests/train",
        digest,
        lambda: ((number, row, None) for number, row in enumerate(rows, start=1)),
    )
