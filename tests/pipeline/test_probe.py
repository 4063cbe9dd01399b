"""`python -m pipeline.probe` says why a clip was dropped, whatever the file does to it."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pipeline.checks import FACTS_SCHEMA
from pipeline.child import ChildProcess
from pipeline.media import ClipError
from pipeline.mux import write_mp4
from pipeline.probe import SHOWN_FACTS, Verdict, as_json, as_table, printable

RATE = 16000


def make(path, seconds=2.0, sound=True):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, size=(round(25 * seconds), 64, 64, 3), dtype=np.uint8)
    noise = rng.uniform(-0.5, 0.5, size=round(seconds * RATE)) if sound else None
    write_mp4(path, frames, 25, noise, RATE)
    return path


def probe(*arguments, cwd=None):
    command = [sys.executable, "-m", "pipeline.probe", *map(os.fspath, arguments)]
    return subprocess.run(command, check=False, capture_output=True, cwd=cwd, timeout=120)


def verdicts(*arguments, cwd=None):
    run = probe("--json", *arguments, cwd=cwd)
    lines = run.stdout.decode().splitlines()
    return run.returncode, [json.loads(line, parse_constant=pytest.fail) for line in lines]


# -- the verdict


def test_whole_file_is_ok_in_table_and_json(tmp_path):
    path = make(tmp_path / "a.mp4")
    run = probe(path)
    text = run.stdout.decode()
    assert run.returncode == 0 and not run.stderr
    assert text.splitlines()[0] == str(path) and text.splitlines()[1].split() == ["status", "ok"]
    for shown in ("25 frames/s", "16000 Hz", "100.0%", "64 px", "2 s", "dBFS"):
        assert shown in text
    code, [verdict] = verdicts(path)
    assert code == 0
    assert (verdict["status"], verdict["message"], verdict["problems"]) == ("ok", "", {})
    assert verdict["num_frames"] == 16 and verdict["video_codec"] == "h264"


def test_every_file_has_its_verdict_and_one_bad_one_fails_the_command(tmp_path):
    whole, silent = make(tmp_path / "a.mp4"), make(tmp_path / "b.mp4", sound=False)
    cut = tmp_path / "c.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    garbage = tmp_path / "d.mp4"
    garbage.write_bytes(b"\0" * 5000)
    code, found = verdicts(whole, silent, cut, garbage, tmp_path / "none.mp4")
    assert code == 1
    assert [verdict["status"] for verdict in found] == [
        "ok", "no_audio", "truncated", "unreadable", "missing",
    ]  # fmt: skip
    assert len({tuple(verdict) for verdict in found}) == 1, "all lines have the same keys"
    assert all("expected" in verdict["message"] for verdict in found[1:])
    assert found[1]["problems"].keys() == {"audio"}


def test_settings_are_those_of_encode(tmp_path):
    path = make(tmp_path / "a.mp4", seconds=2)
    (tmp_path / "run.yaml").write_text("video: {fps: 5}\n")
    code, [verdict] = verdicts(
        path, "--config", tmp_path / "run.yaml", "checks.min_seconds=3", "columns=[video]"
    )
    assert code == 1 and verdict["num_frames"] == 10
    assert verdict["status"] == "too_short" and "expected at least 3 s" in verdict["message"]
    assert verdict["problems"].keys() == {"video"}


def test_check_on_the_picture_decides_about_the_sound_too(tmp_path):
    """As for encode: whatever the columns, both modalities are decoded and judged."""
    write_mp4(tmp_path / "a.mp4", np.full((50, 64, 64, 3), 90, np.uint8), 25, np.ones(32000), RATE)
    settings = [tmp_path / "a.mp4", "checks.still=drop"]
    for modality, other in (("audio", "video"), ("video", "audio")):
        code, [verdict] = verdicts(*settings, f"columns=[{modality}]")
        assert code == 1 and verdict["status"] == "still"
        assert modality in verdict["problems"] and other not in verdict["problems"]


def test_span_of_a_file_is_judged_as_a_clip(tmp_path):
    path = make(tmp_path / "a.mp4", seconds=3)
    assert verdicts(path, "--start", "1", "--duration", "1.5")[1][0]["duration_s"] == 1.5
    assert verdicts(path, "windows.seconds=1")[1][0]["duration_s"] == 1
    code, [verdict] = verdicts(path, "--start", "20")
    assert code == 1 and verdict["status"] == "too_short"
    assert "second 20" in verdict["message"]


def test_all_facts_of_the_pipeline_are_shown():
    shown = [name for units in SHOWN_FACTS.values() for name in units]
    assert sorted(shown) == sorted(FACTS_SCHEMA.names[FACTS_SCHEMA.names.index("duration_s") :])


# -- wrong usage


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "FILE"),
        (["--json"], "FILE"),
        (["checks.min_seconds=3"], "no FILE given"),
        (["a.mp4", "checks.min_second=3"], "did you mean 'checks.min_seconds'?"),
        (["a.mp4", "--start", "-1"], "seconds"),
        (["a.mp4", "--config", "none.yaml"], "none.yaml"),
        (["folder"], "folder is a folder"),
        (["https://example.org/a.mp4"], "is a URL"),
        (["/dev/zero"], "device"),
        ([b"\xff.mp4"], "is no UTF-8"),
    ],
)
def test_wrong_usage_is_one_clear_line_and_exit_2(tmp_path, arguments, complaint):
    make(tmp_path / "a.mp4", seconds=0.2)
    (tmp_path / "folder").mkdir()
    run = probe(*arguments, cwd=tmp_path)
    assert run.returncode == 2 and not run.stdout
    assert complaint in run.stderr.decode().splitlines()[-1]
    assert "Traceback" not in run.stderr.decode()


# -- odd names


def test_odd_names_do_not_reach_the_terminal(tmp_path):
    names = [
        "\x1b[31m\x1b]0;owned\x07.mp4",
        "a\nstatus ok.mp4",
        "\u202e4pm.mp4",
        "a=b.mp4",
        "./-a.mp4",
    ]
    for name in names:
        make(tmp_path / name, seconds=1)
    command = [sys.executable, "-m", "pipeline.probe", *names]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    run = subprocess.run(
        command, check=False, capture_output=True, cwd=tmp_path, env=environment, timeout=60
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.decode("ascii").splitlines()
    assert all(line.isprintable() for line in lines)
    heads = [place for place, line in enumerate(lines) if line.endswith(".mp4")]
    assert len(heads) == len(names)
    assert all(lines[place + 1].split() == ["status", "ok"] for place in heads)


def test_json_names_the_file_so_that_it_can_be_found_again():
    value = json.loads(as_json("\n猫.mp4", Verdict("ok", "", {}, {})).encode("ascii"))
    assert value["file"] == "\n猫.mp4"


def test_printable_text_stays_as_it_is():
    assert printable("Käse 猫.mp4 ½") == "Käse 猫.mp4 ½"
    assert printable("\x1b[2J\u202e\udcff") == "\\x1b[2J\\u202e\\udcff"


def test_message_of_a_file_can_not_break_the_table():
    problem = ("unreadable", "codec \x1b[2J\n  status ok, expected another")
    text = as_table("a.mp4", Verdict(*problem, {"video": problem}, {"flags": []}))
    assert "\x1b" not in text and len(text.splitlines()) == 3


# -- what the file does to its decoder


def misbehaving():
    """Runs in the child."""

    def act(what):
        if what == "sleep":  # in C, with the interpreter's lock held: no signal gets through
            ctypes.PyDLL(None).sleep(60)
        if what == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "exit":
            os._exit(3)
        if what == "raise":
            raise ZeroDivisionError("division by zero")
        if what == "refuse":
            raise ClipError("truncated", "cut")
        return what

    return act


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("sleep", "decode_timeout", "0.5 s"),
        ("die", "decode_crash", "SIGSEGV"),
        ("exit", "decode_crash", "exit code 3"),
        ("raise", "decode_crash", "ZeroDivisionError"),
        ("refuse", "truncated", "cut"),
    ],
)
def test_what_a_file_does_to_its_decoder_is_its_verdict_and_the_next_one_is_decoded(
    what, status, said
):
    with ChildProcess(misbehaving, timeout_s=0.5) as child:
        assert child.call("fine") == "fine"
        with pytest.raises(ClipError) as error:
            child.call(what)
        assert error.value.status == status and said in error.value.message
        assert child.call("fine") == "fine"


def test_no_child_is_left_behind():
    with ChildProcess(misbehaving, timeout_s=5) as child:
        child.call("fine")
        pid = child._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_ctrl_c_ends_it_without_a_traceback(tmp_path):
    make(tmp_path / "a.mp4")
    command = [sys.executable, "-m", "pipeline.probe", *["a.mp4"] * 500]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout and process.stdout.readline().strip() == b"a.mp4"
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the child too
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.decode().split() == ["stopped"]
