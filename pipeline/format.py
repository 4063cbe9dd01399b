"""The on-disk contract: what a data set looks like and what a reader may trust.

Every program that reads or writes a data set goes through the names and records defined
here. This module needs numpy and the standard library only, so that the trainer can import
it without Ray, torch or a video decoder.

    DIR/plan.json, plan.parquet         which clip is row r of shard s; fixed when made
    DIR/facts@probe-1b2c3d4e/           what decoding found, one parquet per shard
    DIR/video@dct-3f9c21ab/             a column: column.json, then per shard
        000000.tar                      payloads, plain WebDataset
        000000.idx.npy                  one fixed-width record per row
        000000.json                     commit record, written last: the shard exists from here on,
                                        with the tar and index that it names
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import read_file, scan, write_json
from pipeline.npy import parse_table

FORMAT_VERSION = 1
MODALITIES = ("video", "audio", "text")
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")

# The position in this tuple is the code stored in the index: append, never reorder.
STATUSES = (
    "ok", "missing", "unreadable", "no_video", "no_audio", "too_short", "truncated",
    "decode_timeout", "decode_crash", "nonfinite", "silent", "still", "low_fps", "duplicate",
    "encode_error",
)  # fmt: skip
OK = 0
STATUS_CODE = {name: code for code, name in enumerate(STATUSES)}
# Stored log-variances count as lying in here, as in diffusers' DiagonalGaussianDistribution.
LOG_VARIANCE_RANGE = (-30.0, 20.0)

# One record per row. `offset` and `nbytes` delimit the array's own bytes inside the tar (behind
# the tar header and the .npy header), so that one preadv fills a tensor. `shape` is padded with
# zeros on the right; `crc32c` covers those bytes; a tombstone has nbytes 0 and its status.
INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("nbytes", "<u8"),
        ("shape", "<u4", (4,)),
        ("crc32c", "<u4"),
        ("status", "<u4"),
    ]
)


class FormatError(Exception):
    """A data set, or a file in it, is not what the contract says."""


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return 8 hex digits that name everything in ``value`` (SHA-256 of its canonical JSON)."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:8]


def keys_hash(keys: Iterable[str]) -> str:
    """Return 16 hex digits over keys in their order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FormatError: the file is missing, or does not hold a JSON object.
    """
    try:
        return _parse_json(path, read_file(path))
    except FileNotFoundError:
        raise FormatError(f"{path} is missing; is {path.parent} a data set?") from None


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON ({error}); restore it or encode again") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


@dataclass(frozen=True)
class PlanSegment:
    """Consecutive shards planned together: all hold ``shard_size`` clips but the last."""

    first_shard: int
    num_clips: int
    shard_size: int


@dataclass(frozen=True)
class Plan:
    """The head of a plan (plan.json): what every column of the data set has in common.

    ``captions`` segments shard the unique captions of the text column in the same way;
    caption 0 is always the empty one, the unconditional text.
    """

    plan_id: str
    seed: int
    source: dict[str, Any]
    clips: tuple[PlanSegment, ...]
    captions: tuple[PlanSegment, ...]
    format_version: int = FORMAT_VERSION

    @property
    def num_clips(self) -> int:
        """Clips over all shards."""
        return sum(segment.num_clips for segment in self.clips)

    def shard_rows(self, text: bool = False) -> np.ndarray:
        """Return the number of rows of every shard, int64 [num_shards]."""
        rows: list[int] = []
        for segment in self.captions if text else self.clips:
            full, rest = divmod(segment.num_clips, segment.shard_size)
            rows += [segment.shard_size] * full + [rest] * bool(rest)
        return np.array(rows, dtype=np.int64)


def read_plan(root: Path) -> Plan:
    """Read the plan's head.

    Raises:
        FormatError: there is none, it is damaged, or it was written by a newer version.
    """
    value = read_json(root / "plan.json")
    if value.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{root / 'plan.json'} has format version {value.get('format_version')}, "
            f"this program reads {FORMAT_VERSION}; use the version that wrote it"
        )
    try:
        segments = {
            name: tuple(PlanSegment(**segment) for segment in value[name])
            for name in ("clips", "captions")
        }
        plan = Plan(**{**value, **segments})
    except (KeyError, TypeError) as error:
        raise FormatError(f"{root / 'plan.json'} is damaged ({error}); restore it") from None
    sizes = [(s.first_shard, s.num_clips, s.shard_size) for s in (*plan.clips, *plan.captions)]
    is_sound = all(type(size) is int and size >= 0 for three in sizes for size in three)
    is_sound &= 0 not in [shard_size for _, _, shard_size in sizes]
    if not (is_sound and isinstance(plan.plan_id, str) and isinstance(plan.source, dict)):
        raise FormatError(
            f"{root / 'plan.json'} is damaged (plan_id {plan.plan_id!r:.40}, segments {sizes}, "
            f"source {plan.source!r:.80}; expected text, counts and an object); restore it"
        )
    return plan


def write_plan(root: Path, plan: Plan) -> None:
    """Write the plan's head; plan.parquet must be there already."""
    write_json(root / "plan.json", asdict(plan))


