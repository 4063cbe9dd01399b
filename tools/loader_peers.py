"""Loaders that others made: each writes the rows in its own format and reads them shuffled.

Each is set up as its documentation says, with its defaults for the size of a shard, and gives
batches of tensors like ours. Loaders are imported where they are used: they live in an environment
of their own (``tools.loader_env``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from tools.loader_data import NUM_SHARDS, Batch, Rows, pad

# Rows in the shuffle buffer of loaders that read in sequence: energon's quick start has 100. More
# of them mix better, and cost memory.
SHUFFLE_ROWS = 100
LITDATA_CHUNK = "64MB"  # its default
SHARD_BYTES = 1 << 32  # webdataset's writer: the number of rows ends a shard, as in ours


@dataclass(frozen=True)
class Job:
    """What a loader has to read.

    Attributes:
        rows: the rows.
        folder: where this loader's format of them lies.
        batch: rows of a batch.
        num_workers: worker processes; 0 reads in the process itself. Of ours, threads that read.
        device: where batches go.
    """

    rows: Rows
    folder: Path
    batch: int
    num_workers: int
    device: str

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of every torch ``DataLoader``: workers stay from epoch to epoch."""
        return {
            "num_workers": self.num_workers,
            "pin_memory": self.device != "cpu",
            "persistent_workers": self.num_workers > 0,
        }


# Makes an iterator over one epoch, each time that it is called.
Epochs = Callable[[], Iterator[Batch]]


@dataclass(frozen=True)
class Loader:
    """A way to load the rows.

    Attributes:
        package: its distribution.
        load: imports what it needs, which is not measured.
        write: writes the rows into a new folder.
        open: opens what was written.
        data: name of the format, which contenders may share.
        num_workers: the numbers of workers to try.
    """

    package: str
    load: Callable[[], None]
    write: Callable[[Rows, Path], None]
    open: Callable[[Job], Epochs]
    data: str
    num_workers: tuple[int, ...] = (0, 2)


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Make a batch of rows; torch's own ``default_collate`` stacks picture and sound."""
    tensors = [{name: torch.as_tensor(s[name]) for name in ("video", "audio")} for s in samples]
    text, mask = pad([torch.as_tensor(sample["text"]) for sample in samples])
    return {**default_collate(tensors), "text": text, "mask": mask}


def importing(*names: str) -> Callable[[], None]:
    """Return what imports modules."""

    def load() -> None:
        for name in names:
            import_module(name)

    return load


# webdataset: the parts of a sample side by side in one tar.


def write_webdataset(rows: Rows, folder: Path) -> None:
    """Write tars of ``<key>.video.npy``, ``.audio.npy`` and ``.text.npy``."""
    webdataset: Any = import_module("webdataset")
    folder.mkdir(parents=True)
    pattern = str(folder / "%06d.tar")
    with webdataset.ShardWriter(
        pattern, maxcount=rows.shard_rows, maxsize=SHARD_BYTES, verbose=0
    ) as writer:
        for row in range(rows.num_rows):
            members = {f"{name}.npy": array for name, array in rows.arrays(row).items()}
            writer.write({"__key__": rows.key(row), **members})


def open_webdataset(job: Job) -> Epochs:
    """Shards shuffled, then rows in a buffer; batches are made in the workers."""
    webdataset: Any = import_module("webdataset")
    dataset = (
        webdataset.WebDataset(
            sorted(map(str, job.folder.glob("*.tar"))),
            shardshuffle=NUM_SHARDS,
            workersplitter=webdataset.split_by_worker,
        )
        .shuffle(SHUFFLE_ROWS)
        .decode()
        .batched(job.batch, collation_fn=_collate_members)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, **job.arguments)
    return lambda: iter(loader)


def _collate_members(samples: Sequence[Mapping[str, Any]]) -> Batch:
    names = ("video", "audio", "text")
    return collate([{name: sample[f"{name}.npy"] for name in names} for sample in samples])


# mosaicml-streaming: MDS shards of 64 MiB, its default; columns of a fixed dtype and shape.


def load_streaming() -> None:
    """Import streaming with a stand-in for torchvision, of which it uses nothing that is run here.

    It asks for torchvision when it is imported, and the build of that on PyPI can't be imported
    beside a torch without CUDA. transformers, which looks for torchvision too, must come first.
    """
    importing("transformers.feature_extraction_utils", "transformers.tokenization_utils_base")()
    names = ("", ".datasets", ".transforms", ".transforms.functional")
    modules: dict[str, Any] = {f"torchvision{name}": ModuleType("torchvision") for name in names}
    modules["torchvision.datasets"].VisionDataset = Dataset
    modules["torchvision.transforms.functional"].to_tensor = None
    sys.modules.update(modules)
    import_module("streaming")


