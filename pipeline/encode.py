"""``python -m pipeline.encode --src CLIPS --out shards/``: clips in, latent columns out.

Run the same command again to go on after any kind of stop: shards that are committed are done.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from pipeline import format as fmt
from pipeline.captions import copy_captions
from pipeline.checks import DECISIONS, facts_directory
from pipeline.config import EncodeConfig, column_specs, decode_settings
from pipeline.duplicates import settle_duplicates
from pipeline.files import write_json
from pipeline.jobs import Job, ShardTask
from pipeline.plan import ensure_plan, extend_plan
from pipeline.plan_table import PlanTable
from pipeline.report import RunReport, column_totals, failures, print_table
from pipeline.settings import ConfigError, dump, load
from pipeline.shards import NoRoomError, create_column
from pipeline.sources import Source, open_source

# Too many failures end the run before the last shard only once this many clips were tried.
MIN_CLIPS_FOR_STOP = 1000
INTERRUPTED = 130  # as shells report it: 128 + SIGINT


def main() -> None:
    """Parse the command line, encode, and turn expected errors into one line and exit 1."""
    arguments, config = parse(sys.argv[1:])
    try:
        failure = encode(
            arguments.src, Path(arguments.out), config, arguments.retry_failed, arguments.extend
        )
    except KeyboardInterrupt:
        print(
            f"\nstopped; committed shards are safe. Go on with: {command_line()}", file=sys.stderr
        )
        sys.exit(INTERRUPTED)
    except (ConfigError, fmt.FormatError, NoRoomError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        sys.exit(f"error:{where}: {error.strerror or error}")
    if failure:
        sys.exit(f"error: {failure}")


def parse(argv: list[str]) -> tuple[argparse.Namespace, EncodeConfig]:
    """Read the command line into arguments and validated settings."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.encode",
        description="Encode clips once into latent columns. The same command again resumes.",
        epilog="settings and their defaults:\n\n" + dump(EncodeConfig()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--src",
        required=True,
        help="folder of media, VGGSound's csv or its folder, table (.csv, .parquet or .jsonl) or "
        "WebDataset tars; or a URL of one (s3://..., https://...)",
    )
    parser.add_argument("--out", required=True, help="data set folder, made if absent")
    parser.add_argument("--config", type=Path, help="YAML file with settings")
    parser.add_argument("--columns", help="of video,audio,text (default: all)")
    parser.add_argument(
        "--media", help="csv and table: folder or URL of the media (default: where the table is)"
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="encode shards that hold failed clips again; silent, still, low_fps and duplicate "
        "clips that a check dropped are no failures, here and in max_failed_share",
    )
    parser.add_argument(
        "--extend",
        action="store_true",
        help="append clips that are new in the source to the plan, as shards of their own",
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, dotted names")
    arguments = parser.parse_intermixed_args(argv)
    if re.search(r"[\ud800-\udfff]", arguments.out):
        sys.exit(f"error: --out {arguments.out!a} is no UTF-8, expected a name that is; rename it")
    overrides = list(arguments.settings)
    if arguments.columns is not None:
        overrides.append(f"columns=[{arguments.columns}]")
    if arguments.media is not None:
        overrides.append(f"media={arguments.media}")
    try:
        return arguments, load(EncodeConfig, arguments.config, overrides)
    except ConfigError as error:
        sys.exit(f"error: {error}")


def encode(
    src: str, out: Path, config: EncodeConfig, retry_failed: bool = False, extend: bool = False
) -> str | None:
    """Encode what of the plan is not committed yet.

    Args:
        src: where the clips come from, a path or a URL.
        out: the data set's folder.
        config: settings.
        retry_failed: whether shards with failed clips count as not committed.
        extend: whether clips that the plan lacks are appended to it.

    Returns:
        None, or why the run counts as failed although it ended.

    Raises:
        ConfigError: the source or the settings can't be used.
        FormatError: ``out`` is damaged.
        NoRoomError: the disk is full; committed shards are safe.
    """
    source = open_source(src, config)
    refuse_out_in_source(src, out, source)
    specs = column_specs(config)  # before anything is written: the settings must be possible
    plan = (extend_plan if extend else ensure_plan)(out, source, config)
    columns = {m: create_column(out, spec, plan.plan_id) for m, spec in specs.items()}
    if "text" in columns:
        copy_captions(out, plan, columns["text"].path)
    facts = out / facts_directory(plan.plan_id, config)
    if retry_failed:
        reopen_failed(columns)
    work = list(open_tasks(plan, columns))
    num_clips = sum(rows for _, modalities, rows in work if modalities != ("text",))
    print(
        f"{plan.num_clips} clips of {source.root} ({plan.source['num_skipped']} other files "
        f"skipped), plan {plan.plan_id}; {len(work)} shards to encode",
        file=sys.stderr,
    )
    if work:
        run_id = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(3)
        with RunReport(out / "runs" / run_id, plan, num_clips) as report:
            (report.folder / "config.yaml").write_text(dump(config))
            run(make_job(out, source, plan, run_id, specs, config), plan, work, config, report)
            settled = settle_duplicates(plan, columns, facts, config.checks)
            report.settled = settled
    else:
        settled = settle_duplicates(plan, columns, facts, config.checks)
    for column in columns.values():
        write_statistics(column)
    rows = {m: plan.shard_rows(text=m == "text").tolist() for m in columns}
    totals = [column_totals(column, rows[m]) for m, column in columns.items()]
    print_table(totals, settled.flagged)
    return settled.complaint or too_many_failed(totals, config)


def refuse_out_in_source(src: str, out: Path, source: Source) -> None:
    """Refuse a data set within a folder that is searched: the next run would find its tars."""
    is_searched = source.kind in ("folder", "tars") and Path(src).is_dir()
    if is_searched and out.resolve().is_relative_to(Path(src).resolve()):
        raise ConfigError(
            f"--out {out} is in {src}, all of which is searched for media; expected a folder "
            "outside of it"
        )


def reopen_failed(columns: dict[str, fmt.Column]) -> None:
    """Take back the commits of all shards that hold a failed clip.

    What was found in a failed clip does not count anyway: see ``pipeline.checks.is_settled``.
    """
    for column in columns.values():
        for shard in column.committed_shards():
            if set(column.committed(shard)["status_counts"]) - DECISIONS - {"ok"}:
                (column.path / f"{fmt.shard_name(shard)}.json").unlink()


def open_tasks(
    plan: fmt.Plan, columns: dict[str, fmt.Column]
) -> Iterator[tuple[int, tuple[str, ...], int]]:
    """Yield (shard, modalities, rows) for all that lacks a commit: the plan minus the commits."""
    committed = {modality: column.committed_shards() for modality, column in columns.items()}
    for shard, rows in enumerate(plan.shard_rows(text=True).tolist()):
        if "text" in columns and shard not in committed["text"]:
            yield shard, ("text",), rows
    clip_columns = [modality for modality in ("video", "audio") if modality in columns]
    for shard, rows in enumerate(plan.shard_rows().tolist()):
        missing = tuple(m for m in clip_columns if shard not in committed[m])
        if missing:
            yield shard, missing, rows


def make_job(
    out: Path,
    source: Source,
    plan: fmt.Plan,
    run_id: str,
    specs: dict[str, fmt.ColumnSpec],
    config: EncodeConfig,
) -> Job:
    """Collect what the cell needs to know; paths are absolute, for processes with another cwd."""
    seconds = plan.source["longest_s"]
    pixels = max(height * width for height, width in config.video.sizes)
    clip_bytes = 3 * pixels * config.video.fps * seconds
    clip_bytes += 4 * config.audio.sample_rate * config.audio.channels * seconds
    return Job(
        root=str(out.resolve()),
        facts=facts_directory(plan.plan_id, config),
        plan_id=plan.plan_id,
        run_id=run_id,
        columns=specs,
        media_root=source.root,
        cache_dir=config.cache_dir,
        cache_bytes=int(config.cache_gb * 1e9),
        decode=decode_settings(config),
        checks=config.checks,
        decode_timeout_s=config.decode_timeout_s,
        fetch_timeout_s=config.fetch_timeout_s,
        clips_per_decoder=config.clips_per_decoder,
        window_clips=max(2, math.floor(config.window_mb * 1e6 / clip_bytes)),
    )


def run(
    job: Job,
    plan: fmt.Plan,
    work: list[tuple[int, tuple[str, ...], int]],
    config: EncodeConfig,
    report: RunReport,
) -> None:
    """Hand the shards to one cell, one after the other.

    Raises:
        ConfigError: too many clips fail, or the cell can't be kept alive.
    """
    from pipeline.cells import Cell, CellError, local_cluster  # a finished run never starts Ray

    decoders = config.decoders or max(1, len(os.sched_getaffinity(0)) - 1)
    table = PlanTable(Path(job.root), plan)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C
    with local_cluster(decoders + 1, object_store_bytes=int(2e6 * config.window_mb + 2e8)):
        try:
            cell = Cell(job, decoders)
            for shard, modalities, _ in work:
                if modalities == ("text",):
                    task = ShardTask(shard, modalities, captions=table.captions(shard))
                else:
                    task = ShardTask(shard, modalities, clips=table.clips(shard))
                for news in cell.encode(task):
                    report.update(news)
                share, limit = report.failed_share, config.max_failed_share
                if report.num_clips >= MIN_CLIPS_FOR_STOP and share > limit:
                    raise ConfigError(
                        f"{share:.0%} of {report.num_clips} clips failed, more than "
                        f"max_failed_share={limit:g}; causes are in {report.folder}/events.jsonl"
                    )
        except CellError as error:
            raise ConfigError(str(error)) from None


def write_statistics(column: fmt.Column) -> None:
    """Write the channel mean and std of what is committed into column.json, for people.

    Readers sum the commit records themselves; column.json is touched only when it changes.
    """
    path = column.path / "column.json"
    value = fmt.read_json(path)
    try:
        statistics = column.statistics()
    except fmt.FormatError:
        return  # no clip of this modality could be encoded
    if value.get("statistics") != statistics:
        write_json(path, asdict(column.spec) | {"statistics": statistics})


def too_many_failed(totals: list[dict], config: EncodeConfig) -> str | None:
    """Return a complaint when a column lacks more clips than ``max_failed_share``."""
    for total in totals:
        failed = failures(total["statuses"]).total()
        if failed > config.max_failed_share * total["rows"]:
            return (
                f"{failed} of {total['rows']} rows of {total['column']} failed, more than "
                f"max_failed_share={config.max_failed_share:g}; every cause is in "
                "runs/*/events.jsonl. Once mended, run the command with --retry-failed"
            )
    return None


def command_line() -> str:
    """Return the command that was typed."""
    return shlex.join(["python", "-m", "pipeline.encode", *sys.argv[1:]])


if __name__ == "__main__":
    main()
