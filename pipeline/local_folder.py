"""Files below a local folder; links that lead out of it are not followed. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.addresses import UriError, check_uri, is_hidden


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
            raise UriError(f"{uri!r} is a link that leads out of {self.root}")
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
