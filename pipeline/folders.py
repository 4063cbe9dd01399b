"""Roots, the uris of files below them, and local folders. Standard library only, no network.

A root is an absolute folder or a URL; a uri is a path below it. Rows of tables and members of tars
name uris, and whoever wrote them is not trusted: nothing outside the root is read, whatever they
say, and links that lead out are not followed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote

from pipeline.settings import ConfigError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# `00000.tar#1536+20480/clip.mp4` is 20480 bytes of 00000.tar from byte 1536 on.
MEMBER = re.compile(
    r"(?P<tar>.+?\.tar)#(?P<offset>\d{1,18})\+(?P<size>\d{1,18})/.+", re.IGNORECASE | re.DOTALL
)
# What looks like a URL to its writer, and like a relative path otherwise.
BROKEN_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[:/]")
# A name and a password before an @. Secrets may hold slashes, so `host:80/a@b` can't be told apart.
PASSWORD = re.compile(r"[^/@]*:[^@]*@")
# Longer ones are no file's on Linux.
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095


class UriError(ValueError):
    """A uri that could lead out of its root."""


def normal_root(address: str) -> str:
    """Return an absolute path, or a URL without a slash at its end.

    Raises:
        ConfigError: the URL holds a password or a query, which would be written into the plan; it
            is broken or not UTF-8.
    """
    try:
        address.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{address!a} is not UTF-8, which plans are; rename it") from None
    if not URL.match(address):
        if found := BROKEN_URL.match(address):
            raise ConfigError(
                f"an address that begins with {found[0]} is refused: expected a URL such as "
                "https://host/folder, one scheme and no chain; or ./ before a folder's name"
            )
        return os.path.abspath(address)  # noqa: PTH100 (links stay)
    scheme, _, rest = address.partition("://")
    scheme = scheme.lower()
    is_token = scheme in ("http", "https") and "@" in rest.partition("/")[0]
    if PASSWORD.match(rest) or is_token:
        host = re.split("[/?#]", rest.rpartition("@")[2])[0]
        raise ConfigError(
            f"a URL of {scheme}://…@{host} holds a password, which would be written into the plan; "
            "take it out and give it by the environment (AWS_ACCESS_KEY_ID, FSSPEC_S3_KEY, …) or "
            "in ~/.config/fsspec/*.json; an @ in a path of http is written %40"
        )
    plain = re.split("[?#]|::", re.sub(r"^\[[0-9A-Fa-f:]*\]", "", rest))
    if len(plain) > 1:
        raise ConfigError(
            f"a URL below {scheme}://{rest.partition('/')[0]} goes on after `?`, `#` or `::`; "
            "that may be a secret, and would be written into the plan: leave it out"
        )
    if scheme in ("file", "local"):
        return normal_root("/" + unquote(rest.partition("/")[2]))
    return f"{scheme}://{rest.rstrip('/')}"


def parent_and_name(address: str) -> tuple[str, str]:
    """Split the address of a file into its folder's and its name."""
    folder, _, name = normal_root(address).rpartition("/")
    return folder or "/", unquote(name) if folder.startswith("http") else name


def check_uri(uri: str, strict: bool = True) -> str:
    """Return ``uri`` if it can only mean a file below its root.

    Args:
        uri: as a row or a tar names it.
        strict: refuse what is harmless on Linux only, too: backslashes, drives, control characters.

    Raises:
        UriError: and why.
    """
    parts = uri.split("/")
    if not uri or "\0" in uri:
        raise UriError(f"{uri!r:.80} is no path")
    if uri.startswith("/") or URL.match(uri):
        raise UriError(f"{uri!r:.80} is not below the folder of the media")
    if ".." in parts or "." in parts or "" in parts:
        raise UriError(f"{uri!r:.80} has a part that is '..', '.' or empty")
    if strict and (re.match("[A-Za-z]:", uri) or re.search(r"[\\\x00-\x1f\x7f]", uri)):
        raise UriError(f"{uri!r:.80} has a drive letter, a backslash or a control character")
    return uri


def uri_below(root: str, address: str) -> str:
    """Return the uri of what a row names: a uri, or a path or URL below the root.

    Raises:
        UriError: it is not below the root, or could lead out of it.
    """
    if not URL.match(address) and not address.startswith("/"):
        return _of_possible_length(check_uri(address), root)
    try:
        path = normal_root(address) if URL.match(address) else address
    except ConfigError as error:
        raise UriError(str(error)) from None
    folder = root.rstrip("/") + "/"
    if ".." in address.split("/") or not path.startswith(folder):
        raise UriError(f"{address!r:.80} is not below {root}, the folder of the media")
    uri = path[len(folder) :]
    uri = check_uri(unquote(uri) if root.startswith("http") else uri)
    return _of_possible_length(uri, root)


