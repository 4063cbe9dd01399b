"""The order of a plan, worked out by columns: which clip is where, and which text is its caption.

The plan's order is that of the keys, shuffled by the seed; rows are brought into it a block at a
time. 10 million clips take 3.5 GB at the peak with a million captions, 4.5 GB if all have their own
(``tools.bench_plan``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline import format as fmt
from pipeline.sources import CLIP_SCHEMA
from pipeline.tables import pc

PLAN_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("key", pa.string()),
        ("uri", pa.string()),
        ("start_s", pa.float64()),
        ("duration_s", pa.float64()),
        ("caption", pa.string()),
        ("label", pa.string()),
        ("split", pa.string()),
        ("text_row", pa.int64()),
    ]
)
# Rows are brought into order and written in blocks of about so many.
BLOCK_ROWS = 1 << 15


@dataclass(frozen=True)
class Draft:
    """Shards worked out, not yet written.

    Attributes:
        clips: ``CLIP_SCHEMA`` [N] in any order, with indices in place of texts that repeat.
        texts: what these indices mean, by column; with them a chunk of clips would drag along all
            texts of its column.
        order: int64 [N], the place among ``clips`` of the clips in the plan's order.
        text_rows: int64 [N], in the plan's order.
        captions: those that no earlier shard has, in the order of their text rows.
        segment: the shards.
    """

    clips: pa.Table
    texts: dict[str, pa.Array]
    order: np.ndarray
    text_rows: np.ndarray
    captions: pa.Array
    segment: fmt.PlanSegment

    def blocks(self) -> Iterator[pa.Table]:
        """Yield the rows in the plan's order, ``PLAN_SCHEMA``, whole shards of them."""
        size = self.segment.shard_size
        block_rows = size * max(1, BLOCK_ROWS // size)
        for start in range(0, len(self.order), block_rows):
            places = np.arange(start, min(start + block_rows, len(self.order)))
            block = self.clips.take(pa.array(self.order[places]))
            for name, texts in self.texts.items():
                told = texts.take(block[name].combine_chunks())
                block = block.set_column(CLIP_SCHEMA.get_field_index(name), name, told)
            block = block.append_column(
                "shard", pa.array(places // size + self.segment.first_shard)
            )
            block = block.append_column("row", pa.array(places % size))
            block = block.append_column("text_row", pa.array(self.text_rows[places]))
            yield block.select(PLAN_SCHEMA.names).cast(PLAN_SCHEMA)


def plan_order(keys: pa.ChunkedArray, seed: int, first_shard: int) -> np.ndarray:
    """Return int64 [N]: the clip at every place of the plan's order, whatever the clips' own order.

    Shuffled by sorting numbers of Philox: numpy keeps the raw output of its bit generators the
    same in all versions, but not what its other functions make of it.
    """
    by_key = pc.sort_indices(keys).to_numpy()
    generator = np.random.Philox(key=np.array([seed % 2**64, first_shard], np.uint64))
    return by_key[np.argsort(generator.random_raw(len(by_key)), kind="stable")].astype(np.int64)


def draft_shards(
    clips: pa.Table, seed: int, shard_size: int, first_shard: int = 0, known: pa.Array | None = None
) -> Draft:
    """Assign clips to shards from ``first_shard`` on.

    Captions that are not among the ``known`` ones get text rows after theirs, in the order in which
    they appear in the plan; caption 0 is the empty one.

    Raises:
        FormatError: a key that no tar can hold.
    """
    for key in clips["key"].filter(_is_odd(clips["key"])).slice(0, 1).to_pylist():
        fmt.check_key(key)
    clips, texts = _without_repeats(clips)
    order = plan_order(clips["key"], seed, first_shard)
    codes, captions = clips["caption"].to_numpy()[order], texts["caption"]
    first_seen = np.full(len(captions), len(codes))
    first_seen[codes[::-1]] = np.arange(len(codes))[::-1]  # of equal places the last one stays
    before = pa.array([""], captions.type) if known is None else known
    text_rows = pc.index_in(captions, before).fill_null(-1).to_numpy().astype(np.int64)
    fresh = np.argsort(first_seen)
    fresh = fresh[(text_rows[fresh] < 0) & (first_seen[fresh] < len(codes))]
    text_rows[fresh] = len(before) + np.arange(len(fresh))
    fresh_captions = captions.take(pa.array(fresh))
    if known is None:
        fresh_captions = pa.concat_arrays([before, fresh_captions])
    segment = fmt.PlanSegment(first_shard, len(order), shard_size)
    return Draft(clips, texts, order, text_rows[codes], fresh_captions, segment)


def _without_repeats(clips: pa.Table) -> tuple[pa.Table, dict[str, pa.Array]]:
    """Return the clips with indices in place of texts that repeat, and the texts by column."""
    clips, texts = clips.unify_dictionaries(), {}
    for place, field in enumerate(CLIP_SCHEMA):
        if not pa.types.is_dictionary(field.type):
            continue
        chunks = clips[field.name].chunks
        empty = pa.array([], field.type.value_type)
        texts[field.name] = chunks[0].dictionary if chunks else empty
        indices = pa.chunked_array([chunk.indices for chunk in chunks], field.type.index_type)
        clips = clips.set_column(place, field.name, indices)
    return clips, texts


def _is_odd(keys: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.invert(pc.match_substring_regex(keys, "^[A-Za-z0-9_-]{1,80}$"))


class ClipsHash:
    """SHA-256 over the clips of a plan in its order, however they are cut into blocks.

    Of every column, the values; of texts, their lengths and their UTF-8.
    """

    def __init__(self) -> None:
        self._values = {name: hashlib.sha256() for name in CLIP_SCHEMA.names}
        self._lengths = {name: hashlib.sha256() for name in CLIP_SCHEMA.names}

    def update(self, block: pa.Table) -> None:
        """Take in the next rows, ``PLAN_SCHEMA``."""
        for name, values in self._values.items():
            for chunk in block[name].chunks:
                if pa.types.is_floating(chunk.type):
                    values.update(chunk.to_numpy().astype("<f8"))
                    continue
                self._lengths[name].update(pc.binary_length(chunk).to_numpy().astype("<i4"))
                # Texts lie in one buffer one after the other; a chunk may be a part of it.
                _, offsets, texts = chunk.buffers()
                offsets = np.frombuffer(offsets, np.int32)[chunk.offset :]
                if texts is not None:
                    values.update(memoryview(texts)[offsets[0] : offsets[len(chunk)]])

    def hexdigest(self) -> str:
        """Return the hash of all rows so far."""
        parts = [*self._values.values(), *self._lengths.values()]
        return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()
