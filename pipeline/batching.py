"""Batches of one modality for its codec: one shape, always the same number of clips.

A batch with fewer clips is filled up with copies of its last one, and what comes of the copies is
thrown away: latents that depend on the number of clips in a batch, as on GPUs they do in the last
bits, would depend on which neighbours a clip happened to have.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from pipeline.codecs import Codec
from pipeline.pool import CellLostError

Owner = TypeVar("Owner")


@dataclass(frozen=True)
class Encoded:
    """What a codec made of one clip.

    Attributes:
        latent: float32, or None.
        problem: (status, message) where there is none.
        seconds: that the codec spent on it: its share of the batch's.
    """

    latent: np.ndarray | None
    problem: tuple[str, str] | None
    seconds: float


def encode_filled(codec: Codec, media: Sequence[Any], batch: int) -> list[np.ndarray]:
    """Encode up to ``batch`` clips of one shape, filled up with copies of the last one."""
    filled = [*media, *[media[-1]] * (batch - len(media))]
    latents = codec.encode(filled)
    if len(latents) != batch:
        raise ValueError(f"the codec gave {len(latents)} latents for {batch} clips")
    return latents[: len(media)]


class Batcher(Generic[Owner]):
    """Collects the clips of one modality by shape, and encodes them when a batch is full.

    Where memory runs out, the batch is halved, for this and all that follow: from then on latents
    may differ in the last bits from what column.json's batch gives. A clip over which the codec
    fails alone, be it for lack of memory, has status ``encode_error``; its neighbours don't notice.

    Attributes:
        batch: clips that the codec takes at once.
    """

    def __init__(self, modality: str, codec: Codec, batch: int) -> None:
        self.batch, self._notes = batch, list[str]()
        self._modality, self._codec = modality, codec
        self._buckets: dict[Hashable, list[tuple[Owner, Any]]] = {}

    def add(self, owner: Owner, media: Any) -> list[tuple[Owner, Encoded]]:
        """Take one clip; return what came of its batch if that is full now.

        Raises:
            CellLostError: the GPU failed, over whichever clip; this process can't use it again.
        """
        shape: Hashable = getattr(media, "shape", None)  # captions have none
        bucket = self._buckets.setdefault(shape, [])
        bucket.append((owner, media))
        return self._encode(shape) if len(bucket) >= self.batch else []

    def flush(self, owner: Owner) -> list[tuple[Owner, Encoded]]:
        """Encode the batch that holds the owner's clip, full or not, if one does."""
        for shape, bucket in self._buckets.items():
            if any(held is owner for held, _ in bucket):
                return self._encode(shape)
        return []

    def take_notes(self) -> tuple[str, ...]:
        """Return what people should hear of that happened since the last call."""
        notes, self._notes = tuple(self._notes), []
        return notes

    def _encode(self, shape: Hashable) -> list[tuple[Owner, Encoded]]:
        bucket = self._buckets.pop(shape)
        encoded = self._encode_all([media for _, media in bucket])
        return [(owner, result) for (owner, _), result in zip(bucket, encoded, strict=True)]

    def _encode_all(self, media: list[Any]) -> list[Encoded]:
        """Encode clips of one shape in batches; each alone where that fails for all together."""
        results: list[Encoded] = []
        while len(results) < len(media):
            part = media[len(results) : len(results) + self.batch]
            started = time.perf_counter()
            error = None
            try:
                latents = encode_filled(self._codec, part, self.batch)
            except Exception as raised:  # codecs are whatever their authors made them
                error = raised.with_traceback(None)  # its frames hold memory that is needed now
            seconds = time.perf_counter() - started
            if error is None:
                results += [Encoded(latent, None, seconds / len(part)) for latent in latents]
            elif is_out_of_memory(error) and self.batch > 1:
                self._halve(error)
            elif is_device_failure(error):
                raise CellLostError(f"the {self._modality} codec's GPU failed: {_line(error)}")
            elif len(part) > 1:
                for one in part:
                    results += self._encode_all([one])
            else:
                message = f"the {self._modality} codec failed over it alone: {_line(error)}"
                if is_out_of_memory(error):
                    message += "; free memory, and encode again with --retry-failed=encode_error"
                results.append(Encoded(None, ("encode_error", message), seconds))
        return results

    def _halve(self, error: Exception) -> None:
        self._notes.append(
            f"{self._modality}: no memory for batches of {self.batch}, going on with "
            f"{self.batch // 2} ({_line(error)}); lower {self._modality}.batch"
        )
        self.batch //= 2
        if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a codec's error says that memory ran out, the GPU's or the machine's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("out of memory", "can't allocate memory", "alloc_failed")
    )


def is_device_failure(error: Exception) -> bool:
    """Return whether an error leaves the GPU useless to this process, as CUDA's asserts do."""
    return not is_out_of_memory(error) and (
        type(error).__name__ == "AcceleratorError"
        or (isinstance(error, RuntimeError) and str(error).startswith("CUDA error"))
    )


def _line(error: Exception) -> str:
    """Return type and first line of an error."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line}"[:300]
