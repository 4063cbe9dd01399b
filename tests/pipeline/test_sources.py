"""Listing a source: every media file once, under a key that a tar can hold, or a clear error."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import EncodeConfig
from pipeline.format import check_key
from pipeline.settings import ConfigError
from pipeline.sources import MEDIA_SUFFIXES, open_source
from pipeline.sources.rows import TEXT, folder_keys
from pipeline.sources.spans import num_windows
from tests.pipeline.listed import read
from tests.pipeline.servers import http_server


def put(root, *names, content="x"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def listed(root, **config):
    return read(open_source(str(root), EncodeConfig(**config)))


def uris(source):
    return sorted(clip.uri for clip in source.clips)


# -- folders


def test_folder_is_searched_to_the_bottom_for_media_of_any_case(tmp_path):
    names = [f"{'d/' * depth}clip{depth}{suffix}" for depth, suffix in enumerate(MEDIA_SUFFIXES)]
    put(tmp_path, *names, "UPPER.MP4", "Mixed.MkV")
    put(tmp_path, "readme.md", "sound.wav", "noextension", "mp4")
    source = listed(tmp_path)
    assert uris(source) == sorted([*names, "UPPER.MP4", "Mixed.MkV"])
    assert source.num_skipped == 4 and source.kind == "folder"
    assert all(Path(source.root, clip.uri).is_file() for clip in source.clips)


def test_hidden_files_and_folders_are_left_out(tmp_path):
    put(tmp_path, "a.mp4", ".b.mp4", "._a.mp4", ".trash/c.mp4", "in/.cache/d.mp4")
    source = listed(tmp_path)
    assert uris(source) == ["a.mp4"] and source.num_skipped == 4  # a folder counts as one


def test_hidden_root_is_searched(tmp_path):
    put(tmp_path / ".data", "a.mp4")
    assert uris(listed(tmp_path / ".data")) == ["a.mp4"]


def test_links_out_of_the_root_are_left_out_and_links_inside_stay(tmp_path):
    root = tmp_path / "root"
    put(root, "in/a.mp4")
    put(tmp_path, "outside/b.mp4")
    (root / "out.mp4").symlink_to(tmp_path / "outside" / "b.mp4")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "again.mp4").symlink_to("in/a.mp4")
    (root / "up").symlink_to("..")
    (root / "dead.mp4").symlink_to("nowhere.mp4")
    source = listed(root)
    assert uris(source) == ["again.mp4", "in/a.mp4"] and source.num_skipped == 4


def test_link_to_itself_is_left_out(tmp_path):
    put(tmp_path, "a.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    assert uris(listed(tmp_path)) == ["a.mp4"]


def test_root_that_is_a_link_is_searched(tmp_path):
    put(tmp_path / "real", "a.mp4")
    (tmp_path / "real" / "b.mp4").symlink_to("a.mp4")
    (tmp_path / "link").symlink_to("real")
    assert uris(listed(tmp_path / "link")) == ["a.mp4", "b.mp4"]


def test_caption_is_the_text_beside_the_clip_on_one_line(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4", "c.mp4", "c.json", "notes.txt")
    put(tmp_path, "a.txt", content="\ufeff  A dog\n  barks.\r\n")
    put(tmp_path, "b.txt", content="")
    source = listed(tmp_path)
    assert {c.key: c.caption for c in source.clips} == {"a": "A dog barks.", "b": "", "c": ""}
    assert source.num_skipped == 1  # notes.txt belongs to no clip


def test_caption_longer_than_any_is_refused_by_name(tmp_path):
    put(tmp_path, "a.mp4")
    put(tmp_path, "a.txt", content="x" * (1 << 20) + "y")
    with pytest.raises(ConfigError, match=r"a\.txt: 1048577 bytes, expected 1048576 at most"):
        listed(tmp_path)


def test_media_setting_is_refused_with_a_folder(tmp_path):
    put(tmp_path, "a.mp4")
    with pytest.raises(ConfigError, match="media=elsewhere: only tables"):
        listed(tmp_path, media="elsewhere")


def test_caption_that_is_no_text_is_refused_by_name(tmp_path):
    put(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"a\.txt.*UTF-8"):
        listed(tmp_path)


def test_label_is_the_parent_folder(tmp_path):
    put(tmp_path, "a.mp4", "dog/b.mp4", "animals/cat meows/c.mp4")
    labels = {clip.uri: clip.label for clip in listed(tmp_path).clips}
    assert labels == {"a.mp4": "", "dog/b.mp4": "dog", "animals/cat meows/c.mp4": "cat meows"}


def test_clip_is_the_first_seconds_of_its_file(tmp_path):
    put(tmp_path, "a.mp4")
    (clip,) = listed(tmp_path, clip={"seconds": 4.5}).clips
    assert (clip.start_s, clip.duration_s, clip.split) == (0.0, 4.5, "train")


def test_plain_names_are_their_own_keys(tmp_path):
    put(tmp_path, "-26aVYRtEAc_000030.mp4", "A_b-9.mkv")
    assert {clip.key for clip in listed(tmp_path).clips} == {"-26aVYRtEAc_000030", "A_b-9"}


def test_files_that_differ_in_suffix_folder_or_odd_characters_have_different_keys(tmp_path):
    put(tmp_path, "a.mp4", "a.mkv", "a.MP4", "x/a.mp4", "x_a.mp4", "y/a.mp4", "a b.mp4", "a+b.mp4")
    put(tmp_path, "ä.mp4", "犬.mp4", "猫.mp4", "a.b.mp4", f"{'long' * 40}.mp4", "new\nline.mp4")
    clips = listed(tmp_path).clips
    assert len({check_key(clip.key) for clip in clips}) == len(clips) == 14


def test_key_made_for_one_file_is_not_taken_from_another(tmp_path):
    """A name that looks like the key of another file must not end as the same key."""
    put(tmp_path, "a.mkv", "a.mp4", "x/b.mp4")
    for key in [clip.key for clip in listed(tmp_path).clips if clip.key != "a"]:
        put(tmp_path, f"{key}.mp4")
    clips = listed(tmp_path).clips
    assert len({clip.key for clip in clips}) == len(clips) == 5


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=30
).filter(lambda name: not name.startswith(".") and len(name.encode()) < 200)


@given(
    st.sets(
        st.tuples(
            st.lists(NAMES, max_size=1).map(tuple), NAMES, st.sampled_from([".mp4", ".mkv", ".MP4"])
        ),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_keys_are_unique_whatever_the_names(tmp_path_factory, found):
    root = tmp_path_factory.mktemp("named")
    wanted = {"/".join([*folders, name + suffix]) for folders, name, suffix in found}
    for uri in wanted:
        put(root, uri)
    clips = listed(root).clips
    assert {clip.uri for clip in clips} == wanted
    assert len({check_key(clip.key) for clip in clips}) == len(wanted)


@given(NAMES, NAMES)
def test_folder_key_tells_paths_apart(one, other):
    keys = folder_keys(pa.array([f"{name}.mp4" for name in (one, other)], TEXT)).to_pylist()
    assert (keys[0] == keys[1]) == (one == other)
    for key in keys:
        check_key(key)


def test_key_does_not_depend_on_files_elsewhere(tmp_path):
    put(tmp_path, "x/a.mp4", "b.mp4")
    before = {clip.uri: clip.key for clip in listed(tmp_path).clips}
    put(tmp_path, "a.mp4", "0/b.mp4", "x/b.mp4")
    after = {clip.uri: clip.key for clip in listed(tmp_path).clips}
    assert before.items() <= after.items()


def test_name_that_is_no_unicode_is_refused_by_name(tmp_path):
    put(tmp_path, "a.mp4")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.mp4")).touch()
    with pytest.raises(ConfigError, match=r"udcff.*rename"):
        listed(tmp_path)


@pytest.mark.parametrize("name", ["\udcff.tar", "\udcff.csv", "\udcff/a.mp4"])
def test_source_named_without_unicode_is_refused(tmp_path, name):
    put(tmp_path, name)
    for source in (tmp_path / name, tmp_path / name.partition("/")[0]):
        with pytest.raises(ConfigError, match=r"udcff.*not UTF-8"):
            listed(source)
    if name.endswith("tar"):
        with pytest.raises(ConfigError, match=r"udcff.*not UTF-8"):
            listed(tmp_path)


def test_folder_named_like_a_member_of_a_tar_is_refused(tmp_path):
    put(tmp_path, "b.tar#0+5/y.mp4")
    with pytest.raises(ConfigError, match=r"b\.tar#0\+5/y\.mp4.*rename its folder"):
        listed(tmp_path)


def test_folder_without_media_says_what_it_looked_for(tmp_path):
    put(tmp_path, "a.txt", "b.wav")
    with pytest.raises(ConfigError, match=r"no media among 2 files.*\.mp4"):
        listed(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "a.mp4"])
def test_source_that_is_neither_folder_nor_csv_is_refused(tmp_path, name):
    put(tmp_path, "a.mp4")
    with pytest.raises(ConfigError, match=f"--src .*{name}"):
        listed(tmp_path / name)


def test_real_folders_are_listed_with_labels(shared_clips):
    source = listed(shared_clips / "folders")
    assert len(source.clips) == 18
    assert {clip.label for clip in source.clips} == {
        "baby", "dog", "drum", "fireworks", "unlabelled"
    }  # fmt: skip


# -- VGGSound


def vggsound(root, text, *media):
    root.mkdir(exist_ok=True)
    put(root, *media)
    (root / "vggsound.csv").write_text(text, encoding="utf-8")
    return root


GOOD = "-26aVYRtEAc,30,female singing,train\n"


def test_real_vggsound_sample_is_listed(shared_clips):
    source = listed(shared_clips / "vggsound")
    assert source.kind == "vggsound" and len(source.clips) == 17 and source.num_skipped == 0
    assert all(Path(source.root, clip.uri).is_file() for clip in source.clips)
    clips = {clip.key: clip for clip in source.clips}
    assert clips["-Qowmc0P9ic_000034"].label == "playing bass drum"
    assert clips["-Qowmc0P9ic_000034"].split == "test"
    assert {clip.start_s for clip in source.clips} == {0.0}


def test_the_whole_vggsound_list_is_read(shared_clips, tmp_path):
    source = listed(shared_clips / "vggsound_rows.csv", media=str(tmp_path))
    assert len(source.clips) > 100_000
    assert {clip.split for clip in source.clips} == {"train", "test"}


def test_csv_or_its_folder_is_the_same_source(tmp_path):
    vggsound(tmp_path, GOOD, "video/-26aVYRtEAc_000030.mp4")
    assert listed(tmp_path) == listed(tmp_path / "vggsound.csv")


def test_clip_without_a_file_stays_with_the_expected_name(tmp_path):
    source = listed(vggsound(tmp_path, GOOD + "0DCit2EBtjs,5,a,test\n", "0DCit2EBtjs_000005.webm"))
    assert {clip.key: clip.uri for clip in source.clips} == {
        "-26aVYRtEAc_000030": "-26aVYRtEAc_000030.mp4",
        "0DCit2EBtjs_000005": "0DCit2EBtjs_000005.webm",
    }


def test_media_may_be_elsewhere_and_in_folders(tmp_path):
    vggsound(tmp_path / "lists", GOOD)
    put(tmp_path / "media", "part0/-26aVYRtEAc_000030.MP4", "part0/other.mp4")
    source = listed(tmp_path / "lists", media=str(tmp_path / "media"))
    assert uris(source) == ["part0/-26aVYRtEAc_000030.MP4"] and source.num_skipped == 1
    assert source.root == str(tmp_path / "media")
    with pytest.raises(ConfigError, match="nowhere"):
        listed(tmp_path / "lists", media=str(tmp_path / "nowhere"))


def test_caption_and_label_are_the_third_column(tmp_path):
    text = '-26aVYRtEAc, 30 ,"people whispering, softly",train\n'
    (clip,) = listed(vggsound(tmp_path, text)).clips
    assert clip.caption == clip.label == "people whispering, softly"
    assert clip.key == "-26aVYRtEAc_000030"


def test_csv_saved_by_a_spreadsheet_is_read(tmp_path):
    (clip,) = listed(vggsound(tmp_path, "\ufeff" + GOOD.replace("\n", "\r\n"))).clips
    assert (clip.key, clip.split) == ("-26aVYRtEAc_000030", "train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("-26aVYRtEAc,30,female singing", "3 fields"),
        ("-26aVYRtEAc,30,a,b,train", "5 fields"),
        ("-26aVYRtEAc,30.5,a,train", "start '30.5'"),
        ("-26aVYRtEAc,-3,a,train", "start '-3'"),
        ("-26aVYRtEAc,,a,train", "start ''"),
        ("-26aVYRtEAc,1234567,a,train", "start '1234567'"),
        ("../../etc/passwd,3,a,train", "id '../../etc/passwd'"),
        ("a.b,3,a,train", "id 'a.b'"),
        (",3,a,train", "id ''"),
        ("0DCit2EBtjs,3,a,", "split ''"),
        ("0DCit2EBtjs,030,female singing,test\n0DCit2EBtjs,30,x,test", "is there twice"),
        ("youtube_id,start,label,split", "start 'start'"),
    ],
)
def test_bad_row_names_file_line_and_fault(tmp_path, row, message):
    vggsound(tmp_path, GOOD + row + "\n" + "6zlMP_kQ_-w,30,playing harp,test\n")
    line = 2 + row.count("\n")
    with pytest.raises(ConfigError, match=rf"vggsound\.csv line {line}: .*{re.escape(message)}"):
        listed(tmp_path)


def test_empty_csv_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"vggsound\.csv has no row"):
        listed(vggsound(tmp_path, ""))


def test_blank_lines_of_a_csv_are_skipped(tmp_path):
    vggsound(tmp_path, f"\n{GOOD}\n\n0DCit2EBtjs,5,a,test\n\n")
    assert len(listed(tmp_path).clips) == 2


def test_two_files_for_one_clip_of_vggsound_are_refused_by_name(tmp_path):
    vggsound(tmp_path, GOOD, "a/-26aVYRtEAc_000030.mp4", "other.mp4", "b/other.mp4")
    assert len(listed(tmp_path).clips) == 1
    put(tmp_path, "b/-26aVYRtEAc_000030.mkv")
    with pytest.raises(ConfigError, match=r"a/-26aVYRtEAc_000030\.mp4 and b/-26aVYRtEAc_0000"):
        listed(tmp_path)


@pytest.mark.parametrize("rest", [b"", b"0DCit2EBtjs,30,a,train\n" * 9000])
@pytest.mark.parametrize("row", [b"a,3,\xff,train\n", b'6zlMP_kQ_-w,30,"open,train\n'])
def test_line_that_cannot_be_read_is_named(tmp_path, row, rest):
    """Also where a quote that is not closed takes the rest of a long file with it."""
    text = b'-26aVYRtEAc,30,"two\nlines",train\n-1UeMOTROlM,3,a,test\n'
    (tmp_path / "vggsound.csv").write_bytes(text + row + rest)
    with pytest.raises(ConfigError, match=r"vggsound\.csv line 4[: ]"):
        listed(tmp_path)


def test_link_instead_of_the_csv_that_leads_out_is_refused(tmp_path):
    vggsound(tmp_path / "elsewhere", GOOD)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "vggsound.csv").symlink_to(tmp_path / "elsewhere" / "vggsound.csv")
    with pytest.raises(ConfigError, match=r"vggsound\.csv.*leads out"):
        listed(tmp_path / "root")
    assert len(listed(tmp_path / "root" / "vggsound.csv").clips) == 1  # named by the user


# -- captions made of labels


def test_template_captions_clips_that_have_a_label_only(tmp_path):
    put(tmp_path, "dog/a.mp4", "dog/b.mp4", "c.mp4")
    put(tmp_path, "dog/b.txt", content="It barks.")
    source = listed(tmp_path, caption_template="the sound of {label}, {{loud}}")
    captions = {clip.uri: clip.caption for clip in source.clips}
    assert captions == {
        "dog/a.mp4": "the sound of dog, {loud}", "dog/b.mp4": "It barks.", "c.mp4": ""
    }  # fmt: skip


def test_template_is_taken_for_the_labels_of_vggsound(tmp_path):
    vggsound(tmp_path, GOOD + '0DCit2EBtjs,5,"{label.x} {0}",test\n')
    clips = listed(tmp_path, caption_template="the sound of {label}").clips
    assert [(clip.caption, clip.label) for clip in clips] == [
        ("the sound of female singing", "female singing"),
        ("the sound of {label.x} {0}", "{label.x} {0}"),
    ]


@pytest.mark.parametrize(
    "template",
    [
        *("{label.__class__}", "{label[0]}", "{0}", "{}", "{caption}", "{label!r}", "{label:>9}"),
        *("the sound of {label", "label}", "the sound of label", "{label} {uri}"),
    ],
)
def test_template_of_anything_but_the_label_is_refused(tmp_path, template):
    put(tmp_path, "dog/a.mp4")
    with pytest.raises(ConfigError, match="caption_template"):
        listed(tmp_path, caption_template=template)


# -- windows


def test_windows_start_while_enough_is_left():
    def starts(length_s, min_seconds=1.0, **windows):
        windows = EncodeConfig(windows=windows, checks={"min_seconds": min_seconds})
        return num_windows(length_s, windows)

    assert starts(60, seconds=10) == 6
    assert starts(61, seconds=10) == 7 and starts(60.9, seconds=10) == 6
    assert starts(60, seconds=10, stride_seconds=5) == 12
    assert starts(0.3, min_seconds=0.1, seconds=0.1) == 3  # in spite of 0.3 - 2 * 0.1 < 0.1
    assert starts(60, min_seconds=0, seconds=10) == 6
    assert starts(60, min_seconds=30, seconds=10) == 6  # never more than a window holds
    assert starts(1e12, seconds=10) == 1e5  # a damaged file's length
    assert starts(0, seconds=10) == starts(0.5, seconds=10) == 1


def test_files_are_cut_into_windows_and_one_that_cannot_be_measured_stays(tmp_path, shared_clips):
    film = min((shared_clips / "folders" / "dog").glob("*.mp4"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "film.mp4").symlink_to("../film.mp4")
    (tmp_path / "film.mp4").write_bytes(film.read_bytes())
    put(tmp_path, "no film.mp4", "film.txt", content="A dog barks.")
    clips = listed(tmp_path, windows={"seconds": 4, "stride_seconds": 2.5}).clips
    spans = {key: [c.start_s for c in clips if c.uri == key] for key in uris(listed(tmp_path))}
    assert spans == {
        "film.mp4": [0, 2.5, 5, 7.5], "in/film.mp4": [0, 2.5, 5, 7.5], "no film.mp4": [0]
    }  # fmt: skip
    assert {clip.duration_s for clip in clips} == {4.0}
    assert {c.key for c in clips if c.uri == "film.mp4"} == {
        "film_000000000", "film_000002500", "film_000005000", "film_000007500"
    }  # fmt: skip
    assert {c.caption for c in clips if c.uri == "film.mp4"} == {"A dog barks."}
    assert len({check_key(clip.key) for clip in clips}) == len(clips)


def test_file_that_takes_too_long_to_measure_is_one_clip(tmp_path, shared_clips):
    film = min((shared_clips / "folders" / "dog").glob("*.mp4"))
    (tmp_path / "film.mp4").write_bytes(film.read_bytes())
    clips = listed(tmp_path, windows={"seconds": 4}, decode_timeout_s=1e-9).clips
    assert [(clip.key, clip.start_s) for clip in clips] == [("film_000000000", 0.0)]


def test_ctrl_c_ends_the_measuring_of_a_file_that_hangs(tmp_path, monkeypatch):
    """The server sends no end of the film; whoever waits for it must not be waited for."""
    put(tmp_path / "in", "film.mp4")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program = (
        "from pipeline.sources import open_source; from pipeline.config import EncodeConfig\n"
        "if __name__ == '__main__':\n"
        "    config = EncodeConfig(windows={'seconds': 4})\n"
        "    open_source(sys.argv[1], config).read()\n"
    )
    (tmp_path / "program.py").write_text("import sys\n" + program)
    with http_server(tmp_path / "in") as server:
        server.stalled = threading.Event()
        command = [sys.executable, tmp_path / "program.py", server.url]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
        assert server.stalled.wait(60)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert errors.count(b"KeyboardInterrupt") == 1 and process.returncode


def test_files_of_vggsound_are_cut_already(shared_clips):
    cut = listed(shared_clips / "vggsound", windows={"seconds": 4})
    assert cut == listed(shared_clips / "vggsound")


def test_key_of_a_window_that_another_file_has_is_refused_with_both(tmp_path):
    put(tmp_path, "a.mp4", "a_000000000.mp4")
    put(tmp_path, "t.jsonl", content='{"uri": "a.mp4"}\n{"uri": "b.mp4", "key": "a_000000000", '
        '"duration_s": 1}\n')  # fmt: skip
    with pytest.raises(ConfigError, match=r"key a_000000000: of a\.mp4 and of b\.mp4"):
        listed(tmp_path / "t.jsonl", windows={"seconds": 4})
