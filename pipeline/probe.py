"""``python -m pipeline.probe FILE…``: the facts and the verdict of single files.

For people who ask why a clip was dropped: the same decoding, checks and settings as
``pipeline.encode``, one file after the other, each in a child process that may hang or die.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pipeline.checks import clip_status, judge
from pipeline.child import ChildProcess
from pipeline.config import EncodeConfig, decode_settings
from pipeline.media import Clip, ClipError, Decoded
from pipeline.settings import ConfigError, describe, load

USAGE_ERROR = 2
# Which facts the table shows under which heading, with what follows the number.
SHOWN_FACTS = {
    "clip": {"duration_s": " s", "content_hash": ""},
    "picture": {
        "video_codec": "",
        "width": " px",
        "height": " px",
        "pixel_aspect": "",
        "rotation": "°",
        "fps": " frames/s",
        "video_s": " s",
        "num_frames": "",
        "video_decoded_share": "%",
        "pts_hash": "",
        "decoder": "",
        "motion": " of white",
        "frozen_s": " s",
        "black_share": "%",
    },
    "sound": {
        "audio_codec": "",
        "sample_rate": " Hz",
        "channels": "",
        "audio_s": " s",
        "audio_offset_s": " s",
        "audio_decoded_share": "%",
        "loudness_dbfs": " dBFS",
        "silent_share": "%",
    },
}


@dataclass(frozen=True)
class Verdict:
    """What became of one file.

    Attributes:
        status, message: of the clip.
        problems: modality -> (status, message) of what gets no latents.
        facts: what is known, by the names of ``pipeline.checks.FACTS_SCHEMA``.
    """

    status: str
    message: str
    problems: dict[str, tuple[str, str]]
    facts: dict[str, Any]


def load_judge(config: EncodeConfig, start_s: float, duration_s: float) -> Callable[[str], Decoded]:
    """Return the function from a file's path to what encode finds in it; imports the decoders.

    Both modalities are decoded whatever the columns, as encode does for its facts: a check on one
    decides about both.
    """
    from pipeline.decode import decode_clip

    settings = decode_settings(config)

    def find(name: str) -> Decoded:
        clip = Clip(key="probe", uri=name, start_s=start_s, duration_s=duration_s)
        decoded = judge(decode_clip(Path(name), clip, settings, {"video", "audio"}), config.checks)
        return replace(decoded, frames=None, sound=None)  # which are large to send

    return find


def _plain(value: Any) -> Any:
    """Return a value that strict JSON can hold: no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    """Parse the command line and print a verdict per file; exit 1 where one is not ok."""
    arguments, files, config = parse(sys.argv[1:])
    duration_s = config.windows.seconds or config.clip.seconds
    if arguments.duration is not None:
        duration_s = arguments.duration
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    all_ok = True
    prepare = partial(load_judge, config, arguments.start, duration_s)
    try:
        with ChildProcess(prepare, config.decode_timeout_s) as child:
            for name in files:
                verdict = probe_file(child, name, config.columns)
                all_ok &= verdict.status == "ok"
                text = as_json(name, verdict) if arguments.json else as_table(name, verdict)
                sys.stdout.write(text + "\n")
                sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        sys.exit(128 + signal.SIGINT)
    except ConfigError as error:
        _usage_error(str(error))
    sys.exit(0 if all_ok else 1)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str], EncodeConfig]:
    """Read the command line into arguments, names of files, and validated settings."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.probe",
        description="Say what is in media files, and what pipeline.encode would make of them.",
        epilog="exit code: 0 all ok, 1 some not, 2 wrong usage. Settings and their defaults:\n\n"
        + describe(EncodeConfig()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="+", metavar="FILE | key=value", help="files and settings")
    parser.add_argument("--config", type=Path, help="YAML file with settings, as for encode")
    parser.add_argument("--start", type=_seconds, default=0.0, help="second the clip starts at")
    parser.add_argument(
        "--duration", type=_seconds, help="its length in s (default: windows or clip.seconds)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    arguments = parser.parse_intermixed_args(argv)
    settings = [word for word in arguments.words if _is_setting(word)]
    files = [word for word in arguments.words if not _is_setting(word)]
    if not files:
        parser.error("no FILE given")
    try:
        for name in files:
            _check_file(name)
        return arguments, files, load(EncodeConfig, arguments.config, settings)
    except ConfigError as error:
        _usage_error(str(error))


def _usage_error(message: str) -> NoReturn:
    sys.stderr.write(f"error: {printable(message)}\n")
    sys.exit(USAGE_ERROR)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds from 0 on")
    return value


def _is_setting(word: str) -> bool:
    return re.match(r"[\w.]+=", word) is not None and not Path(word).exists()


def _check_file(name: str) -> None:
    """Refuse what is no name of a file; a file that is not there gets a verdict instead."""
    if re.search(r"[\ud800-\udfff]", name):
        raise ConfigError(f"file name {name} is no UTF-8, which plans are; rename it")
    if re.match(r"[a-z][a-z0-9+.-]*://", name):
        raise ConfigError(f"{name} is a URL; this command reads local files: download it first")
    if Path(name).is_dir():
        raise ConfigError(f"{name} is a folder; name the files in it, such as {name}/*.mp4")
    if Path(name).exists() and not Path(name).is_file():
        raise ConfigError(f"{name} is a device or a pipe, expected a media file")


def probe_file(child: ChildProcess, name: str, columns: Collection[str]) -> Verdict:
    """Return the verdict of one file on the wanted columns, whatever it does to its decoder."""
    try:
        decoded = child.call(name)
    except ClipError as error:
        decoded = Decoded.failed(error.status, error.message)
    problems = {m: problem for m, problem in decoded.problems.items() if m in columns}
    facts = {name: _plain(value) for name, value in decoded.facts.items()}
    return Verdict(*clip_status(problems), problems, facts)


def as_json(name: str, verdict: Verdict) -> str:
    """Return a verdict as one line of strict JSON."""
    problems = {
        modality: {"status": status, "message": printable(message)}
        for modality, (status, message) in sorted(verdict.problems.items())
    }
    value = {
        "file": name,
        "status": verdict.status,
        "message": printable(verdict.message),
        "problems": problems,
        "flags": verdict.facts.get("flags", []),
        **{name: verdict.facts.get(name) for units in SHOWN_FACTS.values() for name in units},
    }
    return json.dumps(value, allow_nan=False)


def as_table(name: str, verdict: Verdict) -> str:
    """Return a verdict as lines for people: the name, the verdict, the facts by group."""
    lines = [printable(name), _line("status", verdict.status)]
    for modality, (_, message) in sorted(verdict.problems.items(), reverse=True):
        lines.append(_line("picture" if modality == "video" else "sound", printable(message)))
    if verdict.facts.get("flags"):
        lines.append(_line("flags", ", ".join(verdict.facts["flags"])))
    for group, units in SHOWN_FACTS.items():
        known = [name for name in units if verdict.facts.get(name) is not None]
        if known:
            lines.append(f"  {group}")
        lines += [_line(f"  {name}", _shown(verdict.facts[name], units[name])) for name in known]
    return "\n".join(lines) + "\n"


def _line(name: str, value: str) -> str:
    return f"  {name:<22} {value}"


def _shown(value: Any, unit: str) -> str:
    if unit == "%":
        return f"{value:.1%}"
    return printable(f"{value:.5g}" if isinstance(value, float) else str(value)) + unit


def printable(text: str) -> str:
    """Return text in which nothing moves the cursor or can't be printed; such is escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


if __name__ == "__main__":
    main()
