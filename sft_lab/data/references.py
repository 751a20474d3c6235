"""A run's data as a tracker knows it: a name that goes with its contents, and where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_lab.data import files, requests
from sft_lab.schema import DataConfig, LocationConfig


def name_of(fingerprint: str) -> str:
    return f"data-{fingerprint[:12]}"


def uris(data: DataConfig) -> list[str]:
    """Every file and every hub data set that rows come from; of generated rows the code that makes them.

    Of a sweep they are the same for every trial, so that all lead back to one data set.

    Raises:
        PreflightError: a file is not there any more.
    """
    if data.source == "requests":
        return [Path(requests.__file__).resolve().as_uri()]
    locations: list[LocationConfig] = list(data.sources.values()) if data.source == "mixture" else [data]
    found = [uri for location in locations for uri in _of(location)]
    if data.eval_path:
        found += _of_files(data.eval_path)
    return list(dict.fromkeys(found))


def described(data: DataConfig, fingerprint: str, rows: int) -> dict[str, Any]:
    """What does not depend on a run's model and lengths: those would differ between runs of the same data.

    Args:
        rows: as read, before any was left out.
    """
    return {
        "fingerprint": fingerprint,
        "rows": rows,
        "source": data.source,
        "path": {name: source.path for name, source in data.sources.items()} or data.path,
    }


def _of(location: LocationConfig) -> Iterator[str]:
    if location.source != "hub":
        yield from _of_files(location.path)
        return
    from huggingface_hub import constants

    yield f"{constants.ENDPOINT}/datasets/{location.path}/tree/{location.revision}"


def _of_files(path: str) -> Iterator[str]:
    for file in files.files_of(path):
        yield file.absolute().as_uri()
