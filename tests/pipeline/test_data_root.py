"""A path below a URL is used like a ``pathlib.Path``; its failures are never taken for answers."""

import errno
import io
import os
import pathlib
import uuid

import pytest

from pipeline import storage
from pipeline.data_root import RemotePath, open_root
from pipeline.files import (
    is_local,
    map_ahead,
    read_range,
    scan,
    write_atomically,
    write_json,
    writing,
)
from pipeline.format import read_json
from pipeline.settings import ConfigError


def memory_root():
    return open_root(f"memory://{uuid.uuid4().hex}/data")


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    """A root of either kind, with a file and a folder in it."""
    root = open_root(str(tmp_path / "data")) if request.param == "local" else memory_root()
    root.mkdir(parents=True, exist_ok=True)
    (root / "facts@a").mkdir()
    (root / "facts@a" / "000000.parquet").write_bytes(b"0123456789")
    (root / "plan.json").write_bytes(b'{"a": 1}')
    return root


class Failing:
    """A file system of which every request fails, in a way of its own."""

    def __init__(self, error):
        self._error = error

    def __getattr__(self, name):
        def fail(*_, **__):
            raise self._error

        return fail


@pytest.fixture
def failing(monkeypatch):
    """Make a path whose requests raise an error."""
    monkeypatch.setattr(storage, "PAUSES_S", (0.0, 0.0))

    def make(error):
        root = memory_root()
        root._folder.files = Failing(error)
        return RemotePath(root._folder, "a.json")

    return make


# -- addresses


def test_folder_is_a_plain_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ("data", f"{tmp_path}/data/", f"file://{tmp_path}/data"):
        found = open_root(address)
        assert type(found) is pathlib.PosixPath and found == tmp_path / "data"


