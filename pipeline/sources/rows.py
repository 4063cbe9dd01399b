"""What all sources share: tables of clips, their keys, and fields of rows, checked by column."""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.folders import LocalFolder, UriError, file_of
from pipeline.media import Clip
from pipeline.settings import ConfigError
from pipeline.storage import Folder
from pipeline.tables import pc

MEDIA_SUFFIXES = frozenset(
    (
        *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".flv", ".ts", ".mpg", ".ps", ".3gp", ".ogv"),
        *(".wmv", ".mxf"),
    )
)
# A source that doesn't say how long a clip is; ``pipeline.sources.spans`` fills it in.
UNTOLD_S = 0.0
# The start in ms has 9 digits in keys.
MAX_START_S = 1e6
MAX_KEY_LENGTH = 80
FIELDS = ("uri", "start_s", "duration_s", "caption", "label", "split", "key")
NUM_THREADS = 8
REPORT_EVERY = 1000

BYTES = pa.large_binary()
TEXT = pa.large_string()  # with 32-bit offsets, a column of 100 M names would overflow
REPEATED_TEXT = pa.dictionary(pa.int32(), TEXT)
# The fields of ``pipeline.media.Clip``: a clip takes some 100 bytes here, 1 kB as an object.
CLIP_SCHEMA = pa.schema(
    [
        ("key", TEXT),
        ("uri", TEXT),
        ("start_s", pa.float64()),
        ("duration_s", pa.float64()),
        ("caption", REPEATED_TEXT),
        ("label", REPEATED_TEXT),
        ("split", REPEATED_TEXT),
    ]
)
# Tables of clips grow by chunks of so many rows.
CHUNK_ROWS = 1 << 16

Item = TypeVar("Item")
Result = TypeVar("Result")
# Values of a column as they were read: of a file that has types, or Python's.
Values = pa.Array | list[Any]


@dataclass(frozen=True)
class Listing:
    """All clips of a source.

    Attributes:
        clips: ``CLIP_SCHEMA``, in no order that matters.
        num_skipped: files, or members of tars, that are no part of a clip.
    """

    clips: pa.Table
    num_skipped: int = 0


@dataclass(frozen=True)
class Source:
    """Where clips come from.

    Attributes:
        kind: "folder", "vggsound", "table" or "tars".
        root: folder or URL that every clip's uri is relative to.
        state: a text that is another one where ``read`` would list other clips.
        read: lists the clips, which may take long.
    """

    kind: str
    root: str
    state: str
    read: Callable[[], Listing]


def clip_batch(columns: Mapping[str, Values]) -> pa.RecordBatch:
    """Return columns named as in ``CLIP_SCHEMA`` as one chunk of a table of clips."""
    arrays = []
    for field in CLIP_SCHEMA:
        is_repeated = field.type == REPEATED_TEXT
        array = columns[field.name]
        if isinstance(array, list):
            array = pa.array(array, TEXT if is_repeated else field.type)
        arrays.append(array.dictionary_encode() if is_repeated else array)
    return pa.record_batch(arrays, schema=CLIP_SCHEMA)


def clip_table(clips: Iterable[Clip]) -> pa.Table:
    """Collect clips, a chunk of them as objects at a time."""
    clips, batches = iter(clips), []
    while part := list(islice(clips, CHUNK_ROWS)):
        names = CLIP_SCHEMA.names
        batches.append(clip_batch({n: [getattr(clip, n) for clip in part] for n in names}))
    return pa.Table.from_batches(batches, CLIP_SCHEMA)


def clips_of(table: pa.Table) -> Iterator[Clip]:
    """Yield the clips of a table."""
    for batch in table.to_batches(CHUNK_ROWS):
        for record in batch.to_pylist():
            yield Clip(**record)


def first_repeat(keys: pa.ChunkedArray) -> tuple[int, int] | None:
    """Return the places of two equal keys, the second one as early as can be; None without."""
    order = pc.sort_indices(keys)  # stable
    ordered = keys.take(order)
    same = pc.equal(ordered.slice(1), ordered.slice(0, max(0, len(ordered) - 1)))
    found = np.flatnonzero(same.to_numpy())
    if not len(found):
        return None
    order = order.to_numpy()
    first = found[np.argmin(order[found + 1])]
    return int(order[first]), int(order[first + 1])


def suffix_of(uri: str) -> str:
    """Return a name's suffix in lower case, with its dot; "" where there is none."""
    stem, dot, suffix = uri.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if dot and stem else ""


