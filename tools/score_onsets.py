"""Score generated sound against the known truth of a bouncing world: does it hit when it is seen?

Reads the folder that `train.sample` wrote for the task v2a and the clips that
`tools.make_clips` made, detects onsets and counts those within ±60 ms of an impact, pooled over
clips (micro F1) for

    generated          the sound that the model made for the picture
    codec round trip   the stored latents decoded: the best that any model can reach
    chance             the round trip of other clips: right sounds at wrong times
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.decode import read_sound
from pipeline.files import write_json
from pipeline.format import FormatError, read_json
from pipeline.media import ClipError
from train.metrics.onsets import OnsetScore, onset_f1, onset_times, pool

SAMPLE_RATE_HZ = 16000  # what the detector's constants were chosen at
MAX_SHIFTS = 8  # other clips that each clip is compared with for chance


@dataclass(frozen=True)
class ScoredClip:
    """The onsets of one clip in seconds of the sample, each float64 [onsets]."""

    uri: str
    true_s: np.ndarray
    source_s: np.ndarray
    generated_s: np.ndarray


def read_clips(samples: Path, truth: Path) -> list[ScoredClip]:
    """Read the onsets of every clip that ``samples``/samples.json lists.

    Raises:
        FormatError: a JSON file is missing or damaged, or the task leaves no sound to score.
        ClipError: an mp4 has no sound that can be read.
    """
    path = samples / "samples.json"
    listing = read_json(path)
    if listing.get("task") != "v2a":
        raise FormatError(
            f"{path} has task {listing.get('task')!r}, expected 'v2a': only there is sound made "
            "for a picture with known impacts; sample again with that task"
        )
    try:
        return [read_clip(samples, truth, clip) for clip in listing["clips"]]
    except (KeyError, TypeError) as error:
        raise FormatError(
            f"{path}, or a truth file in {truth}, lacks a field ({error!r}); "
            "write them again with train.sample and tools.make_clips"
        ) from None


def read_clip(samples: Path, truth: Path, clip: dict[str, Any]) -> ScoredClip:
    """Detect the onsets of one clip of the listing and cut its truth to the sampled span."""
    source = read_sound(samples / clip["source"], SAMPLE_RATE_HZ)
    generated = read_sound(samples / clip["generated"], SAMPLE_RATE_HZ)
    impacts = read_json(truth / f"{Path(clip['uri']).stem}.json")["impacts"]
    true_s = np.array([impact["time_s"] for impact in impacts]) - clip["start_s"]
    heard = (true_s >= 0) & (true_s < len(source) / SAMPLE_RATE_HZ)
    return ScoredClip(
        uri=clip["uri"],
        true_s=true_s[heard],
        source_s=onset_times(source, SAMPLE_RATE_HZ),
        generated_s=onset_times(generated, SAMPLE_RATE_HZ),
    )


def chance_score(clips: Sequence[ScoredClip]) -> OnsetScore:
    """Score each clip's truth against the round trip of the next clips of other sources.

    Raises:
        FormatError: all clips are of one source.
    """
    scores = [
        onset_f1(clips[(number + shift) % len(clips)].source_s, clip.true_s)
        for shift in range(1, min(MAX_SHIFTS, len(clips) - 1) + 1)
        for number, clip in enumerate(clips)
        if clips[(number + shift) % len(clips)].uri != clip.uri
    ]
    if not scores:
        raise FormatError("chance needs samples of two clips or more; sample more clips")
    return pool(scores)


def score(clips: Sequence[ScoredClip]) -> dict[str, OnsetScore]:
    """Return the three scores by name, in the order of the table."""
    return {
        "generated": pool(onset_f1(clip.generated_s, clip.true_s) for clip in clips),
        "codec round trip": pool(onset_f1(clip.source_s, clip.true_s) for clip in clips),
        "chance": chance_score(clips),
    }


def report(scores: dict[str, OnsetScore], num_clips: int) -> dict[str, Any]:
    """Return the scores as JSON values; ``ratio`` is generated / chance, None at chance 0."""
    table = {
        name.replace(" ", "_"): {
            "f1": value.f1,
            "precision": value.precision,
            "recall": value.recall,
            "num_predicted": value.num_predicted,
            "num_true": value.num_true,
        }
        for name, value in scores.items()
    }
    chance = scores["chance"].f1
    ratio = scores["generated"].f1 / chance if chance else None
    return {"num_clips": num_clips, **table, "ratio": ratio}


def print_table(scores: dict[str, OnsetScore], ratio: float | None) -> None:
    """Print one line for each score, and the ratio."""
    print(f"{'':20}{'F1':>7}{'precision':>11}{'recall':>8}{'onsets':>8}{'impacts':>9}")
    for name, value in scores.items():
        shares = f"{value.f1:7.3f}{value.precision:11.3f}{value.recall:8.3f}"
        print(f"{name:20}{shares}{value.num_predicted:8}{value.num_true:9}")
    print(f"{'generated / chance':20}" + ("      –" if ratio is None else f"{ratio:7.2f}"))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.score_onsets",
        description="Score generated sound against the known impacts of tools.make_clips.",
    )
    parser.add_argument(
        "--samples", type=Path, required=True, metavar="OUT", help="folder of train.sample"
    )
    parser.add_argument(
        "--truth", type=Path, required=True, metavar="CLIPS", help="folder of tools.make_clips"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores here, too")
    options = parser.parse_args(arguments)
    try:
        clips = read_clips(options.samples, options.truth)
        scores = score(clips)
        result = report(scores, len(clips))
        if options.json:
            write_json(options.json, result)
    except ClipError as error:
        print(f"score_onsets: {error.message}", file=sys.stderr)
        return 1
    except (FormatError, OSError) as error:
        print(f"score_onsets: {error}", file=sys.stderr)
        return 1
    print_table(scores, result["ratio"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
