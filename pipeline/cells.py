"""The Ray side of cells: the cluster, encoder actors, placement groups, lost ones.

A cell is one placement group: an encoder actor and, beside it on the same node, its decoder
actors. It is handed whole shards and knows nothing smaller; frames go from decoder to encoder
through the node's shared memory and never further.
"""

from __future__ import annotations

import contextlib
import errno
import platform
import queue
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.config import EncodeConfig
from pipeline.data_root import open_root
from pipeline.decoders import DecoderPool
from pipeline.files import NoRoomError
from pipeline.fleet import Lost
from pipeline.folders import URL
from pipeline.format import FormatError, read_plan
from pipeline.jobs import Job, ShardTask, ShardUpdate
from pipeline.layout import Layout, Node, describe_cell, describe_nodes
from pipeline.pool import CellError
from pipeline.settings import ConfigError
from pipeline.storage import scrubbed

GET_TIMEOUT_S = 60.0  # of a few hundred bytes that are there
# What another node, or the same in a minute, may not run into. Stores raise without a number.
PASSING_ERRORS = (None, errno.EIO, errno.ESTALE, errno.ENETUNREACH, errno.EHOSTUNREACH)
LOW_MEMORY = "lower window_mb, decoders or batch, or give the node fewer cells"


# The mailbox has a thread of its own, for run() has the other.
ENCODER_OPTIONS: dict[str, Any] = {"max_restarts": 0, "concurrency_groups": {"mailbox": 1}}


@ray.remote(**ENCODER_OPTIONS)
class EncoderActor:
    """The head of a cell: encodes what is put into its mailbox, with decoders beside it."""

    def __init__(self, job: Job, group: PlacementGroup, num_decoders: int, num_cpus: int) -> None:
        self._job, self._group = job, group
        self._num_decoders, self._num_cpus = num_decoders, num_cpus
        self._mailbox: queue.SimpleQueue[ShardTask | None] = queue.SimpleQueue()

    @ray.method(concurrency_group="mailbox")
    def lease(self, task: ShardTask) -> None:
        """Put a shard behind those that are there."""
        self._mailbox.put(task)

    def run(self) -> Iterator[ShardUpdate]:
        """Encode and commit shards until killed, telling the driver how it goes.

        Raises:
            CellError: this node does not see what all must share, or can't start decoders.
        """
        check_node(self._job)
        # First, for decoders start while codecs are loaded.
        pool = DecoderPool(self._job, self._group, self._num_decoders)
        import torch  # not above: decoders would load it, too

        from pipeline.encoder import ShardEncoder

        torch.set_num_threads(self._num_cpus)
        encoder = ShardEncoder(self._job, pool)
        yield ShardUpdate("alive")
        yield from encoder.run(self._mailbox)


def check_node(job: Job) -> None:
    """Check that this node sees the data set of the run, and its media.

    Raises:
        CellError: it does not; the message names the node and what all must share.
    """
    node = f"node {platform.node()} ({ray.util.get_node_ip_address()})"
    shared = (
        "all nodes must share --src and --out: the same folders under the same paths, or URLs; "
        "see configs/cluster/README.md"
    )
    try:
        found = read_plan(open_root(job.root)).plan_id
    except (FormatError, ConfigError, OSError) as error:
        raise CellError(f"{node} does not see the data set {job.root}: {error}; {shared}") from None
    if found != job.plan_id:
        raise CellError(
            f"{node} has another data set in {job.root}: plan {found}, expected {job.plan_id}; "
            f"{shared}"
        )
    if not URL.match(job.media_root) and not Path(job.media_root).is_dir():
        raise CellError(f"{node} has no folder {job.media_root} of media; {shared}")


