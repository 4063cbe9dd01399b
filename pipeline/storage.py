"""Files below a root: a local folder, or a URL of anything fsspec knows. Only importer of fsspec.

Whatever rows and members of tars say, nothing outside the root is read: see ``pipeline.folders``.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote

import fsspec

from pipeline.folders import (
    MEMBER,
    URL,
    FileStat,
    LocalFolder,
    UriError,
    check_uri,
    file_of,
    is_hidden,
    normal_root,
)
from pipeline.media import ClipError
from pipeline.media_cache import CacheError, MediaCache
from pipeline.settings import ConfigError

# What fsspec's file systems call the things that change when a file does.
VERSION_FIELDS = frozenset(
    (
        *("size", "mtime", "created", "modified", "LastModified", "Last-Modified", "last_modified"),
        *("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "generation", "VersionId"),
    )
)
# How object stores say that they or a bucket's quota are full; no standard has a code for it.
FULL = re.compile(r"quota|storage ?full|insufficient ?storage|no space|free drive", re.IGNORECASE)
# Where messages hold credentials: before a host (a key pasted in may have slashes), in what follows
# the ? of an address, and as the value of whatever is called a token or the like.
CREDENTIALS = (
    (re.compile(r"//(?:[^\s@/]*:[^\s@]*|[^\s@/]*)@"), "//"),
    (re.compile(r"[?][^\s'\"<>]+"), "?…"),
    (
        re.compile(
            r"""(x-amz-[\w-]+|\b(?:[\w-]*(?:signature|token|secret|password)|sig|authorization|"""
            r"""accountkey)\b)(['"]?\s*[=:]\s*)(?:bearer\s+|basic\s+)?['"]?[^\s'"&,;<>]+""",
            re.IGNORECASE,
        ),
        r"\1\2…",
    ),
)
# Between attempts when the network fails; file systems such as s3fs try again themselves, too.
PAUSES_S = (0.5, 1.0)
# Decoders must stay small: what one request brings is held in memory.
REQUEST_BYTES = 8 << 20
# Of folders in index pages: some servers answer whatever path with the same page.
MAX_PAGE_DEPTH = 32

Result = TypeVar("Result")


def scrubbed(error: BaseException) -> str:
    """Return an error's first line, without the credentials that a URL in it may hold."""
    line = next(iter(str(error).splitlines()), "")
    for pattern, kept in CREDENTIALS:
        line = pattern.sub(kept, line)
    return f"{type(error).__name__}: {line}"[:300]


def attempt(call: Callable[[], Result]) -> Result:
    """Call a file system, again after a pause when the network fails.

    Raises:
        FileNotFoundError, FileExistsError: there is no such file, or one already.
        OSError: anything else that a file system may raise, with a message fit for people;
            PermissionError and ENOSPC tell the failures that don't pass by themselves.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            return call()
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # every fsspec file system has exceptions of its own
            failure = as_os_error(error)
            if pause_s is None or isinstance(failure, PermissionError):
                raise failure from None
        time.sleep(pause_s)
    raise AssertionError("unreachable")


def as_os_error(error: Exception) -> OSError:
    """Return what any file system raised as one of the errors that ``attempt`` raises."""
    message = scrubbed(error)
    response = getattr(error.__cause__, "response", None)  # of S3
    code = str(response.get("Error", {}).get("Code")) if isinstance(response, dict) else ""
    if code in ("PreconditionFailed", "412"):  # s3fs knows it from AWS only
        return FileExistsError(message)
    if isinstance(error, PermissionError):
        return PermissionError(errno.EACCES, message)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or FULL.search(code + message):
        return OSError(errno.ENOSPC, message)
    return OSError(errno.EIO, message)


class RemoteFolder:
    """The files below a URL.

    Attributes:
        root: the URL, see ``pipeline.folders.normal_root``.
        files: its fsspec file system.
        path: what that calls the root.

    Raises:
        ConfigError: no package is installed for such URLs, or no server answers.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        try:
            self.files, self.path = fsspec.url_to_fs(root, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{root} can't be opened: {scrubbed(error)}. For s3:// install the extra: "
                "pip install -e '.[s3]'; for others the package that fsspec names"
            ) from None
        except Exception as error:  # some connect at once, with exceptions of their own
            raise ConfigError(
                f"{root} can't be opened: {scrubbed(error)}; expected a server that answers: is "
                "the address right, and the network up?"
            ) from None

    def full(self, uri: str, strict: bool = True) -> str:
        """Return how the file system names a file; raises as ``check_uri``."""
        check_uri(uri, strict)
        return f"{self.path.rstrip('/')}/{quote(uri) if self.root.startswith('http') else uri}"

    def stat(self, uri: str) -> FileStat:
        """Ask for a file's size and version.

        Raises:
            FileNotFoundError, OSError, UriError: there is no such file, or it can't be told.
        """
        path = self.full(uri)
        info = attempt(lambda: self.info(path))
        if info.get("type") == "directory":
            raise FileNotFoundError(f"{uri} is a folder")
        if info.get("size") is None:
            raise OSError(f"the server does not tell the size of {uri}")
        version = sorted(f"{name}={info[name]}" for name in VERSION_FIELDS & info.keys())
        return FileStat(int(info["size"]), " ".join(version))

    def info(self, path: str) -> dict[str, Any]:
        """fsspec calls every failure of an http request a missing file; only 404 and 410 are."""
        try:
            return self.files.info(path)
        except FileNotFoundError as error:
            cause, is_http = error.__cause__, self.root.startswith("http")
            if is_http and cause and getattr(cause, "status", None) not in (404, 410):
                raise OSError(scrubbed(cause)) from None
            raise

    def read(self, uri: str, start: int, size: int) -> bytes:
        """Read a range of bytes that the file has.

        Raises:
            FileNotFoundError, OSError, UriError: also where other bytes come than were asked for.
        """
        path = self.full(uri)
        if not size:
            return b""
        data = attempt(lambda: self.files.cat_file(path, start=start, end=start + size))
        if len(data) != size:
            raise OSError(
                f"{uri}: asked for {size} bytes from byte {start} on, got {len(data)}; the file "
                "was cut off or changed, or the server can't send ranges of bytes"
            )
        return data

    def open(self, uri: str, buffer_bytes: int = 4 << 20) -> BinaryIO:
        """Open a file for reading and seeking; the buffer is what one request brings."""
        return io.BufferedReader(_RangeFile(self, uri), buffer_bytes)

    def list_files(self) -> tuple[list[str], int]:
        """Return the uris of all files, sorted, and how many hidden or odd ones were left out.

        Raises:
            OSError: the network fails, or the URL can't be listed.
        """
        if self.root.startswith("http"):
            found, deepest = attempt(self._walk_pages)
            if deepest.count("/") - self.path.count("/") > MAX_PAGE_DEPTH:
                raise OSError(
                    f"pages link to folders in folders without end, such as …{deepest[-80:]}; "
                    f"expected {MAX_PAGE_DEPTH} levels at most: name a folder further down, or "
                    "list the files in a table"
                )
        else:
            found = attempt(lambda: self.files.find(self.path))
        root = self.path.rstrip("/") + "/"
        uris = [name.removeprefix(root) for name in found if name.startswith(root)]
        uris = [uri for uri in uris if uri and not uri.endswith("/")]
        if self.root.startswith("http"):  # index pages link to themselves, sorted otherwise
            uris = [unquote(uri) for uri in uris if "?" not in uri]
        kept = [uri for uri in uris if not is_hidden(uri) and _is_plain(uri)]
        return sorted(kept), len(uris) - len(kept)

    def _walk_pages(self) -> tuple[list[str], str]:
        """Return the files that index pages link to, and the deepest folder; stops too deep."""
        found, deepest = [], self.path
        for folder, _, files in self.files.walk(self.path, detail=True):
            found += [info["name"] for info in files.values()]
            deepest = max(deepest, folder, key=lambda name: name.count("/"))
            if deepest.count("/") - self.path.count("/") > MAX_PAGE_DEPTH:
                break
        return found, deepest


def _is_plain(uri: str) -> bool:
    try:
        return bool(check_uri(uri))
    except UriError:
        return False


class _RangeFile(io.RawIOBase):
    """A remote file that is read by ranges of bytes."""

    def __init__(self, folder: RemoteFolder, uri: str) -> None:
        self._folder, self._uri, self._at = folder, uri, 0
        self._size = folder.stat(uri).size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._at))
        buffer[:size] = self._folder.read(self._uri, self._at, size)
        self._at += size
        return size


