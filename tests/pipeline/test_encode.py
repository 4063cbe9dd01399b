"""The encode command as a user runs it: real Ray, real files, real kills.

Slow is what ``test_encoder.py``, ``test_plan.py`` and ``test_hard_clips.py`` show, too, without the
command, or ``tests/tools/test_chaos.py`` with it.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import webdataset

from pipeline import format as fmt
from pipeline.mux import write_mp4
from pipeline.plan_table import PlanTable
from pipeline.request import parse
from train.config import DataConfig
from train.data.census import NOT_USABLE
from train.data.view import open_view

SETTINGS = ["shard_size=4", "video.size=64", "video.fps=16", "clip.seconds=2", "decoders=1"]
RUN_TIMEOUT_S = 180


def encode(src, out, *arguments, settings=SETTINGS):
    """Run the command to its end."""
    command = [sys.executable, "-m", "pipeline.encode", "--src", str(src), "--out", str(out)]
    return subprocess.run(
        [*command, *arguments, *settings],
        check=False,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
    )


def start_encode(src, out):
    """Start the command in a process group of its own, as a terminal does."""
    command = [sys.executable, "-m", "pipeline.encode", "--src", str(src), "--out", str(out)]
    return subprocess.Popen(
        [*command, *SETTINGS],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_commits(out, count, process):
    """Wait until the video column has ``count`` commits; fail if the run ends before."""
    end = time.monotonic() + RUN_TIMEOUT_S
    while len(list(out.glob("video@*/0*.json"))) < count:
        assert process.poll() is None, f"the run ended early: {process.communicate()}"
        assert time.monotonic() < end, "no commit came"
        time.sleep(0.02)


def payload_hashes(out):
    """Return path -> SHA-256 of every tar and index."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in ("*@*/*.tar", "*@*/*.npy")
        for path in sorted(out.glob(pattern))
    }


