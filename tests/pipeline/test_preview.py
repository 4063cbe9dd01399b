"""The gallery shows what is stored beside what it was made of, and says what was lost."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest

from pipeline import preview, settings
from pipeline.config import EncodeConfig
from pipeline.format import FormatError, open_column, read_json, read_plan
from pipeline.pick import pick_rows
from pipeline.preview import picture_psnr_db, sound_distance_db
from pipeline.source_media import SourceMedia, decode_settings_of
from pipeline.stored_clips import StoredClips
from tests.pipeline.encoded import SETTINGS, Encoded, record_films


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preview")
    src = record_films(folder / "src", 5)
    return Encoded(folder / "data", src, settings.build(EncodeConfig, SETTINGS, "test")).build()


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command in this process, in a folder of its own."""

    def run(*arguments) -> Done:
        monkeypatch.setattr(sys, "argv", ["preview", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        try:
            code, message = preview.main() or 0, ""
        except SystemExit as stop:
            code, message = 1, f"{stop.code}\n"
        out, err = capsys.readouterr()
        return Done(code, out, err + message)

    return run


# -- the choice


@pytest.mark.parametrize("num", [1, 5, 12, 40])
def test_choice_is_random_by_seed_and_has_no_row_twice(num):
    def pick(seed):
        return pick_rows(range(8), range, num, seed)

    first = pick(0)
    assert first == pick(0) and len(set(first)) == len(first) == min(num, 28)
    assert num == 40 or len({tuple(pick(seed)) for seed in range(20)}) > 5
    assert all(0 <= row < shard for shard, row in first)


def test_choice_looks_into_no_more_shards_than_it_takes():
    looked = []

    def fitting(shard):
        looked.append(shard)
        return range(4)

    assert len(pick_rows(range(1000), fitting, 3, 0)) == 3
    assert len(looked) == 3


def test_every_row_may_be_chosen():
    chosen = {pick_rows(range(3), lambda _: [0, 1, 4], 1, seed)[0] for seed in range(200)}
    assert chosen == {(shard, row) for shard in range(3) for row in (0, 1, 4)}


# -- what was lost


def test_psnr_is_that_of_its_definition():
    one = np.full((2, 4, 4, 3), 100, np.uint8)
    other = np.full((3, 4, 4, 3), 110, np.uint8)
    assert picture_psnr_db(one, other) == pytest.approx(10 * np.log10(255**2 / 100), abs=0.01)
    assert picture_psnr_db(other, one) == picture_psnr_db(one, other)
    assert picture_psnr_db(one, one) == 100
    assert picture_psnr_db(one, other[:, :2]) is None and picture_psnr_db(None, one) is None


def test_sound_distance_is_that_of_levels():
    noise = np.random.default_rng(0).normal(0, 0.1, (1, 16000)).astype(np.float32)
    assert sound_distance_db(noise, noise, 16000) == 0
    assert sound_distance_db(noise, noise / 2, 16000) == pytest.approx(6.02, abs=0.01)
    assert sound_distance_db(None, noise, 16000) is None


# -- source media


def test_decoding_again_gives_what_was_encoded(encoded):
    specs = {m: encoded.columns[m].spec for m in ("video", "audio")}
    with SourceMedia(str(encoded.src)) as media:
        for start in ("thing_film1", "thing_mute"):
            (key,) = [key for key in keys_of(encoded) if key.startswith(start)]
            _, _, clip = encoded.clip(key)
            expected = encoded.decode(clip)
            found = media.decode(clip, decode_settings_of(specs), {"video", "audio"})
            assert found.problems == expected.problems
            assert_same(found.frames, expected.frames)
            assert_same(found.sound, expected.sound)
        alone = media.decode(clip, decode_settings_of({"video": specs["video"]}), {"video"})
    assert_same(alone.frames, found.frames)
    assert alone.sound is None


def assert_same(one, other):
    assert (one is None) == (other is None)
    np.testing.assert_array_equal(one, other)


def keys_of(encoded):
    clips = StoredClips(encoded.root, encoded.plan, {"video": None, "audio": None})
    return [clips.read(s, r).clip.key for s in clips.shards for r in clips.usable(s, None)]


def test_missing_media_are_a_status(encoded):
    _, _, clip = encoded.clip(keys_of(encoded)[0])
    for root in (str(encoded.root), None):
        with SourceMedia(root) as media:
            specs = {"video": encoded.columns["video"].spec}
            found = media.decode(clip, decode_settings_of(specs), {"video"})
        assert found.problems["video"][0] == "missing"


def test_column_that_does_not_tell_its_preprocessing_is_named(encoded):
    spec = replace(encoded.columns["video"].spec, preprocessing={"fps": 8.0})
    with pytest.raises(FormatError, match=f"{spec.directory}.*does not tell"):
        decode_settings_of({"video": spec})


# -- the command


def test_gallery_shows_source_and_latents_of_every_clip(encoded, run, tmp_path):
    done = run(encoded.root, "--num", 6, "--json", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    clips = {clip["key"]: clip for clip in told["clips"]}
    assert set(clips) == set(keys_of(encoded)) and len(clips) == 6
    for key, clip in clips.items():
        is_mute = "mute" in key
        assert clip["statuses"] == {"video": "ok", "audio": "no_audio" if is_mute else "ok"}
        assert clip["psnr_db"] > 20
        assert (clip["log_mel_distance_db"] is None) == is_mute
        assert is_mute or 0 < clip["log_mel_distance_db"] < 12
        media = {path.name for path in (tmp_path / "out" / "media").glob(f"{key}.*")}
        assert media == {f"{key}.source.mp4", f"{key}.latents.mp4"}
    page = (tmp_path / "out" / "index.html").read_text()
    assert told["gallery"] == str(tmp_path / "out" / "index.html")
    assert page.count("<video") == 12 and page.count('alt="spectrogram"') == 10
    assert re.search(r"PSNR \d\d\.\d dB, log-mel distance \d+\.\d dB", page)


def test_data_set_is_not_changed(encoded, run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in encoded.root.rglob("*")}
    assert run(encoded.root, "--num", 1).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in encoded.root.rglob("*")} == before
    assert (tmp_path / "preview" / "index.html").exists()


def test_without_its_media_only_the_latents_are_shown(encoded, run, tmp_path):
    done = run(encoded.root, "--num", 1, "--src", tmp_path, "--json")
    (clip,) = json.loads(done.stdout)["clips"]
    assert done.returncode == 0 and clip["psnr_db"] is None
    assert "missing" in clip["source_problems"]["video"]
    page = (tmp_path / "preview" / "index.html").read_text()
    assert page.count("<video") == 1 and "missing: no file" in page


def test_moved_media_are_found_with_src(encoded, run, tmp_path):
    shutil.copytree(encoded.src, tmp_path / "moved")
    key = keys_of(encoded)[0]
    done = run(encoded.root, "--keys", key, "--src", tmp_path / "moved", "--json")
    (clip,) = json.loads(done.stdout)["clips"]
    assert clip["key"] == key and clip["psnr_db"] > 20


def test_one_column_alone_is_shown_alone(encoded, run, tmp_path):
    shutil.copytree(encoded.root, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / encoded.columns["video"].path.name)
    done = run(tmp_path / "data", "--num", 2)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "preview" / "index.html").read_text()
    assert page.count("<audio") == 4 and "<video" not in page
    assert "log-mel distance" in done.stdout and "PSNR" not in done.stdout


def test_split_and_too_few_clips(encoded, run, tmp_path):
    done = run(encoded.root, "--num", 100, "--split", "train")
    assert done.returncode == 0 and "fewer than --num 100: all are shown" in done.stderr
    done = run(encoded.root, "--split", "nothing")
    assert done.returncode == 1 and "no encoded clips of split 'nothing'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keys", "nobody"], "is not in the plan"),
        (["--video", "vae"], "has no video column 'vae'"),
        (["--audio", "00000000"], "has no audio column"),
    ],
)
def test_what_is_not_there_is_one_line(encoded, run, tmp_path, arguments, message):
    done = run(encoded.root, *arguments)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "preview").exists()


