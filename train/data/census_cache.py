"""Censuses kept in a folder of the node: the first process that needs one makes it, others wait.

Invariants: what gets a census's name is whole (made in ``.NAME.tmp`` and renamed); it is made under
a flock, which the kernel drops with the process, so that what a killed one left is known as such.
What is not whole any more, as programs that clean temporary folders leave it, is made anew.
The name tells which data on disk and which clips are wanted; other data have another.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from pipeline.files import NoRoomError, is_local, scan, sync_folder
from pipeline.format import Column, FormatError, Plan, canonical_json
from pipeline.plan_table import PLAN_NAME
from pipeline.settings import ConfigError
from train.data.census import CENSUS_VERSION, HEAD_NAME, Census, CensusWriter
from train.data.classes import Selection
from train.data.survey import write_census

log = logging.getLogger(__name__)

Opened = TypeVar("Opened")

NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")  # what is wanted of which data set, and its state
LEFT = re.compile(rf"\.({NAME.pattern})\.(lock|tmp)")
SHARD_FILE = re.compile(r"\d{6,}\.(json|parquet)")  # a commit record, or facts
KEPT_S = 30 * 24 * 3600.0  # since it was last opened
# Errors that only the cache has, for data sets are read: no room, a quota, a limit, no locks.
CACHE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENOLCK)


def open_census(
    cache_dir: str | None,
    root: Path,
    plan: Plan,
    opened: Mapping[str, Column],
    selection: Selection,
) -> Census:
    """Open the census of a data set; make it, where this node has none of the data as they are.

    Raises:
        FormatError, OSError: as ``survey.write_census``.
        ConfigError: the cache can't be used, has no room, or the filter asks for what is not there.
    """
    folder = census_folder(cache_dir, root, plan, opened, selection)

    def build(into: Path) -> None:
        with CensusWriter(into) as writer:
            write_census(writer, root, plan, opened, selection)

    def open_made() -> Census:
        return Census(folder, plan.shard_rows(), len(plan.shard_rows(text=True)))

    census = made_once(folder, build, open_made)
    with contextlib.suppress(OSError):  # a cache may be read-only, too
        for path in folder.iterdir():  # programs that clean temporary folders look at each file
            os.utime(path)
    return census


def census_folder(
    cache_dir: str | None,
    root: Path,
    plan: Plan,
    opened: Mapping[str, Column],
    selection: Selection,
) -> Path:
    """Return where the census of a data set is, or would be: the data as they are on disk now.

    The name hashes which clips of what data set are wanted; and the plan, and how each folder that
    is read stands.

    Raises:
        ConfigError: the cache can't be used.
        FormatError: there is no plan.parquet.
        OSError: a folder can't be looked at.
    """
    text = selection.clip_filter.text if selection.clip_filter else None
    place = str(root.absolute() if is_local(root) else root)
    columns = {name: column.path.name for name, column in opened.items()}
    wanted = [place, columns, selection.subset, selection.heldout_share]
    wanted += [dict(selection.lengths), text]
    try:
        found = (root / PLAN_NAME).stat()
    except FileNotFoundError:
        raise FormatError(f"{root / PLAN_NAME} is missing; restore it, or encode again") from None
    table = [found.st_size, repr(found.st_mtime)]
    folders = [column.path for column in opened.values()]
    if selection.clip_filter is not None and selection.clip_filter.facts:
        names = [entry.name for entry in scan(root) if entry.name.startswith("facts@")]
        folders += [root / name for name in sorted(names)]
    states = {folder.name: state_of(folder) for folder in folders}
    state = [CENSUS_VERSION, asdict(plan), table, states]
    digests = [hashlib.sha256(canonical_json(one).encode()) for one in (wanted, state)]
    return views_folder(cache_dir) / "-".join(digest.hexdigest()[:16] for digest in digests)


def state_of(folder: Path) -> str:
    """Return what changes whenever a shard of a folder is committed, replaced or removed.

    A local folder's own time does, for all these are renames, links and removals in it; to look at
    400,000 records of each column instead takes every rank some 10 s, and a file server more. A
    record changed in place is found when its shard is read. Object stores are listed.

    Raises:
        OSError: it can't be looked at.
    """
    if is_local(folder):
        return str(folder.stat().st_mtime_ns)
    digest = hashlib.sha256()
    for entry in sorted(scan(folder), key=lambda entry: entry.name):
        if SHARD_FILE.fullmatch(entry.name):
            found = entry.stat()
            digest.update(f"{entry.name} {found.st_size} {found.st_mtime!r}\n".encode())
    return digest.hexdigest()


def views_folder(cache_dir: str | None) -> Path:
    """Return the folder of this user's censuses; make it if need be.

    Raises:
        ConfigError: it can't be made, or others could write into it.
    """
    base = Path(cache_dir or tempfile.gettempdir())
    folder = base.absolute() / f"av-latents-views-{os.geteuid()}"
    try:
        base.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; set data.cache_dir") from None
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not is_own or found.st_mode & 0o077:
        raise ConfigError(
            f"{folder}: expected a folder that is yours and that nobody else can open (mode 0700), "
            f"found {stat.filemode(found.st_mode)} of user {found.st_uid}; remove it, or set "
            "data.cache_dir"
        )
    return folder


def made_once(made: Path, build: Callable[[Path], None], open_made: Callable[[], Opened]) -> Opened:
    """Open a folder, which ``build`` fills where there is none; one process does, others wait.

    Args:
        made: the folder.
        build: fills an empty folder that is given to it.
        open_made: opens ``made``; where that is not whole it raises FormatError, and it is made
            anew.

    Raises:
        ConfigError: there is no room for it, or the folder around it can't be used.
        Exception: whatever ``build`` raises; then nothing is left.
    """
    if made.exists():
        with contextlib.suppress(FormatError):  # which is looked at again below
            return open_made()
    try:
        with held(made.with_name(f".{made.name}.lock")):
            if made.exists():
                try:
                    return open_made()  # another process made it meanwhile
                except FormatError as error:
                    log.warning("%s: making it anew", str(error).partition(";")[0])
            remove_unused(made)
            make(made, build)
    except NoRoomError:
        raise unusable(made.parent, "there is no room") from None
    except OSError as error:
        is_of_cache = str(error.filename or "").startswith(str(made.parent))
        if not is_of_cache and error.errno not in CACHE_ERRORS:
            raise  # of the data set
        reason = f"{Path(error.filename or '').name}: {error.strerror}".removeprefix(": ")
        raise unusable(made.parent, reason) from None
    return open_made()


def unusable(folder: Path, reason: str) -> ConfigError:
    """Return the error that a folder of the cache can't be written to."""
    return ConfigError(
        f"{folder} can't take the table of a view's clips ({reason}; "
        f"{shutil.disk_usage(folder).free:,} bytes free): mend that, or set data.cache_dir"
    )


