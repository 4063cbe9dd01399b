"""Tables of clips: .csv with a header, .jsonl, .parquet; columns as in ``pipeline.sources.rows``.

A clip is its row's key where it has one, else it is named after its file, and after its start where
the row has one. So a row's key doesn't depend on other rows.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.folders import UriError, file_of, uri_below
from pipeline.media import Clip
from pipeline.settings import ConfigError
from pipeline.sources.rows import (
    FIELDS,
    UNTOLD_S,
    Source,
    folder_key,
    read_fields,
    reading,
    suffix_of,
    timed_key,
)
from pipeline.storage import Folder, LocalFolder

TABLE_SUFFIXES = frozenset((".csv", ".jsonl", ".parquet"))

Row = tuple[str, dict[str, Any]]


def table_source(lists: Folder, name: str, media: Folder) -> Source:
    """Read a table whose uris are below ``media``.

    Raises:
        ConfigError: a row that is none, that leads out of ``media``, or that is there twice.
    """
    path = f"{lists.root}/{name}"
    read = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[suffix_of(name)]
    unknown: set[str] = set()
    clips: dict[str, Clip] = {}
    places: dict[str, str] = {}
    for where, row in read(lists, name):
        unknown |= row.keys() - set(FIELDS)
        clip = _clip(row, where, media)
        if clip.key in clips:
            raise ConfigError(
                f"{where}: the same clip {clip.key} as in {places[clip.key]}; remove one, or tell "
                "them apart by a column `key`"
            )
        clips[clip.key], places[clip.key] = clip, where.removeprefix(path).strip()
    if not clips:
        raise ConfigError(f"{path} has no row; expected the columns {', '.join(FIELDS)}")
    if unknown:
        names = ", ".join(sorted(map(repr, unknown)))
        sys.stderr.write(f"{path}: columns ignored: {names}; known are {', '.join(FIELDS)}\n")
    return Source("table", media.root, list(clips.values()))


def csv_rows(folder: Folder, name: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (file and line, cells) of a csv file.

    Raises:
        ConfigError: no such file, no UTF-8, no csv; with the line.
    """
    path = f"{folder.root}/{name}"
    line = 1
    try:
        with reading(path), folder.open(name) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            rows = csv.reader(text, strict=True)
            for row in rows:
                yield f"{path} line {line}", row
                line = rows.line_num + 1
    except csv.Error as error:
        raise ConfigError(
            f"{path} line {line} can't be read as csv: {error} (a quote that opens there may not "
            "be closed)"
        ) from None
    except UnicodeDecodeError as error:
        line = _line_that_is_no_text(folder, name)
        raise ConfigError(f"{path} line {line}: expected UTF-8 text, {error.reason}") from None


def _line_that_is_no_text(folder: Folder, name: str) -> int:
    with folder.open(name) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


def has_header(lists: Folder, name: str) -> bool:
    """Return whether a csv's first line names the column uri; VGGSound's has no header."""
    _, first = next(csv_rows(lists, name), ("", []))
    return "uri" in [cell.strip() for cell in first]


def _clip(row: dict[str, Any], where: str, media: Folder) -> Clip:
    fields = read_fields(row, where)
    try:
        uri = uri_below(media.root, fields.uri)
        if isinstance(media, LocalFolder) and media.leads_out(file_of(uri)):
            raise UriError(f"{uri!r} is a link that leads out of {media.root}")
    except UriError as error:
        raise ConfigError(
            f"{where}: uri refused, {error}; expected a path below the folder of the media, which "
            "the setting `media` names"
        ) from None
    key = fields.key or folder_key(uri)
    if fields.start_s is not None and not fields.key:
        key = timed_key(key, fields.start_s)
    start_s, duration_s = fields.start_s or 0.0, fields.duration_s or UNTOLD_S
    return Clip(key, uri, start_s, duration_s, fields.caption, fields.label, fields.split)


def _read_csv(lists: Folder, name: str) -> Iterator[Row]:
    rows = csv_rows(lists, name)
    where, header = next(rows)
    columns = [cell.strip() for cell in header]
    if len(set(columns)) < len(columns):
        raise ConfigError(f"{where}: a column is there twice in {','.join(columns)!r}")
    for where, cells in rows:
        if len(cells) != len(columns):
            raise ConfigError(f"{where}: {len(cells)} fields, expected the header's {len(columns)}")
        row: dict[str, Any] = {c: cell for c, cell in zip(columns, cells, strict=True) if cell}
        for column in ("start_s", "duration_s"):
            if column in row:
                row[column] = _number(row[column], column, where)
        yield where, row


def _number(cell: str, column: str, where: str) -> float:
    if not re.fullmatch(r"\s*[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?\s*", cell):
        raise ConfigError(f"{where}: {column} is {cell!r:.80}, expected seconds such as 12.5")
    return float(cell)


def _read_jsonl(lists: Folder, name: str) -> Iterator[Row]:
    path = f"{lists.root}/{name}"
    with reading(path), lists.open(name) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path} line {number}"
                yield where, json_object(line.strip().removeprefix(b"\xef\xbb\xbf"), where)


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: it is none.
    """
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: expected a JSON object, {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_parquet(lists: Folder, name: str) -> Iterator[Row]:
    path = f"{lists.root}/{name}"
    number = 0
    try:
        with reading(path), lists.open(name) as opened, pq.ParquetFile(opened) as file:
            columns = file.schema_arrow.names
            if columns.count("uri") != 1:
                raise ConfigError(f"{path}: expected one column uri among {', '.join(columns)}")
            known = [column for column in columns if column in FIELDS]
            ignored = dict.fromkeys(set(columns) - set(known))
            for batch in file.iter_batches(columns=known):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row | ignored
    except pa.ArrowException as error:
        raise ConfigError(f"{path} can't be read as Parquet after row {number}: {error}") from None
