"""``python -m pipeline.encode --src CLIPS --out shards/``: clips in, latent columns out.

Run the same command again to go on after any kind of stop: shards that are committed are done.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from pipeline import format as fmt
from pipeline.captions import copy_captions
from pipeline.checks import facts_directory
from pipeline.config import EncodeConfig, column_specs, decode_settings
from pipeline.data_root import open_root
from pipeline.duplicates import Settled, forget_settled, read_settled, settle_duplicates
from pipeline.files import write_json
from pipeline.folders import normal_root
from pipeline.jobs import Job, ShardTask
from pipeline.plan import ensure_plan, extend_plan
from pipeline.plan_table import PlanTable
from pipeline.records import Totals, sum_records
from pipeline.report import RunReport, failures, print_table
from pipeline.request import Request, parse
from pipeline.settings import ConfigError
from pipeline.shards import create_column
from pipeline.sources import Source, open_source
from pipeline.sweep import one_line_errors
from pipeline.wording import counted
from pipeline.work import Work, open_work, reopen, restrict

# Too many failures end the run before the last shard only once this many clips were tried.
MIN_CLIPS_FOR_STOP = 1000


def main() -> None:
    """Parse the command line, encode, and turn expected errors into one line and exit 1."""
    with one_line_errors(f"committed shards are safe. Go on with: {command_line()}"):
        request, config = parse(sys.argv[1:])
        if request.calibrate:
            advise(request, config)
        elif failure := encode(request, config):
            sys.exit(f"error: {failure}")


def advise(request: Request, config: EncodeConfig) -> None:
    """Print the rates of decoding and encoding here, and how many decoders an encoder needs."""
    from pipeline.calibrate import calibrate, calibration_text  # loads torch

    found = calibrate(open_source(request.src, config), config)
    print(json.dumps(asdict(found), indent=2) if request.as_json else calibration_text(found))


def encode(request: Request, config: EncodeConfig) -> str | None:
    """Encode what of the plan is not committed yet.

    Returns:
        None, or why the run counts as failed although it ended.

    Raises:
        ConfigError: the source or the settings can't be used.
        FormatError: ``out`` is damaged.
        NoRoomError: the disk is full; committed shards are safe.
    """
    root = open_root(request.out)
    source = open_source(request.src, config)
    refuse_out_in_source(request, source)
    specs = column_specs(config)  # before anything is written: the settings must be possible
    plan = (extend_plan if request.extend else ensure_plan)(root, source, config)
    columns = {m: create_column(root, spec, plan.plan_id) for m, spec in specs.items()}
    if "text" in columns:
        copy_captions(root, plan, columns["text"].path)
    lacking = open_work(plan, columns, request.retry_failed)
    work = restrict(lacking, plan, request.shards, request.limit)
    print(
        f"{plan.num_clips} clips of {source.root} ({plan.source['num_skipped']} other files "
        f"skipped), plan {plan.plan_id}; {to_do(work)} to encode",
        file=sys.stderr,
    )
    lost = None
    if work:
        from pipeline.driver import complaint, encode_shards  # a finished run never loads Ray
        from pipeline.telemetry import Telemetry

        run_id = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(3)
        forget_settled(root / facts_directory(plan.plan_id, config))
        job = make_job(request, source, plan, run_id, specs, config)
        num_clips = sum(item.rows for item in work if not item.is_text)
        publish = Telemetry(run_id).publish
        with RunReport(root, run_id, plan, num_clips, len(work), config, publish) as report:
            tasks = hand_out(work, PlanTable(root, plan), columns, request, config, report)
            given_up = encode_shards(job, tasks, config, report, request.address)
            lost = complaint(given_up) if given_up else None
            report.settled = settled = settle(plan, columns, root / job.facts, config)
    else:
        facts = root / facts_directory(plan.plan_id, config)
        settled = settle(plan, columns, facts, config)
    totals = {column.path.name: sum_records(column) for column in columns.values()}
    for column in columns.values():
        write_statistics(column, totals[column.path.name])
    num_shards = {c.path.name: len(plan.shard_rows(text=m == "text")) for m, c in columns.items()}
    print_table({name: (totals[name], num_shards[name]) for name in totals}, settled.flagged)
    return lost or settled.complaint or too_many_failed(totals, config)


def to_do(work: list[Work]) -> str:
    """Return how many shards there are of clips and of captions."""
    captions = sum(item.is_text for item in work)
    counts = {"clip shard": len(work) - captions, "caption shard": captions}
    return " and ".join(counted(n, thing) for thing, n in counts.items() if n) or "0 shards"


def refuse_out_in_source(request: Request, source: Source) -> None:
    """Refuse a data set within a folder that is searched: the next run would find its tars."""
    src, out = normal_root(request.src), normal_root(request.out)
    is_local = Path(src).is_dir()
    if is_local:
        src, out = os.path.realpath(src), os.path.realpath(out)
    is_searched = source.kind in ("folder", "tars") and (is_local or src == source.root)
    if is_searched and f"{out}/".startswith(f"{src}/"):
        raise ConfigError(
            f"--out {request.out} is in {request.src}, all of which is searched for media; "
            "expected a folder outside of it"
        )


def make_job(
    request: Request,
    source: Source,
    plan: fmt.Plan,
    run_id: str,
    specs: dict[str, fmt.ColumnSpec],
    config: EncodeConfig,
) -> Job:
    """Collect what the cells need to know; paths are absolute, for processes with another cwd."""
    return Job(
        root=normal_root(request.out),
        facts=facts_directory(plan.plan_id, config),
        plan_id=plan.plan_id,
        run_id=run_id,
        columns=specs,
        batch={modality: getattr(config, modality).batch for modality in specs},
        media_root=source.root,
        cache_dir=config.cache_dir,
        cache_bytes=int(config.cache_gb * 1e9),
        decode=decode_settings(config),
        checks=config.checks,
        decode_timeout_s=config.decode_timeout_s,
        fetch_timeout_s=config.fetch_timeout_s,
        encode_timeout_s=config.encode_timeout_s,
        clips_per_decoder=config.clips_per_decoder,
        window_bytes=int(config.window_mb * 1e6),
    )


def hand_out(
    work: list[Work],
    table: PlanTable,
    columns: dict[str, fmt.Column],
    request: Request,
    config: EncodeConfig,
    report: RunReport,
) -> Iterator[ShardTask]:
    """Yield the shards as cells can take them; one to be retried is taken back only now.

    Raises:
        ConfigError: too many clips failed so far.
    """
    for item in work:
        stop_if_too_many_failed(report, config.max_failed_share)
        if request.retry_failed:
            reopen(item, columns, request.retry_failed)
        yield item.task(table)


def settle(
    plan: fmt.Plan, columns: dict[str, fmt.Column], facts: Path, config: EncodeConfig
) -> Settled:
    """Settle duplicates once all shards are committed; a part of them can't say what is one."""
    if open_work(plan, columns):
        return Settled(Counter())
    return read_settled(facts, columns.values()) or settle_duplicates(
        plan, columns, facts, config.checks
    )