def make(made: Path, build: Callable[[Path], None]) -> None:
    """Have ``build`` fill a folder, which gets its name when it is whole and on the disk."""
    unfinished = made.with_name(f".{made.name}.tmp")
    for left in (unfinished, made):  # by a process that was killed, or not whole
        remove(left)
    unfinished.mkdir(mode=0o700)
    try:
        build(unfinished)
        sync_folder(unfinished)
        unfinished.rename(made)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync_folder(made.parent)


@contextlib.contextmanager
def held(path: Path, is_waiting: bool = True) -> Iterator[bool]:
    """Hold the flock of a file, which is made if need be and left there.

    Args:
        path: the file.
        is_waiting: wait while another process holds it.

    Yields:
        Whether it is held: False where it was not waited for.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            is_held = lock(descriptor, is_waiting)
            if is_held and not is_named(path, descriptor):
                continue  # it was removed meanwhile
            yield is_held
            return
        finally:
            os.close(descriptor)


def lock(descriptor: int, is_waiting: bool) -> bool:
    """Take the flock of an open file; return whether that is held."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not is_waiting:
            return False
        log.info("another process of this node looks at every shard: waiting for it")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return True


def is_named(path: Path, descriptor: int) -> bool:
    """Return whether a path leads to an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def remove_unused(made: Path) -> None:
    """Remove what is in the way of nobody but the disk; what is open stays readable.

    That is: censuses not opened for a long time, those of the same clips as ``made`` when their
    data set was in another state, and what processes that were killed left of theirs.
    """
    folder, limit = made.parent, time.time() - KEPT_S
    for path in list(folder.iterdir()):
        with contextlib.suppress(OSError):
            if not NAME.fullmatch(path.name) or path == made:
                continue
            is_of_before = path.name[:16] == made.name[:16]
            if is_of_before or (path / HEAD_NAME).stat().st_mtime < limit:
                log.info("removing %s: %s", path, "the data changed" if is_of_before else "unused")
                remove(path)
    for name in {found[1] for path in folder.iterdir() if (found := LEFT.fullmatch(path.name))}:
        if (folder / name).exists():
            continue
        with contextlib.suppress(OSError), held(folder / f".{name}.lock", is_waiting=False) as own:
            if own:
                remove(folder / f".{name}.tmp")
                (folder / f".{name}.lock").unlink()


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