class RayCell:
    """A `pipeline.fleet.Cell`: asks Ray for a place at once, and for processes in it."""

    def __init__(self, number: int, job: Job, num_decoders: int, config: EncodeConfig) -> None:
        self._number, self.num_decoders = number, num_decoders
        encoder = {"CPU": float(config.encoder_cpus)}
        if config.encoder_gpus:
            encoder["GPU"] = config.encoder_gpus
        bundles = [encoder, *({"CPU": 1.0} for _ in range(num_decoders))]
        self._group = placement_group(bundles, "STRICT_PACK")
        actor_class: Any = EncoderActor
        self._actor = actor_class.options(
            num_cpus=config.encoder_cpus,
            num_gpus=config.encoder_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=0
            ),
        ).remote(job, self._group, num_decoders, config.encoder_cpus)
        self.stream: Any = self._actor.run.options(num_returns="streaming").remote()
        self._host = ""

    @property
    def name(self) -> str:
        """Its host, once it has one, and its number."""
        self.is_placed()
        return f"{self._host or 'unplaced'}/{self._number}"

    def is_placed(self) -> bool:
        """Return whether it has found a node."""
        if not self._host:
            group: Any = placement_group_table(self._group)
            node_id = group["bundles_to_node_id"].get(0) if group["state"] == "CREATED" else None
            hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
            self._host = hosts.get(node_id, "")
        return bool(self._host)

    def lease(self, task: ShardTask) -> None:
        """Give it a shard to do after those it has."""
        self._actor.lease.remote(task)

    def read(self) -> ShardUpdate | Lost:
        """Return the next news, which is there.

        Raises what ends the run, see `pipeline.fleet.Cells`.
        """
        try:
            news: Any = ray.get(next(self.stream), timeout=GET_TIMEOUT_S)
            return news
        except StopIteration:
            return Lost("the encoder ended by itself")
        except RayTaskError as error:  # raised by the encoder's code
            return lost_by(error.cause)
        except RayError as error:
            return Lost(_reason(error))

    def kill(self) -> None:
        """End its processes, at once."""
        with contextlib.suppress(RayError, ValueError):  # the cluster may be gone
            ray.kill(self._actor)
            remove_placement_group(self._group)


class RayCells:
    """`pipeline.fleet.Cells` on the Ray cluster that this process is connected to."""

    def __init__(
        self, job: Job, config: EncodeConfig, layout: Layout, place_timeout_s: float
    ) -> None:
        self._job, self._config, self._layout = job, config, layout
        self.num_cells, self.place_timeout_s = layout.num_cells, place_timeout_s

    def start(self, number: int) -> RayCell:
        """Ask for a cell; it may take long to be placed."""
        return RayCell(number, self._job, self._layout.decoders[number], self._config)

    def poll(
        self, cells: Sequence[RayCell], timeout_s: float
    ) -> list[tuple[RayCell, ShardUpdate | Lost]]:
        """Return the next piece of news of each cell that has any, waiting for the first."""
        if not cells:
            time.sleep(timeout_s)
            return []
        streams = [cell.stream for cell in cells]
        ray.wait(streams, timeout=timeout_s)
        ready = set(ray.wait(streams, num_returns=len(streams), timeout=0)[0])
        return [(cell, cell.read()) for cell in cells if cell.stream in ready]

    def shortage(self) -> str:
        """Say what a cell asks for and what there is."""
        smallest = min(self._layout.decoders)
        free = ray.available_resources()
        return (
            f"asked is {describe_cell(self._config, smallest)} on one node, there are "
            f"{describe_nodes(cluster_nodes())}, of which {free.get('CPU', 0):g} CPUs and "
            f"{free.get('GPU', 0):g} GPUs are free; lower decoders, encoder_cpus or encoder_gpus, "
            "or end what else runs there"
        )


def cluster_nodes() -> list[Node]:
    """Return the living nodes of the cluster with all that they have."""
    return [
        Node(
            node["NodeID"],
            int(node["Resources"].get("CPU", 0)),
            node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def lost_by(error: BaseException) -> Lost:
    """Return the loss of a cell whose code raised, or raise what ends the run."""
    if isinstance(error, CellError):
        return Lost(str(error), is_sick=True)
    if isinstance(error, ObjectStoreFullError | OutOfDiskError):
        raise NoRoomError(
            f"Ray's shared memory and the disk it spills to are full ({type(error).__name__}): "
            "lower window_mb or cells, or start Ray with more object_store_memory"
        ) from None
    if isinstance(error, OSError):
        passes = isinstance(error, ConnectionError | TimeoutError) or error.errno in PASSING_ERRORS
        if not passes:
            raise error from None
    if isinstance(error, NoRoomError | FormatError | ConfigError):
        raise error from None
    return Lost(scrubbed(error), task=getattr(error, "task", None))


def _reason(error: RayError) -> str:
    """Say in one line why Ray gave a cell up."""
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "low on memory" in text:
        return f"Ray's memory monitor ended the encoder: its node is out of memory; {LOW_MEMORY}"
    line = text.strip().splitlines()[-1]
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return f"the encoder can't start: {line}"
    return f"{type(error).__name__}: {line.split(' Some common causes')[0]}"