@dataclass(frozen=True)
class ColumnSpec:
    """What a column is (column.json): all that decides its bytes, and how to read them.

    Attributes:
        modality: video, audio or text.
        codec: ``{"name": …, **settings}``: enough to build the codec again for decoding.
        preprocessing: what the frames, samples or captions went through before the codec.
        axes: names of the array's axes, time first, e.g. ("time", "channel", "height", "width").
        rate_hz: latents per second; 0 for text.
        offset_s: second of the clip at the middle of the first latent.
        croppable: whether a temporal crop may start at any latent.
        dtype: numpy name of the stored type.
    """

    modality: str
    codec: dict[str, Any]
    preprocessing: dict[str, Any]
    axes: tuple[str, ...]
    rate_hz: float
    offset_s: float
    croppable: bool
    dtype: str = "float16"
    format_version: int = FORMAT_VERSION
    weights: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """8 hex digits over every field."""
        return fingerprint(asdict(self))

    @property
    def directory(self) -> str:
        """The column's directory name: ``modality@codec-fingerprint``."""
        return f"{self.modality}@{self.codec['name']}-{self.fingerprint}"

    @property
    def channel_axis(self) -> int:
        """Position of the channel axis, the one that statistics are kept for."""
        return self.axes.index("channel")

    @property
    def stores_moments(self) -> bool:
        """Whether means and log-variances are stored, one behind the other in the channel axis."""
        return self.codec.get("store") == "moments"


def shard_name(shard: int) -> str:
    """Return the stem of a shard's files."""
    return f"{shard:06d}"


@dataclass(frozen=True)
class Column:
    """A column on disk, opened for reading. Only committed shards are ever trusted."""

    path: Path
    spec: ColumnSpec
    plan_id: str

    def commit(self, shard: int) -> dict[str, Any] | None:
        """Return a shard's commit record, or None where it is not committed.

        Raises:
            FormatError: the record belongs to another column or plan.
        """
        path = self.path / f"{shard_name(shard)}.json"
        try:
            record = _parse_json(path, read_file(path))
        except FileNotFoundError:
            return None
        for name, expected in (("plan_id", self.plan_id), ("column", self.path.name)):
            if record.get(name) != expected:
                raise FormatError(
                    f"{path}: {name} is {record.get(name)!r}, expected {expected!r}; "
                    "the file was copied from another data set: remove it and encode again"
                )
        return record

    def committed_shards(self) -> set[int]:
        """Return the numbers of all committed shards (one directory listing)."""
        names = [entry.name for entry in scan(self.path)]
        return {int(name[:-5]) for name in names if re.fullmatch(r"\d{6,}\.json", name)}

    def index(self, shard: int, num_rows: int) -> np.ndarray:
        """Return a committed shard's index, ``INDEX_DTYPE`` [num_rows].

        Raises:
            FormatError: it is missing, has another length, or points outside its tar.
        """
        record = self.committed(shard)
        path = self.path / record["index"]
        try:
            data = read_file(path)
        except OSError as error:
            raise FormatError(f"{path} can't be read ({error}); encode the shard again") from None
        return self.parse_index(path, data, num_rows, record["tar_bytes"])

    def parse_index(self, path: Path, data: bytes, num_rows: int, tar_bytes: int) -> np.ndarray:
        """Return the records in the bytes of an index; ``path`` is for messages, see ``index``."""
        try:
            index = parse_table(data, INDEX_DTYPE, num_rows)
        except (EOFError, ValueError) as error:
            raise FormatError(f"{path} can't be read ({error}); encode the shard again") from None
        if index.dtype != INDEX_DTYPE or index.shape != (num_rows,):
            raise FormatError(
                f"{path} holds {index.shape} records of {index.dtype}, expected ({num_rows},) of "
                f"{INDEX_DTYPE}; encode the shard again"
            )
        # Compared without adding, and sizes as floats (exact up to 2^53 bytes), so that hostile
        # values cannot wrap around 2^64.
        end = np.uint64(tar_bytes)
        inside = (index["nbytes"] <= end) & (index["offset"] <= end - index["nbytes"])
        shapes = index["shape"].astype(np.float64)
        sizes = np.where(shapes > 0, shapes, 1).prod(axis=1) * np.dtype(self.spec.dtype).itemsize
        sound = inside & (index["status"] < len(STATUSES))
        sound &= (index["status"] != OK) | (sizes == index["nbytes"])
        if not sound.all():
            row = int(np.flatnonzero(~sound)[0])
            raise FormatError(
                f"{path} row {row}: {index[row]} doesn't fit {tar_bytes} bytes of tar; encode again"
            )
        return index

    def committed(self, shard: int) -> dict[str, Any]:
        """Return the commit record of a shard that must have one.

        Raises:
            FormatError: it has none, or another data set's.
        """
        record = self.commit(shard)
        if record is None:
            raise FormatError(f"{self.path.name} shard {shard} is not committed; encode it first")
        return record

    def tar_path(self, shard: int) -> Path:
        """Return the path of a committed shard's tar."""
        return self.path / self.committed(shard)["tar"]


