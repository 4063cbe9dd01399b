"""Other ways to turn clips into tars of latents: a loop of one's own, and Ray Data.

Both do our work on our clips: decord to frames of 256 x 256 at 8 fps and 16 kHz mono sound (as
``tools.contenders`` lets it), the same codecs, float16 into WebDataset tars. Neither checks its
clips, resumes, or can say which clip failed.
"""

from __future__ import annotations

import multiprocessing
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.calibrate import child_threads
from pipeline.codecs import build_codec, stored
from pipeline.format import ColumnSpec
from tools.contenders import CONTENDERS, Task
from tools.side_by_side import Lane, Timing, run_side_by_side

# Rows that Ray Data hands to the codecs at once, and into one tar.
BATCH_ROWS = 4
# Its sources and sinks are tasks: with a whole CPU each, they wait for ever beside actors that
# hold all.
TASK_CPUS = 0.01


@dataclass(frozen=True)
class PeerJob:
    """What a peer has to do: clips, columns of picture and sound, a new folder for the tars."""

    tasks: tuple[Task, ...]
    specs: dict[str, ColumnSpec]
    out: str
    shard_size: int
    decoder: str = "decord"


def latents_of(specs: dict[str, ColumnSpec]) -> Callable[[np.ndarray, np.ndarray], dict[str, Any]]:
    """Build codecs; return what makes the members of a sample of frames and sound [N]."""
    codecs = {m: build_codec(spec.codec, spec.preprocessing) for m, spec in specs.items()}

    def encode(frames: np.ndarray, sound: np.ndarray) -> dict[str, Any]:
        items = {"video": frames, "audio": sound[None]}
        return {
            f"{m}.npy": stored(codec.encode([items[m]])[0], specs[m].dtype)
            for m, codec in codecs.items()
        }

    return encode


def loop(job: PeerJob, num_processes: int) -> Timing:
    """As video2dataset works: processes that each decode, encode and write tars of their own."""
    parts = [
        (replace(job, tasks=job.tasks[part::num_processes]), part) for part in range(num_processes)
    ]
    Path(job.out).mkdir(parents=True)
    return run_side_by_side(_looping, parts)


def _looping(argument: tuple[PeerJob, int]) -> Callable[[], Iterator[int]]:
    from webdataset.writer import ShardWriter

    job, part = argument
    _, decode = CONTENDERS[job.decoder]()
    encode = latents_of(job.specs)

    def work() -> Iterator[int]:
        pattern = f"{job.out}/{part:02d}-%06d.tar"
        with ShardWriter(pattern, maxcount=job.shard_size, verbose=0) as sink:
            for task in job.tasks:
                sink.write({"__key__": Path(task.path).stem, **encode(*decode(task))})
                yield 1

    return work


def ray_data(job: PeerJob, num_decoders: int, num_encoders: int) -> Timing:
    """``map`` decodes and ``map_batches`` encodes on actors, ``write_webdataset`` writes.

    Runs in a process of its own, with a Ray of its own that has a CPU for every actor.

    Raises:
        RuntimeError: it failed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    launched_s = time.monotonic()
    arguments = (theirs, job, num_decoders, num_encoders)
    with child_threads(1):
        process = context.Process(target=_ray_data, args=arguments)
        process.start()
    theirs.close()
    try:
        ended_s = ours.recv()
    except EOFError:
        raise RuntimeError("Ray Data failed; what it said is above") from None
    finally:
        process.join()
    lanes = []
    for log in sorted(Path(job.out).glob("*.steps")):
        rows = [line.split() for line in log.read_text().splitlines()]
        lanes.append(Lane(launched_s, tuple((float(at_s), int(clips)) for at_s, clips in rows)))
    return Timing(tuple(lanes), launched_s, ended_s)


class Decode:
    """Actor of Ray Data: a clip's path to its frames and sound."""

    def __init__(self, decoder: str, tasks: dict[str, Task]) -> None:
        _, self._decode = CONTENDERS[decoder]()
        self._tasks = tasks

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Decode one row."""
        frames, sound = self._decode(self._tasks[row["path"]])
        return {"__key__": Path(row["path"]).stem, "frames": frames, "sound": sound}


class Encode:
    """Actor of Ray Data: frames and sound to latents; notes when each batch is done."""

    def __init__(self, specs: dict[str, ColumnSpec], out: str) -> None:
        self._encode = latents_of(specs)
        self._log = Path(out, f"{time.monotonic_ns()}.steps")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode a batch of rows."""
        latents = [
            self._encode(*pair) for pair in zip(batch["frames"], batch["sound"], strict=True)
        ]
        with self._log.open("a") as log:
            log.write(f"{time.monotonic()} {len(latents)}\n")
        columns = {name: _column([each[name] for each in latents]) for name in latents[0]}
        return {"__key__": batch["__key__"], **columns}


def _column(arrays: list[np.ndarray]) -> np.ndarray:
    """Return arrays as a column, whatever their shapes: decord's sound differs in length."""
    column = np.empty(len(arrays), object)
    column[:] = arrays
    return column


def _ray_data(pipe: Any, job: PeerJob, num_decoders: int, num_encoders: int) -> None:
    import ray
    import ray.data

    Path(job.out).mkdir(parents=True)
    ray.init(
        address="local",
        num_cpus=num_decoders + num_encoders + 1,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    tasks = {task.path: task for task in job.tasks}
    clips = ray.data.from_items(
        [{"path": path} for path in tasks], override_num_blocks=-(-len(tasks) // BATCH_ROWS)
    )
    stages: list[Any] = [Decode, Encode]
    decoded = clips.map(
        stages[0],
        fn_constructor_args=(job.decoder, tasks),
        compute=ray.data.ActorPoolStrategy(size=num_decoders),
        num_cpus=1,
    )
    latents = decoded.map_batches(
        stages[1],
        fn_constructor_args=(job.specs, job.out),
        compute=ray.data.ActorPoolStrategy(size=num_encoders),
        num_cpus=1,
        batch_size=BATCH_ROWS,
    )
    latents.write_webdataset(job.out, ray_remote_args={"num_cpus": TASK_CPUS})
    pipe.send(time.monotonic())
    ray.shutdown()


def check_tars(folder: Path, job: PeerJob) -> None:
    """Raise ValueError unless the tars hold every clip once, with a member for each column."""
    expected = sorted(
        f"{Path(task.path).stem}.{modality}.npy" for task in job.tasks for modality in job.specs
    )
    found = []
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            found += tar.getnames()
    if sorted(found) != expected:
        raise ValueError(
            f"{folder} has {len(found)} members ({len(set(found))} names), expected {len(expected)}"
        )