@pytest.mark.parametrize(
    "address", ["s3://KEY:SECRET@bucket/x", "s3://bucket/x?token=SECRET", "memory://a::s3://SECRET"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(address):
    with pytest.raises(ConfigError) as error:
        open_root(address)
    assert "SECRET" not in str(error.value)


def test_unknown_scheme_is_named():
    with pytest.raises(ConfigError, match="nosuch://x can't be opened"):
        open_root("nosuch://x")


# -- the manners of pathlib


def test_names_and_ways(root):
    path = root / "facts@a" / "000000.parquet"
    assert (path.name, path.stem) == ("000000.parquet", "000000")
    assert (
        path == root / "facts@a/000000.parquet" and len({path, root / "facts@a" / path.name}) == 1
    )
    assert path.parent == root / "facts@a" and path.parent.parent == root
    assert str(path) == f"{root}/facts@a/000000.parquet"
    assert path.with_name("x").parent == path.parent
    assert sorted([path, root / "a"])[0] == root / "a"
    assert is_local(path) == isinstance(root, pathlib.Path)


def test_what_is_there_is_told(root):
    assert root.is_dir() and root.exists()
    assert (root / "plan.json").exists() and not (root / "plan.json").is_dir()
    assert not (root / "x").exists() and not (root / "x").is_dir()
    assert {path.name for path in root.iterdir()} == {"plan.json", "facts@a"}
    assert (root / "facts@a" / "000000.parquet").stat().st_size == 10


def test_listing_tells_sizes_kinds_and_times(root):
    entries = {entry.name: entry for entry in scan(root)}
    plan = entries["plan.json"]
    assert entries["facts@a"].is_dir() and not plan.is_dir()
    assert plan.stat(follow_symlinks=False).st_size == 8
    assert plan.stat().st_mtime > 1.7e9
    with pytest.raises(FileNotFoundError):
        scan(root / "nothing")


def test_odd_names_are_listed(root):
    """Whoever looks for what is left over must see them."""
    odd = {"a\\b", "tab\there", "ümlaut %41", "c:d"}
    for name in odd:
        (root / name).write_bytes(b"x")
    assert {path.name for path in root.iterdir()} == odd | {"plan.json", "facts@a"}
    assert all((root / name).read_bytes() == b"x" for name in odd)


def test_reading(root):
    path = root / "facts@a" / "000000.parquet"
    assert read_range(path, 3, 4) == b"3456" and read_range(path, 8, 4) == b"89"
    assert read_range(path, 5, 0) == b""
    with path.open("rb") as file:
        file.seek(-2, io.SEEK_END)
        assert file.read() == b"89"


@pytest.mark.parametrize("call", ["read_bytes", "stat", "open", "unlink"])
def test_missing_file_is_named(root, call):
    with pytest.raises(FileNotFoundError) as error:
        getattr(root / "x.json", call)()
    assert error.value.errno == errno.ENOENT and error.value.filename in (
        str(root / "x.json"),
        root / "x.json",
    )


def test_files_are_written_whole_or_not_at_all(root):
    path = root / "new"
    with writing(path) as file:
        file.write(b"x" * 1000)
        assert not path.exists()
    assert path.stat().st_size == 1000
    with pytest.raises(KeyError), writing(path) as file:
        file.write(b"y")
        raise KeyError
    write_atomically(path, b"small")
    assert path.read_bytes() == b"small"
    write_json(root / "j.json", {"b": [1]})
    assert read_json(root / "j.json") == {"b": [1]}
    assert {path.name for path in root.iterdir()} == {"plan.json", "facts@a", "new", "j.json"}
    path.unlink()
    path.unlink(missing_ok=True)
    assert not path.exists()


def test_order_of_results_is_that_of_the_items(root):
    assert list(map_ahead(root, lambda n: n * n, iter(range(50)), num_ahead=7)) == [
        n * n for n in range(50)
    ]


# -- what only object stores do


def test_create_writes_once():
    path = memory_root() / "record.json"
    path.create(b"first")
    with pytest.raises(FileExistsError):
        path.create(b"second")
    assert path.read_bytes() == b"first"


@pytest.mark.parametrize("mode", ["w", "wb", "a", "x", "r+b"])
def test_parts_of_objects_are_not_written(mode):
    with pytest.raises(ValueError, match="whole files"):
        (memory_root() / "a").open(mode)


def test_upload_that_comes_short_is_told(tmp_path, monkeypatch):
    path = memory_root() / "a"
    monkeypatch.setattr(path._files, "put_file", lambda _, name: path._files.pipe_file(name, b"x"))
    with (tmp_path / "f").open("w+b") as file:
        file.write(b"12345")
        with pytest.raises(OSError, match="1 bytes are there, 5 were uploaded") as error:
            path.upload(file)
    assert error.value.errno == errno.EIO


@pytest.mark.parametrize(
    ("raised", "number"),
    [
        (RuntimeError("Could not connect to https://key:hush@host/"), errno.EIO),
        (PermissionError("Access Denied"), errno.EACCES),
        (OSError(errno.ENOSPC, "No space left"), errno.ENOSPC),
        (OSError(errno.EIO, "Bucket quota exceeded"), errno.ENOSPC),
    ],
    ids=["network", "refused", "disk full", "quota"],
)
@pytest.mark.parametrize(
    "call",
    [
        RemotePath.exists, RemotePath.is_dir, RemotePath.stat, RemotePath.scan,
        RemotePath.read_bytes, RemotePath.unlink, RemotePath.mkdir,
        lambda path: path.write_bytes(b"x"), lambda path: path.create(b"x"),
        lambda path: path.read_range(0, 1), lambda path: path.open("rb"),
    ],
)  # fmt: skip
def test_failure_is_an_os_error_of_its_kind_and_no_answer(failing, call, raised, number):
    path = failing(raised)
    with pytest.raises(OSError) as error:
        call(path)
    assert error.value.errno == number and error.value.filename == str(path)
    assert "hush" not in str(error.value)
    assert isinstance(error.value, PermissionError) == (number == errno.EACCES)


def test_local_temporaries_of_writers_with_the_same_pid_differ(tmp_path, monkeypatch):
    """Containers on two nodes often have one pid."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with writing(tmp_path / "a") as one:
        with writing(tmp_path / "a") as other:
            other.write(b"other")
        one.write(b"one")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
