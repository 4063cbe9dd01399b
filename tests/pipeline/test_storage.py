"""Media below a root: local files, members of tars, S3 and http, and nothing outside the root."""

import hashlib
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.config import EncodeConfig
from pipeline.folders import UriError, check_uri, normal_root, uri_below
from pipeline.media import ClipError
from pipeline.settings import ConfigError
from pipeline.sources import open_source
from pipeline.storage import MediaStore, open_folder, scrubbed
from tests.pipeline.listed import read
from tests.pipeline.servers import http_server, s3_bucket

FILM = b"film" * 1000


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root" / "in").mkdir(parents=True)
    (tmp_path / "root" / "in" / "a.mp4").write_bytes(FILM)
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    return tmp_path / "root"


def store_of(root, tmp_path, cache_bytes=10**6):
    return MediaStore(str(root), str(tmp_path / "cache"), cache_bytes)


def content(store, uri):
    with store.local(uri) as path:
        return path.read_bytes()


def error_of(store, uri):
    with pytest.raises(ClipError) as error, store.local(uri):
        pass
    return error.value


def cached(tmp_path):
    return [path for path in tmp_path.glob("cache/*/*") if path.name != ".lock"]


# -- addresses


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIAKEY:SECRET@bucket/media",
        "s3://AKIAKEY:SEC/SECRET@bucket/media",
        "https://user:SECRET@host:8443/media",
        "https://host/media?X-Amz-Signature=SECRET",
        "https://host/media#SECRET",
        "s3://bucket/media::https://u:SECRET@host",
        "s3://AKIAKEY:12/abSECRET@bucket/x.csv",
        "http://user:123/45SECRET@host/x.csv",
        "http://SECRET@host/x",
    ],
)
def test_url_with_a_secret_is_refused_and_not_repeated(address):
    for call in (normal_root, open_folder, lambda url: MediaStore(url, None, 1)):
        with pytest.raises(ConfigError, match="written into the plan") as error:
            call(address)
        assert "SECRET" not in str(error.value)
    with pytest.raises(UriError) as error:
        uri_below("s3://bucket", address)
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "can't reach https://user:SECRET@host/x",
        "can't reach s3://AKIAKEY:SE/SECRET@bucket/x",
        "can't reach https://SECRET@host/x",
        "x" * 280 + " https://user:SECRET" + "y" * 100 + "@host/x",
        "403, url='https://host/a.mp4?X-Amz-Credential=SECRET&X-Amz-Signature=SECRET'",
        "https://host/a?sv=2024&sig=SECRET%3D (denied)",
        "{'X-Amz-Security-Token': 'SECRET', 'x': 1}",
        "refused: X-Amz-Signature=SECRET&x=1",
        "refused: sig=SECRET",
        "refused: aws_secret=SECRET, session_token: SECRET",
        "Authorization: Bearer SECRET",
        "AccountKey=SECRET;Endpoint=core.windows.net",
    ],
)
def test_message_is_told_without_credentials(text):
    assert "SECRET" not in scrubbed(OSError(text)) and "OSError: " in scrubbed(OSError(text))


def test_message_without_credentials_stays():
    text = "s3://data/out/video@dct-12345678/000000.tar: no answer from http://host:9000/data"
    assert scrubbed(OSError(text)) == f"OSError: {text}"


@pytest.mark.parametrize(
    ("address", "root"),
    [
        ("/data/clips/", "/data/clips"),
        ("/data/x/../clips", "/data/clips"),
        ("file:///data/my%20clips", "/data/my clips"),
        ("file://localhost/data/clips/", "/data/clips"),
        ("s3://bucket/media/", "s3://bucket/media"),
        ("S3://bucket", "s3://bucket"),
        ("http://127.0.0.1:8080/a%40b", "http://127.0.0.1:8080/a%40b"),
        ("http://[::1]:8080/media", "http://[::1]:8080/media"),
    ],
)
def test_root_has_one_spelling(address, root):
    assert normal_root(address) == root == normal_root(root)


@pytest.mark.parametrize("address", ["filecache::http://u:SECRET@h/x", "http:/u:SECRET@host/x"])
def test_address_that_is_no_url_but_looks_so_is_refused_and_not_repeated(address):
    with pytest.raises(ConfigError, match="expected a URL such as") as error:
        normal_root(address)
    assert "SECRET" not in str(error.value)


