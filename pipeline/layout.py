"""How many cells fit on which nodes, and how many decoders each gets: pure functions.

A cell needs a whole encoder (``encoder_cpus``, ``encoder_gpus``) and a CPU per decoder on one
node. Decoding is the bound more often than not, so CPUs that are left go to decoders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import EncodeConfig
from pipeline.settings import ConfigError


@dataclass(frozen=True)
class Node:
    """What a node has in all, whoever uses it now. No other has its name."""

    name: str
    cpus: int
    gpus: float = 0.0


@dataclass(frozen=True)
class Layout:
    """The decoders of every cell, most first: large cells look for their place first."""

    decoders: tuple[int, ...]

    @property
    def num_cells(self) -> int:
        """How many cells the run wants."""
        return len(self.decoders)

    def num_cpus(self, config: EncodeConfig) -> int:
        """Return the CPUs that all cells together take."""
        return self.num_cells * config.encoder_cpus + sum(self.decoders)


def local_layout(num_cpus: int, config: EncodeConfig) -> Layout:
    """Lay cells out on this machine, which takes whatever the settings ask.

    More cells or decoders than CPUs share them; the operating system sees to that.

    Raises:
        ConfigError: GPUs can't be shared so.
    """
    check_gpus(config)
    cells = config.cells or 1
    share = num_cpus // cells - config.encoder_cpus
    return Layout((config.decoders or max(1, share),) * cells)


def cluster_layout(nodes: Sequence[Node], config: EncodeConfig) -> Layout:
    """Lay cells out on the nodes of a cluster.

    Without ``cells``, every GPU gets its encoders, and without GPUs every node one. Cells that
    are asked for beyond what the nodes hold are as large as the smallest of the others: they wait
    for nodes to join.

    Raises:
        ConfigError: no node holds a cell, and the settings don't say what will.
    """
    check_gpus(config)
    room = {node: _capacity(node, config) for node in nodes if _capacity(node, config)}
    if not room and not config.cells:
        raise ConfigError(
            f"no node holds a cell: asked is {describe_cell(config)} on one node, there are "
            f"{describe_nodes(nodes)}; lower decoders, encoder_cpus or encoder_gpus. If nodes join "
            "only when they are asked for, say how many: cells= and decoders="
        )
    placed = Counter[Node]()
    for _ in range(min(config.cells or sum(room.values()), sum(room.values()))):
        placed[max(room, key=lambda node: (room[node] - placed[node], node.cpus))] += 1
    decoders = sorted(
        (
            size
            for node, cells in placed.items()
            for size in [_decoders(node, cells, config)] * cells
        ),
        reverse=True,
    )
    smallest = decoders[-1] if decoders else config.decoders or 1
    return Layout((*decoders, *[smallest] * (config.cells - len(decoders))))


def check_gpus(config: EncodeConfig) -> None:
    """Check that ``encoder_gpus`` is what Ray can give out.

    Raises:
        ConfigError: it is not.
    """
    if config.encoder_gpus > 1 and config.encoder_gpus % 1:
        raise ConfigError(
            f"encoder_gpus {config.encoder_gpus:g}: expected a share of one GPU or whole ones"
        )


def store_bytes(num_cells: int, config: EncodeConfig) -> int:
    """Return the shared memory of a node for its cells' frames.

    Twice their windows, for what was freed leaves gaps into which no other clip may fit.
    """
    return int(2e6 * config.window_mb * num_cells + 2e8)


def _capacity(node: Node, config: EncodeConfig) -> int:
    """Return how many cells a node holds, each with as few decoders as it may have."""
    cells = node.cpus // (config.encoder_cpus + (config.decoders or 1))
    if config.encoder_gpus:
        per_gpu = int(1 / config.encoder_gpus) if config.encoder_gpus < 1 else 0
        gpus = int(node.gpus)
        return min(cells, gpus * per_gpu if per_gpu else int(gpus // config.encoder_gpus))
    return cells if config.cells else min(1, cells)


def _decoders(node: Node, cells: int, config: EncodeConfig) -> int:
    """Return the decoders of each of a node's cells.

    All alike, though a CPU may be left: on nodes that are alike, every cell then finds a place in
    whatever order they look for one.
    """
    return config.decoders or node.cpus // cells - config.encoder_cpus


def describe_cell(config: EncodeConfig, decoders: int | None = None) -> str:
    """Say what one cell asks of its node."""
    cpus = config.encoder_cpus + (decoders or config.decoders or 1)
    return f"{_count(cpus, 'CPU')} and {_count(config.encoder_gpus, 'GPU')}"


def describe_nodes(nodes: Sequence[Node]) -> str:
    """Say what the nodes have, those alike together."""
    alike = Counter((node.cpus, node.gpus) for node in nodes)
    return (
        ", ".join(
            f"{_count(number, 'node')} of {_count(cpus, 'CPU')} and {_count(gpus, 'GPU')}"
            for (cpus, gpus), number in sorted(alike.items(), reverse=True)
        )
        or "no nodes"
    )


def _count(number: float, thing: str) -> str:
    return f"{number:g} {thing}{'' if number == 1 else 's'}"
