"""Tables of clips: .csv with a header, .jsonl, .parquet; columns as in ``pipeline.sources.rows``.

A clip is its row's key where it has one, else it is named after its file, and after its start where
the row has one. So a row's key doesn't depend on other rows. Rows are read and checked a chunk at a
time, by column: 10 million of them take a minute or so.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.folders import MAX_NAME_BYTES, UriError, file_of, uri_below
from pipeline.settings import ConfigError
from pipeline.sources.rows import (
    CHUNK_ROWS,
    FIELDS,
    TEXT,
    UNTOLD_S,
    Listing,
    Source,
    Values,
    check_fields,
    clip_batch,
    first_repeat,
    first_true,
    folder_keys,
    reading,
    suffix_of,
    timed_keys,
)
from pipeline.storage import Folder, LocalFolder
from pipeline.tables import pc

TABLE_SUFFIXES = frozenset((".csv", ".jsonl", ".parquet"))
# Uris that ``uri_below`` returns as they are, whatever the root; it takes 25 s for 10 million.
PLAIN_URI = "^[A-Za-z0-9_-][A-Za-z0-9_. -]*(/[A-Za-z0-9_-][A-Za-z0-9_. -]*)*$"


@dataclass(frozen=True)
class Chunk:
    """Rows of a table.

    Attributes:
        path: of the table.
        numbers: of each row's line or row in the file, int64.
        columns: values by column; those that are not in ``FIELDS`` may be left out.
        names: of all columns.
    """

    path: str
    numbers: np.ndarray
    columns: Mapping[str, Values]
    names: frozenset[str]

    def where(self, row: int) -> str:
        """Tell a row's place in the table."""
        return f"{self.path} {place_of(self.path, self.numbers[row])}"


def place_of(path: str, number: int) -> str:
    """Tell a row's place: its line in a text."""
    return f"{'row' if suffix_of(path) == '.parquet' else 'line'} {number}"


def table_source(lists: Folder, name: str, media: Folder) -> Source:
    """Describe a table whose uris are below ``media``."""
    state = content_hash(lists, name)
    return Source("table", media.root, state, lambda: read_table(lists, name, media))


def content_hash(folder: Folder, name: str) -> str:
    """Return the SHA-256 of a file.

    Raises:
        ConfigError: it can't be read.
    """
    with reading(f"{folder.root}/{name}"), folder.open(name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]


def read_table(lists: Folder, name: str, media: Folder) -> Listing:
    """Read all rows.

    Raises:
        ConfigError: a row that is none, that leads out of ``media``, or that is there twice.
    """
    path = f"{lists.root}/{name}"
    read = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[suffix_of(name)]
    unknown, links = set[str](), OutwardLinks(media)
    batches, numbers = [], []
    for chunk in read(lists, name):
        unknown |= chunk.names - set(FIELDS)
        batches.append(_clips(chunk, links))
        numbers.append(chunk.numbers)
    if not batches:
        raise ConfigError(f"{path} has no row; expected the columns {', '.join(FIELDS)}")
    clips = pa.Table.from_batches(batches)
    if repeat := first_repeat(clips["key"]):
        first, second = (place_of(path, np.concatenate(numbers)[row]) for row in repeat)
        raise ConfigError(
            f"{path} {second}: the same clip {clips['key'][repeat[0]]} as in {first}; remove one, "
            "or tell them apart by a column `key`"
        )
    if unknown:
        names = f"{', '.join(sorted(map(repr, unknown))):.800}"
        sys.stderr.write(f"{path}: columns ignored: {names}; known are {', '.join(FIELDS)}\n")
    return Listing(clips)


# -- rows to clips


def _clips(chunk: Chunk, links: OutwardLinks) -> pa.RecordBatch:
    fields = check_fields(chunk.columns, len(chunk.numbers), chunk.where)
    uris = _uris_below(links.media, fields["uri"], chunk)
    bad = links.first(uris)
    if bad is not None:
        error = f"{uris[bad].as_py()!r:.80} is a link that leads out of {links.media.root}"
        raise ConfigError(_refusal(chunk, bad, error))
    starts_s = fields["start_s"].fill_null(0.0)
    keys = folder_keys(uris)
    keys = pc.if_else(pc.is_null(fields["start_s"]), keys, timed_keys(keys, starts_s))
    keys = pc.if_else(pc.equal(fields["key"], ""), keys, fields["key"])
    return clip_batch(
        {
            **fields,
            "key": keys,
            "uri": uris,
            "start_s": starts_s,
            "duration_s": fields["duration_s"].fill_null(UNTOLD_S),
        }
    )


def _uris_below(media: Folder, addresses: pa.Array, chunk: Chunk) -> pa.Array:
    """Return uris of what rows name: uris, or paths and URLs below the folder of the media."""
    is_plain = pc.match_substring_regex(addresses, PLAIN_URI)
    is_plain = pc.and_(is_plain, pc.less_equal(pc.utf8_length(addresses), MAX_NAME_BYTES))
    if first_true(pc.invert(is_plain)) is None:
        return addresses
    uris = addresses.to_pylist()
    for row in np.flatnonzero(~is_plain.to_numpy(zero_copy_only=False)):
        try:
            uris[row] = uri_below(media.root, uris[row])
        except UriError as error:
            raise ConfigError(_refusal(chunk, int(row), str(error))) from None
    return pa.array(uris, TEXT)


def _refusal(chunk: Chunk, row: int, error: str) -> str:
    return (
        f"{chunk.where(row)}: uri refused, {error}; expected a path below the folder of the media, "
        "which the setting `media` names"
    )


