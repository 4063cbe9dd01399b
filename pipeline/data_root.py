"""The root of a data set: a local folder, or a URL of anything fsspec knows.

``RemotePath`` is used like a ``pathlib.Path``, so that all that reads and writes a data set is
written once. Each of its methods is one request where that is possible, is tried again when the
network fails, and raises nothing but `OSError`: ``exists`` never takes a failure for an absence.
"""

from __future__ import annotations

import errno
import io
import stat
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from pipeline.folders import URL, normal_root
from pipeline.storage import RemoteFolder, as_os_error, attempt

# Whatever the file system, one of these tells when a file was last written.
TIME_FIELDS = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
# Their top folders are buckets: paid for by somebody, named by everybody, never made by us.
BUCKET_SCHEMES = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "cos"))
READ_BYTES = 4 << 20  # of one request, where a file is read from front to back

Result = TypeVar("Result")


def open_root(address: str) -> Path:
    """Return the root of a data set: an absolute path, or a ``RemotePath``, used in the same way.

    Args:
        address: a folder or a URL, without credentials.

    Raises:
        ConfigError: the URL holds a password or a query, see ``pipeline.folders.normal_root``; no
            package is installed for such URLs, or no server answers.
    """
    root = normal_root(address)
    if URL.match(root):
        return cast(Path, RemotePath(RemoteFolder(root)))
    return Path(root)


class FileFacts(NamedTuple):
    """What of an ``os.stat_result`` an object store tells; the time is 0 where it doesn't."""

    st_size: int
    st_mtime: float
    st_mode: int


