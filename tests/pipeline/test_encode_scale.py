"""The encode command on object stores, by several drivers at once, over all rows of VGGSound."""

import csv
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline import format as fmt
from pipeline.data_root import open_root
from pipeline.verify import verify
from tests.pipeline.servers import s3_bucket
from tests.pipeline.test_encode import encode, payload_hashes

NUM_CLIPS = 8
VGGSOUND_ROWS = 190_983


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two shards of rendered clips."""
    folder = tmp_path_factory.mktemp("source") / "clips"
    command = [sys.executable, "-m", "tools.make_clips", "--out", str(folder)]
    subprocess.run([*command, "--count", str(NUM_CLIPS)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def dataset(clips, tmp_path_factory):
    """What one undisturbed run on a local disk writes."""
    out = tmp_path_factory.mktemp("dataset") / "shards"
    done = encode(clips, out)
    assert done.returncode == 0, done.stderr
    return out


def stored_payloads(root):
    """Return column/shard -> bytes of the tar and index that each commit record names."""
    found = {}
    for name in fmt.column_directories(root):
        column = fmt.open_column(root, name, fmt.read_plan(root).plan_id)
        for shard in column.committed_shards():
            record = column.committed(shard)
            files = [(column.path / record[part]).read_bytes() for part in ("tar", "index")]
            found[f"{name}/{shard}"] = files
    return found


def test_an_object_store_gets_the_same_bytes_as_a_disk_and_no_secret(clips, dataset, tmp_path):
    with s3_bucket(tmp_path, "data") as files:
        out = "s3://data/set"
        done = encode(clips, out)
        assert done.returncode == 0, done.stderr
        root = open_root(out)
        assert stored_payloads(root) == stored_payloads(dataset)
        findings = []
        verify(root, findings.append, full=True)
        assert findings == []
        again = encode(clips, out)
        assert again.returncode == 0 and " 0 shards to encode" in again.stderr
        written = {path: files.cat_file(path) for path in files.find("data/set/runs")}
        assert {path.rpartition("/")[2] for path in written} == {
            *("config.yaml", "events.jsonl", "summary.json", "report.html")
        }
        told = b"".join(written.values()) + f"{done.stdout}{done.stderr}".encode()
        assert b"hush-hush" not in told


@pytest.mark.slow
def test_drivers_at_once_share_a_data_set(clips, dataset, tmp_path):
    """Two have a shard each, on purpose; a third has both, by mistake."""
    out = tmp_path / "shards"
    parts = [["--shards", "0"], ["--shards", "1"], []]
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda part: encode(clips, out, *part), parts))
    assert [done.returncode for done in runs] == [0, 0, 0], runs
    assert payload_hashes(out) == payload_hashes(dataset)
    assert not list(out.glob("*@*/.*"))
    assert len(list(out.glob("runs/*/summary.json"))) == 3


@pytest.mark.slow
def test_limit_encodes_a_part_that_the_next_run_goes_on_with(clips, dataset, tmp_path):
    out = tmp_path / "shards"
    done = encode(clips, out, "--limit", "1", "--columns", "audio")
    assert done.returncode == 0, done.stderr
    assert re.search(r"audio@\S+ +1/2 ", done.stdout)
    (path,) = out.glob("runs/*/summary.json")
    assert json.loads(path.read_text())["clips"] == 4


@pytest.mark.slow
def test_every_row_of_vggsound_gets_its_place(shared_clips, tmp_path):
    """Almost all files are absent; those of the real clips that are among the rows are encoded."""
    source = tmp_path / "vggsound"
    source.mkdir()
    shutil.copy(shared_clips / "vggsound_rows.csv", source / "vggsound.csv")
    out, media = tmp_path / "shards", shared_clips / "vggsound" / "video"
    settings = ["max_failed_share=1", "video.size=64", "video.fps=2", "decoders=1"]
    done = encode(source, out, "--media", str(media), settings=settings)
    assert done.returncode == 0, done.stderr
    plan = fmt.read_plan(out)
    assert plan.num_clips == VGGSOUND_ROWS
    (path,) = out.glob("runs/*/summary.json")
    summary = json.loads(path.read_text())
    assert sum(summary["statuses"].values()) == VGGSOUND_ROWS
    present = summary["statuses"]["ok"]
    assert summary["statuses"] == {"missing": VGGSOUND_ROWS - present, "ok": present}
    rows = (shared_clips / "vggsound_rows.csv").read_text().splitlines()
    names = {f"{name}_{int(start):06d}" for name, start, *_ in csv.reader(rows)}
    assert present == len(names & {path.stem for path in media.iterdir()}) > 0
    again = encode(source, out, "--media", str(media), settings=settings)
    assert again.returncode == 0 and " 0 shards to encode" in again.stderr
