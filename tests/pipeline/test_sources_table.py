"""Tables of clips: typed columns, distinct keys, no row that leads out of the media's folder."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import EncodeConfig
from pipeline.format import check_key
from pipeline.settings import ConfigError
from pipeline.sources import open_source
from tests.pipeline.listed import read

ROWS = [
    {"uri": "a.mp4"},
    {
        "uri": "in/b c.mkv",
        "start_s": 1.5,
        "duration_s": 4.0,
        "caption": "A dog\n barks",
        "key": "k",
    },
    {"uri": "a.mp4", "start_s": 12.0, "label": "dog", "split": "test"},
]


def csv_cell(value):
    text = "" if value is None else str(value)
    return f'"{text}"' if re.search(r'[,"\n]', text) else text


COLUMNS = ("uri", "start_s", "duration_s", "caption", "label", "split", "key")


def write(path, rows, columns=COLUMNS):
    if path.suffix == ".csv":
        lines = [",".join(columns)]
        lines += [",".join(csv_cell(row.get(column)) for column in columns) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        named = [name for name in columns if any(name in row for row in rows)]
        table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in named})
        pq.write_table(table, path, row_group_size=2)
    return path


def listed(path, **config):
    return read(open_source(str(path), EncodeConfig(**config)))


SUFFIXES = [".csv", ".jsonl", ".parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_are_clips_with_defaults_for_what_is_not_there(tmp_path, suffix):
    source = listed(write(tmp_path / f"t{suffix}", ROWS), clip={"seconds": 7})
    assert (source.kind, source.root) == ("table", str(tmp_path))
    first, second, third = source.clips
    assert (first.key, first.uri, first.start_s, first.duration_s) == ("a", "a.mp4", 0.0, 7.0)
    assert (first.caption, first.label, first.split) == ("", "", "train")
    assert (second.key, second.uri, second.caption) == ("k", "in/b c.mkv", "A dog barks")
    assert (second.start_s, second.duration_s) == (1.5, 4.0)
    assert (third.key, third.start_s, third.label) == ("a_000012000", 12.0, "dog")
    assert third.split == "test"


def test_the_three_kinds_of_tables_are_the_same_source(tmp_path):
    sources = [listed(write(tmp_path / f"t{suffix}", ROWS)) for suffix in SUFFIXES]
    assert sources[0] == sources[1] == sources[2]


def test_numbers_of_a_parquet_may_be_of_any_width(tmp_path):
    columns = {"uri": pa.array(["a.mp4"]), "start_s": pa.array([3], pa.int16())}
    columns["duration_s"] = pa.array([2.5], pa.float32())
    columns["label"] = pa.array(["dog"]).dictionary_encode()
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    (clip,) = listed(tmp_path / "t.parquet").clips
    assert (clip.start_s, clip.duration_s, clip.label) == (3.0, 2.5, "dog")


def test_csv_of_a_spreadsheet_is_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes('\ufeffcaption,uri\r\n"a, b",a.mp4\r\n'.encode())
    (clip,) = listed(path).clips
    assert (clip.caption, clip.uri) == ("a, b", "a.mp4")


def test_starts_in_one_file_are_told_apart_to_the_millisecond(tmp_path):
    rows = [{"uri": "x/y.mp4", "start_s": start} for start in (0.0, 0.001, 1.0, 12345.678)]
    keys = [clip.key for clip in listed(write(tmp_path / "t.jsonl", rows)).clips]
    assert len(set(keys)) == 4 and keys[3].endswith("_012345678")


@given(st.lists(st.tuples(st.text("ab/ é_-", min_size=1, max_size=90), st.integers(0, 10**9 - 1))))
@settings(deadline=None, max_examples=60)
def test_keys_hold_in_a_tar_whatever_the_names(tmp_path_factory, named):
    rows = {
        (f"x{re.sub('/+', '/', name).strip('/')}.mp4", ms): {
            "uri": f"x{re.sub('/+', '/', name).strip('/')}.mp4",
            "start_s": ms / 1000,
        }
        for name, ms in named
    }
    rows[("y.mp4", 0)] = {"uri": "y.mp4"}
    path = write(tmp_path_factory.mktemp("t") / "t.jsonl", list(rows.values()))
    clips = listed(path).clips
    assert len({check_key(clip.key) for clip in clips}) == len(rows)


def test_key_of_a_row_does_not_depend_on_other_rows(tmp_path):
    every = {c.key: c.uri for c in listed(write(tmp_path / "t.jsonl", ROWS)).clips}
    for row in ROWS:
        (clip,) = listed(write(tmp_path / "t.jsonl", [row])).clips
        assert every[clip.key] == clip.uri


def test_same_clip_twice_names_both_rows(tmp_path):
    path = write(tmp_path / "t.csv", [*ROWS, {"uri": "a.mp4", "start_s": 12}])
    with pytest.raises(ConfigError, match=r"t\.csv line 6: .* a_000012000 as in line 5; .*`key`"):
        listed(path)  # the caption of the second row takes two lines
    path = write(tmp_path / "t.parquet", [{"uri": "a.mp4"}, {"uri": "b.mp4", "key": "a"}])
    with pytest.raises(ConfigError, match=r"t\.parquet row 2: .* a as in row 1"):
        listed(path)


def test_captions_are_on_one_line_whatever_white_space_they_hold(tmp_path):
    white = [chr(c) for c in range(1, 0x3100) if chr(c).isspace()]
    captions = [*(f"{w}a{w}{w}b {w}c" for w in white), "ä  犬", "", " ", "a b", "a  b"]
    rows = [{"uri": f"{n}.mp4", "caption": caption} for n, caption in enumerate(captions)]
    found = [clip.caption for clip in listed(write(tmp_path / "t.jsonl", rows)).clips]
    assert found == [" ".join(caption.split()) for caption in captions]


def test_media_may_be_elsewhere_and_named_in_full(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "media").mkdir()
    uris = ["a.mp4", f"{tmp_path}/media/b.mp4", f"file://{tmp_path}/media/in/c.mp4"]
    path = write(tmp_path / "lists" / "t.jsonl", [{"uri": uri} for uri in uris])
    source = listed(path, media=str(tmp_path / "media"))
    assert [clip.uri for clip in source.clips] == ["a.mp4", "b.mp4", "in/c.mp4"]
    assert source.root == str(tmp_path / "media")
    with pytest.raises(ConfigError, match=r"line 2: uri refused, .*setting `media`"):
        listed(path)
    with pytest.raises(ConfigError, match="nowhere"):
        listed(path, media=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "uri",
    [
        *("/etc/passwd", "../a.mp4", "in/../../a.mp4", "C:\\a.mp4", "in\\a.mp4", "s3://b/a.mp4"),
        *("file:///etc/passwd", "https://u:SECRET@host/a.mp4", "a.tar#1+2/../../x.mp4", "./a.mp4"),
    ],
)
def test_uri_that_leads_out_is_refused_with_its_row(tmp_path, suffix, uri):
    path = write(tmp_path / f"t{suffix}", [{"uri": "ok.mp4"}, {"uri": uri}])
    where = {".csv": "line 3", ".jsonl": "line 2", ".parquet": "row 2"}[suffix]
    with pytest.raises(ConfigError, match=rf"t{re.escape(suffix)} {where}: uri refused") as error:
        listed(path)
    assert "SECRET" not in str(error.value)


def test_link_that_leads_out_is_refused_with_its_row(tmp_path):
    (tmp_path / "root" / "in").mkdir(parents=True)
    (tmp_path / "b.mp4").touch()
    (tmp_path / "root" / "a.mp4").symlink_to(tmp_path / "b.mp4")
    (tmp_path / "root" / "up").symlink_to(tmp_path)
    (tmp_path / "root" / "in" / "c.mp4").symlink_to("../in/d.mp4")
    path = write(tmp_path / "root" / "t.jsonl", [{"uri": "in/c.mp4"}])
    assert len(listed(path).clips) == 1
    (tmp_path / "root" / "0.tar").symlink_to(tmp_path / "b.mp4")
    for uri in ("a.mp4", "up/b.mp4", "0.tar#0+10/x.mp4"):
        write(path, [{"uri": "in/c.mp4"}, {"uri": uri}])
        with pytest.raises(ConfigError, match=r"line 2: uri refused, .* leads out"):
            listed(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"uri": "b.mp4", "key": "a.b"}, "key 'a.b'"),
        ({"uri": "b.mp4", "key": "../x"}, "key '../x'"),
        ({"uri": "b.mp4", "key": "x" * 81}, "at most 80"),
        ({"uri": "b.mp4", "split": "a b"}, "split 'a b'"),
        ({"uri": "b.mp4", "start_s": -1.0}, "start_s is"),
        ({"uri": "b.mp4", "start_s": float("nan")}, "start_s is"),
        ({"uri": "b.mp4", "start_s": 1e6}, "start_s is"),
        ({"uri": "b.mp4", "duration_s": 0.0}, "duration_s is 0"),
        ({"uri": "b.mp4", "duration_s": float("inf")}, "duration_s is"),
        ({"uri": None, "key": "x"}, "uri refused, '' is no path"),
    ],
)
def test_bad_field_names_row_and_fault(tmp_path, suffix, row, message):
    path = write(tmp_path / f"t{suffix}", [row])
    with pytest.raises(ConfigError, match=rf"(line|row) [12]: .*{re.escape(message)}"):
        listed(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"uri": 3}', "uri is 3, expected text"),
        ('{"uri": "b.mp4", "start_s": true}', "start_s is True"),
        ('{"uri": "b.mp4", "start_s": "3"}', "start_s is '3'"),
        ('{"uri": "b.mp4", "label": ["dog"]}', "label is ['dog']"),
        ('{"uri": "b.mp4", "caption": "\\ud800"}', "not Unicode"),
        ('["b.mp4"]', "expected a JSON object, found list"),
        ("b.mp4", "expected a JSON object"),
        ('{"uri": "b.mp4", "uri": "c.mp4"}', "'uri' is there twice"),
        ('{"uri": "b.mp4", "start_s": 1' + "0" * 400 + "}", "start_s is inf"),
        ('{"uri": "b.mp4", "key": "' + "x" * 10**6 + '"}', "xxx, expected letters"),
        ('{"uri": "' + "x" * 300 + '.mp4"}', "304 bytes, expected"),
        ('{"uri": "' + "x/" * 5000 + 'b.mp4"}', "10005 bytes, expected"),
        ("[" * 100_000, "expected a JSON object"),
        ('{"uri": "b.mp4", "start_s": ' + "9" * 5000 + "}", "expected a JSON object"),
    ],
)
def test_bad_line_of_json_names_line_and_fault(tmp_path, row, message):
    (tmp_path / "t.jsonl").write_text('{"uri": "a.mp4"}\n\n' + row + "\n")
    with pytest.raises(ConfigError, match=rf"t\.jsonl line 3: .*{re.escape(message)}") as error:
        listed(tmp_path / "t.jsonl")
    assert len(str(error.value)) < 800


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uri,label\na.mp4\n", "line 2: 1 fields, expected the header's 2"),
        ("uri,label\na.mp4,b,c\n", "line 2: 3 fields"),
        ("uri,uri\na.mp4,b.mp4\n", "line 1: a column is there twice"),
        ("uri,start_s\na.mp4,1_0\n", "line 2: start_s is '1_0'"),
        ("uri\n", "has no row"),
        ("uri,start_s\na.mp4,soon\n", "line 2: start_s is 'soon'"),
        ("uri,key\na.mp4," + "x" * 200_000 + "\n", "cells of 131072 characters at most"),
        ('uri,caption\na.mp4,x\n"b.mp4,y\nc.mp4,z\n', "line 3 can't be read as csv"),
    ],
)
def test_bad_csv_names_line_and_fault(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        listed(tmp_path / "t.csv")


def test_bytes_that_are_no_text_name_their_line(tmp_path):
    (tmp_path / "t.csv").write_bytes(
        b"uri\n%s\xff.mp4\n" % b"".join(b"%d.mp4\n" % n for n in range(10_000))
    )
    with pytest.raises(ConfigError, match=r"t\.csv line 10002: expected UTF-8"):
        listed(tmp_path / "t.csv")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1"])
def test_parquet_that_is_none_is_refused_by_name(tmp_path, content):
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(ConfigError, match=r"t\.parquet"):
        listed(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("start_s", pa.array([1234567891], pa.timestamp("ns"))),
        ("start_s", pa.array([2**62], pa.duration("ns"))),
        ("start_s", pa.array(["3"])),
        ("duration_s", pa.array([True])),
        ("split", pa.array([2**30], pa.date32())),
        ("label", pa.array([1], pa.timestamp("us", "Nowhere/None"))),
        ("caption", pa.array([["a"]])),
        ("key", pa.array([b"a"])),
    ],
)
def test_column_of_another_type_is_refused_by_name(tmp_path, column, values):
    pq.write_table(pa.table({"uri": ["a.mp4"], column: values}), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=rf"t\.parquet: column {column} is of type .*expected"):
        listed(tmp_path / "t.parquet")


def test_column_that_is_there_twice_is_refused_by_name(tmp_path):
    columns = [pa.array([text]) for text in ("a.mp4", "x", "y")]
    table = pa.Table.from_arrays(columns, ["uri", "caption", "caption"])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match="column caption is there twice"):
        listed(tmp_path / "t.parquet")


def test_parquet_of_text_that_is_none_is_refused(tmp_path):
    bad = pa.array([b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"uri": ["a.mp4"], "caption": bad}), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"t\.parquet can't be read"):
        listed(tmp_path / "t.parquet")


def test_parquet_without_uri_names_its_columns(tmp_path):
    with pytest.raises(ConfigError, match=r"one column uri among path, label"):
        listed(write(tmp_path / "t.parquet", [{"path": "a", "label": "x"}], ("path", "label")))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_unknown_columns_are_named_once(tmp_path, suffix, capsys):
    rows = [{"uri": f"{name}.mp4", "duration": 3.0} for name in "abc"]
    listed(write(tmp_path / f"t{suffix}", rows, columns=("uri", "duration")))
    (line,) = capsys.readouterr().err.splitlines()
    assert "ignored: 'duration'; known are uri, start_s, duration_s" in line


def test_table_that_is_a_link_is_read_where_it_is_and_its_media_beside_the_link(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "media").mkdir()
    write(tmp_path / "lists" / "t.csv", ROWS)
    (tmp_path / "media" / "t.csv").symlink_to(tmp_path / "lists" / "t.csv")
    assert listed(tmp_path / "media" / "t.csv").root == str(tmp_path / "media")


def test_rows_without_a_length_are_cut_into_windows(tmp_path, shared_clips):
    media = shared_clips / "folders" / "dog"
    film = min(media.glob("*.mp4")).name
    rows = [
        {"uri": film, "key": "all"},
        {"uri": film, "key": "late", "start_s": 5.0},
        {"uri": film, "key": "told", "start_s": 2.0, "duration_s": 3.0},
        {"uri": "nowhere.mp4"},
    ]
    path = write(tmp_path / "t.jsonl", rows)
    windows = {"seconds": 4, "stride_seconds": 3}
    clips = listed(path, media=str(media), windows=windows).clips
    assert {clip.key: (clip.start_s, clip.duration_s) for clip in clips} == {
        "all_000000000": (0, 4),
        "all_000003000": (3, 4),
        "all_000006000": (6, 4),
        "all_000009000": (9, 4),
        "late_000005000": (5, 4),
        "late_000008000": (8, 4),
        "told": (2, 3),
        "nowhere_000000000": (0, 4),
    }
