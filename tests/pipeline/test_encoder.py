"""A shard's columns and facts, whatever was known, missing or broken before. No Ray."""

import numpy as np
import pytest

from pipeline import format as fmt
from pipeline.checks import facts_directory, facts_path, read_facts
from pipeline.codecs.builtin import DctVideo, LogmelAudio
from pipeline.config import EncodeConfig, column_specs, decode_settings
from pipeline.decode import decode_clip
from pipeline.duplicates import settle_duplicates
from pipeline.encoder import ShardEncoder
from pipeline.facts_check import FactsCheck, Judged
from pipeline.jobs import ShardTask
from pipeline.media import Clip, ClipError, Decoded
from pipeline.mux import write_mp4
from pipeline.old_rows import take_back
from pipeline.settings import load
from pipeline.shards import create_column
from pipeline.work import FAILED, open_work, reopen
from tests.pipeline.pools import InProcessPool, mailbox_of, make_job

SETTINGS = ["video.size=64", "clip.seconds=2"]


class Run:
    """A source and a data set of one shard; its clips are the files named."""

    def __init__(self, root, *names):
        self.media, self.root, self.attempt = root / "media", root / "shards", 0
        self.media.mkdir()
        self.root.mkdir()
        self.clips = [Clip(name, f"{name}.mp4", 0.0, 2.0) for name in names]
        self.plan = fmt.Plan(
            plan_id="plan",
            seed=0,
            source={},
            clips=(fmt.PlanSegment(0, len(names), len(names)),),
            captions=(fmt.PlanSegment(0, 1, len(names)),),
        )
        self.decoded = []

    def film(self, name, seed=0, sound=True, still=False, seconds=2.0):
        count = round(25 * seconds)
        noise = np.random.default_rng(seed).integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
        frames = noise.repeat(8, axis=1).repeat(8, axis=2)
        frames = frames[:1].repeat(count, axis=0) if still else frames
        tone = 0.3 * np.sin(np.arange(round(16000 * seconds)) / (9 + seed)) if sound else None
        write_mp4(self.media / f"{name}.mp4", frames, 25, tone, 16000)

    def encode(self, *settings):
        """Encode what lacks a commit; return modality -> (statuses of the column, messages)."""
        config = load(EncodeConfig, None, [*SETTINGS, *settings])
        specs = {m: spec for m, spec in column_specs(config).items() if m != "text"}
        self.attempt += 1
        job = make_job(
            root=str(self.root),
            facts=facts_directory("plan", config),
            run_id=f"run{self.attempt}",
            columns=specs,
            media_root=str(self.media),
            decode=decode_settings(config),
            checks=config.checks,
        )
        self.facts, self.checks = self.root / job.facts, config.checks
        self.columns = {m: create_column(self.root, spec, "plan") for m, spec in specs.items()}
        lacking = tuple(m for m, column in self.columns.items() if not self.committed(column))
        self.decoded, self.messages = [], {}
        if lacking:
            task = ShardTask(0, lacking, clips=self.clips)
            pool = InProcessPool(job.window_bytes, self.decoder(job))
            for news in ShardEncoder(job, pool).run(mailbox_of(task)):
                self.messages |= {failed.key: failed.message for failed in news.failed}
        return {m: self.statuses(column) for m, column in self.columns.items()}

    def reopen_failed(self):
        for item in open_work(self.plan, self.columns, FAILED):
            reopen(item, self.columns, FAILED)

    def committed(self, column):
        return 0 in column.committed_shards()

    def statuses(self, column):
        index = column.index(0, len(self.clips))
        return [fmt.STATUSES[code] for code in index["status"]]

    def decoder(self, job):
        def decode(clip, wanted):
            self.decoded.append((clip.key, frozenset(wanted)))
            try:
                return decode_clip(self.media / clip.uri, clip, job.decode, wanted)
            except ClipError as error:
                return Decoded.failed(error.status, error.message)

        return decode

    def fact(self, name):
        return [row[name] for row in read_facts(self.facts, 0) or ()]


def test_facts_of_what_was_missing_are_measured_when_it_is_there(tmp_path):
    """A still that came later is dropped from every column, the sound's too."""
    run = Run(tmp_path, "a", "x")
    run.film("a")
    still = "checks.still=drop"
    assert run.encode("columns=[video]", still) == {"video": ["ok", "missing"]}
    run.film("x", still=True)
    assert run.encode("columns=[audio]", still) == {"audio": ["ok", "still"]}
    assert run.fact("status") == ["ok", "still"]
    assert run.encode("columns=[video]", still) == {"video": ["ok", "missing"]}, "until asked for"
    run.reopen_failed()
    assert run.encode("columns=[video]", still) == {"video": ["ok", "still"]}
    assert run.fact("status") == ["ok", "still"]


