"""Make a small audio-visual world with known truth: shapes that bounce, and are heard to.

One or two shapes fly under gravity in a box the size of the picture. Every impact on the
floor or a wall sounds at that instant: pitch and timbre tell shape and size, loudness tells
speed. So the sound can be predicted from the picture, and a model that learned to do so can
be scored without a listener (`tools.score_onsets`).

    clip-000000.mp4    picture and sound
    clip-000000.txt    the caption
    clip-000000.json   the truth: objects, and the time, speed and loudness of every impact
    .clips.json        the settings that all clips of the folder were made with

Clip i depends on the settings and i alone, so that a folder can grow. The world itself is in
`tools.bouncing`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.files import write_json
from pipeline.format import FormatError, read_json
from pipeline.mux import write_mp4
from pipeline.settings import ConfigError
from tools.bouncing import ClipSettings, describe, draw_frames, draw_sound, draw_world, truth


def write_clip(out: Path, settings: ClipSettings, index: int) -> bool:
    """Write clip ``index``, its truth last; return False where it was there already."""
    stem = f"clip-{index:06d}"
    if (out / f"{stem}.json").exists():
        return False
    bodies = draw_world(np.random.default_rng([settings.seed, index]), settings)
    frames, sound = draw_frames(bodies, settings), draw_sound(bodies, settings)
    write_mp4(out / f"{stem}.mp4", frames, settings.fps, sound, settings.sample_rate)
    (out / f"{stem}.txt").write_text(describe(bodies) + "\n")
    write_json(out / f"{stem}.json", {"index": index, **truth(bodies, settings)})
    return True


def open_folder(out: Path, settings: ClipSettings) -> None:
    """Make the folder, or check that it holds clips of the same settings.

    Raises:
        ConfigError: it holds something else.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = out / ".clips.json"  # hidden: readers of the folder look for media
    if record.exists():
        found = read_json(record)
        other = [f"{k} {found.get(k)}" for k, v in asdict(settings).items() if found.get(k) != v]
        if other:
            raise ConfigError(
                f"{out} holds clips of other settings ({', '.join(other)}); "
                "repeat those to add clips, or choose another --out"
            )
    elif any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and has no .clips.json; choose another --out")
    else:
        write_json(record, asdict(settings))


def make_clips(out: Path, settings: ClipSettings, count: int) -> int:
    """Write clips 0 … count − 1 that are not there yet, on all cores; return how many."""
    if count < 1:
        raise ConfigError(f"--count is {count}, expected 1 or more")
    open_folder(out, settings)
    # Spawned, not forked: the caller may hold threads of torch or FFmpeg.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        return sum(pool.map(partial(write_clip, out, settings), range(count), chunksize=4))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_clips",
        description="Make clips of bouncing shapes whose impacts are heard, with known truth.",
        epilog="The same settings with a larger --count add clips to a folder. Beyond about "
        "10 seconds the shapes come to rest.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or grown")
    parser.add_argument("--count", type=int, default=64, help="clips that the folder shall hold")
    helps = {
        "seconds": "length of a clip", "size": "width and height in pixels",
        "fps": "frames per second", "sample_rate": "of the sound, in Hz",
        "seed": "another seed makes other clips", "max_shapes": "most shapes in a clip",
    }  # fmt: skip
    for name, default in asdict(ClipSettings()).items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(default), default=default, help=helps[name])
    values = vars(parser.parse_args(arguments))
    out, count = values.pop("out"), values.pop("count")
    try:
        num_written = make_clips(out, ClipSettings(**values), count)
    except (ConfigError, FormatError, OSError) as error:
        print(f"make_clips: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {num_written} clips written, {count - num_written} were there already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
