"""What the driver needs of cells, and whom it tells. ``pipeline.cells`` fulfils it with Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pipeline.jobs import ShardTask, ShardUpdate


@dataclass(frozen=True)
class Lost:
    """News that a cell is no more.

    Attributes:
        reason: in one line.
        is_sick: whether its node is to blame, and none of its shards.
        task: of the shard over which it was lost, where that is known.
    """

    reason: str
    is_sick: bool = False
    task: tuple[str, int] | None = None


class Cell(Protocol):
    """One encoder with its decoders, or the request for them."""

    @property
    def name(self) -> str:
        """What people call it, such as "node-3/1"."""
        ...

    @property
    def num_decoders(self) -> int:
        """How many decoders it has."""
        ...

    def is_placed(self) -> bool:
        """Return whether it has found a node."""
        ...

    def lease(self, task: ShardTask) -> None:
        """Give it a shard to do after those it has."""
        ...

    def kill(self) -> None:
        """End it, at once."""
        ...


AnyCell = TypeVar("AnyCell", bound=Cell)


class Cells(Protocol[AnyCell]):
    """Where cells come from.

    Attributes:
        num_cells: how many to have, at most.
        place_timeout_s: how long to wait when none finds a node.
    """

    num_cells: int
    place_timeout_s: float

    def start(self, number: int) -> AnyCell:
        """Ask for cell ``number`` of 0 … ``num_cells`` - 1; it may take long to be placed."""
        ...

    def poll(
        self, cells: Sequence[AnyCell], timeout_s: float
    ) -> list[tuple[AnyCell, ShardUpdate | Lost]]:
        """Return the next piece of news of each cell that has any, waiting for the first.

        Raises what ends the run: FormatError, NoRoomError, OSError, ConfigError.
        """
        ...

    def shortage(self) -> str:
        """Say what a cell asks for and what there is."""
        ...


class Watch(Protocol):
    """Who is told what goes on."""

    def update(self, news: ShardUpdate) -> None:
        """Hear news of a cell."""
        ...

    def set_cells(self, num_cells: int, num_decoders: int) -> None:
        """Hear how many cells are alive, and how many decoders they have together."""
        ...

    def lost(self, task: tuple[str, int], attempt: int, reason: str, cell: str = "") -> None:
        """Hear that an attempt at a shard was lost; its rows don't count."""
        ...

    def event(self, kind: str, **fields: Any) -> None:
        """Hear of anything else worth a line in the log."""
        ...