def test_server_that_does_not_answer_is_named():
    with pytest.raises(
        ConfigError, match=r"ftp://127\.0\.0\.1:1/x can't be opened: .*expected a se"
    ):
        open_folder("ftp://127.0.0.1:1/x")


def test_relative_folder_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert normal_root("clips/x") == str(tmp_path / "clips" / "x")


def test_url_of_an_unknown_kind_says_what_is_missing():
    with pytest.raises(ConfigError, match=r"nonsense.*pip install -e '\.\[s3\]'"):
        open_folder("nonsense://bucket")


ALWAYS_REFUSED = [
    *(
        "",
        "/etc/passwd",
        "../secret.mp4",
        "in/../../secret.mp4",
        "in/..",
        "./in/a.mp4",
        "in//a.mp4",
    ),
    *("in/a.mp4/", "in/\0a.mp4", "file:///etc/passwd", "s3://other/a.mp4", "."),
]
REFUSED_IN_ROWS = ["in\\a.mp4", "C:\\a.mp4", "c:a.mp4", "in/a\n.mp4", "in/a\x1b.mp4"]


@pytest.mark.parametrize("uri", ALWAYS_REFUSED + REFUSED_IN_ROWS)
def test_uri_of_a_row_that_could_lead_out_is_refused(uri):
    with pytest.raises(UriError):
        check_uri(uri)
    if not uri.startswith("/"):
        with pytest.raises(UriError):
            uri_below("/data", uri)


@pytest.mark.parametrize("uri", ALWAYS_REFUSED)
def test_store_refuses_what_leads_out(root, tmp_path, uri):
    store = store_of(root, tmp_path)
    error = error_of(store, uri)
    assert error.status == "unreadable" and "refused" in error.message
    assert not store.is_missing(uri)


@pytest.mark.parametrize(
    ("root", "address", "uri"),
    [
        ("/data", "/data/in/a.mp4", "in/a.mp4"),
        ("/data", "file:///data/in/a%20b.mp4", "in/a b.mp4"),
        ("/", "/data/a.mp4", "data/a.mp4"),
        ("s3://bucket/media", "s3://bucket/media/in/a.mp4", "in/a.mp4"),
        ("http://host/media", "http://host/media/a%20b.mp4", "a b.mp4"),
    ],
)
def test_full_address_below_the_root_is_stored_relative(root, address, uri):
    assert uri_below(root, address) == uri


@pytest.mark.parametrize(
    ("root", "address"),
    [
        ("/data", "/etc/passwd"),
        ("/data", "/data2/a.mp4"),
        ("/data", "/data/../etc/passwd"),
        ("/data", "file:///data/%2e%2e/etc/passwd"),
        ("/data", "s3://bucket/a.mp4"),
        ("s3://bucket/media", "s3://bucket/other/a.mp4"),
        ("s3://bucket/media", "s3://bucket/media/../other/a.mp4"),
        ("s3://bucket/media", "/etc/passwd"),
        ("http://host/media", "http://host/media/%2e%2e/a.mp4"),
        ("http://host/media", "http://other/media/a.mp4"),
    ],
)
def test_full_address_elsewhere_is_refused(root, address):
    with pytest.raises(UriError):
        uri_below(root, address)


# -- local files


@pytest.mark.parametrize("as_url", [False, True])
def test_local_file_is_itself(root, tmp_path, as_url):
    store = store_of(f"file://{root}" if as_url else root, tmp_path)
    with store.local("in/a.mp4") as path:
        assert path == root / "in" / "a.mp4"
    assert not store.is_missing("in/a.mp4") and not cached(tmp_path)


def test_missing_file_is_missing(root, tmp_path):
    store = store_of(root, tmp_path)
    assert error_of(store, "in/b.mp4").status == "missing"
    assert store.is_missing("in/b.mp4") and store.is_missing("nowhere/b.mp4")


def test_what_is_no_file_is_unreadable(root, tmp_path):
    os.mkfifo(root / "pipe.mp4")
    for uri in ("in", "pipe.mp4", "in/a.mp4/b.mp4", "x" * 300):
        assert error_of(store_of(root, tmp_path), uri).status == "unreadable"


def test_links_are_followed_inside_the_root_only(root, tmp_path):
    (root / "again.mp4").symlink_to("in/a.mp4")
    (root / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "up").symlink_to("..")
    (root / "dead.mp4").symlink_to("nowhere.mp4")
    (root / "loop.mp4").symlink_to("loop.mp4")
    store = store_of(root, tmp_path)
    assert content(store, "again.mp4") == FILM
    for uri in ("out.mp4", "up/secret.mp4"):
        error = error_of(store, uri)
        assert error.status == "unreadable" and "leads out" in error.message
    assert error_of(store, "dead.mp4").status == "missing"
    assert error_of(store, "loop.mp4").status == "unreadable"


