"""``python -m pipeline.preview DIR --num 8``: look at and listen to what a data set holds.

Decodes latents back through their codecs into a gallery, beside the source's own frames and sound
as the codecs were given them, with what the way there and back has lost.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import format as fmt
from pipeline.codecs import Codec, build_codec
from pipeline.data_root import open_root
from pipeline.gallery import Entry, Take, mel_decibels, write_gallery
from pipeline.media import Decoded
from pipeline.pick import pick_rows
from pipeline.source_media import SourceMedia, decode_settings_of
from pipeline.stored_clips import StoredClip, StoredClips
from pipeline.sweep import command_parser, one_line_errors, progress_bar

# What is called equal: beyond it, differences are of rounding.
MAX_PSNR_DB = 100.0


def main() -> None:
    """Parse the command line, write the gallery, print what was found."""
    parser = command_parser(
        "preview", "Decode latents back into a gallery, beside the media they were made of."
    )
    parser.add_argument("--num", type=int, default=8, help="clips, chosen at random (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default 0)")
    parser.add_argument("--split", help="choose among the clips of this split only")
    parser.add_argument("--keys", help="show these clips instead, comma-separated")
    parser.add_argument("--video", metavar="COLUMN", help="codec, fingerprint or folder")
    parser.add_argument("--audio", metavar="COLUMN", help="likewise (default: the only one)")
    parser.add_argument("--src", help="where the media are now (default: where the plan has them)")
    parser.add_argument(
        "--out", type=Path, default=Path("preview"), help="folder to write (default ./preview)"
    )
    arguments = parser.parse_args()
    if arguments.num < 1 or arguments.seed < 0:
        parser.error("--num must be 1 or more, --seed 0 or more")
    with one_line_errors("the data set was not changed"):
        summary = preview(arguments)
        print(json.dumps(summary, indent=2, allow_nan=False) if arguments.json else text(summary))


def preview(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the gallery that the command line asks for.

    Returns:
        Path of the gallery, columns, and for every clip what was found.

    Raises:
        FormatError: a column or clip is not there, or damaged.
    """
    root = open_root(arguments.dir)
    plan = fmt.read_plan(root)
    clips = StoredClips(root, plan, {"video": arguments.video, "audio": arguments.audio})
    directories = {m: column.path.name for m, column in clips.opened.items()}
    if arguments.keys:
        places = clips.places(arguments.keys.split(","))
    else:
        places = pick_rows(
            clips.shards,
            lambda shard: clips.usable(shard, arguments.split),
            arguments.num,
            arguments.seed,
        )
    what = f"clips of split {arguments.split!r}" if arguments.split else "clips"
    if not places:
        raise fmt.FormatError(
            f"{root} holds no encoded {what} in {' and '.join(directories.values())}"
        )
    if not arguments.keys and len(places) < arguments.num:
        found = f"{len(places)} encoded {what}, fewer than --num"
        sys.stderr.write(f"{root} holds {found} {arguments.num}: all are shown\n")
    told: list[dict[str, Any]] = []
    source = arguments.src or plan.source.get("root")
    with progress_bar(len(places), "clip") as bar:
        entries = iterate(clips, places, source, told, bar)
        note = f"{', '.join(directories.values())} of {root}"
        page = write_gallery(arguments.out, "Latents, decoded again", note, entries)
    return {"dir": str(root), "gallery": str(page), "columns": directories, "clips": told}


def iterate(
    clips: StoredClips,
    places: list[tuple[int, int]],
    source: str | None,
    told: list[dict[str, Any]],
    bar: Any,
) -> Iterator[Entry]:
    """Yield the clips for the gallery; append to ``told`` what programs are told of each."""
    specs = {modality: column.spec for modality, column in clips.opened.items()}
    settings = decode_settings_of(specs)
    codecs = {m: build_codec(spec.codec, spec.preprocessing) for m, spec in specs.items()}
    with SourceMedia(source) as media:
        for place in places:
            stored = clips.read(*place)
            decoded = media.decode(stored.clip, settings, set(specs))
            yield entry(stored, decoded, codecs, specs, told)
            bar.update()


