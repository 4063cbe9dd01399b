"""Clips encoded again give the stored bytes; what does not is found and measured."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from pipeline import codecs, reencode, settings
from pipeline.codecs.builtin import DctVideo
from pipeline.config import EncodeConfig
from pipeline.format import FormatError, open_column
from pipeline.shards import ShardWriter
from tests.pipeline import films
from tests.pipeline.encoded import SETTINGS, Encoded, record_films
from tests.pipeline.films import Picture, Sound


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reencode")
    src = record_films(folder / "src", 5)
    return Encoded(folder / "data", src, settings.build(EncodeConfig, SETTINGS, "test")).build()


@pytest.fixture
def encoded(built, tmp_path):
    """The data set and its media, to be spoilt."""
    shutil.copytree(built.root, tmp_path / "data")
    shutil.copytree(built.src, tmp_path / "src")
    return replace(built, root=tmp_path / "data", src=tmp_path / "src")


def check(encoded, modalities=("video", "audio", "text"), num=100, seed=0, src=None):
    """Return what the check says of each column, and its findings."""
    found = []
    plan = encoded.plan
    plan = replace(plan, source=plan.source | {"root": str(src or encoded.src)})
    columns = [
        open_column(encoded.root, encoded.columns[m].path.name, plan.plan_id) for m in modalities
    ]
    told = reencode.reencode_columns(encoded.root, plan, columns, num, seed, found.append)
    return told, found


def test_everything_gives_the_stored_bytes_again(built):
    told, found = check(built)
    assert not found
    assert [(one["checked"], one["equal"]) for one in told] == [(6, 6), (5, 5), (1, 1)]
    assert [one["column"] for one in told] == [c.path.name for c in built.columns.values()]
    assert all(one["largest_difference"] == 0 and not one["not_checked"] for one in told)


def test_choice_is_by_seed_and_no_larger_than_asked_for(built):
    told, _ = check(built, ["audio"], num=2)
    assert told[0]["checked"] == 2

    def rows(seed):
        seen, ok_rows = [], reencode.EncodedAgain.row
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reencode.EncodedAgain, "row", lambda self, *place: seen.append(place))
            check(built, ["audio"], num=2, seed=seed)
        assert reencode.EncodedAgain.row is ok_rows
        return seen

    assert rows(0) == rows(0) and len({tuple(rows(seed)) for seed in range(10)}) > 1


def test_batches_are_filled_up_as_in_a_run(built, tmp_path, monkeypatch):
    filled = {**SETTINGS, "video": {**SETTINGS["video"], "batch": 3}}
    config = settings.build(EncodeConfig, filled, "test")
    encoded = Encoded(tmp_path / "data", built.src, config).build()
    sizes, encode = [], DctVideo.encode
    monkeypatch.setattr(
        DctVideo, "encode", lambda self, batch: sizes.append(len(batch)) or encode(self, batch)
    )
    told, found = check(encoded, ["video"])
    assert not found and told[0]["equal"] == 6 and sizes == [3] * 6


def test_missing_media_are_not_checked_and_counted(encoded):
    (encoded.src / "thing" / "film1.mp4").unlink()
    told, found = check(encoded, ["video", "audio"])
    assert not found
    assert [(one["equal"], one["not_checked"]) for one in told] == [
        (5, {"missing": 1}),
        (4, {"missing": 1}),
    ]
    told, found = check(encoded, ["video"], src=encoded.root)
    assert not found and told[0]["not_checked"] == {"missing": 6} and told[0]["checked"] == 0


def test_value_that_differs_is_measured(encoded):
    """A value is changed and everything signed anew: no checksum can tell."""
    column, key = encoded.columns["video"], None
    shard, plan_rows = 0, 2
    index = column.index(shard, plan_rows)
    (column.path / "000000.json").unlink()
    table = reencode.PlanTable(encoded.root, encoded.plan)
    with ShardWriter(column, shard, "b-1") as writer:
        for row, clip in enumerate(table.clips(shard)):
            latent = encoded.latent("video", encoded.decode(clip).frames)
            if row == 1:
                key, latent[3, 2, 1, 0] = clip.key, latent[3, 2, 1, 0] + 0.5
            writer.add(clip.key, latent)
        assert writer.commit() and len(index) == plan_rows
    (told,), (finding,) = check(encoded, ["video"])
    assert (told["checked"], told["equal"]) == (6, 5)
    assert told["largest_difference"] == pytest.approx(0.5, abs=0.01)
    assert (finding.row, finding.key) == (1, key) and finding.file.endswith("000000.tar")
    assert re.search(r"1 of 16384 values differ, at most by 0\.5", finding.message)


def test_another_codec_than_that_of_the_column_is_found(built, monkeypatch):
    class Louder(DctVideo):
        def encode(self, batch):
            return [latent + np.float32(0.25) for latent in super().encode(batch)]

    monkeypatch.setitem(codecs.CODECS, "dct", Louder)
    (told,), found = check(built, ["video"])
    assert len(found) == told["checked"] == 6 and told["equal"] == 0
    assert 0.2 < told["largest_difference"] < 0.3


def test_replaced_source_is_named(encoded):
    film = encoded.src / "thing" / "film1.mp4"
    films.record(film, Picture(seconds=2.4, rotation=180), Sound(seconds=2.4))
    (told,), (finding,) = check(encoded, ["video"])
    assert told["equal"] == 5 and "film1" in str(finding.key)
    assert "the source was replaced since: its content is another" in finding.message


def test_source_without_the_modality_any_more_is_named(encoded):
    film = encoded.src / "thing" / "film1.mp4"
    films.record(film, Picture(seconds=2.4), None)
    (told,), (finding,) = check(encoded, ["audio"])
    assert told["equal"] == 4 and "the source is no_audio now" in finding.message
    assert "replaced since" in finding.message


def test_unreadable_source_is_not_checked(encoded):
    (encoded.src / "thing" / "film1.mp4").write_bytes(b"no film" * 100)
    (told,), found = check(encoded, ["video"])
    assert not found and told["not_checked"] == {"unreadable": 1}


def test_shape_that_differs_is_named(encoded):
    film = encoded.src / "thing" / "film1.mp4"
    films.record(film, Picture(seconds=1.2), Sound(seconds=1.2))
    (_,), (finding,) = check(encoded, ["video"])
    assert "shape (9, 16, 8, 8), expected (16, 16, 8, 8)" in finding.message


def test_damaged_payload_is_found(encoded):
    column = encoded.columns["video"]
    offset = int(column.index(0, 2)["offset"][0])
    with column.tar_path(0).open("r+b") as file:
        file.seek(offset)
        file.write(b"\x55\x55")
    (told,), (finding,) = check(encoded, ["video"])
    assert told["equal"] == 5 and "crc32c" in finding.message


def test_damaged_shard_is_left_to_the_other_checks(encoded):
    column = encoded.columns["video"]
    (column.path / column.committed(0)["index"]).write_bytes(b"")
    (told,), found = check(encoded, ["video"])
    assert not found and told["equal"] == 4 and told["not_checked"] == {"shard is damaged": 1}


def test_column_of_another_decoder_version_is_not_checked(built, monkeypatch):
    monkeypatch.setattr(reencode, "DECODER_VERSION", 99)
    (told,), found = check(built, ["video"])
    assert not found and told["checked"] == 0
    assert told["not_checked"] == {"written by decoder version 2, this is 99": 6}


def test_column_of_other_weights_is_not_checked(built, monkeypatch):
    monkeypatch.setattr(DctVideo, "fingerprint", lambda self: {"weights": "other"})
    (told,), found = check(built, ["video"])
    assert not found and told["not_checked"] == {"the codec's weights are others now": 6}


def test_unknown_codec_is_an_error(built, monkeypatch):
    monkeypatch.delitem(codecs.CODECS, "dct")
    with pytest.raises(FormatError, match="unknown to this version"):
        check(built, ["video"])
