"""Memory of batches that is used again: fresh memory costs more in page faults than the copy."""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict

import numpy as np
import torch

MOST_FREE = 4  # times the largest block: of shapes that no batch has had for long, memory is freed


class BatchMemory:
    """Float16 tensors whose memory is used again once nothing refers to it any more.

    Args:
        device: where batches go; for a GPU memory is pinned.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # By size, that of the newest use last; within a size the newest block last.
        self._free: OrderedDict[int, list[np.ndarray]] = OrderedDict()
        self._free_values = self._largest = 0
        self._lock = threading.RLock()  # the garbage collector may give back in the middle of take

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return an uninitialised CPU tensor; threads may call this at the same time."""
        if self._device.type == "cuda":
            # Torch keeps freed pinned memory, and waits for copies out of it. A thread is on GPU 0
            # unless told otherwise, and would take half a gigabyte there for a context.
            with torch.cuda.device(self._device):
                return torch.empty(shape, dtype=torch.float16, pin_memory=True)
        num_values = math.prod(shape)
        block = self._used_again(_size_class(num_values))
        # All tensors over the block hold this array, so it dies with the last of them.
        lent = block[:num_values].reshape(shape)
        weakref.finalize(lent, self._give_back, block)
        return torch.from_numpy(lent)

    @property
    def free_bytes(self) -> int:
        """Bytes that no tensor refers to."""
        return 2 * self._free_values

    def _used_again(self, size: int) -> np.ndarray:
        with self._lock:
            self._largest = max(self._largest, size)
            if blocks := self._free.get(size):
                self._free_values -= size
                return blocks.pop()  # the newest, which may be in the CPU's cache still
        return np.empty(size, dtype=np.float16)

    def _give_back(self, block: np.ndarray) -> None:
        with self._lock:
            self._free.setdefault(block.size, []).append(block)
            self._free.move_to_end(block.size)
            self._free_values += block.size
            while self._free_values > MOST_FREE * self._largest:
                size, blocks = next(iter(self._free.items()))
                if not blocks:
                    del self._free[size]
                    continue
                blocks.pop(0)
                self._free_values -= size


def _size_class(num_values: int) -> int:
    """Round up by an eighth at most, so that buckets and texts of similar sizes share blocks."""
    step = 1 << max(0, num_values.bit_length() - 4)
    return -(-num_values // step) * step