def test_file_replaced_by_a_link_out_is_refused_from_then_on(root, tmp_path):
    store = store_of(root, tmp_path)
    assert content(store, "in/a.mp4") == FILM
    (root / "in" / "a.mp4").unlink()
    (root / "in" / "a.mp4").symlink_to(tmp_path / "secret.mp4")
    assert "leads out" in error_of(store, "in/a.mp4").message


def test_root_that_is_a_link_is_a_root(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert content(store_of(tmp_path / "link", tmp_path), "in/a.mp4") == FILM


def test_error_inside_the_block_passes_unchanged(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="mine"), store_of(root, tmp_path).local("in/a.mp4"):
        raise FileNotFoundError("mine")


def test_store_travels_to_other_processes(root, tmp_path):
    store = store_of(root, tmp_path)
    content(store, "in/a.mp4")
    assert content(pickle.loads(pickle.dumps(store)), "in/a.mp4") == FILM


# -- members of tars


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            file = path.with_name("member")
            file.write_bytes(data)
            tar.add(file, name)
    with tarfile.open(path) as tar:
        return {m.name: f"{path.name}#{m.offset_data}+{m.size}/{m.name}" for m in tar}


def test_member_of_a_tar_is_a_copy_with_its_suffix(root, tmp_path):
    uris = tar_of(root / "0.tar", {"a.mp4": FILM, "b.ts": b"other"})
    store = store_of(root, tmp_path)
    with store.local(uris["a.mp4"]) as path:
        assert path.read_bytes() == FILM and path.suffix == ".mp4"
    with store.local(uris["b.ts"]) as path:
        assert path.read_bytes() == b"other" and path.suffix == ".ts"
    assert len(cached(tmp_path)) == 2
    content(store, uris["a.mp4"])
    assert len(cached(tmp_path)) == 2
    assert not store.is_missing(uris["a.mp4"]) and store.is_missing("1.tar#0+1/a.mp4")


def test_member_of_a_changed_tar_is_not_served_from_before(root, tmp_path):
    uris = tar_of(root / "0.tar", {"a.mp4": FILM})
    store = store_of(root, tmp_path)
    assert content(store, uris["a.mp4"]) == FILM
    assert tar_of(root / "0.tar", {"a.mp4": FILM[::-1]}) == uris
    assert content(store, uris["a.mp4"]) == FILM[::-1]


def test_member_beyond_the_end_of_its_tar_is_unreadable(root, tmp_path):
    uri = tar_of(root / "0.tar", {"a.mp4": FILM})["a.mp4"]
    os.truncate(root / "0.tar", 2000)
    error = error_of(store_of(root, tmp_path), uri)
    assert error.status == "unreadable" and "cut off or replaced" in error.message
    (root / "0.tar").unlink()
    assert error_of(store_of(root, tmp_path), uri).status == "missing"


def test_member_of_a_tar_outside_is_refused(root, tmp_path):
    tar_of(tmp_path / "0.tar", {"a.mp4": FILM})
    (root / "link.tar").symlink_to(tmp_path / "0.tar")
    for tar in ("../0.tar", "link.tar", "/etc/0.tar"):
        error = error_of(store_of(root, tmp_path), f"{tar}#0+10/a.mp4")
        assert error.status == "unreadable" and "refused" in error.message


def test_member_bigger_than_the_cache_names_the_setting(root, tmp_path):
    uri = tar_of(root / "0.tar", {"a.mp4": FILM})["a.mp4"]
    error = error_of(store_of(root, tmp_path, cache_bytes=3999), uri)
    assert error.status == "unreadable" and "raise cache_gb" in error.message


def test_cache_that_others_can_enter_is_an_error_that_names_the_setting(root, tmp_path):
    uri = tar_of(root / "0.tar", {"a.mp4": FILM})["a.mp4"]
    store_of(root, tmp_path).cache.folder.chmod(0o777)
    assert "set cache_dir" in error_of(store_of(root, tmp_path), uri).message


# -- http


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(storage, "PAUSES_S", (0.01, 0.01))


def test_http_file_is_fetched_once_with_odd_names(root, tmp_path):
    (root / "in" / "a b#c?d%20.mp4").write_bytes(FILM)
    with http_server(root) as server:
        store = store_of(server.url, tmp_path)
        assert not store.is_missing("nowhere.mp4")
        for uri in ("in/a.mp4", "in/a b#c?d%20.mp4", "in/a.mp4"):
            assert content(store, uri) == FILM
        assert len(server.requests) == 2
        assert error_of(store, "in/b.mp4").status == "missing"
        for uri in ALWAYS_REFUSED + REFUSED_IN_ROWS:
            assert "refused" in error_of(store, uri).message


def test_http_file_longer_than_a_request_is_put_together(root, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "REQUEST_BYTES", 1000)
    data = os.urandom(3500)
    (root / "long.mp4").write_bytes(data)
    with http_server(root) as server:
        assert content(store_of(server.url, tmp_path), "long.mp4") == data
        assert len(server.requests) == 4


def test_http_server_that_fails_for_a_while_is_asked_again(root, tmp_path, quick):
    with http_server(root) as server:
        server.failing = 2
        assert content(store_of(server.url, tmp_path), "in/a.mp4") == FILM


def test_http_server_that_keeps_failing_is_an_error(root, tmp_path, quick):
    with http_server(root) as server:
        server.failing = 1000
        error = error_of(store_of(server.url, tmp_path), "in/a.mp4")
        assert error.status == "unreadable" and "503" in error.message
        url = server.url
    error = error_of(store_of(url, tmp_path), "in/a.mp4")  # it is gone now
    assert error.status == "unreadable" and "Connect" in error.message
    assert not [path for path in cached(tmp_path) if path.suffix in (".tmp", ".mp4")]


def test_http_server_without_ranges_gives_small_files_and_says_why_not_big_ones(
    root, tmp_path, quick, monkeypatch
):
    with http_server(root, has_ranges=False) as server:
        assert content(store_of(server.url, tmp_path), "in/a.mp4") == FILM
        monkeypatch.setattr(storage, "REQUEST_BYTES", 1000)
        (root / "b.mp4").write_bytes(FILM)
        error = error_of(store_of(server.url, tmp_path), "b.mp4")
        assert error.status == "unreadable" and "ranges of bytes" in error.message


def listed(src, config):
    return read(open_source(src, config))


def test_http_folder_is_listed_by_its_index_pages(root, tmp_path):
    (root / "in" / "a.txt").write_text("a dog barks")
    (root / "in" / "b c.mp4").write_bytes(FILM)
    with http_server(root) as server:
        source = listed(server.url, storage_config(tmp_path))
        assert {clip.uri: clip.caption for clip in source.clips} == {
            "in/a.mp4": "a dog barks",
            "in/b c.mp4": "",
        }
        assert source.root == server.url


def test_http_pages_that_link_deeper_without_end_are_refused(root, tmp_path):
    """One page for all paths, as single-page applications are served."""
    for name in ("one", "two"):
        (root / name).symlink_to(root)
    with http_server(root) as server, pytest.raises(ConfigError, match=r"without end.*32 levels"):
        listed(server.url, storage_config(tmp_path))


# -- S3


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A bucket of an own S3 server, as fsspec's file system."""
    with s3_bucket(tmp_path_factory.mktemp("s3"), "clips") as files:
        yield files


def storage_config(tmp_path, **settings):
    return EncodeConfig(cache_dir=str(tmp_path / "cache"), **settings)


def test_s3_object_is_fetched_once_and_again_when_it_changes(s3, tmp_path):
    s3.pipe_file("clips/one/a b.mp4", FILM)
    store = store_of("s3://clips/one", tmp_path)
    for _ in range(2):
        assert content(store, "a b.mp4") == FILM
    assert len(cached(tmp_path)) == 1
    s3.pipe_file("clips/one/a b.mp4", FILM[::-1])
    assert content(store, "a b.mp4") == FILM[::-1]
    assert error_of(store, "b.mp4").status == "missing"
    assert error_of(store, "../two/a.mp4").status == "unreadable"


def test_s3_bucket_that_is_not_there_is_missing_without_credentials_in_the_message(s3, tmp_path):
    error = error_of(store_of("s3://nobucket/x", tmp_path), "a.mp4")
    assert error.status in ("missing", "unreadable") and "hush" not in error.message


def test_s3_prefix_of_real_clips_is_the_folder_they_were_copied_from(s3, shared_clips, tmp_path):
    local = tmp_path / "dog"
    shutil.copytree(shared_clips / "folders" / "dog", local / "dog")
    first = min((local / "dog").iterdir())
    first.with_suffix(".txt").write_text("a dog")
    s3.put(str(local), "clips/folders", recursive=True)
    here = listed(str(local), storage_config(tmp_path))
    there = listed("s3://clips/folders/", storage_config(tmp_path))
    assert sorted(here.clips, key=lambda c: c.key) == sorted(there.clips, key=lambda c: c.key)
    assert there.root == "s3://clips/folders" and "a dog" in {c.caption for c in there.clips}
    store = store_of(there.root, tmp_path, 10**8)
    for clip in there.clips:
        wanted = hashlib.sha256((local / clip.uri).read_bytes()).digest()
        assert hashlib.sha256(content(store, clip.uri)).digest() == wanted


def test_s3_tars_and_tables_are_read_in_place(s3, shared_clips, tmp_path):
    films = sorted((shared_clips / "folders" / "dog").glob("*.mp4"))[:2]
    members = {"000.mp4": films[0].read_bytes(), "000.txt": b"a dog", "001.mp4": b"film"}
    tar_of(tmp_path / "0.tar", members)
    s3.put_file(str(tmp_path / "0.tar"), "clips/tars/0.tar")
    source = listed("s3://clips/tars", storage_config(tmp_path))
    assert source == listed("s3://clips/tars/0.tar", storage_config(tmp_path))
    assert {clip.key: clip.caption for clip in source.clips} == {"000": "a dog", "001": ""}
    store = store_of(source.root, tmp_path, 10**8)
    assert {c.key: content(store, c.uri) for c in source.clips} == {
        "000": members["000.mp4"],
        "001": b"film",
    }
    pq.write_table(pa.table({"uri": ["x.mp4"], "start_s": [2.0]}), tmp_path / "t.parquet")
    tables = {
        "t.jsonl": b'{"uri": "s3://clips/tars/x.mp4", "start_s": 2}\n',
        "t.csv": b"uri,start_s\nx.mp4,2\n",
        "t.parquet": (tmp_path / "t.parquet").read_bytes(),
    }
    for name, data in tables.items():
        s3.pipe_file(f"clips/tables/{name}", data)
        config = storage_config(tmp_path, media="s3://clips/tars/")
        (clip,) = listed(f"s3://clips/tables/{name}", config).clips
        assert (clip.uri, clip.key) == ("x.mp4", "x_000002000")
    with pytest.raises(ConfigError, match=r"nothing\.csv: no such file"):
        listed("s3://clips/tars/nothing.csv", storage_config(tmp_path))


def test_csv_of_vggsound_here_finds_its_media_on_s3(s3, shared_clips, tmp_path):
    s3.put(str(shared_clips / "vggsound" / "video"), "clips/vgg", recursive=True)
    csv = str(shared_clips / "vggsound" / "vggsound.csv")
    source = listed(csv, storage_config(tmp_path, media="s3://clips/vgg"))
    video = str(shared_clips / "vggsound" / "video")
    assert source.clips == listed(csv, storage_config(tmp_path, media=video)).clips
    store = store_of(source.root, tmp_path, 10**8)
    clip = source.clips[0]
    assert content(store, clip.uri) == Path(video, clip.uri).read_bytes()


def test_cache_that_cannot_be_made_is_said_before_a_clip_is_tried(s3, tmp_path):
    s3.pipe_file("clips/one/a.mp4", FILM)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"media cache .*set cache_dir"):
        listed("s3://clips/one", storage_config(tmp_path))


def test_s3_media_are_measured_for_windows(s3, shared_clips, tmp_path):
    film = min((shared_clips / "folders" / "dog").glob("*.mp4"))
    s3.put_file(str(film), "clips/long/a.mp4")
    config = storage_config(tmp_path, windows={"seconds": 4})
    clips = listed("s3://clips/long", config).clips
    assert [(clip.key, clip.start_s, clip.duration_s) for clip in clips] == [
        ("a_000000000", 0.0, 4.0),
        ("a_000004000", 4.0, 4.0),
        ("a_000008000", 8.0, 4.0),
    ]


def test_local_path_of_a_root_named_by_url_is_read(root, tmp_path):
    source = listed(f"file://{root}", storage_config(tmp_path))
    assert source.root == str(root) and Path(source.root, source.clips[0].uri).read_bytes() == FILM
