"""Whether the files below a directory are of several splits: one of them may be held out, so they are not mixed.

Names tell it, as the hub reads them (`train-00000-of-00001.parquet`, `gsm8k_test.jsonl`, `validation/a.csv`), and what
a README.md or dataset_infos.json that came with the files says.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any

from sft_lab.errors import PreflightError

_TRAIN = "train"
_WORDS = {
    **dict.fromkeys(("train", "training", "trains"), _TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "tests", "testing", "eval", "evals", "evaluation", "heldout", "holdout"), "test"),
}
_TWO_WORDS = re.compile(r"(held|hold)[-_. ]out")
_ENDING = re.compile(r"(\.(jsonl|json|csv|parquet|arrow|txt))?(\.gz)?$", re.IGNORECASE)
_SHARD = re.compile(r"-\d+-of-\d+$")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def require_one_split(given: str, base: Path, found: list[Path]) -> None:
    """
    base: the directory that was given, or in which a glob begins; what is above it says nothing.

    Raises:
        PreflightError: `found` are files of several splits; it names what to give instead.
    """
    declared = _declared(base)
    splits: dict[str, list[Path]] = {}
    for file in found:
        splits.setdefault(_split_of(file, base, declared), []).append(file)
    if not splits.keys() - {""}:  # a word in the middle tells only where another file has its counterpart
        inside = {file: _split_in(_stem(file.name), anywhere=True) for file in found}
        if len(set(inside.values()) - {""}) > 1:
            splits = {}
            for file, split in inside.items():
                splits.setdefault(split, []).append(file)
    named = splits.keys() - {""}
    if len(named) > 1 or (named - {_TRAIN} and "" in splits):
        allowed = ", ".join(_pattern(files, found, base) for name, files in sorted(splits.items()) if name)
        names = ", ".join(name or "no split" for name in sorted(splits))
        raise PreflightError(
            f"{given}: holds files of several splits ({names}; allowed: one of {allowed}; several: data=mixture)"
        )


def _split_of(file: Path, base: Path, declared: dict[str, str]) -> str:
    """The split of a file, by what is declared, its name, or the nearest directory that tells; "" where none does."""
    inside = file.relative_to(base) if file.is_relative_to(base) else Path(file.name)
    for pattern, split in declared.items():
        if fnmatchcase(inside.as_posix(), pattern) or _stem(file.name).lower() == pattern:
            return split
    names = [_stem(file.name), *reversed(inside.parts[:-1])]
    return next(filter(None, map(_split_in, names)), "")


def _stem(name: str) -> str:
    return _SHARD.sub("", _ENDING.sub("", name))


def _split_in(name: str, anywhere: bool = False) -> str:
    """The split that the first or the last word of a name is, or any; "contest" and "developer" are no splits."""
    name = _TWO_WORDS.sub(r"\1out", _CAMEL.sub("-", name).lower())
    words = [word for word in (word.rstrip("0123456789") for word in re.split(r"[-_. ]+", name)) if word]
    looked_at = words if anywhere else (*words[:1], *words[-1:])
    return next((_WORDS[word] for word in looked_at if word in _WORDS), "")


# ------------------------------------------------------------------------------------------- what the files' maker says


def _declared(base: Path) -> dict[str, str]:
    """Patterns of files below `base`, or their names without ending, and the split that is declared for them."""
    found: dict[str, str] = {}
    for source in (_card(base / "README.md"), _infos(base / "dataset_infos.json")):
        for pattern, split in source:
            found.setdefault(pattern.removeprefix("./"), _split_in(split) or split)
    return found


def _card(path: Path) -> Iterator[tuple[str, str]]:
    """Of a data set card's YAML head: `configs`, with their `data_files`, and the splits of `dataset_info`."""
    from huggingface_hub import metadata_load

    try:
        card = metadata_load(path) if path.is_file() else None
    except Exception:  # whatever YAML raises: it is a text for people first, and names tell as well
        card = None
    if not isinstance(card, dict):
        return
    for config in _listed(card.get("configs")):
        files = config.get("data_files") if isinstance(config, dict) else None
        if isinstance(files, dict):
            files = [{"split": split, "path": patterns} for split, patterns in files.items()]
        for entry in _listed(files):
            if isinstance(entry, dict) and isinstance(entry.get("split"), str):
                yield from ((str(pattern), entry["split"]) for pattern in _listed(entry.get("path")))
    for info in _listed(card.get("dataset_info")):
        yield from _names(info)


def _infos(path: Path) -> Iterator[tuple[str, str]]:
    try:
        infos = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:  # as `_card`
        infos = {}
    for info in infos.values() if isinstance(infos, dict) else ():
        yield from _names(info)


def _names(info: Any) -> Iterator[tuple[str, str]]:
    """The names of splits; a file of such a name is of that split."""
    splits = info.get("splits") if isinstance(info, dict) else None
    for split in list(splits) if isinstance(splits, dict) else _listed(splits):
        name = split.get("name") if isinstance(split, dict) else split
        if isinstance(name, str):
            yield name.lower(), name


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


# ------------------------------------------------------------------------------------------------- what to give instead


def _pattern(files: list[Path], found: list[Path], base: Path) -> str:
    """A path or a glob that means these of the files that were found; the first of them where there is none."""
    if len(files) == 1:
        return str(files[0])
    folder = Path(os.path.commonpath([file.parent for file in files]))
    if folder != base and sum(file.is_relative_to(folder) for file in found) == len(files):
        return str(folder)
    names = [str(file) for file in files]
    start, end = _common(names), _common([name[::-1] for name in names])[::-1]
    end = end if len(start) + len(end) <= min(map(len, names)) else ""
    glob = f"{escape(start)}*{escape(end)}"
    alone = sum(fnmatchcase(str(file), glob) for file in found) == len(files)
    if alone and all(file.parent == folder for file in files):
        return glob
    return f"{names[0]} and {len(files) - 1} more"


def _common(names: list[str]) -> str:
    """What all names begin with."""
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in alike)