class Entry(NamedTuple):
    """A file or folder in a listing, like an ``os.DirEntry``."""

    name: str
    facts: FileFacts

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Return whether it is a folder; there are no links."""
        return stat.S_ISDIR(self.facts.st_mode)

    def stat(self, *, follow_symlinks: bool = True) -> FileFacts:
        """Return what the listing told of it."""
        return self.facts


class RemotePath:
    """A file or folder below a URL. Holds no connection of its own; safe in threads.

    Args:
        folder: the root.
        uri: path below the root, as ``pipeline.folders.check_uri`` allows; empty for the root.
    """

    def __init__(self, folder: RemoteFolder, uri: str = "") -> None:
        self._folder, self._uri = folder, PurePosixPath(uri)
        self._files = folder.files
        # Others may have put objects of odd names there, which have to be listed.
        self._path = folder.full(str(self._uri), strict=False) if uri else folder.path.rstrip("/")

    # -- names

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(str(self)).name

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> RemotePath:
        """The folder it is in; the root is its own."""
        return RemotePath(self._folder, _text(self._uri.parent))

    def with_name(self, name: str) -> RemotePath:
        """Return the path of another name in the same folder."""
        return RemotePath(self._folder, str(self._uri.with_name(name)))

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._folder, str(self._uri / name))

    def __str__(self) -> str:
        return "/".join((self._folder.root, *self._uri.parts))

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __lt__(self, other: RemotePath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def _ask(self, call: Callable[[], Result]) -> Result:
        """Make a request, see ``attempt``; its errors say which file it was about."""
        try:
            return attempt(call)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "there is no such file", str(self)) from None
        except OSError as error:
            error.filename = str(self)
            raise

    # -- what is there

    def stat(self) -> FileFacts:
        """Return size, time and kind.

        Raises:
            FileNotFoundError, OSError: there is nothing, or it can't be told.
        """
        return _facts(self._ask(lambda: self._folder.info(self._path)))

    def exists(self) -> bool:
        """Return whether there is a file, or a folder with something in it."""
        return self._mode() != 0

    def is_dir(self) -> bool:
        """Return whether there is a folder with something in it."""
        return stat.S_ISDIR(self._mode())

    def _mode(self) -> int:
        try:
            return self.stat().st_mode
        except FileNotFoundError:
            return 0

    def scan(self) -> list[Entry]:
        """List a folder, see ``pipeline.files.scan``."""
        listed = self._ask(lambda: self._files.ls(self._path, detail=True))
        found = [(info["name"].rstrip("/"), info) for info in listed]
        # The console of some stores leaves an object that stands for the folder itself.
        inside = [(name, info) for name, info in found if name.strip("/") != self._path.strip("/")]
        return [Entry(name.rpartition("/")[2], _facts(info)) for name, info in inside]

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield what is in a folder."""
        yield from (self / entry.name for entry in self.scan())

    # -- reading

    def read_bytes(self) -> bytes:
        """Return a whole file."""
        return self._ask(lambda: self._files.cat_file(self._path))

    def read_range(self, start: int, nbytes: int) -> bytes:
        """Return a part of a file, cut where it ends."""
        if not nbytes:
            return b""
        return self._ask(lambda: self._files.cat_file(self._path, start=start, end=start + nbytes))

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open a file for reading bytes; to write one, see ``upload``.

        Raises:
            FileNotFoundError, OSError: there is no file to read.
            ValueError: the mode is another: an object store makes nothing but whole files.
        """
        if mode != "rb":
            raise ValueError(f"mode {mode!r} of {self}: expected rb; write whole files instead")
        return self._ask(lambda: self._folder.open(str(self._uri), READ_BYTES))

    # -- writing

    def write_bytes(self, data: bytes) -> int:
        """Write a file whole: readers of an object see the old data or the new."""
        self._ask(lambda: self._files.pipe_file(self._path, data))
        return len(data)

    def create(self, data: bytes) -> None:
        """Write a small file unless there is one; asked once, for a second time may find the first.

        Atomic on S3, Google's and Azure's stores. Other file systems of fsspec look first and
        write then, so that of two writers at once both may succeed, and the last one's data stay.

        Raises:
            FileExistsError: there is a file.
            OSError: anything else; the file may be written all the same, even later.
        """
        try:
            self._files.pipe_file(self._path, data, mode="create")
        except FileExistsError:
            raise
        except Exception as error:  # every fsspec file system has exceptions of its own
            failure = as_os_error(error)
            failure.filename = str(self)
            raise failure from None

    def upload(self, file: BinaryIO) -> None:
        """Write all of an open local file here, in parts where it is large.

        Raises:
            OSError: the upload failed, or there are not as many bytes here afterwards.
        """
        file.flush()
        size = file.seek(0, io.SEEK_END)
        # Opens the file anew, from its start; temporary files have no name of their own.
        self._ask(lambda: self._files.put_file(f"/proc/self/fd/{file.fileno()}", self._path))
        if (found := self.stat().st_size) != size:
            raise OSError(errno.EIO, f"{found} bytes are there, {size} were uploaded", str(self))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file. S3 doesn't tell whether there was one."""
        try:
            self._ask(lambda: self._files.rm_file(self._path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Make a folder with all above it, on file systems that need one.

        Raises:
            FileExistsError: there is one, and not ``exist_ok``.
            FileNotFoundError: there is no bucket of that name.
        """
        if self._folder.root.partition("://")[0] not in BUCKET_SCHEMES:
            self._ask(lambda: self._files.makedirs(self._path, exist_ok=exist_ok))
            return
        if not exist_ok and self.exists():
            raise FileExistsError(f"{self} exists")
        bucket = self._path.lstrip("/").partition("/")[0]
        try:
            self._ask(lambda: self._folder.info(bucket))
        except FileNotFoundError:
            reason = f"there is no bucket {bucket!r}; make it, or mend the name"
            raise FileNotFoundError(errno.ENOENT, reason, str(self)) from None
        except PermissionError:
            pass  # to look at all of a bucket may be forbidden where a folder of it may be written


def _text(uri: PurePosixPath) -> str:
    return "" if uri == PurePosixPath() else str(uri)


def _facts(info: dict[str, Any]) -> FileFacts:
    time = next((info[name] for name in TIME_FIELDS if info.get(name)), 0.0)
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    seconds = time.timestamp() if isinstance(time, datetime) else float(time)
    kind = stat.S_IFDIR if info.get("type") == "directory" else stat.S_IFREG
    return FileFacts(int(info.get("size") or 0), seconds, kind)