def test_clip_that_was_cut_is_encoded_when_it_is_mended(tmp_path):
    """Also where a run was stopped right after it took the commits back."""
    run = Run(tmp_path, "a", "x")
    run.film("a")
    run.film("x", seed=1)
    whole = (run.media / "x.mp4").read_bytes()
    (run.media / "x.mp4").write_bytes(whole[: len(whole) // 2])
    assert run.encode()["video"] == ["ok", "truncated"]
    (run.media / "x.mp4").write_bytes(whole)
    run.reopen_failed()
    assert run.encode() == {"video": ["ok", "ok"], "audio": ["ok", "ok"]}
    assert run.fact("status") == ["ok", "ok"]


def test_facts_of_good_clips_stay_as_they_are_and_save_decoding(tmp_path):
    run = Run(tmp_path, "a", "still")
    run.film("a")
    run.film("still", still=True)
    run.encode("columns=[video]", "checks.still=drop")
    before = facts_path(run.facts, 0).stat().st_mtime_ns
    assert run.encode("columns=[audio]", "checks.still=drop")["audio"] == ["ok", "still"]
    assert run.decoded == [("a", {"audio"})]
    assert facts_path(run.facts, 0).stat().st_mtime_ns == before


def test_file_that_changed_between_two_columns_fails_the_second(tmp_path):
    run = Run(tmp_path, "a", "x")
    run.film("a")
    run.film("x", seed=1)
    run.encode("columns=[video]")
    hashes = run.fact("content_hash")
    run.film("x", seed=2)
    assert run.encode("columns=[audio]")["audio"] == ["ok", "unreadable"]
    assert "file changed" in run.messages["x"] and hashes[1] in run.messages["x"]
    assert run.fact("content_hash") == hashes


def test_what_a_codec_finds_is_no_fact(tmp_path):
    """One latent of 16 frames needs two seconds at 8 fps; another codec encodes less."""
    run = Run(tmp_path, "a", "short")
    run.film("a")
    run.film("short", seconds=1.5)
    first = run.encode("columns=[video]", "video.codec.frames=16")
    assert first["video"] == ["ok", "too_short"]
    assert run.messages["short"] == "12 frames, expected 16 for one latent at least"
    assert run.fact("status") == run.fact("video_status") == ["ok", "ok"]
    assert run.encode() == {"video": ["ok", "ok"], "audio": ["ok", "ok"]}


@pytest.mark.parametrize("columns", ["columns=[video]", "columns=[video,audio]"])
def test_films_without_sound_are_flagged_and_found_twice(tmp_path, columns):
    run = Run(tmp_path, "a", "b", "c")
    run.film("a", sound=False, still=True)
    for name in ("b", "c"):
        (run.media / f"{name}.mp4").write_bytes((run.media / "a.mp4").read_bytes())
    run.encode(columns)
    flagged = settle_duplicates(run.plan, run.columns, run.facts, run.checks).flagged
    assert flagged == {"duplicate": 2, "still": 3}
    run.encode(columns, "checks.duplicate=drop")
    settled = settle_duplicates(run.plan, run.columns, run.facts, run.checks)
    assert (settled.num_dropped, settled.flagged) == (2, {"still": 1})
    assert run.statuses(run.columns["video"]) == ["ok", "duplicate", "duplicate"]
    assert run.encode(columns, "checks.duplicate=drop")["video"][1:] == ["duplicate"] * 2


def test_only_failed_clips_are_decoded_again(tmp_path):
    """The others are copied, though their files are gone by then; bytes are as if none failed."""
    run = Run(tmp_path, "a", "x", "b")
    for seed, name in enumerate(("a", "x", "b")):
        run.film(name, seed=seed)
    (run.media / "x.mp4").rename(tmp_path / "x.mp4")
    run.encode()
    (tmp_path / "x.mp4").rename(run.media / "x.mp4")
    for name in ("a", "b"):
        (run.media / f"{name}.mp4").rename(tmp_path / f"{name}.mp4")
    run.reopen_failed()
    assert run.encode() == {"video": ["ok"] * 3, "audio": ["ok"] * 3}
    assert run.decoded == [("x", {"video", "audio"})]
    assert not list(run.root.rglob(".*"))

    undisturbed = Run(make_folder(tmp_path / "undisturbed"), "a", "x", "b")
    for name in ("a", "b", "x"):
        there = tmp_path if name != "x" else run.media
        (there / f"{name}.mp4").rename(undisturbed.media / f"{name}.mp4")
    undisturbed.encode()
    assert payloads(undisturbed) == payloads(run)


def test_codec_that_failed_over_sound_costs_no_picture_again(tmp_path, monkeypatch):
    """Its facts are known: only what lacks a latent is decoded."""
    run = Run(tmp_path, "a", "x")
    run.film("a")
    run.film("x", seed=1)
    encode, num_calls = LogmelAudio.encode, []

    def fail_once(self, batch):
        num_calls.append(len(batch))
        if len(num_calls) == 2:
            raise ArithmeticError("no sound today")
        return encode(self, batch)

    monkeypatch.setattr(LogmelAudio, "encode", fail_once)
    assert run.encode() == {"video": ["ok", "ok"], "audio": ["ok", "encode_error"]}
    run.reopen_failed()
    assert run.encode() == {"video": ["ok", "ok"], "audio": ["ok", "ok"]}
    assert run.decoded == [("x", {"audio"})]


def test_clip_that_is_worse_when_it_is_tried_again_stays_as_it_was(tmp_path):
    """In latents, statuses and facts: its picture was fine, and only its sound was asked for."""
    run = Run(tmp_path, "mute", "gone")
    run.film("mute", sound=False)
    statuses = {"video": ["ok", "missing"], "audio": ["no_audio", "missing"]}
    assert run.encode() == statuses
    before, facts = payloads(run), read_facts(run.facts, 0)
    (run.media / "mute.mp4").rename(tmp_path / "mute.mp4")
    run.reopen_failed()
    assert run.encode() == statuses
    assert payloads(run) == before and read_facts(run.facts, 0) == facts
    assert contradictions(run) == []


def test_other_checks_lose_no_latent_of_media_that_are_gone(tmp_path):
    """They judge by what was measured then."""
    run = Run(tmp_path, "a", "still", "gone")
    run.film("a")
    run.film("still", still=True)
    run.encode()
    before, flags, hashes = payloads(run), run.fact("flags"), run.fact("content_hash")
    assert flags == [[], ["still"], []]
    for path in run.media.iterdir():
        path.unlink()
    run.reopen_failed()
    statuses = ["ok", "ok", "missing"]
    assert run.encode("checks.min_motion=0") == {"video": statuses, "audio": statuses}
    assert payloads(run) == before and run.fact("status") == statuses
    assert run.fact("content_hash") == hashes and run.fact("flags") == [[], [], []]
    assert contradictions(run) == []


def test_same_film_costs_no_codec_again_and_another_takes_its_place_whole(tmp_path, monkeypatch):
    run = Run(tmp_path, "same", "other")
    for seed, name in enumerate(("same", "other")):
        run.film(name, sound=False, seed=seed)
    assert run.encode()["audio"] == ["no_audio", "no_audio"]
    run.film("other", seed=5)
    for column in run.columns.values():
        take_back(column, 0)
    num_encoded, encode = [], DctVideo.encode

    def count(self, batch):
        num_encoded.append(len(batch))
        return encode(self, batch)

    monkeypatch.setattr(DctVideo, "encode", count)
    assert run.encode() == {"video": ["ok", "ok"], "audio": ["no_audio", "ok"]}
    assert len(num_encoded) == 1 and contradictions(run) == []
    assert payloads(run) == payloads(undisturbed(run, tmp_path / "again"))


def test_latent_of_another_film_than_the_facts_are_of_is_not_copied(tmp_path):
    """Facts of other checks, which another column was encoded with after a film was replaced."""
    run = Run(tmp_path, "a", "gone")
    run.film("a")
    run.encode("columns=[video]")
    columns = run.columns
    run.film("a", seed=5)
    run.encode("columns=[audio]", "checks.min_motion=0")
    take_back(columns["video"], 0)
    assert run.encode("columns=[video]", "checks.min_motion=0")["video"] == ["ok", "missing"]
    assert run.decoded == [("a", {"video"})]
    again = undisturbed(run, tmp_path / "again", "columns=[video]")
    assert payloads(run) == payloads(again)


def contradictions(run):
    """Return what verify would say of the facts and the columns that were judged by them."""
    judged = [
        Judged(column, 0, column.committed(0)["facts"], column.index(0, len(run.clips))["status"])
        for column in run.columns.values()
    ]
    return FactsCheck(run.root, print).look(0, [clip.key for clip in run.clips], judged)


def undisturbed(run, root, *settings):
    """Return another data set of the media as they are now."""
    again = Run(make_folder(root), *(clip.key for clip in run.clips))
    for path in run.media.iterdir():
        (again.media / path.name).write_bytes(path.read_bytes())
    again.encode(*settings)
    return again


@pytest.mark.parametrize("damage", ["payload", "index", "record", "tar is gone"])
def test_rows_that_are_damaged_are_encoded_again(tmp_path, damage):
    run = Run(tmp_path, "a", "x")
    run.film("a")
    run.encode()
    run.film("x", seed=1)
    run.reopen_failed()
    folder = run.columns["video"].path
    path = {"payload": "000000.tar", "index": "000000.idx.npy", "tar is gone": "000000.tar"}.get(
        damage, ".000000.reopened.tmp"
    )
    data = bytearray((folder / path).read_bytes())
    data[{"payload": 2000, "record": 0}.get(damage, len(data) // 2)] ^= 1
    (folder / path).write_bytes(data)
    if damage == "tar is gone":
        (folder / path).unlink()
    assert run.encode() == {"video": ["ok", "ok"], "audio": ["ok", "ok"]}
    assert sorted(run.decoded) == [("a", {"video"}), ("x", {"video", "audio"})]
    again = Run(make_folder(tmp_path / "again"), "a", "x")
    again.film("a")
    again.film("x", seed=1)
    again.encode()
    assert payloads(again) == payloads(run)


def make_folder(path):
    path.mkdir()
    return path


def payloads(run):
    """Return the tars and indexes of a data set's columns."""
    files = [path for column in run.columns.values() for path in column.path.iterdir()]
    return {
        str(path.relative_to(run.root)): path.read_bytes()
        for path in files
        if path.suffix in (".tar", ".npy")
    }
