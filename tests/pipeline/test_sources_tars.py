"""WebDataset tars of media: every sample once, captions beside it, damage never planned."""

import io
import json
import os
import re
import tarfile
import tempfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import EncodeConfig
from pipeline.format import check_key
from pipeline.settings import ConfigError
from pipeline.sources import open_source
from pipeline.storage import MediaStore
from tests.pipeline.listed import read

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def make_tar(path, members, tar_format=tarfile.USTAR_FORMAT):
    """members: name -> bytes, text, dict (JSON), or a TarInfo without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            if isinstance(data, tarfile.TarInfo):
                data.name = name
                tar.addfile(data)
                continue
            data = json.dumps(data) if isinstance(data, dict) else data
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def listed(path, **config):
    return read(open_source(str(path), EncodeConfig(**config)))


def contents(source, tmp_path):
    store = MediaStore(source.root, str(tmp_path / "cache"), 10**8)
    found = {}
    for clip in source.clips:
        with store.local(clip.uri) as path:
            found[clip.key] = path.read_bytes()
    return found


SAMPLES = {
    "000000000.json": {"caption": "from json", "label": "dog", "split": "test", "url": "https://x"},
    "000000000.mp4": b"first film",
    "000000000.txt": " A dog\nbarks ",
    "000000001.mp4": b"second",
    "000000001.json": {"caption": "only json", "start_s": 1.5, "duration_s": 2},
    "000000001.jpg": b"other",
    "000000002.webm": b"",
}


@pytest.mark.parametrize("tar_format", FORMATS)
def test_samples_are_clips_with_captions_and_exact_bytes(tmp_path, tar_format):
    make_tar(tmp_path / "s" / "00000.tar", SAMPLES, FORMATS[tar_format])
    source = listed(tmp_path / "s")
    assert (source.kind, source.root, source.num_skipped) == ("tars", str(tmp_path / "s"), 1)
    clips = {clip.key: clip for clip in source.clips}
    first, second, third = (clips[f"00000000{n}"] for n in range(3))
    assert (first.caption, first.label, first.split) == ("A dog barks", "dog", "test")
    assert (first.start_s, first.duration_s) == (0.0, 10.0)
    assert (second.caption, second.start_s, second.duration_s) == ("only json", 1.5, 2.0)
    assert (third.caption, third.label, third.split) == ("", "", "train")
    assert contents(source, tmp_path) == {
        "000000000": b"first film",
        "000000001": b"second",
        "000000002": b"",
    }
    assert all(clip.uri.isprintable() for clip in source.clips)


def test_tar_alone_and_its_folder_are_the_same_source(tmp_path):
    make_tar(tmp_path / "00000.tar", SAMPLES)
    assert listed(tmp_path) == listed(tmp_path / "00000.tar")


def test_members_of_any_name_length_are_read(tmp_path):
    for name, tar_format in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        members = {f"{'long/' * 60}{'x' * 150}.mp4": b"film", "ключ.mp4": b"other"}
        make_tar(tmp_path / name / "0.tar", members, tar_format)
        source = listed(tmp_path / name)
        assert sorted(contents(source, tmp_path).values()) == [b"film", b"other"]
        assert all(check_key(clip.key) for clip in source.clips)


def test_keys_follow_the_rule_of_webdataset(tmp_path):
    members = {
        "a/x.mp4": b"1",
        "a/x.txt": "one",
        "b.c/x.mp4": b"2",
        "d.e.mp4": b"no media: the suffix is e.mp4",
        "noending": b"",
    }
    make_tar(tmp_path / "0.tar", members)
    theirs = webdataset.WebDataset(
        str(tmp_path / "0.tar"), shardshuffle=False, empty_check=False, select_files=None
    )
    wanted = {sample["__key__"]: sample["mp4"] for sample in theirs if "mp4" in sample}
    source = listed(tmp_path / "0.tar")
    found = {c.uri.partition("/")[2].removesuffix(".mp4"): c.key for c in source.clips}
    assert found.keys() == wanted.keys() == {"a/x", "b.c/x"}
    assert contents(source, tmp_path) == {found[key]: data for key, data in wanted.items()}
    assert source.num_skipped == 2


def test_tar_made_of_a_folder_by_the_program_tar_is_read(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.mp4", "a.txt", "b.mp4", "._a.mp4", ".hidden.mp4"):
        (tmp_path / "in" / name).write_bytes(name.encode())
    (tmp_path / "out").mkdir()
    os.system(f"tar -C {tmp_path}/in --sort=name -cf {tmp_path}/out/0.tar .")
    source = listed(tmp_path / "out")
    assert contents(source, tmp_path) == {"a": b"a.mp4", "b": b"b.mp4"}
    assert {clip.caption for clip in source.clips} == {"a.txt", ""}


def test_same_keys_in_two_tars_are_told_apart_whatever_else_is_there(tmp_path):
    for tar in ("0", "1"):
        make_tar(tmp_path / f"{tar}.tar", {"x.mp4": f"film {tar}", f"y{tar}.mp4": "y"})
    before = listed(tmp_path)
    assert len({clip.key for clip in before.clips}) == 4
    assert {"y0", "y1"} <= {clip.key for clip in before.clips}
    make_tar(tmp_path / "00.tar", {"x.mp4": "film 00"})
    assert set(before.clips) < set(listed(tmp_path).clips)


def test_real_clips_are_given_back_whole(tmp_path, shared_clips):
    films = sorted((shared_clips / "folders").rglob("*.mp4"))[:3]
    members = {f"{n:09d}.mp4": film.read_bytes() for n, film in enumerate(films)}
    make_tar(tmp_path / "s" / "0.tar", members)
    found = contents(listed(tmp_path / "s"), tmp_path)
    assert {f"{key}.mp4": data for key, data in found.items()} == members
    clips = listed(tmp_path / "s", windows={"seconds": 4}, cache_dir=str(tmp_path / "c")).clips
    assert {clip.key for clip in clips} == {
        f"{n:09d}_{start}" for n in range(3) for start in ("000000000", "000004000", "000008000")
    }


# -- refused


def link(kind, target):
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


def special(kind):
    info = tarfile.TarInfo()
    info.type = kind
    return info


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("/etc/x.mp4", b"x"),
        ("../x.mp4", b"x"),
        ("a/../../x.mp4", b"x"),
        ("a\\x.mp4", b"x"),
        ("C:x.mp4", b"x"),
        ("a\nx.mp4", b"x"),
        ("a//x.mp4", b"x"),
        ("x.mp4", link(tarfile.SYMTYPE, "/etc/passwd")),
        ("x.mp4", link(tarfile.SYMTYPE, "ok.mp4")),
        ("x.mp4", link(tarfile.LNKTYPE, "ok.mp4")),
        ("x.mp4", special(tarfile.FIFOTYPE)),
        ("x.mp4", special(tarfile.CHRTYPE)),
        ("x.mp4", special(tarfile.GNUTYPE_SPARSE)),
    ],
)
def test_member_that_leads_out_or_is_no_plain_file_is_refused_by_name(tmp_path, name, data):
    make_tar(tmp_path / "0.tar", [("ok.mp4", b"x"), (name, data)], tarfile.GNU_FORMAT)
    with pytest.raises(ConfigError, match=r"0\.tar member .*x\.mp4.*: refused"):
        listed(tmp_path)


def test_sparse_member_of_pax_is_refused(tmp_path):
    (tmp_path / "s").mkdir()
    with (tmp_path / "x.mp4").open("wb") as file:
        file.seek(10**6)
        file.write(b"end")
    os.system(f"tar -C {tmp_path} --format=pax --sparse -cf {tmp_path}/s/0.tar x.mp4")
    with pytest.raises(ConfigError, match=r"x\.mp4.*refused.*sparse"):
        listed(tmp_path / "s")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.mp4", b"1"), ("a.mkv", b"2")], "sample 'a' has 2 media"),
        ([("a.mp4", b"1"), ("b.mp4", b"2"), ("a.txt", b"3")], "sample 'a' is there twice"),
        ([("a.mp4", b"1"), ("b.mp4", b"2"), ("a.mp4", b"3")], "sample 'a' is there twice"),
        ([("a.mp4", b"1"), ("a.txt", b"2"), ("a.txt", b"3")], r"'a' has two members \.txt"),
        ([("a.mp4", b"1"), ("a.json", b'{"label": "x", "label": "y"}')], "'label' is there twice"),
        ([("a.txt", b"1"), ("b.txt", b"2")], "no media in 1 tars"),
        ([("a.mp4", b"1"), ("a.txt", b"\xff")], r"a\.txt: expected UTF-8"),
        ([("a.mp4", b"1"), ("a.json", b"{")], r"a\.json: expected a JSON object"),
        ([("a.mp4", b"1"), ("a.json", {"caption": 3})], r"a\.json: caption is 3, expected text"),
        ([("a.mp4", b"1"), ("a.json", {"start_s": -3})], r"a\.json: start_s is -3"),
    ],
)
def test_sample_that_is_none_is_refused_by_name(tmp_path, members, message):
    make_tar(tmp_path / "0.tar", members)
    with pytest.raises(ConfigError, match=message):
        listed(tmp_path)


def test_folder_with_media_and_tars_is_refused(tmp_path):
    make_tar(tmp_path / "0.tar", SAMPLES)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(
        ConfigError, match=r"both media \(such as a\.mp4\) and tars \(such as 0\.tar"
    ):
        listed(tmp_path)


def test_media_setting_is_refused_with_tars(tmp_path):
    make_tar(tmp_path / "0.tar", SAMPLES)
    with pytest.raises(ConfigError, match="media=elsewhere"):
        listed(tmp_path, media="elsewhere")


# -- damage


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "0.tar"
    members = {}
    for n in range(4):
        members |= {f"{n}.mp4": bytes([n]) * (700 + n), f"{n}.txt": f"film {n}"}
    return make_tar(path, members, tarfile.PAX_FORMAT).read_bytes()


def test_tar_cut_off_anywhere_is_an_error_that_names_it(good, tmp_path):
    end = good.rstrip(b"\0")
    last_byte = len(end) + (-len(end)) % 512  # members end here, zeros follow
    for size in [*range(0, last_byte + 1, 128), last_byte + 511]:
        (tmp_path / "0.tar").write_bytes(good[:size])
        with pytest.raises(ConfigError, match=r"0\.tar is damaged or cut off near byte \d+"):
            listed(tmp_path)
    for size in (last_byte + 512, last_byte + 1024):
        (tmp_path / "0.tar").write_bytes(good[:size])
        assert len(listed(tmp_path).clips) == 4


@given(st.integers(0, 16 * 512 - 1), st.integers(1, 255))
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_byte_is_an_error_or_plans_the_same_clips(good, tmp_path, place, change):
    (tmp_path / "0.tar").write_bytes(good)
    wanted = {(clip.key, clip.uri) for clip in listed(tmp_path).clips}
    damaged = bytearray(good)
    damaged[place] ^= change
    (tmp_path / "0.tar").write_bytes(damaged)
    try:
        found = {(clip.key, clip.uri) for clip in listed(tmp_path).clips}
    except ConfigError as error:
        assert "0.tar" in str(error)
    else:
        assert found == wanted


@given(st.binary(max_size=4096))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_bytes_that_are_no_tar_are_an_error(tmp_path, data):
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(ConfigError):
        listed(tmp_path)


def test_two_tars_glued_together_are_an_error(good, tmp_path):
    """Readers stop at the first end: the clips of the second would be missing."""
    (tmp_path / "0.tar").write_bytes(good + good)
    with pytest.raises(ConfigError, match="expected a header or zeros to the end"):
        listed(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_thousands_of_headers_for_one_member_are_damage(good, tmp_path, kind):
    header = special(kind)
    header.name = "x"
    (tmp_path / "0.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) * 5000 + good)
    with pytest.raises(ConfigError, match=r"0\.tar is damaged"):
        listed(tmp_path)


def test_compressed_tar_is_refused(tmp_path):
    make_tar(tmp_path / "0.tar", SAMPLES)
    os.system(f"gzip -k {tmp_path}/0.tar && mv {tmp_path}/0.tar.gz {tmp_path}/1.tar")
    with pytest.raises(ConfigError, match=r"1\.tar is damaged"):
        listed(tmp_path)


def test_member_of_a_size_that_no_file_has_is_an_error(tmp_path):
    """Sizes can be written in base 256, negative ones too, which once hung Python's tarfile."""
    make_tar(tmp_path / "0.tar", {"a.mp4": b"x" * 100, "b.mp4": b"y"}, tarfile.GNU_FORMAT)
    data = bytearray((tmp_path / "0.tar").read_bytes())
    for size in (b"\xff" * 12, b"\xff" * 10 + b"\xfe\x00", b"\x80" + b"\x7f" * 11):
        data[124:136] = size
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
        Path(tmp_path, "0.tar").write_bytes(data)
        with pytest.raises(ConfigError, match=r"0\.tar is damaged"):
            listed(tmp_path)


def test_damage_is_named_with_its_place(good, tmp_path):
    damaged = bytearray(good)
    at = good.index(b"2.mp4\0")
    damaged[at] ^= 1
    (tmp_path / "0.tar").write_bytes(damaged)
    with pytest.raises(ConfigError, match=re.escape(f"near byte {at}: expected a header or zeros")):
        listed(tmp_path)