def entry(
    stored: StoredClip,
    source: Decoded,
    codecs: dict[str, Codec],
    specs: dict[str, fmt.ColumnSpec],
    told: list[dict[str, Any]],
) -> Entry:
    """Decode a clip's latents, compare them with the source, and describe both."""
    made = {
        modality: codecs[modality].decode([latent.astype(np.float32)])[0]
        for modality, latent in stored.latents.items()
    }
    sample_rate = int(specs["audio"].preprocessing["sample_rate"]) if "audio" in specs else 0
    fps = float(specs["video"].preprocessing["fps"]) if "video" in specs else 0.0
    frames, sound = made.get("video"), made.get("audio")
    psnr_db = picture_psnr_db(source.frames, frames)
    mel_db = sound_distance_db(source.sound, sound, sample_rate)
    lost = measured(psnr_db, mel_db)
    lost += [f"{m}: {status}" for m, status in stored.statuses.items() if status != "ok"]
    problems = {m: ": ".join(p) for m, p in source.problems.items() if m in specs}
    told.append(
        {
            "key": stored.clip.key,
            "shard": stored.shard,
            "row": stored.row,
            "caption": stored.clip.caption,
            "split": stored.clip.split,
            "statuses": stored.statuses,
            "psnr_db": psnr_db,
            "log_mel_distance_db": mel_db,
            "source_problems": problems,
        }
    )
    missing = "; ".join(dict.fromkeys(problems.values()))
    takes = (
        Take("source", "source", source.frames, fps, source.sound, sample_rate, missing),
        Take("latents", "latents, decoded", frames, fps, sound, sample_rate, ", ".join(lost)),
    )
    place = f"shard {stored.shard} row {stored.row} · {stored.clip.split}"
    return Entry(stored.clip.key, stored.clip.caption, takes, place)


def picture_psnr_db(one: np.ndarray | None, other: np.ndarray | None) -> float | None:
    """Return the PSNR of the frames that both have; None where they can't be compared."""
    if one is None or other is None or one.shape[1:] != other.shape[1:]:
        return None
    count = min(len(one), len(other))
    difference = one[:count].astype(np.float32) - other[:count]
    mean_square = float(np.square(difference, out=difference).mean(dtype=np.float64))
    floor = 255**2 / 10 ** (MAX_PSNR_DB / 10)
    return round(10 * np.log10(255**2 / max(mean_square, floor)), 2)


def sound_distance_db(
    one: np.ndarray | None, other: np.ndarray | None, sample_rate: int
) -> float | None:
    """Return the mean absolute difference of mel spectrograms in dB, over what both have."""
    if one is None or other is None:
        return None
    mels = [mel_decibels(sound, sample_rate) for sound in (one, other)]
    count = min(mel.shape[1] for mel in mels)
    return round(float(np.abs(mels[0][:, :count] - mels[1][:, :count]).mean()), 2)


def measured(psnr_db: float | None, mel_db: float | None) -> list[str]:
    """Return what was lost on the way to latents and back, as far as it is known."""
    known = {"PSNR": psnr_db, "log-mel distance": mel_db}
    return [f"{name} {value:.1f} dB" for name, value in known.items() if value is not None]


def text(summary: dict[str, Any]) -> str:
    """Return the summary as lines for a person."""
    lines = []
    for clip in summary["clips"]:
        found = [f"{m} {status}" for m, status in clip["statuses"].items()]
        found += measured(clip["psnr_db"], clip["log_mel_distance_db"])
        found += [f"source: {p}" for p in dict.fromkeys(clip["source_problems"].values())]
        lines.append(f"{clip['key']}  {', '.join(found)}")
    return "\n".join([*lines, f"gallery: {summary['gallery']}"])


if __name__ == "__main__":
    main()
