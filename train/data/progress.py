"""What people are told of a stream: where it is, and which clips it repeats or leaves out."""

from __future__ import annotations

import logging

from train.data.order import wraps
from train.data.stream import Cursor, Stream
from train.data.view import View

log = logging.getLogger(__name__)


def position(view: View, stream: Stream, cursor: Cursor) -> str:
    """Return where a stream is: the epoch, the clip within it, and the next keys.

    Raises:
        FormatError: the census was damaged meanwhile.
    """
    batch = next(stream.batches(cursor))
    part = view.parts[batch.part]
    keys = part.keys_of(batch.rows[:3].tolist())
    place, now = batch.cursor.places[batch.part], cursor.places[batch.part]
    done = sum(now.consumed) if now.epoch == place.epoch else 0
    of = f" of {part.root}" if len(view.parts) > 1 else ""
    return f"epoch {place.epoch}{of}, clip {done} of {part.num_clips}; next {', '.join(keys)}"


def warn_of_few_clips(view: View, stream: Stream, global_batch: int) -> None:
    """Log which clips come more often than once an epoch, or never."""
    for part, num_rows in zip(view.parts, stream.num_rows, strict=True):
        num_few = int(num_rows[num_rows < global_batch].sum())
        if num_few and wraps(num_rows, global_batch, view.config.tail):
            log.warning(
                "%s: %d clips are of shapes that have fewer than the global batch of %d: some are "
                "repeated within a step",
                part.root,
                num_few,
                global_batch,
            )
        elif num_few:
            log.warning(
                "%s: %d clips are never trained on: those of their shape are fewer than the global "
                "batch of %d; lower global_batch, or set data.tail=wrap",
                part.root,
                num_few,
                global_batch,
            )
