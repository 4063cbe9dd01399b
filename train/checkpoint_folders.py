"""Which checkpoints of a run there are, which can be used, and which go.

A folder of ``run_dir/checkpoints/step_*`` is

    complete    it holds COMPLETE, and all that COMPLETE lists as it lists it
    damaged     it holds COMPLETE, but does not fit it: never read, never removed
    broken off  it lacks COMPLETE, as a run that was killed while saving leaves it
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.files import sync_folder, write_json
from train.errors import ResumeError

MARKER = "COMPLETE"
STATE_NAME = "state.json"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run, oldest first.

    Attributes:
        complete: those that can be used.
        broken_off: those that never became complete.
        damaged: what is wrong, by folder.
    """

    complete: list[Path] = field(default_factory=list)
    broken_off: list[Path] = field(default_factory=list)
    damaged: dict[Path, str] = field(default_factory=dict)


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint with ``step`` optimiser steps done."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def was_completed(folder: Path) -> bool:
    """Return whether a checkpoint was complete once; it may be damaged now."""
    return os.path.lexists(folder / MARKER)


def find_damage(folder: Path) -> str | None:
    """Return what a folder holds otherwise than its COMPLETE says, or None.

    Sizes are compared, and of state.json the checksum: the other files have their own.
    """
    path = folder / MARKER
    try:
        listed = json.loads(path.read_bytes())
        for name, size in listed["files"].items():
            path = folder / name
            found = path.stat().st_size
            if found != size:
                return f"{path} has {found:,} bytes, expected {size:,}"
        path = folder / STATE_NAME
        # Versions before 3 lack it; they are refused by their number, when they are read.
        expected = listed.get("state_sha256")
        if expected is not None and (found := digest_of(path)) != expected:
            return f"{path} has SHA-256 {found[:16]}…, expected {expected[:16]}…: it was changed"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} can't be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{folder / MARKER} is not as it was written"
    return None


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find_checkpoints(run_dir: Path) -> Checkpoints:
    """Look at all checkpoints of a run."""
    found = Checkpoints()
    for folder in sorted((run_dir / "checkpoints").glob("step_*")):
        if not folder.name.removeprefix("step_").isdigit() or not folder.is_dir():
            continue
        if not was_completed(folder):
            found.broken_off.append(folder)
        elif damage := find_damage(folder):
            found.damaged[folder] = damage
        else:
            found.complete.append(folder)
    return found


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None where none ever was.

    Raises:
        ResumeError: a newer one is damaged. To go on from an older one, or from nothing, would
            lose steps that may be mended: that is for people to decide.
    """
    found = find_checkpoints(run_dir)
    newest = found.complete[-1] if found.complete else None
    lost = [folder for folder in found.damaged if newest is None or folder > newest]
    if lost:
        start = f"go on from {newest.name}" if newest else "start again from step 0"
        raise ResumeError(
            f"the checkpoint {lost[-1]} is damaged: {found.damaged[lost[-1]]}. Restore it; or "
            f"remove {' and '.join(map(str, lost))} to {start}; or set another run_dir"
        )
    return newest


def mark_complete(folder: Path, num_ranks: int, has_shards: bool) -> None:
    """Check that every rank's files are there and put them on the disk, then write COMPLETE.

    Raises:
        ResumeError: files of a rank are missing.
    """
    counts = {"ema/*.safetensors": num_ranks, "*model_states.pt": 1}
    if has_shards:
        counts["*optim_states.pt"] = num_ranks
    for pattern, least in counts.items():
        found = len(list(folder.glob(pattern)))
        if found < least:
            raise ResumeError(
                f"{folder} holds {found} files {pattern}, expected {least}: not all ranks see "
                "the same folder; put run_dir on a file system that all nodes share"
            )
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for place in (folder / "ema", folder, folder.parent):
        sync_folder(place)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    state_sha256 = digest_of(folder / STATE_NAME)
    write_json(folder / MARKER, {"files": files, "state_sha256": state_sha256})


def prune(run_dir: Path, keep_last: int) -> None:
    """Remove all but the newest complete checkpoints, and what broke off before the newest."""
    found = find_checkpoints(run_dir)
    newest = found.complete[-1:]
    for folder in found.complete[:-keep_last]:
        remove(folder)
    for folder in found.broken_off:
        if newest and folder < newest[0]:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint; one that is half removed counts as broken off."""
    (folder / MARKER).unlink(missing_ok=True)
    sync_folder(folder)  # on the disk, too, before anything else goes
    shutil.rmtree(folder)
