"""The command line of ``pipeline.encode``: what is asked for beside the settings."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import EncodeConfig
from pipeline.settings import ConfigError, describe, load
from pipeline.work import parse_shards, parse_statuses


@dataclass(frozen=True)
class Request:
    """What the command line asks for beside the settings.

    Attributes:
        src: where the clips come from, a path or a URL.
        out: the data set, a folder or a URL.
        extend: whether clips that the plan lacks are appended to it.
        retry_failed: shards with clips failed in these ways count as not committed.
        shards, limit: the part of the work to do, see ``pipeline.work.restrict``.
        address: of a Ray cluster; None starts one on this machine.
        calibrate: measure and advise only; as_json: print what was found for programs.
    """

    src: str
    out: str
    extend: bool = False
    retry_failed: frozenset[str] = frozenset()
    shards: list[range] | None = None
    limit: int | None = None
    address: str | None = None
    calibrate: bool = False
    as_json: bool = False


def parse(argv: list[str]) -> tuple[Request, EncodeConfig]:
    """Read the command line.

    Raises:
        ConfigError: a value can't be used.
    """
    arguments = make_parser().parse_intermixed_args(argv)
    for name in ("src", "out"):
        if not getattr(arguments, name).strip():
            raise ConfigError(f"--{name} is empty; is a variable of the shell unset?")
    if re.search(r"[\ud800-\udfff]", arguments.out):
        raise ConfigError(
            f"--out {arguments.out!a} is no UTF-8, expected a name that is; rename it"
        )
    overrides = list(arguments.settings)
    retry = arguments.retry_failed
    if retry is not None and "=" in retry:  # `--retry-failed decoders=2`: the setting isn't its own
        overrides.insert(0, retry)
        retry = ""
    if arguments.columns is not None:
        overrides.append(f"columns=[{arguments.columns}]")
    if arguments.media is not None:
        overrides.append(f"media={arguments.media}")
    if arguments.json and not arguments.calibrate:
        raise ConfigError("--json goes with --calibrate; pipeline.status DIR --json sums up a run")
    request = Request(
        src=arguments.src,
        out=arguments.out,
        extend=arguments.extend,
        retry_failed=frozenset() if retry is None else parse_statuses(retry),
        shards=None if arguments.shards is None else parse_shards(arguments.shards),
        limit=arguments.limit,
        address=arguments.address,
        calibrate=arguments.calibrate,
        as_json=arguments.json,
    )
    return request, load(EncodeConfig, arguments.config, overrides)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.encode",
        description="Encode clips once into latent columns. The same command again resumes.",
        epilog="settings and their defaults:\n\n" + describe(EncodeConfig()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--src",
        required=True,
        help="folder of media, VGGSound's csv or its folder, table (.csv, .parquet or .jsonl) or "
        "WebDataset tars; or a URL of one (s3://..., https://...)",
    )
    add("--out", required=True, help="data set: a folder or a URL (s3://...), made if absent")
    add("--config", type=Path, help="YAML file with settings")
    add("--columns", help="of video,audio,text (default: all)")
    add("--media", help="csv and table: folder or URL of the media (default: where the table is)")
    add(
        "--retry-failed",
        nargs="?",
        const="",
        metavar="STATUS,...",
        help="encode shards again that hold clips failed so (default: in any way); silent, still, "
        "low_fps and duplicate clips that a check dropped are no failures, here and in "
        "max_failed_share",
    )
    add(
        "--extend",
        action="store_true",
        help="append clips that are new in the source to the plan, as shards of their own",
    )
    add("--shards", metavar="0-15,20", help="encode these shards only, to split work by hand")
    add(
        "--limit",
        type=positive,
        metavar="N",
        help="encode as many whole shards as it takes to hold N clips (and all captions): to try "
        "things out; run again for the rest",
    )
    add("--address", help="of a Ray cluster, such as auto; default: start Ray on this machine")
    add(
        "--calibrate",
        action="store_true",
        help="encode a few clips, print the rates of decoding and encoding, advise `decoders`; "
        "writes nothing",
    )
    add("--json", action="store_true", help="with --calibrate: print JSON for programs")
    add("settings", nargs="*", metavar="key=value", help="settings, dotted names")
    return parser


def positive(text: str) -> int:
    """Read a number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)
