"""Censuses kept in a folder of the node: the first process that needs one makes it, others wait.

Invariants: what has a census's name is whole (made in ``.NAME.tmp`` and renamed); it is made under
a flock, which the kernel drops with the process, so that what a killed one left is known as such.
The name tells which data on disk and which clips are wanted; other data have another.
"""

from __future__ import annotations

import contextlib
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

from pipeline.files import NoRoomError, is_local, naming_a_full_disk, scan, sync_folder
from pipeline.format import Column, FormatError, Plan, canonical_json
from pipeline.plan_table import PLAN_NAME
from pipeline.settings import ConfigError
from train.data.census import CENSUS_VERSION, HEAD_NAME, Census, CensusWriter
from train.data.classes import Selection
from train.data.survey import write_census

log = logging.getLogger(__name__)

NAME = re.compile(r"[0-9a-f]{32}")
SHARD_FILE = re.compile(r"\d{6,}\.(json|parquet)")  # a commit record, or facts
KEPT_S = 30 * 24 * 3600.0  # since it was last opened


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

    made_once(folder, build)
    os.utime(folder / HEAD_NAME)
    return Census(folder, plan.shard_rows(), plan.shard_rows(text=True))


def census_folder(
    cache_dir: str | None,
    root: Path,
    plan: Plan,
    opened: Mapping[str, Column],
    selection: Selection,
) -> Path:
    """Return where the census of a data set is, or would be: the data as they are on disk now.

    The name hashes what is wanted, the plan, and how each folder that is read stands.

    Raises:
        ConfigError: the cache can't be used.
        FormatError: there is no plan.parquet.
        OSError: a folder can't be looked at.
    """
    text = selection.clip_filter.text if selection.clip_filter else None
    wanted = [selection.subset, selection.heldout_share, dict(selection.lengths), text]
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
    identity = [CENSUS_VERSION, str(root), asdict(plan), wanted, table, states]
    digest = hashlib.sha256(canonical_json(identity).encode())
    return views_folder(cache_dir) / digest.hexdigest()[:32]


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


def made_once(made: Path, build: Callable[[Path], None]) -> None:
    """Have ``build`` fill a folder unless it is there; only the first process does, others wait.

    Raises:
        ConfigError: there is no room for it.
        Exception: whatever ``build`` raises; then nothing is left.
    """
    if made.exists():
        return
    folder = made.parent
    with held(folder / f".{made.name}.lock"):
        if made.exists():  # another process made it meanwhile
            return
        remove_unused(folder)
        unfinished = folder / f".{made.name}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        unfinished.mkdir(mode=0o700)
        try:
            with naming_a_full_disk(folder):
                build(unfinished)
            sync_folder(unfinished)
            unfinished.rename(made)
        except NoRoomError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise ConfigError(
                f"{folder}: no room for the table of a view's clips, "
                f"{shutil.disk_usage(folder).free:,} bytes free; make room, or set data.cache_dir"
            ) from None
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        sync_folder(folder)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the flock of a file, which is left there."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process of this node looks at every shard: waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_unused(folder: Path) -> None:
    """Remove censuses that were not opened for a long time; open ones stay readable."""
    limit = time.time() - KEPT_S
    for entry in folder.iterdir():
        is_census = NAME.fullmatch(entry.name)
        with contextlib.suppress(OSError):
            if is_census and (entry / HEAD_NAME).stat().st_mtime < limit:
                log.info("removing %s, not opened for 30 days", entry)
                shutil.rmtree(entry)
                (folder / f".{entry.name}.lock").unlink(missing_ok=True)
