"""``python -m pipeline.pack DIR --out OUT``: columns joined into one WebDataset tar per shard.

For readers that know nothing of columns. The same command again goes on after a stop: a tar is
complete when the JSON beside it says so. The same columns give the same bytes.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from pipeline import format as fmt
from pipeline.data_root import open_root
from pipeline.files import is_local, map_ahead, scan, write_json, writing
from pipeline.joint import JointRows
from pipeline.records import Count, Crc, Totals, first_error, read_record, record_problems
from pipeline.sweep import command_parser, one_line_errors, progress_bar


def main() -> None:
    """Parse the command line, pack, print what was done."""
    parser = command_parser(
        "pack", "Join columns into one WebDataset tar per shard. The same command resumes."
    )
    parser.add_argument("--out", required=True, help="where the tars go, a folder or a URL")
    parser.add_argument(
        "--view",
        default="video,audio,text",
        help="columns to join: modalities, and where there are several columns of one, which: "
        "video,audio@logmel (codec), audio@1234abcd (fingerprint) or the folder's name",
    )
    parser.add_argument(
        "--missing",
        choices=("error", "drop"),
        default="error",
        help="clips that are not ok in all columns: refuse to pack (default), or leave them out",
    )
    arguments = parser.parse_args()
    with one_line_errors("complete tars are kept; the same command goes on"):
        names = parse_view(arguments.view)
        root, out = open_root(arguments.dir), open_root(arguments.out)
        summary = pack(root, out, names, arguments.missing)
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        print(
            f"{summary['clips']} clips in {summary['shards']} tars ({summary['shards_there']} were "
            f"there), {summary['bytes'] / 1e6:,.1f} MB in {summary['out']}; "
            f"{summary['dropped']} clips left out"
        )


def parse_view(text: str) -> dict[str, str | None]:
    """Read ``--view``: by modality, the column as `format.find_column` takes it.

    The order is always the same, so that the bytes are.

    Raises:
        FormatError: something is no modality, or named twice.
    """
    items = [item.partition("@") for item in text.split(",")]
    names = {modality: column or None for modality, _, column in items}
    if not set(names) <= set(fmt.MODALITIES) or len(names) < len(items):
        raise fmt.FormatError(
            f"--view {text}: expected some of {','.join(fmt.MODALITIES)}, each once; a column is "
            "named behind an @, as in audio@logmel"
        )
    return {modality: names[modality] for modality in fmt.MODALITIES if modality in names}


@checked_dataclass(frozen=True)
class PackedShard:
    """The JSON beside a tar: written after it, so that the tar is complete where it fits.

    Attributes:
        plan_id, columns, missing: what was asked for; one folder holds one such choice.
        sources: checksums of the tars that this one was copied from, by modality.
        rows: planned clips.
        clips: clips in the tar.
    """

    plan_id: str
    columns: dict[str, str]
    missing: str
    sources: dict[str, str]
    rows: Count
    clips: Count
    tar_bytes: Count
    tar_crc32c: Crc

    @property
    def settings(self) -> dict[str, Any]:
        """What all tars of a folder have in common."""
        return {"plan_id": self.plan_id, "columns": self.columns, "missing": self.missing}


def pack(root: Path, out: Path, names: dict[str, str | None], missing: str) -> dict[str, Any]:
    """Join columns of a data set.

    Args:
        root: the data set's folder.
        out: folder of the tars, made if absent.
        names: by modality to join, the column as `format.find_column` takes it.
        missing: "error" or "drop", for clips that are not ok in all columns.

    Returns:
        Counts over all tars: shards, shards_there, clips, dropped, bytes; and the columns.

    Raises:
        FormatError: the data set is not complete or damaged, or ``out`` holds something else.
        NoRoomError: the disk is full; complete tars are kept.
    """
    plan = fmt.read_plan(root)
    columns = {m: fmt.find_column(root, m, name, plan.plan_id) for m, name in names.items()}
    directories = {modality: column.path.name for modality, column in columns.items()}
    settings: dict[str, Any] = {
        "plan_id": plan.plan_id,
        "columns": directories,
        "missing": missing,
    }
    there = packed_shards(out, settings)
    crcs = {m: tar_checksums(c, plan, must_be_ok=missing == "error") for m, c in columns.items()}
    joint = JointRows(root, plan, columns)
    out.mkdir(parents=True, exist_ok=True)
    counts = {"shards": 0, "shards_there": 0, "clips": 0, "dropped": 0, "bytes": 0}
    with progress_bar(plan.num_clips, "clip") as bar:
        for shard, rows in enumerate(plan.shard_rows().tolist()):
            # Any text shard may hold a caption of this shard: all of them count as its source.
            sources = {m: fmt.fingerprint(crcs[m] if m == "text" else crcs[m][shard]) for m in crcs}
            packed = there.get(shard)
            if packed is not None and packed.sources == sources:
                counts["shards_there"] += 1
            else:
                written = write_tar(out, shard, joint.samples(shard))
                packed = PackedShard(**settings, sources=sources, rows=rows, **written)
                write_json(out / f"{fmt.shard_name(shard)}.json", asdict(packed))
            bar.update(rows)
            counts["shards"] += 1
            counts["clips"] += packed.clips
            counts["dropped"] += packed.rows - packed.clips
            counts["bytes"] += packed.tar_bytes
    return {"out": str(out), **settings, **counts}


def packed_shards(out: Path, settings: dict[str, Any]) -> dict[int, PackedShard]:
    """Return what complete tars a folder holds, by shard.

    Raises:
        FormatError: it holds other files, or tars that were packed with other settings.
    """
    try:
        listed = {entry.name: entry for entry in scan(out) if not entry.name.startswith(".")}
    except FileNotFoundError:
        return {}
    for name in sorted(listed):
        if not re.fullmatch(r"\d{6,}\.(tar|json)", name):
            raise fmt.FormatError(
                f"--out {out} holds {name}, which no pack wrote; name another folder"
            )
    paths = [out / name for name in sorted(listed) if name.endswith(".json")]
    found = {}
    for path, value in zip(paths, map_ahead(out, fmt.read_json, paths), strict=True):
        try:
            packed = TypeAdapter(PackedShard).validate_python(value)
        except ValidationError as error:
            raise fmt.FormatError(f"{path}: {first_error(error)}; use another --out") from None
        for name, wanted in settings.items():
            if packed.settings[name] != wanted:
                raise fmt.FormatError(
                    f"{path}: packed with {name} {packed.settings[name]}, this run has {wanted}; "
                    "use another --out, or remove the tars there"
                )
        tar = listed.get(f"{path.stem}.tar")
        if tar is not None and tar.stat().st_size == packed.tar_bytes:
            found[int(path.stem)] = packed
    return found


def tar_checksums(column: fmt.Column, plan: fmt.Plan, must_be_ok: bool) -> list[int]:
    """Return the crc32c of all tars of a column.

    Raises:
        FormatError: a shard is not committed or not of the plan, or holds a failed row that
            ``must_be_ok``.
    """
    rows_per_shard = plan.shard_rows(text=column.spec.modality == "text")
    crcs, totals, uncommitted = [], Totals(), []
    shards = range(len(rows_per_shard))
    records = map_ahead(column.path, lambda shard: read_record(column, shard), shards)
    for shard, record in enumerate(records):
        if record is None:
            uncommitted.append(shard)
            continue
        for problem in record_problems(column, shard, record, rows_per_shard, None):
            raise fmt.FormatError(problem)
        totals.add(record)
        crcs.append(record.tar_crc32c)
    if uncommitted:
        raise fmt.FormatError(
            f"{column.path}: {len(uncommitted)} of {len(rows_per_shard)} shards are not committed "
            f"(such as {fmt.shard_name(uncommitted[0])}); run pipeline.encode again"
        )
    if must_be_ok and totals.ok < totals.rows:
        causes = ", ".join(f"{n} {count}" for n, count in totals.statuses.items() if n != "ok")
        raise fmt.FormatError(
            f"{column.path}: {totals.rows - totals.ok} of {totals.rows} rows failed ({causes}); "
            "--missing drop leaves such clips out"
        )
    return crcs


class ChecksummedWriter:
    """A file for `tarfile` to write to; knows the checksum of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.position, self.crc32c = 0, 0

    def write(self, data: bytes) -> int:
        """Append bytes."""
        self.crc32c = google_crc32c.extend(self.crc32c, data)
        self.position += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        """Return the bytes written."""
        return self.position


def write_tar(
    out: Path, shard: int, samples: Iterator[tuple[str, dict[str, bytes]]]
) -> dict[str, Any]:
    """Write the tar of a shard, whole or not at all; the JSON beside an older one goes first.

    Returns:
        Its clips, tar_bytes and tar_crc32c.

    Raises:
        NoRoomError: the disk is full.
    """
    stem, clips = fmt.shard_name(shard), 0
    path = out / f"{stem}.tar"
    try:
        with writing(path) as file:
            writer: Any = ChecksummedWriter(file)
            with tarfile.open(fileobj=writer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for key, members in samples:
                    clips += 1
                    for extension, data in members.items():
                        member = tarfile.TarInfo(f"{key}.{extension}")
                        member.size, member.mode = len(data), 0o644
                        tar.addfile(member, io.BytesIO(data))
            (out / f"{stem}.json").unlink(missing_ok=True)
    finally:
        if is_local(out):
            for left in out.glob(f".{stem}.*.tmp"):  # by killed runs
                left.unlink(missing_ok=True)
    return {"clips": clips, "tar_bytes": writer.position, "tar_crc32c": writer.crc32c}


if __name__ == "__main__":
    main()