def media_files(files: list[str], root: str) -> list[str]:
    """Return those of a listing that are media.

    Raises:
        ConfigError: see ``check_names``.
    """
    media = [uri for uri in files if suffix_of(uri) in MEDIA_SUFFIXES]
    check_names(media, root)
    return media


def check_names(uris: list[str], root: str) -> None:
    """Refuse files of a listing that a plan can't name.

    Raises:
        ConfigError: a name is not UTF-8, which plans are, or means a member of a tar.
    """
    for uri in uris:
        try:
            uri.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"file name {uri!a} in {root} is not UTF-8; rename it") from None
        if file_of(uri) != uri:
            raise ConfigError(
                f"file name {uri!r:.80} in {root} reads as a member of the tar {file_of(uri)!r:.80}"
                "; rename its folder"
            )


def folder_keys(uris: pa.Array) -> pa.Array:
    """Return the keys of relative paths: the stem, and 8 hex digits where that is ambiguous.

    A plain file name in the root keeps its stem; anything else (subfolders, odd characters)
    gets a hash of the whole path, so that two files never share a key.
    """
    stems = pc.replace_substring_regex(uris, r"(?s)^(.+)\.[^.]*$", r"\1")
    keys = pc.replace_substring_regex(stems, "[^A-Za-z0-9_-]+", "_")
    is_odd = pc.or_(pc.not_equal(keys, stems), pc.greater(pc.utf8_length(keys), 64))
    hashed = hashed_keys(keys.filter(is_odd), uris.filter(is_odd))
    return pc.replace_with_mask(keys, is_odd, hashed)


def hashed_keys(keys: pa.Array, texts: pa.Array, length: int = 64) -> pa.Array:
    """Return the ends of keys and 8 hex digits of texts, ``length`` + 9 characters at most."""
    digests = [hashlib.sha256(text).hexdigest()[:8] for text in texts.cast(BYTES).to_pylist()]
    ends = pc.utf8_slice_codeunits(keys, -length)
    return pc.binary_join_element_wise(ends, pa.array(digests, TEXT), pa.scalar("-", TEXT))