def all_files(out):
    """Return path -> (content hash, mtime) of everything but the folders of the runs."""
    return {
        str(path.relative_to(out)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(out.rglob("*"))
        if path.is_file() and "runs" not in path.relative_to(out).parts
    }


def assert_untouched(before, after):
    """Compare ``all_files``; duplicates.parquet names the columns it was settled for last."""
    kept = {path for path in before if not path.endswith("/duplicates.parquet")}
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of 24 rendered clips and three files that can't become latents."""
    folder = tmp_path_factory.mktemp("source") / "clips"
    command = [sys.executable, "-m", "tools.make_clips", "--out", str(folder), "--count", "24"]
    subprocess.run(command, check=True, capture_output=True, timeout=RUN_TIMEOUT_S)
    (folder / "clip-000003.mp4").write_bytes(b"<html>not a movie</html>")
    whole = (folder / "clip-000005.mp4").read_bytes()
    (folder / "clip-000005.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.pdf").write_bytes(b"skipped")
    return folder


@pytest.fixture(scope="module")
def dataset(clips, tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("dataset") / "shards"
    done = encode(clips, out)
    assert done.returncode == 0, done.stderr
    return out


def test_plain_webdataset_reads_every_column(dataset):
    for name in fmt.column_directories(dataset):
        modality = name.partition("@")[0]
        tars = sorted(str(path) for path in (dataset / name).glob("*.tar"))
        samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
        records = [
            json.loads(path.read_text()) for path in sorted((dataset / name).glob("0*.json"))
        ]
        assert len(samples) == sum(record["ok"] for record in records) > 0
        for sample in samples:
            assert sample[f"{modality}.npy"].dtype == np.float16


def test_rows_are_the_plans_clips_and_bad_clips_are_tombstones(dataset, clips):
    plan = fmt.read_plan(dataset)
    table = pq.read_table(dataset / "plan.parquet").to_pylist()
    assert sorted(row["uri"] for row in table) == [f"clip-{i:06d}.mp4" for i in range(24)]
    assert {row["caption"] for row in table} == {
        path.read_text().strip() for path in clips.glob("*.txt")
    }
    for modality in ("video", "audio"):
        column = fmt.find_column(dataset, modality, None, plan.plan_id)
        for shard, rows in enumerate(plan.shard_rows().tolist()):
            keys = [row["key"] for row in table if row["shard"] == shard]
            index = column.index(shard, rows)
            statuses = [fmt.STATUSES[code] for code in index["status"]]
            for key, status in zip(keys, statuses, strict=True):
                damaged = key in ("clip-000003", "clip-000005")
                assert (status != "ok") == damaged, (key, status)
            assert column.commit(shard)["keys_hash"] == fmt.keys_hash(keys)


def test_facts_say_what_was_wrong(dataset):
    facts = [
        row for path in dataset.glob("facts@*/*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    assert len(facts) == 24
    by_key = {row["key"]: row for row in facts}
    assert by_key["clip-000003"]["status"] == "unreadable"
    assert by_key["clip-000005"]["status"] == "truncated"
    assert by_key["clip-000003"]["message"]
    assert by_key["clip-000000"]["duration_s"] == pytest.approx(2.0, abs=0.05)


def test_a_finished_run_does_nothing_again(dataset, clips):
    before = all_files(dataset)
    done = encode(clips, dataset)
    assert done.returncode == 0
    assert "0 shards to encode" in done.stderr
    assert all_files(dataset) == before


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(dataset, clips, tmp_path):
    out = tmp_path / "shards"
    process = start_encode(clips, out)
    wait_for_commits(out, 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(list(out.glob("video@*/0*.json"))) < 6, "killed too late to show anything"
    done = encode(clips, out)
    assert done.returncode == 0, done.stderr
    assert payload_hashes(out) == payload_hashes(dataset)
    assert not list(out.glob("*@*/.*")), "temporaries of the killed run are left"


@pytest.mark.slow
def test_a_lost_encoder_is_replaced_and_its_shard_done_again(dataset, clips, tmp_path):
    out = tmp_path / "shards"
    process = start_encode(clips, out)
    wait_for_commits(out, 2, process)
    family = psutil.Process(process.pid).children(recursive=True)
    (encoder,) = [child for child in family if child.cmdline()[0].startswith("ray::EncoderActor")]
    encoder.kill()
    _, errors = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, errors
    assert payload_hashes(out) == payload_hashes(dataset)
    assert not list(out.glob("*@*/.*")), "temporaries of the lost encoder are left"


def test_ctrl_c_keeps_commits_and_says_how_to_go_on(clips, tmp_path):
    out = tmp_path / "shards"
    process = start_encode(clips, out)
    wait_for_commits(out, 1, process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Go on with: python -m pipeline.encode --src" in errors
    assert "Traceback" not in errors
    committed = len(list(out.glob("video@*/0*.json")))
    assert 1 <= committed < 6
    assert len(list(out.glob("video@*/0*.tar"))) == committed


def test_a_second_audio_setting_adds_one_column_and_touches_nothing(dataset, clips, tmp_path):
    out = tmp_path / "shards"
    shutil.copytree(dataset, out)
    before = all_files(out)
    done = encode(clips, out, "--columns", "audio", settings=[*SETTINGS, "audio.codec.channels=12"])
    assert done.returncode == 0, done.stderr
    after = all_files(out)
    assert_untouched(before, after)
    added = {path.split("/")[0] for path in set(after) - set(before)}
    assert len(added) == 1
    assert added.pop().startswith("audio@logmel-")
    assert len(fmt.column_directories(out, "audio")) == 2


# -- verdicts: what is known of whole clips and of all clips together

ALL_DROP = [f"checks.{check}=drop" for check in ("silent", "still", "low_fps", "duplicate")]
ODD_SETTINGS = ["shard_size=2", "video.buckets=[[64,64],[48,80],[80,48]]", "clip.seconds=2"]
ODD_SETTINGS += ["decoders=1", *ALL_DROP]
VERDICTS = {
    "copy": "duplicate",
    "copy2": "duplicate",
    "silent": "silent",
    "slow": "low_fps",
    "still": "still",
    "tall": "ok",
    "whole": "ok",
    "wide": "ok",
}


@pytest.fixture(scope="module")
def odd_clips(tmp_path_factory):
    """Clips that are whole, but not what everyone wants; the shape of two is not square."""
    folder = tmp_path_factory.mktemp("odd") / "clips"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (50, 8, 8, 3), dtype=np.uint8)
    film = noise.repeat(12, axis=1).repeat(12, axis=2)  # 96 x 96
    tone = 0.3 * np.sin(np.arange(32000) / 9)
    write_mp4(folder / "whole.mp4", film, 25, tone, 16000)
    write_mp4(folder / "wide.mp4", film[:, :56], 25, tone, 16000)
    write_mp4(folder / "tall.mp4", film[:, :, :56], 25, tone, 16000)
    write_mp4(folder / "still.mp4", film[:1].repeat(50, axis=0), 25, tone, 16000)
    write_mp4(folder / "silent.mp4", film, 25, 0 * tone, 16000)
    write_mp4(folder / "slow.mp4", film[:10], 5, tone, 16000)
    for name in ("copy", "copy2"):
        shutil.copy(folder / "whole.mp4", folder / f"{name}.mp4")
    return folder


@pytest.fixture(scope="module")
def odd_dataset(odd_clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("odd-dataset") / "shards"
    done = encode(odd_clips, out, settings=[*ODD_SETTINGS, "max_failed_share=0"])
    assert done.returncode == 0, done.stderr
    assert "dropped: duplicate 2, low_fps 1, silent 1, still 1" in done.stdout
    return out


def rows_of(out, modality, wanted=None):
    """Return key -> (status, shape) of a column."""
    plan = fmt.read_plan(out)
    column = fmt.find_column(out, modality, wanted, plan.plan_id)
    found, table = {}, PlanTable(out, plan)
    for shard, rows in enumerate(plan.shard_rows().tolist()):
        keys = table.read(shard, [])["key"]
        for key, record in zip(keys, column.index(shard, rows), strict=True):
            found[key] = (fmt.STATUSES[record["status"]], tuple(record["shape"].tolist()))
    return found


def test_verdicts_are_tombstones_in_both_columns(odd_dataset):
    for modality in ("video", "audio"):
        statuses = {key: status for key, (status, _) in rows_of(odd_dataset, modality).items()}
        # Which of three copies is the first depends on the plan's order.
        copies = [statuses.pop(key) for key in ("whole", "copy", "copy2")]
        assert sorted(copies) == ["duplicate", "duplicate", "ok"]
        assert statuses == {key: VERDICTS[key] for key in statuses}
    (summary,) = odd_dataset.glob("runs/*/summary.json")
    assert json.loads(summary.read_text())["duplicates_dropped"] == 2


def test_every_row_has_the_shape_of_its_bucket(odd_dataset):
    shapes = {key: shape for key, (status, shape) in rows_of(odd_dataset, "video").items()}
    assert shapes["wide"] == (16, 16, 6, 10) and shapes["tall"] == (16, 16, 10, 6)
    square = [shapes[key] for key in ("whole", "copy", "copy2") if shapes[key][0]]
    assert square == [(16, 16, 8, 8)]
    for tar in odd_dataset.glob("video@*/*.tar"):
        for sample in webdataset.WebDataset(
            str(tar), shardshuffle=False, empty_check=False
        ).decode():
            assert sample["video.npy"].shape == shapes[sample["__key__"]]


@pytest.mark.slow
def test_another_codec_comes_to_the_same_verdicts(odd_clips, odd_dataset, tmp_path):
    """Stillness can't be seen in the sound: it is in the facts of the first run."""
    out = tmp_path / "shards"
    shutil.copytree(odd_dataset, out)
    before = all_files(out)
    settings = [*ODD_SETTINGS, "audio.codec.channels=12"]
    done = encode(odd_clips, out, "--columns", "audio", settings=settings)
    assert done.returncode == 0, done.stderr
    after = all_files(out)
    assert_untouched(before, after)
    (new,) = set(fmt.column_directories(out, "audio")) - {path.split("/")[0] for path in before}
    statuses = {key: status for key, (status, _) in rows_of(out, "audio", new).items()}
    assert statuses == {key: status for key, (status, _) in rows_of(out, "video").items()}


def test_decisions_are_not_retried_and_fail_no_run(odd_clips, odd_dataset):
    before = all_files(odd_dataset)
    settings = [*ODD_SETTINGS, "max_failed_share=0"]
    done = encode(odd_clips, odd_dataset, "--retry-failed", settings=settings)
    assert done.returncode == 0, done.stderr
    assert "0 shards to encode" in done.stderr
    assert all_files(odd_dataset) == before


@pytest.mark.slow
def test_lost_commits_come_back_to_the_same_bytes_though_copies_were_dropped(
    odd_clips, odd_dataset, tmp_path
):
    """As after a kill at any time: some shards lack a commit, one its facts as well."""
    out = tmp_path / "shards"
    shutil.copytree(odd_dataset, out)
    for record in [*out.glob("video@*/0*[02].json"), *out.glob("audio@*/0*[01].json")]:
        record.unlink()
    next(out.glob("facts@*/000000.parquet")).unlink()
    next(out.glob("facts@*/duplicates.parquet")).unlink()
    done = encode(odd_clips, out, settings=ODD_SETTINGS)
    assert done.returncode == 0, done.stderr
    assert payload_hashes(out) == payload_hashes(odd_dataset)
    facts = [path for path in all_files(out) if path.startswith("facts@")]
    assert facts == [path for path in all_files(odd_dataset) if path.startswith("facts@")]
    for path in facts:
        assert pq.read_table(out / path).equals(pq.read_table(odd_dataset / path)), path


@pytest.mark.slow
def test_flags_are_counted_and_cost_nothing(odd_clips, tmp_path):
    out = tmp_path / "shards"
    done = encode(odd_clips, out, settings=ODD_SETTINGS[: -len(ALL_DROP)])
    assert done.returncode == 0, done.stderr
    assert "flagged, but kept: duplicate 2, low_fps 1, silent 1, still 1" in done.stdout
    assert {status for status, _ in rows_of(out, "video").values()} == {"ok"}
    (summary,) = out.glob("runs/*/summary.json")
    flagged = {"duplicate": 2, "low_fps": 1, "silent": 1, "still": 1}
    assert json.loads(summary.read_text())["flagged"] == flagged


@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_nothing_half_written(clips, tmp_path):
    out = tmp_path / "small"
    out.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(out)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("a small tmpfs can't be mounted here (needs root)")
    try:
        done = encode(clips, out / "shards")
        assert done.returncode == 1
        assert "no room" in done.stderr.lower()
        assert "Traceback" not in done.stderr
        for tar in (out / "shards").glob("video@*/*.tar"):
            assert tar.with_suffix(".json").exists()
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--src", "{empty}", "--out", "{out}"], "no media"),
        (["--src", "{absent}", "--out", "{out}"], "no such file or folder"),
        (["--src", "{csv}", "--out", "{out}"], "bad.csv line 2"),
        (["--src", "{clips}", "--out", "{out}", "shard_sise=4"], "did you mean 'shard_size'?"),
        (["--src", "{clips}", "--out", "{out}", "video.fsp=4"], "did you mean 'video.fps'?"),
        (["--src", "{clips}", "--out", "{other}"], "neither empty nor a data set"),
        (["--src", "{clips}", "--out", "{clips}/shards"], "searched for media; expected a folder"),
        (["--src", "{clips}", "--out", "o\udcff"], "is no UTF-8"),
        (["--src", "{clips}", "--out", ""], "--out is empty"),
        (
            ["--src", "{clips}", "--out", "{out}", "--columns", "vidoe"],
            "'video', 'audio' or 'text'",
        ),
        (["--src", "{clips}", "--out", "{out}", "--columns", ""], "columns"),
        (
            ["--src", "{clips}", "--out", "{out}", "video.size=100"],
            "multiple of codec.block 8",
        ),
        (["--src", "{clips}", "--out", "{out}", "audio.codec.fmin_hz=9000"], "nothing is left"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(clips, tmp_path, arguments, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.pdf").write_text("no media here")
    (tmp_path / "bad.csv").write_text(
        "-26aVYRtEAc,30,female singing,train\n0B4dYTMsgHA,x,a,train\n"
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").write_text("precious")
    places = {
        "empty": tmp_path / "empty",
        "absent": tmp_path / "absent",
        "csv": tmp_path / "bad.csv",
        "clips": clips,
        "out": tmp_path / "out",
        "other": tmp_path / "other",
    }
    command = [argument.format(**places) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.encode", *command],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.doc"]


def test_settings_may_stand_between_options():
    words = ["--src", "a", "video.size=64", "--out", "b", "--columns", "video", "decoders=1"]
    request, config = parse(words)
    assert (request.src, request.out) == ("a", "b")
    assert (config.video.size, config.columns, config.decoders) == (64, ("video",), 1)


def test_another_plan_is_refused_and_named(dataset, clips):
    before = all_files(dataset)
    settings = ["shard_size=5", *SETTINGS[1:]]
    done = encode(clips, dataset, settings=settings)
    assert done.returncode == 1
    assert "shard_size 4 there, 5 now" in done.stderr
    assert all_files(dataset) == before


def test_a_wrong_path_does_not_make_an_empty_data_set_quietly(tmp_path):
    (tmp_path / "rows.csv").write_text("".join(f"id{i:09d},0,label,train\n" for i in range(5)))
    done = encode(tmp_path / "rows.csv", tmp_path / "out")
    assert done.returncode == 1
    assert "missing 5" in done.stdout
    assert "max_failed_share" in done.stderr


@pytest.mark.slow
def test_failed_clips_are_encoded_again_when_asked(clips, tmp_path):
    source, out = tmp_path / "source", tmp_path / "shards"
    source.mkdir()
    rows = "".join(f"id{i},0,a bounce,train\n" for i in range(4))
    (source / "vggsound.csv").write_text(rows)
    for i in range(3):
        shutil.copy(clips / f"clip-{i:06d}.mp4", source / f"id{i}_000000.mp4")
    assert encode(source, out).returncode == 0
    shutil.copy(clips / "clip-000004.mp4", source / "id3_000000.mp4")
    assert "0 shards to encode" in encode(source, out).stderr
    done = encode(source, out, "--retry-failed")
    assert done.returncode == 0, done.stderr
    (column,) = (json.loads(path.read_text()) for path in out.glob("video@*/000000.json"))
    assert column["ok"] == 4
    (facts,) = out.glob("facts@*/000000.parquet")
    assert {row["status"] for row in pq.read_table(facts).to_pylist()} == {"ok"}


def test_help_lists_the_settings():
    command = [sys.executable, "-m", "pipeline.encode", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "  shard_size=512\n" in printed
    assert "  audio.sample_rate=16000\n" in printed


@pytest.mark.slow
def test_the_real_clips_are_all_ok(shared_clips, tmp_path):
    done = encode(shared_clips / "vggsound", tmp_path / "out", settings=["shard_size=8"])
    assert done.returncode == 0, done.stderr
    root = tmp_path / "out"
    plan = fmt.read_plan(root)
    for modality in ("video", "audio"):
        column = fmt.find_column(root, modality, None, plan.plan_id)
        records = [column.commit(shard) for shard in sorted(column.committed_shards())]
        assert [sum(r["ok"] for r in records), sum(r["rows"] for r in records)] == [17, 17]


@pytest.mark.slow
def test_every_hard_clip_ends_with_a_typed_status(shared_clips, tmp_path):
    done = encode(shared_clips / "hard", tmp_path / "out", settings=["max_failed_share=1"])
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("facts@*/000000.parquet")
    facts = pq.read_table(path).to_pylist()
    assert len(facts) == 66
    for row in facts:
        assert row["status"] in fmt.STATUSES
        assert bool(row["message"]) == (row["status"] != "ok"), row["key"]
        assert row["status"] not in ("decode_timeout", "decode_crash"), row["key"]


@pytest.mark.slow
def test_new_clips_are_appended_and_nothing_moves(clips, dataset, tmp_path):
    src, out = tmp_path / "clips", tmp_path / "shards"
    shutil.copytree(clips, src)
    shutil.copytree(dataset, out)
    before = payload_hashes(out)
    (src / "new.mp4").write_bytes((clips / "clip-000001.mp4").read_bytes())
    (src / "new.txt").write_text("a caption that is new")
    refused = encode(src, out)
    assert refused.returncode == 1 and "--extend appends" in refused.stderr
    done = encode(src, out, "--extend")
    assert done.returncode == 0, done.stderr
    after = payload_hashes(out)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 6  # a shard of video, of audio and of text
    again = encode(src, out)
    assert again.returncode == 0 and " 0 shards to encode" in again.stderr
    config = DataConfig(root=str(out), seconds=1.0, missing="drop", cache_dir=str(tmp_path))
    view = open_view(config)
    (part,) = view.parts
    last = len(part.counts) - 1
    usable = part.buckets_of(last) != NOT_USABLE
    assert dict(zip(part.shard_rows(last).keys, usable, strict=True))["new"]