def _of_possible_length(uri: str, root: str) -> str:
    """Return a uri that a file may have; object stores have names of any length."""
    file = file_of(uri).encode(errors="surrogatepass")
    longest = max(map(len, file.split(b"/")))
    if not URL.match(root) and (longest > MAX_NAME_BYTES or len(file) > MAX_PATH_BYTES):
        raise UriError(
            f"{uri!r:.80}… has {len(file)} bytes, expected {MAX_PATH_BYTES} at most, and "
            f"{MAX_NAME_BYTES} between slashes"
        )
    return uri


def is_hidden(uri: str) -> bool:
    """Return whether a part of a path is named like .hidden files are."""
    return any(part.startswith(".") and part != ".." for part in uri.split("/"))


def file_of(uri: str) -> str:
    """Return the file that holds what a uri names: itself, or the tar of a member."""
    member = MEMBER.fullmatch(uri)
    return member["tar"] if member else uri


class FileStat(NamedTuple):
    """Size in bytes, and a text that is another one when the file's content is."""

    size: int
    version: str


class LocalFolder:
    """The files below a folder.

    Attributes:
        root: absolute path.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._real_root = os.path.realpath(root).rstrip("/") + "/"
        self._real_folders: dict[str, str] = {}

    def leads_out(self, uri: str) -> bool:
        """Return whether a link on the way to a file leads out of the folder."""
        folder, _, name = uri.rpartition("/")
        if folder not in self._real_folders:  # tables name millions of files of few folders
            self._real_folders[folder] = os.path.realpath(Path(self.root, folder))
        real = f"{self._real_folders[folder].rstrip('/')}/{name}"
        real = os.path.realpath(real) if Path(real).is_symlink() else real
        return not real.startswith(self._real_root)

    def path(self, uri: str) -> Path:
        """Return the path of a file; links are followed anew, they may have changed.

        Raises:
            UriError: it is outside the folder.
        """
        path = Path(self.root, check_uri(uri, strict=False))
        if not os.path.realpath(path).startswith(self._real_root):
            raise UriError(f"{uri!r:.80} is a link that leads out of {self.root}")
        return path

    def stat(self, uri: str) -> FileStat:
        """Return a file's size and version.

        Raises:
            FileNotFoundError, OSError, UriError: there is no such file, or it is none.
        """
        path = self.path(uri)
        found = path.stat()
        if not path.is_file():
            raise OSError(f"{path}: expected a file, found a folder or a device")
        return FileStat(found.st_size, f"{found.st_size} {found.st_mtime_ns}")

    def read(self, uri: str, start: int, size: int) -> bytes:
        """Read a range of bytes; fewer where the file ends."""
        with self.open(uri) as file:
            file.seek(start)
            return file.read(size)

    def open(self, uri: str, buffer_bytes: int = 1 << 16) -> BinaryIO:
        """Open a file for reading and seeking."""
        return self.path(uri).open("rb", buffering=buffer_bytes)

    def list_files(self) -> tuple[list[str], int]:
        """Return the uris of all files, sorted, and how many were left out.

        Left out are hidden ones, dead links, and links to folders or out of the folder.

        Raises:
            OSError: a folder can't be read.
        """
        found = self._walk()
        kept = [uri for uri in found if not is_hidden(uri) and self._is_inside(uri)]
        return sorted(kept), len(found) - len(kept)

    def _is_inside(self, uri: str) -> bool:
        path = Path(self.root, uri)
        return not path.is_symlink() or (path.is_file() and not self.leads_out(uri))

    def _walk(self) -> list[str]:
        """All files, and the folders that are not entered: hidden ones and links."""

        def refuse(error: OSError) -> None:
            raise error  # else what is in there would be missing from the plan without a word

        found: list[str] = []
        for folder, folders, names in os.walk(self.root, onerror=refuse):
            below = Path(folder).relative_to(self.root).as_posix()
            prefix = "" if below == "." else f"{below}/"
            links = {name for name in folders if Path(folder, name).is_symlink()}
            hidden = {name for name in folders if name.startswith(".")}
            found += [prefix + name for name in [*names, *(links | hidden)]]
            folders[:] = [name for name in folders if name not in hidden]
        return found