def timed_keys(keys: pa.Array, starts_s: pa.Array) -> pa.Array:
    """Return the keys of clips that start within their file: with the start in ms."""
    starts_ms = pc.round(pc.multiply(starts_s, 1000.0), round_mode="half_to_even")
    starts = pc.utf8_lpad(starts_ms.cast(pa.int64()).cast(TEXT), 9, "0")
    is_long = pc.greater(pc.add(pc.utf8_length(keys), pc.utf8_length(starts)), MAX_KEY_LENGTH - 1)
    long = keys.filter(is_long)
    keys = pc.replace_with_mask(keys, is_long, hashed_keys(long, long, MAX_KEY_LENGTH - 20))
    return pc.binary_join_element_wise(keys, starts, pa.scalar("_", TEXT))


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what goes wrong while a source is read into an error that names it.

    Raises:
        ConfigError: it can't be opened, or the network fails.
    """
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"{what}: no such file") from None
    except UriError as error:
        raise ConfigError(f"{what}: refused, {error}") from None
    except OSError as error:
        raise ConfigError(f"{what} can't be read: {error.strerror or error}") from None


def in_threads(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    what: str,
    num_threads: int = NUM_THREADS,
) -> list[Result]:
    """Return the function's results in the order of the items; progress of many on stderr.

    Where it fails or is interrupted, no thread is waited for.
    """
    futures = [Future[Result]() for _ in items]
    todo = deque(zip(items, futures, strict=True))

    def work() -> None:
        while todo:
            try:
                item, future = todo.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                future.set_result(function(item))
            except BaseException as error:
                future.set_exception(error)

    # Python waits at its end for the threads of an executor, which may hang.
    for _ in range(min(num_threads, len(items))):
        threading.Thread(target=work, daemon=True).start()
    results = []
    try:
        for future in futures:
            results.append(future.result())
            if len(results) % REPORT_EVERY == 0:
                sys.stderr.write(f"{len(results)} of {len(items)} {what} read\n")
    finally:
        todo.clear()
    return results


def versions(folder: Folder, uris: Sequence[str]) -> list[list[str]]:
    """Return [uri, text that changes with its content] of files that were listed.

    Raises:
        ConfigError: a file has gone, or the network fails.
    """

    def version(uri: str) -> list[str]:
        with reading(f"{folder.root}/{uri}"):
            if isinstance(folder, LocalFolder):  # .stat would look for links again: 20 x slower
                found = Path(folder.root, uri).stat()
                return [uri, f"{found.st_size} {found.st_mtime_ns}"]
            return [uri, folder.stat(uri).version]

    if isinstance(folder, LocalFolder):
        return [version(uri) for uri in uris]
    return in_threads(version, uris, "sizes")


# -- the fields of rows


def check_fields(
    columns: Mapping[str, Values], num_rows: int, where: Callable[[int], str]
) -> dict[str, pa.Array]:
    """Check the columns of rows.

    Args:
        columns: by name; what is not there is missing in all rows.
        num_rows: of each column.
        where: tells the place of a row, for errors.

    Returns:
        ``FIELDS``: seconds are float64 with nulls, texts are without: "" where a row has none, or
        "train" as its split; captions and labels are on one line.

    Raises:
        ConfigError: a field has another type or range than it should; with the row's place.
    """
    nothing = pa.nulls(num_rows)
    fields = {
        name: (_seconds if name.endswith("_s") else _texts)(columns.get(name, nothing), name, where)
        for name in FIELDS
    }
    bad = first_true(pc.equal(fields["duration_s"], 0.0).fill_null(False))
    if bad is not None:
        raise ConfigError(f"{where(bad)}: duration_s is 0, expected more")
    for name in ("caption", "label"):
        fields[name] = on_one_line(fields[name])
    fields["split"] = mapped(fields["split"], lambda split: split or "train")
    bad = first_true(pc.invert(pc.match_substring_regex(fields["split"], "^[A-Za-z0-9_-]+$")))
    if bad is not None:
        split = fields["split"][bad].as_py()
        raise ConfigError(f"{where(bad)}: split {split!r:.80} is no name such as train or test")
    pattern = f"^[A-Za-z0-9_-]{{0,{MAX_KEY_LENGTH}}}$"
    bad = first_true(pc.invert(pc.match_substring_regex(fields["key"], pattern)))
    if bad is not None:
        raise ConfigError(
            f"{where(bad)}: key {fields['key'][bad].as_py()!r:.80}, expected letters, digits, _ "
            f"and -, at most {MAX_KEY_LENGTH} of them"
        )
    return fields


def first_true(mask: pa.Array) -> int | None:
    """Return the first row where a mask without nulls holds."""
    place = pc.index(mask, True).as_py()
    return None if place < 0 else place


def on_one_line(texts: pa.Array) -> pa.Array:
    """Return texts with one space wherever they have white space within."""
    is_odd = pc.invert(pc.match_substring_regex(texts, "^([!-~]+( [!-~]+)*)?$"))
    words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(texts.filter(is_odd)))
    return pc.replace_with_mask(texts, is_odd, pc.binary_join(words, pa.scalar(" ", TEXT)))


def mapped(texts: pa.Array, function: Callable[[str], str]) -> pa.Array:
    """Call a function for the different ones among texts."""
    encoded = texts.dictionary_encode()
    values = [function(text) for text in encoded.dictionary.to_pylist()]
    return pa.array(values, TEXT).take(encoded.indices)


def _texts(values: Values, name: str, where: Callable[[int], str]) -> pa.Array:
    if not isinstance(values, list):
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
            return values.cast(TEXT).fill_null("")
        values = values.to_pylist()
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{where(row)}: {name} is {value!r:.80}, expected text")
    try:
        return pa.array(values, TEXT).fill_null("")
    except UnicodeEncodeError as error:
        row = values.index(error.object)
        raise ConfigError(f"{where(row)}: {name} {error.object!a:.80} is not Unicode") from None


def _seconds(values: Values, name: str, where: Callable[[int], str]) -> pa.Array:
    if isinstance(values, list):
        array = pa.array([_number(v, name, where, row) for row, v in enumerate(values)])
    elif pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        array = values
    else:
        return _seconds(values.to_pylist(), name, where)
    array = array.cast(pa.float64(), safe=False)
    is_sound = pc.and_(pc.greater_equal(array, 0.0), pc.less(array, MAX_START_S)).fill_null(True)
    bad = first_true(pc.invert(is_sound))
    if bad is not None:
        raise ConfigError(
            f"{where(bad)}: {name} is {array[bad].as_py()}, expected 0 to {MAX_START_S:g} seconds"
        )
    return array


def _number(value: Any, name: str, where: Callable[[int], str], row: int) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where(row)}: {name} is {value!r:.80}, expected a number of seconds")
    try:
        return float(value)
    except OverflowError:
        return math.inf