Folder = LocalFolder | RemoteFolder


def open_folder(address: str) -> Folder:
    """Return the folder of a path or URL.

    Raises:
        ConfigError: see ``normal_root`` and ``RemoteFolder``.
    """
    root = normal_root(address)
    return RemoteFolder(root) if URL.match(root) else LocalFolder(root)


class MediaStore:
    """Media below a root as local files: themselves, or copies in a bounded cache of the node.

    Args:
        root: absolute folder or URL.
        cache_dir: where the cache of this user is made; None: the machine's folder for such.
        cache_bytes: its size at most.
    """

    def __init__(self, root: str, cache_dir: str | None, cache_bytes: int) -> None:
        self.root = normal_root(root)
        self._cache_dir, self._cache_bytes = cache_dir, cache_bytes

    @functools.cached_property
    def _folder(self) -> Folder:  # opened where it is used: stores travel to other processes
        return open_folder(self.root)

    @functools.cached_property
    def cache(self) -> MediaCache:
        """The cache, made when first wanted.

        Raises:
            ConfigError: it can't be made, or others could write into it.
        """
        return MediaCache(self._cache_dir, self._cache_bytes)

    def is_copied(self, uri: str) -> bool:
        """Return whether ``local`` gives a copy, which may take long to come."""
        return bool(URL.match(self.root) or MEMBER.fullmatch(uri))

    def is_missing(self, uri: str) -> bool:
        """Return whether a file is known not to be there; never asks the network."""
        if URL.match(self.root):
            return False
        try:
            self._folder.stat(file_of(uri))
        except FileNotFoundError:
            return True
        except (UriError, OSError):
            return False
        return False

    @contextlib.contextmanager
    def local(self, uri: str) -> Iterator[Path]:
        """Give the path of a local file for the length of a block.

        Raises:
            ClipError: ``missing``; or ``unreadable``: the uri is refused, the network fails, the
                file is bigger than the cache.
        """
        with contextlib.ExitStack() as held:
            try:
                path = self._path(uri, held)
            except FileNotFoundError:
                raise ClipError("missing", f"no file {file_of(uri)} in {self.root}") from None
            except UriError as error:
                raise ClipError("unreadable", f"refused: {error}") from None
            except (CacheError, ConfigError) as error:
                raise ClipError("unreadable", f"{uri}: {error}") from None
            except OSError as error:
                raise ClipError("unreadable", f"{uri}: {error.strerror or error}") from None
            yield path

    def _path(self, uri: str, held: contextlib.ExitStack) -> Path:
        if isinstance(self._folder, LocalFolder) and not self.is_copied(uri):
            self._folder.stat(uri)
            return self._folder.path(uri)
        return held.enter_context(self._copy(uri))

    def _copy(self, uri: str) -> contextlib.AbstractContextManager[Path]:
        """Return the hold of a copy; entering it downloads."""
        file = file_of(uri)
        stat = self._folder.stat(file)
        member = MEMBER.fullmatch(uri)
        start, size = (int(member["offset"]), int(member["size"])) if member else (0, stat.size)
        if start + size > stat.size:
            raise OSError(
                f"{file} has {stat.size} bytes, expected {start + size} or more: it was cut off "
                "or replaced since it was planned"
            )

        def fetch(target: BinaryIO) -> None:
            for done in range(0, size, REQUEST_BYTES):
                part = min(REQUEST_BYTES, size - done)
                try:
                    target.write(self._folder.read(file, start + done, part))
                except FileNotFoundError:
                    raise OSError(f"{file} was removed while it was read") from None

        return self.cache.held(self._cache_name(uri, stat), size, fetch)

    def _cache_name(self, uri: str, stat: FileStat) -> str:
        """Name a copy by what decides its bytes; the suffix is for decord, which opens it by name.

        The boot counts too: copies aren't synced to the disk, a crash may leave them empty.
        """
        identity = json.dumps([_boot_id(), self.root, uri, *stat])
        suffix = re.search(r"\.[A-Za-z0-9]{1,8}\Z", uri)
        name = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return name + (suffix[0].lower() if suffix else "")


@functools.cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
