"""Damaged files: 500 seeded mutations of small films, decoded and judged as the pipeline does."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pipeline.child import ChildProcess
from pipeline.format import STATUSES
from pipeline.media import ClipError
from tests.pipeline import films, scene

SECONDS = 2.4
FPS = 25  # as recorded, so that every frame is asked for once
RATE = 16000
SIZE = 96
DEADLINE_S = 30.0
NUM_FRAMES = round(SECONDS * FPS)
PIECE = RATE // 100
SILENCE = 3e-4  # the films' noise has peaks 30 times as high
SHARE_TOLERANCE = 0.01  # a damaged edge silences a piece that is otherwise there
NUM_MUTATIONS = 500  # 20 s
FILMS = {
    "a.mp4": ("libx264", "aac"),
    "b.mkv": ("libx264", "libmp3lame"),
    "c.webm": ("libvpx-vp9", "libopus"),
    "d.ts": ("libx264", "aac"),
}
MP4_PARENTS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"udta"}
EBML_PARENTS = {0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0xE0, 0xE1, 0x1F43B675, 0x1C53BB6B, 0xBB}


class Outcome(NamedTuple):
    """What became of one damaged film.

    Attributes:
        statuses: of picture and sound; ``messages`` likewise.
        numbers: of the frames as they show them, -1 where that can't be read; None if not ok.
        sound_share: share of 10 ms pieces of the sound that aren't silent, from where the file
            says that it starts; None if not ok.
    """

    statuses: tuple[str, ...]
    messages: tuple[str, ...]
    numbers: list[int] | None = None
    sound_share: float | None = None


# ---------------------------------------------------------------------------------------------
# Damage


def mutate(
    content: bytes, suffix: str, other: bytes, rng: np.random.Generator
) -> tuple[str, bytes]:
    """Return the name of a damage and the file with it."""
    kinds = [flip, flip_header, truncate, zero, scribble, insert, remove, splice]
    kind = str(rng.choice(["structure", "structure", *(function.__name__ for function in kinds)]))
    if kind == "structure":
        return rearrange(content, list(siblings(content, suffix)), rng)
    if kind == "splice":
        return kind, splice(content, other, rng)
    return kind, {function.__name__: function for function in kinds}[kind](content, rng)


def flip(content: bytes, rng: np.random.Generator, end: int | None = None) -> bytes:
    damaged = bytearray(content)
    for place in rng.integers(0, end or len(content), size=rng.choice([1, 4, 32])):
        damaged[place] ^= 1 << rng.integers(8)
    return bytes(damaged)


def flip_header(content: bytes, rng: np.random.Generator) -> bytes:
    return flip(content, rng, end=min(len(content), 2500))


def truncate(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(0, len(content))]


def some_range(content: bytes, rng: np.random.Generator) -> tuple[int, int]:
    start = int(rng.integers(0, len(content)))
    length = int(len(content) * rng.choice([0.001, 0.01, 0.1, 0.3]))
    return start, min(start + max(length, 1), len(content))


def zero(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = some_range(content, rng)
    return content[:start] + bytes(end - start) + content[end:]


def scribble(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = some_range(content, rng)
    return content[:start] + rng.bytes(end - start) + content[end:]


def insert(content: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(0, len(content)))
    return content[:start] + rng.bytes(int(rng.integers(1, 1000))) + content[start:]


def remove(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = some_range(content, rng)
    return content[:start] + content[end:]


def splice(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(0, len(content))] + other[rng.integers(0, len(other)) :]


def rearrange(
    content: bytes, groups: list[list[tuple[int, int]]], rng: np.random.Generator
) -> tuple[str, bytes]:
    """Swap, double or drop elements that have the same parent."""
    spans = groups[rng.integers(len(groups))]
    kind = str(rng.choice(["swap", "double", "drop"]))
    first, second = sorted(int(place) for place in rng.integers(0, len(spans), size=2))
    (a, b), (c, d) = spans[first], spans[second]
    if kind == "double":
        return kind, content[:b] + content[a:b] + content[b:]
    if kind == "drop" or first == second:
        return "drop", content[:a] + content[b:]
    return kind, content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def siblings(content: bytes, suffix: str) -> Iterator[list[tuple[int, int]]]:
    """Yield groups of (start, end) of boxes, EBML elements or packets with the same parent."""
    if suffix == ".mp4":
        yield from mp4_boxes(content, 0, len(content))
    elif suffix == ".ts":
        yield [(start, start + 188) for start in range(0, len(content) - 187, 188)]
    else:
        yield from ebml_elements(content, 0, len(content))


def mp4_boxes(content: bytes, start: int, end: int) -> Iterator[list[tuple[int, int]]]:
    spans = []
    while start + 8 <= end:
        size, kind = int.from_bytes(content[start : start + 4]), content[start + 4 : start + 8]
        spans.append((start, start + size))
        if kind in MP4_PARENTS:
            yield from mp4_boxes(content, start + 8, start + size)
        start += size
    yield spans


def ebml_elements(content: bytes, start: int, end: int) -> Iterator[list[tuple[int, int]]]:
    spans = []
    while start < end:
        id_length = 9 - content[start].bit_length()
        name = int.from_bytes(content[start : start + id_length])
        size_at = start + id_length
        size_length = 9 - content[size_at].bit_length()
        size = int.from_bytes(content[size_at : size_at + size_length]) & (1 << 7 * size_length) - 1
        begin = size_at + size_length
        stop = min(begin + size, end)  # of unknown length: to the end
        spans.append((start, stop))
        if name in EBML_PARENTS and stop > begin:
            yield from ebml_elements(content, begin, stop)
        start = stop
    yield spans


# ---------------------------------------------------------------------------------------------
# Decoding, in a child process


def prepare(folder: Path):
    """Return the function from a seed to (damage, outcome); runs in the child."""
    from pipeline.checks import judge
    from pipeline.config import CheckSettings, EncodeConfig, VideoSettings, decode_settings
    from pipeline.decode import decode_clip
    from pipeline.media import Clip

    clip = Clip(key="fuzz", uri="fuzz", start_s=0.0, duration_s=10.0)
    settings = decode_settings(EncodeConfig(video=VideoSettings(fps=FPS, size=SIZE)))
    regions = films.Picture().decoded_regions(SIZE, SIZE, "crop")

    def decode(path: Path) -> Outcome:
        decoded = judge(decode_clip(path, clip, settings, {"video", "audio"}), CheckSettings())
        numbers = sound_share = None
        if decoded.frames is not None:
            colours = scene.region_colours(decoded.frames, regions, border=1)
            numbers = scene.numbers_shown(colours).tolist()
        if decoded.sound is not None:
            start = max(round(decoded.facts["audio_offset_s"] * RATE), 0)
            sound = decoded.sound[0, start:]
            pieces = np.abs(sound[: len(sound) // PIECE * PIECE]).reshape(-1, PIECE)
            sound_share = float((pieces.max(axis=1, initial=0) > SILENCE).mean())
        problems = [decoded.problems.get(modality, ("ok", "")) for modality in ("video", "audio")]
        statuses, messages = zip(*problems, strict=True)
        return Outcome(statuses, messages, numbers, sound_share)

    def decode_damaged(argument: tuple[str, int | None]) -> Outcome:
        name, seed = argument
        if seed is None:
            return decode(folder / name)
        target = (folder / "damaged").with_suffix(Path(name).suffix)
        target.write_bytes(damaged(folder / name, seed)[1])
        return decode(target)

    return decode_damaged


def damaged(path: Path, seed: int) -> tuple[str, bytes]:
    """Return the name of this seed's damage, and a film with it."""
    rng = np.random.default_rng(seed)
    others = [other for other in FILMS if other != path.name]
    other = (path.parent / others[rng.integers(len(others))]).read_bytes()
    return mutate(path.read_bytes(), path.suffix, other, rng)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    for name, (video, audio) in FILMS.items():
        rate = 48000 if audio == "libopus" else 44100
        picture = films.Picture(video, seconds=SECONDS)
        films.record(folder / name, picture, films.Sound(audio, rate, seconds=SECONDS))
    return folder