def open_column(root: Path, directory: str, plan_id: str) -> Column:
    """Open one column by its directory name.

    Raises:
        FormatError: column.json is missing or does not hash to the name of its directory.
    """
    value = read_json(root / directory / "column.json")
    known = {name: value[name] for name in ColumnSpec.__dataclass_fields__ if name in value}
    try:
        known["axes"] = tuple(known["axes"])
        spec = ColumnSpec(**known)
        expected = spec.directory
    except (KeyError, TypeError) as error:
        raise FormatError(f"{root / directory / 'column.json'} is damaged ({error})") from None
    if expected != directory:
        raise FormatError(
            f"{root / directory}: column.json hashes to {expected}; "
            "it was edited or moved: restore it, or encode into a new column"
        )
    return Column(root / directory, spec, plan_id)


def column_directories(root: Path, modality: str | None = None) -> list[str]:
    """Return the names of all column directories, of one modality or of all, sorted."""
    wanted = (modality,) if modality else MODALITIES
    return sorted(
        entry.name
        for entry in scan(root)
        if entry.is_dir() and entry.name.partition("@")[0] in wanted and "@" in entry.name
    )


def find_column(root: Path, modality: str, wanted: str | None, plan_id: str) -> Column:
    """Open the column that ``wanted`` names: a codec, a fingerprint or a whole directory name.

    ``None`` stands for the only column of the modality.

    Raises:
        FormatError: none or several match; the message lists what is there.
    """
    names = column_directories(root, modality)

    def matches(name: str) -> bool:
        codec, _, print8 = name.partition("@")[2].rpartition("-")
        return wanted in (None, name, name.partition("@")[2], codec, print8)

    found = [name for name in names if matches(name)]
    if len(found) == 1:
        return open_column(root, found[0], plan_id)
    there = ", ".join(names) or "none"
    if not found:
        what = f"{modality} column {wanted!r}" if wanted else f"{modality} column"
        raise FormatError(f"{root} has no {what}; there: {there}")
    raise FormatError(f"{wanted or modality!r} fits several columns: {there}; name one")


def check_key(key: str) -> str:
    """Return ``key`` if WebDataset and a USTAR header can hold it.

    Raises:
        FormatError: it has a character outside ``[A-Za-z0-9_-]`` or over 80 characters.
    """
    if not KEY_PATTERN.fullmatch(key) or len(key) > 80:
        raise FormatError(f"key {key!r} must match {KEY_PATTERN.pattern} in at most 80 characters")
    return key


def status_counts(codes: Sequence[int] | np.ndarray) -> dict[str, int]:
    """Count statuses by name, only those that occur."""
    counts = np.bincount(np.asarray(codes, dtype=np.int64), minlength=len(STATUSES))
    return {name: int(count) for name, count in zip(STATUSES, counts, strict=True) if count}
