"""Memory of batches that is used again: fresh memory costs more in page faults than the copy."""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch


class BatchMemory:
    """Float16 tensors whose memory is used again once nothing refers to it any more.

    Args:
        device: where batches go; for a GPU memory is pinned.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: dict[int, deque[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return an uninitialised CPU tensor; threads may call this at the same time."""
        if self._device.type == "cuda":
            # Torch keeps freed pinned memory, and waits for copies out of it. A thread is on GPU 0
            # unless told otherwise, and would take half a gigabyte there for a context.
            with torch.cuda.device(self._device):
                return torch.empty(shape, dtype=torch.float16, pin_memory=True)
        num_values = math.prod(shape)
        size = _size_class(num_values)
        free = self._free.setdefault(size, deque())
        try:
            block = free.pop()  # the newest, which may be in the CPU's cache still
        except IndexError:
            block = np.empty(size, dtype=np.float16)
        # All tensors over the block hold this array, so it dies with the last of them.
        lent = block[:num_values]
        weakref.finalize(lent, free.append, block)
        return torch.from_numpy(lent).view(shape)


def _size_class(num_values: int) -> int:
    """Round up by an eighth at most, so that buckets and texts of similar sizes share blocks."""
    step = 1 << max(0, num_values.bit_length() - 4)
    return -(-num_values // step) * step