# ---------------------------------------------------------------------------------------------
# What `ok` promises


def num_expected(numbers: list[int], suffix: str) -> int:
    """Return how many frames a file that shows these should have.

    Nothing in Matroska and in transport streams says that a file started earlier, and nothing in
    the latter that it went on: what has lost its ends is a shorter film.
    """
    shown = [number for number in numbers if number >= 0]
    first = 0 if suffix == ".mp4" or not shown else min(shown)
    last = max(shown) + 1 if suffix == ".ts" and shown else NUM_FRAMES
    return last - first


def num_different(numbers: list[int]) -> int:
    """Count frames that aren't the one before once more; one that is garbled was decoded."""
    return sum(a != b or a < 0 for a, b in zip(numbers, [None, *numbers], strict=False))


@pytest.fixture(scope="module")
def outcomes(folder):
    """Case -> outcome of every damage; a decoder that dies or hangs is replaced, as in a run."""
    outcomes = {}
    with ChildProcess(partial(prepare, folder), DEADLINE_S) as child:
        for name in FILMS:
            whole = child.call((name, None))
            assert whole == Outcome(("ok", "ok"), ("", ""), list(range(NUM_FRAMES)), 1.0)
        for seed in range(NUM_MUTATIONS):
            name = list(FILMS)[seed % len(FILMS)]
            try:
                outcome = child.call((name, seed))
            except ClipError as error:
                outcome = Outcome((error.status,) * 2, (error.message,) * 2)
            outcomes[f"{name} {damaged(folder / name, seed)[0]} (seed {seed})"] = outcome
    return outcomes