class OutwardLinks:
    """Finds the uris that lead out of a local folder by links; others are for the servers to say.

    Every folder is listed once: asking for each of 10 million files took longer than all the rest.
    """

    def __init__(self, media: Folder) -> None:
        self.media = media
        self._links: dict[str, set[str]] = {}  # by folder, "a/b/"; that itself where it leads out

    def first(self, uris: pa.Array) -> int | None:
        """Return the first row whose uri leads out."""
        if not isinstance(self.media, LocalFolder):
            return None
        if first_true(pc.match_substring(uris, "#")) is not None:
            uris = pa.array([file_of(uri) for uri in uris.to_pylist()], TEXT)
        folders = pc.replace_substring_regex(uris, "[^/]*$", "")
        outward = set[str]()
        for folder in pc.unique(folders).to_pylist():
            if folder not in self._links:
                self._links[folder] = self._found(self.media, folder)
            outward |= self._links[folder]
        found = pa.array(outward, TEXT)
        return first_true(pc.or_(pc.is_in(uris, found), pc.is_in(folders, found)))

    @staticmethod
    def _found(media: LocalFolder, folder: str) -> set[str]:
        if folder and media.leads_out(folder.rstrip("/")):
            return {folder}
        try:
            with os.scandir(Path(media.root, folder)) as entries:
                links = [f"{folder}{entry.name}" for entry in entries if entry.is_symlink()]
        except OSError:  # its files will be missing or unreadable
            return set()
        return {os.fsencode(uri).decode(errors="replace") for uri in links if media.leads_out(uri)}


# -- files to rows


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
                if row:  # else a blank line
                    yield f"{path} line {line}", row
                line = rows.line_num + 1
    except csv.Error as error:
        raise ConfigError(
            f"{path} line {line} can't be read as csv: {error}; expected quotes that are closed, "
            f"and cells of {csv.field_size_limit()} characters at most"
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


def _read_csv(lists: Folder, name: str) -> Iterator[Chunk]:
    rows = csv_rows(lists, name)
    where, header = next(rows)
    path = where.rpartition(" line ")[0]
    names = [cell.strip() for cell in header]
    if len(set(names)) < len(names):
        raise ConfigError(f"{where}: a column is there twice in {','.join(names)!r:.80}")
    while part := list(islice(rows, CHUNK_ROWS)):
        for where, cells in part:
            if len(cells) != len(names):
                raise ConfigError(
                    f"{where}: {len(cells)} fields, expected the header's {len(names)}"
                )
        numbers = np.array([int(where.rpartition(" ")[2]) for where, _ in part])
        columns: dict[str, Values] = {
            column: [cell or None for cell in cells]
            for column, cells in zip(
                names, zip(*(cells for _, cells in part), strict=True), strict=True
            )
        }
        for column in ("start_s", "duration_s"):
            columns[column] = [
                None if cell is None else _number(cell, column, where)
                for cell, (where, _) in zip(
                    columns.get(column, [None] * len(part)), part, strict=True
                )
            ]
        yield Chunk(path, numbers, columns, frozenset(names))


def _number(cell: str, column: str, where: str) -> float:
    if not re.fullmatch(r"\s*[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?\s*", cell):
        raise ConfigError(f"{where}: {column} is {cell!r:.80}, expected seconds such as 12.5")
    return float(cell)


def _read_jsonl(lists: Folder, name: str) -> Iterator[Chunk]:
    path = f"{lists.root}/{name}"
    with reading(path), lists.open(name) as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        while part := list(islice(lines, CHUNK_ROWS)):
            rows = [
                json_object(line.strip().removeprefix(b"\xef\xbb\xbf"), f"{path} line {number}")
                for number, line in part
            ]
            columns = {column: [row.get(column) for row in rows] for column in FIELDS}
            numbers = np.array([number for number, _ in part])
            yield Chunk(path, numbers, columns, frozenset().union(*rows))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r:.80} is there twice")
    return value


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: it is none.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: expected a JSON object, {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _check_type(where: str, name: str, kind: pa.DataType) -> None:
    """Refuse a column's type: not all values of it can even be shown."""
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if name.endswith("_s"):
        is_good, wanted = pa.types.is_integer(kind) or pa.types.is_floating(kind), "numbers"
    else:
        is_good, wanted = pa.types.is_string(inner) or pa.types.is_large_string(inner), "texts"
    if not is_good and not pa.types.is_null(kind):
        raise ConfigError(f"{where} is of type {kind}, expected {wanted}")


def _read_parquet(lists: Folder, name: str) -> Iterator[Chunk]:
    path = f"{lists.root}/{name}"
    number = 0
    try:
        with reading(path), lists.open(name) as opened, pq.ParquetFile(opened) as file:
            names = file.schema_arrow.names
            if names.count("uri") != 1:
                raise ConfigError(f"{path}: expected one column uri among {', '.join(names):.800}")
            known = [name for name in names if name in FIELDS]
            if len(set(known)) < len(known):
                twice = max(known, key=known.count)
                raise ConfigError(f"{path}: the column {twice} is there twice; remove one")
            for name in known:
                _check_type(f"{path}: column {name}", name, file.schema_arrow.field(name).type)
            for batch in file.iter_batches(CHUNK_ROWS, columns=known):
                batch.validate(full=True)  # such as texts that are no UTF-8
                numbers = np.arange(number, number + len(batch)) + 1
                number += len(batch)
                if len(batch):
                    yield Chunk(
                        path,
                        numbers,
                        dict(zip(known, batch.columns, strict=True)),
                        frozenset(names),
                    )
    except pa.ArrowException as error:
        raise ConfigError(f"{path} can't be read as Parquet after row {number}: {error}") from None