def test_clip_of_an_uncommitted_shard_is_named(encoded, tmp_path):
    shutil.copytree(encoded.root, tmp_path / "data")
    key = keys_of(encoded)[0]
    shard, _, _ = encoded.clip(key)
    (tmp_path / "data" / encoded.columns["audio"].path.name / f"{shard:06d}.json").unlink()
    clips = StoredClips(tmp_path / "data", encoded.plan, {"video": None, "audio": None})
    assert shard not in clips.shards
    with pytest.raises(FormatError, match="not committed in all columns"):
        clips.places([key])


def test_command_starts(encoded, tmp_path):
    command = [sys.executable, "-m", "pipeline.preview", str(encoded.root), "--num", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (tmp_path / "preview" / "index.html").exists(), done.stderr


def test_damaged_payload_is_one_line(encoded, run, tmp_path):
    shutil.copytree(encoded.root, tmp_path / "data")
    key = next(key for key in keys_of(encoded) if "film" in key)
    shard, row, _ = encoded.clip(key)
    column = open_column(
        tmp_path / "data", encoded.columns["video"].path.name, encoded.plan.plan_id
    )
    offset = int(column.index(shard, len(column.index(shard, 2)))["offset"][row])
    with column.tar_path(shard).open("r+b") as file:
        file.seek(offset)
        file.write(b"\x55\x55")
    done = run(tmp_path / "data", "--keys", key)
    assert done.returncode == 1 and "crc32c" in done.stderr
    assert f"row {row} ({key})" in done.stderr


def test_plan_without_a_root_shows_latents(encoded, run, tmp_path):
    shutil.copytree(encoded.root, tmp_path / "data")
    plan = read_json(tmp_path / "data" / "plan.json")
    plan["source"].pop("root")
    (tmp_path / "data" / "plan.json").write_text(json.dumps(plan))
    assert read_plan(tmp_path / "data").source.get("root") is None
    done = run(tmp_path / "data", "--num", 1)
    assert done.returncode == 0 and "plan.json does not say where" in done.stdout