def write_streaming(rows: Rows, folder: Path) -> None:
    """Write MDS shards without compression."""
    streaming: Any = import_module("streaming")
    shapes = {"video": rows.video_shape, "audio": rows.audio_shape}
    columns = {
        name: f"ndarray:float16:{','.join(map(str, shape))}" for name, shape in shapes.items()
    }
    with streaming.MDSWriter(
        out=str(folder), columns={**columns, "text": "ndarray:float16"}
    ) as writer:
        for row in range(rows.num_rows):
            writer.write(rows.arrays(row))


def open_streaming(job: Job) -> Epochs:
    """Shuffled by its default algorithm; the files are local, nothing is downloaded."""
    streaming: Any = import_module("streaming")
    dataset = streaming.StreamingDataset(local=str(job.folder), shuffle=True, batch_size=job.batch)
    loader = streaming.StreamingDataLoader(
        dataset, batch_size=job.batch, collate_fn=collate, **job.arguments
    )
    return lambda: iter(loader)


# litdata: chunks of 64 MB.


def write_litdata(rows: Rows, folder: Path) -> None:
    """Write chunks of tensors with ``optimize``."""
    litdata: Any = import_module("litdata")
    litdata.optimize(
        fn=_LitdataRow(rows),
        inputs=list(range(rows.num_rows)),
        output_dir=str(folder),
        chunk_bytes=LITDATA_CHUNK,
        num_workers=1,
        verbose=False,
    )


@dataclass(frozen=True)
class _LitdataRow:
    rows: Rows

    def __call__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in self.rows.arrays(row).items()}


def open_litdata(job: Job) -> Epochs:
    """Chunks and rows within chunks are shuffled."""
    litdata: Any = import_module("litdata")
    dataset = litdata.StreamingDataset(str(job.folder), shuffle=True)
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=job.batch, collate_fn=collate, **job.arguments
    )
    return lambda: iter(loader)


# megatron-energon: WebDataset tars with an index beside them.


def write_energon(rows: Rows, folder: Path) -> None:
    """Write tars as for webdataset, and prepare them as ``energon prepare`` does."""
    flavors: Any = import_module("megatron.energon.flavors")
    write_webdataset(rows, folder)
    tars = sorted(path.name for path in folder.glob("*.tar"))
    split = [("train", 1.0)]
    flavors.BaseWebdatasetFactory.prepare_dataset(folder, tars, split_parts_ratio=split, workers=1)
    kind = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (folder / ".nv-meta" / "dataset.yaml").write_text(kind)


def open_energon(job: Job) -> Epochs:
    """Shards shuffled, then rows in a buffer; a cooker names the parts of a row."""
    energon: Any = import_module("megatron.energon")

    @energon.edataclass
    class Latents(energon.Sample):
        arrays: dict[str, Any]

    @energon.stateless
    def cook(sample: dict[str, Any]) -> Any:
        arrays = {name: sample[f"{name}.npy"] for name in ("video", "audio", "text")}
        return Latents(**energon.basic_sample_keys(sample), arrays=arrays)

    class Encoder(energon.DefaultTaskEncoder):
        cookers = (energon.Cooker(cook),)

        @energon.stateless
        def batch(self, samples: list[Any]) -> Any:
            return collate([sample.arrays for sample in samples])

    workers = energon.WorkerConfig(rank=0, world_size=1, num_workers=job.num_workers)
    dataset = energon.get_train_dataset(
        str(job.folder),
        worker_config=workers,
        batch_size=job.batch,
        shuffle_buffer_size=SHUFFLE_ROWS,
        max_samples_per_sequence=SHUFFLE_ROWS,
        repeat=False,
        task_encoder=Encoder(),
    )
    loader = energon.get_loader(dataset)
    return lambda: iter(loader)


# A file for every row.


def write_files(rows: Rows, folder: Path) -> None:
    """Write a file of tensors for every row, with ``torch.save``."""
    folder.mkdir(parents=True)
    for row in range(rows.num_rows):
        tensors = {name: torch.from_numpy(array) for name, array in rows.arrays(row).items()}
        torch.save(tensors, folder / f"{rows.key(row)}.pt")


class _Files(Dataset):
    def __init__(self, folder: Path) -> None:
        self._paths = sorted(map(str, folder.glob("*.pt")))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return torch.load(self._paths[row])


def open_files(job: Job) -> Epochs:
    """Read with torch's own ``DataLoader``, fully shuffled."""
    loader = DataLoader(
        _Files(job.folder),
        batch_size=job.batch,
        shuffle=True,
        collate_fn=collate,
        **job.arguments,
    )
    return lambda: iter(loader)


SHARD_PEERS = {
    loader.package: loader
    for loader in (
        Loader(
            "webdataset", importing("webdataset"), write_webdataset, open_webdataset, "webdataset"
        ),
        Loader("mosaicml-streaming", load_streaming, write_streaming, open_streaming, "mds"),
        Loader("litdata", importing("litdata"), write_litdata, open_litdata, "litdata"),
        Loader(
            "megatron-energon",
            importing("megatron.energon"),
            write_energon,
            open_energon,
            "energon",
        ),
    )
}
FILES = Loader("torch", importing(), write_files, open_files, "files")