def test_every_damage_ends_in_a_status(outcomes):
    """A crash of FFmpeg would be one too; an error of ours, or a hang, is none."""
    counts = Counter(outcome.statuses for outcome in outcomes.values())
    print(f"\n{len(outcomes)} damaged films:")
    for (video, audio), count in counts.most_common():
        print(f"{count:5} picture {video}, sound {audio}")
    assert {status for statuses in counts for status in statuses} <= set(STATUSES)
    assert not any("decode_timeout" in statuses for statuses in counts)
    messages = [message for outcome in outcomes.values() for message in outcome.messages]
    assert not [message for message in messages if "the decoder raised" in message]


def test_ok_means_that_98_percent_are_there(outcomes):
    broken = []
    for case, outcome in outcomes.items():
        if outcome.numbers is not None:
            there = num_different(outcome.numbers)
            expected = num_expected(outcome.numbers, Path(case.split()[0]).suffix)
            if there < 0.98 * expected:
                broken.append(f"{case}: {there} of {expected} frames")
        if outcome.sound_share is not None and outcome.sound_share < 0.98 - SHARE_TOLERANCE:
            broken.append(f"{case}: {outcome.sound_share:.1%} of the sound")
    assert not broken, "ok, but not there:\n" + "\n".join(broken)


def test_damage_inside_frames_is_found_where_the_codec_can_tell(outcomes):
    """VP9 decodes anything, and H.264 much of what comes in another order or without a part."""
    garbled = {
        case: outcome.numbers.count(-1)
        for case, outcome in outcomes.items()
        if outcome.numbers is not None and -1 in outcome.numbers
    }
    print(f"\n{len(garbled)} pictures of {len(outcomes)} are ok, but hold frames that are garbled:")
    for case, count in garbled.items():
        print(f"{case}: {count} of {NUM_FRAMES}")
    assert not [case for case in garbled if case.startswith("a.mp4")]
