"""Rows that come out of Arrow: .parquet and .arrow files, data sets of the hub.

Arrow gives every object of a column the keys of all, with null where one has not got them. In an object null therefore
stands for absent and is left out: a tool's parameters, a call's arguments, a message would else have keys of others.
`files.read_file` is the way in for files, and tells what pyarrow raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from sft_lab.data.text_files import Decoder, Rows
from sft_lab.data.unchanged import Version, opened, require
from sft_lab.data.values import NullsDropped
from sft_lab.errors import PreflightError

_BATCH = 16  # rows that are Python objects at a time; one may be of 10 MB
_BUFFER = 1 << 20  # bytes of a Parquet column read ahead; without it the columns of a whole row group are in memory
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # the end-of-stream mark of Arrow's IPC format
_JSON = Decoder()
_Plain = Callable[[Any, list[str]], Any]


def read_parquet(path: Path, version: Version | None = None) -> Rows:
    """One row a record, nested ones as they are."""
    with opened(path, version) as file:
        parquet = pyarrow.parquet.ParquetFile(
            file, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
        )
        yield from _rows(path, parquet.schema_arrow, parquet.iter_batches(_BATCH, use_threads=False))


def read_arrow(path: Path, version: Version | None = None) -> Rows:
    """The stream form of Arrow's IPC format, which `datasets` writes, and the file form."""
    with open(path, "rb") as file:  # this tells better than pyarrow why a file cannot be opened
        head = file.read(6)
    require(path, version)
    with pyarrow.memory_map(str(path)) as source:
        require(path, version)  # so that it is the same that was mapped
        if head == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            yield from _rows(path, reader.schema, batches)
            return
        reader = pyarrow.ipc.open_stream(source)
        yield from _rows(path, reader.schema, reader)
        source.seek(source.tell() - len(_STREAM_END))
        if source.read(len(_STREAM_END)) != _STREAM_END:  # cut between two batches, which pyarrow takes for the end
            raise pyarrow.ArrowInvalid("the stream has no end mark, so rows are missing")


def _rows(path: Path, schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch]) -> Rows:
    if len(set(schema.names)) < len(schema.names):
        raise PreflightError(f"{path}: the schema names a column twice ({', '.join(schema.names)})")
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            for value, problem in values(batch.slice(start, _BATCH)):
                number += 1
                yield number, value, problem


def values(batch: pyarrow.RecordBatch) -> list[tuple[Any, str | None]]:
    """The rows of a batch, or why one cannot be read; each is read by itself where one of them cannot be."""
    try:
        batch.validate(full=True)  # what is damaged must not be followed: offsets, texts that are no UTF-8
        rows = batch.to_pylist()
        for field, column in zip(batch.schema, batch.columns, strict=True):
            plain = _plain(field.type) if _differs(field.type) or _has_null_member(column) else None
            if plain is not None:
                _replace(rows, field.name, plain)
    except (ValueError, OverflowError) as error:  # pyarrow.ArrowInvalid is a ValueError
        if batch.num_rows == 1:
            first_line = str(error).partition("\n")[0]
            return [(None, f"cannot be read ({first_line})")]
        return [row for place in range(batch.num_rows) for row in values(batch.slice(place, 1))]
    return [(row, None) for row in rows]


def _replace(rows: list[dict[str, Any]], name: str, plain: _Plain) -> None:
    for number, row in enumerate(rows):
        dropped: list[str] = []
        if row[name] is not None:
            row[name] = plain(row[name], dropped)
        if dropped:
            rows[number] = NullsDropped(row)


def _differs(kind: pyarrow.DataType) -> bool:
    """Whether `_plain` may give something else than `to_pylist` does, null members of objects aside."""
    inner = any(_differs(kind.field(number).type) for number in range(kind.num_fields))
    return inner or pyarrow.types.is_floating(kind) or isinstance(kind, pyarrow.JsonType)


def _has_null_member(column: pyarrow.Array) -> bool:
    """Whether an object somewhere in a column has a null."""
    if isinstance(column, pyarrow.ExtensionArray):
        return _has_null_member(column.storage)
    kind = column.type
    if pyarrow.types.is_struct(kind):
        members = [column.field(number) for number in range(kind.num_fields)]
        return any(member.null_count or _has_null_member(member) for member in members)
    if pyarrow.types.is_dictionary(kind) or pyarrow.types.is_map(kind) or not kind.num_fields:
        return False
    return not hasattr(column, "flatten") or _has_null_member(column.flatten())


_CALL = ("arguments", "input")  # of a call, whose keys anybody may choose and whose values may be null


@functools.cache
def _plain(kind: pyarrow.DataType, in_call: bool = False) -> _Plain | None:
    """What makes a value of this type what other files would give: None for NaN, by which data frames mark what is
    missing; JSON decoded; objects without the members that are null. None where nothing is to be done.

    It takes the value, never None, and a list to which it adds names of nulls in the arguments of calls. It raises
    ValueError where a value is marked as JSON and is none.
    """
    types = pyarrow.types
    if isinstance(kind, pyarrow.JsonType):  # what `datasets` makes of mixed types
        return _decoded
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _plain(kind.storage_type, in_call)
    if types.is_floating(kind):
        return lambda value, _: None if value != value else value
    if types.is_struct(kind):
        members = [(field.name, _plain(field.type, in_call or field.name in _CALL)) for field in kind]
        return functools.partial(_members, members, in_call)
    if hasattr(kind, "value_type") and not types.is_dictionary(kind) and not types.is_map(kind):
        inner = _plain(kind.value_type, in_call)
        if inner is not None:
            return lambda value, dropped: [None if item is None else inner(item, dropped) for item in value]
    return None


def _members(
    members: list[tuple[str, _Plain | None]], in_call: bool, value: dict[str, Any], dropped: list[str]
) -> dict[str, Any]:
    kept = {}
    for name, plain in members:
        member = value[name]
        if member is not None and plain is not None:
            member = plain(member, dropped)
        if member is not None:
            kept[name] = member
        elif in_call:
            dropped.append(name)
    return kept


def _decoded(value: Any, _: list[str]) -> Any:
    decoded, problem = _JSON.whole(value)
    if problem:
        raise ValueError(problem)
    return decoded