def write_statistics(column: fmt.Column, totals: Totals) -> None:
    """Write the channel mean and std of what is committed into column.json, for people.

    Readers sum the commit records themselves; column.json is touched only when it changes.
    """
    path, statistics = column.path / "column.json", totals.statistics()
    if statistics and fmt.read_json(path).get("statistics") != statistics:
        write_json(path, asdict(column.spec) | {"statistics": statistics})


def stop_if_too_many_failed(report: RunReport, limit: float) -> None:
    """End a run early that gets nowhere.

    Raises:
        ConfigError: more clips than the share ``limit`` have failed.
    """
    if report.clips_done >= MIN_CLIPS_FOR_STOP and report.failed_share > limit:
        raise ConfigError(
            f"{report.failed_share:.0%} of {report.clips_done} clips failed, more than "
            f"max_failed_share={limit:g}; causes are in {report.folder / 'report.html'}"
        )


def too_many_failed(totals: dict[str, Totals], config: EncodeConfig) -> str | None:
    """Return a complaint when a column lacks more clips than ``max_failed_share``."""
    for name, total in totals.items():
        failed = failures(total.statuses).total()
        if failed > config.max_failed_share * total.rows:
            return (
                f"{failed} of {total.rows} rows of {name} failed, more than "
                f"max_failed_share={config.max_failed_share:g}; the causes are in "
                "runs/*/report.html. Mend them and add --retry-failed, or raise max_failed_share; "
                "--columns leaves out what clips don't have"
            )
    return None


def command_line() -> str:
    """Return the command that was typed."""
    return shlex.join(["python", "-m", "pipeline.encode", *sys.argv[1:]])


if __name__ == "__main__":
    main()
