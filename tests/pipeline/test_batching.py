"""A clip's latents do not depend on its neighbours, nor its fate on theirs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batching import Batcher, is_device_failure, is_out_of_memory
from pipeline.pool import CellLostError

SHAPES = [(4, 8), (4, 6), (2, 8)]


class StrictCodec:
    """Takes batches of one shape and size only; what it fails over is in its clips' values.

    Args:
        batches: sizes that may come.
        memory: clips that it has memory for.
        broken: first value of clips that it fails over.
    """

    def __init__(self, batches, memory=1000, broken=(), error=None):
        self.batches, self.memory, self.broken = batches, memory, broken
        self.error = error or ZeroDivisionError("a bug")
        self.sizes = []

    def encode(self, batch):
        assert len(batch) in self.batches
        assert len({media.shape for media in batch}) == 1
        self.sizes.append(len(batch))
        if len(batch) > self.memory:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if any(media.flat[0] in self.broken for media in batch):
            raise self.error
        # As on a GPU: the size of the batch shows in the last bits.
        return [media * (1 + len(batch) * 1e-6) for media in batch]


def clips(*shapes):
    return [np.full(shape, float(number)) for number, shape in enumerate(shapes)]


def run(batcher, media):
    """Encode all; return number -> what came of it, each once."""
    owners = [object() for _ in media]
    encoded = [
        found for owner, one in zip(owners, media, strict=True) for found in batcher.add(owner, one)
    ]
    for owner in owners:
        encoded += batcher.flush(owner)  # nothing where it was encoded before
    assert len(encoded) == len(media)
    numbers = {owner: number for number, owner in enumerate(owners)}
    return {numbers[owner]: result for owner, result in encoded}


@given(st.integers(1, 5), st.lists(st.sampled_from(SHAPES), min_size=1, max_size=20))
def test_latents_do_not_depend_on_neighbours(batch, shapes):
    found = run(Batcher("video", StrictCodec({batch}), batch), clips(*shapes))
    for number, media in enumerate(clips(*shapes)):
        alone = StrictCodec({batch}).encode([media] * batch)[0]
        assert found[number].latent.tobytes() == alone.tobytes()


def test_batch_is_encoded_when_it_is_full_and_not_before():
    codec = StrictCodec({3})
    batcher = Batcher("video", codec, 3)
    a, b = SHAPES[:2]
    came = [len(batcher.add(number, media)) for number, media in enumerate(clips(a, b, a, b, a, b))]
    assert came == [0, 0, 0, 0, 3, 3] and codec.sizes == [3, 3]


def test_captions_have_no_shape():
    class Words:
        def encode(self, batch):
            return [np.full((len(caption.split()) + 1, 2), 1.0) for caption in batch]

    found = run(Batcher("text", Words(), 2), ["", "a dog barks", "rain"])
    assert [len(found[number].latent) for number in range(3)] == [1, 4, 2]


def test_batch_is_halved_for_good_where_memory_runs_out():
    codec = StrictCodec({8, 4, 2}, memory=2)
    batcher = Batcher("video", codec, 8)
    found = run(batcher, clips(*[SHAPES[0]] * 12))
    assert all(result.problem is None for result in found.values())
    assert codec.sizes == [8, 4, 2, 2, 2, 2, 2, 2] and batcher.batch == 2
    notes = batcher.take_notes()
    assert [note.split(" (")[0] for note in notes] == [
        "video: no memory for batches of 8, going on with 4",
        "video: no memory for batches of 4, going on with 2",
    ]
    assert "lower video.batch" in notes[0] and batcher.take_notes() == ()


def test_clip_for_which_memory_runs_out_alone_is_named():
    found = run(Batcher("audio", StrictCodec({2, 1}, memory=0), 2), clips(SHAPES[0]))
    status, message = found[0].problem
    assert status == "encode_error" and found[0].latent is None
    assert "audio codec failed over it alone: RuntimeError: CUDA out of memory" in message
    assert message.endswith("encode again with --retry-failed=encode_error")


@pytest.mark.parametrize("batch", [1, 4])
def test_clip_that_a_codec_fails_over_costs_itself_only(batch):
    batcher = Batcher("video", StrictCodec({batch}, broken=(2.0, 5.0)), batch)
    found = run(batcher, clips(*[SHAPES[0]] * 7))
    assert {n for n, result in found.items() if result.problem} == {2, 5}
    assert found[2].problem[1].endswith("ZeroDivisionError: a bug")
    alone = StrictCodec({batch}).encode([clips(*[SHAPES[0]] * 7)[3]] * batch)[0]
    assert found[3].latent.tobytes() == alone.tobytes() and batcher.batch == batch


def test_codec_that_gives_another_number_of_latents_is_found():
    class Forgetful:
        def encode(self, batch):
            return list(batch)[1:]

    found = run(Batcher("video", Forgetful(), 2), clips(*[SHAPES[0]] * 2))
    assert "1 latents for 2 clips" in found[0].problem[1]


def test_gpu_that_failed_is_blamed_on_no_clip():
    error = RuntimeError("CUDA error: device-side assert triggered\nmore lines")
    batcher = Batcher("video", StrictCodec({2}, broken=(1.0,), error=error), 2)
    with pytest.raises(CellLostError, match=r"device-side assert triggered$"):
        run(batcher, clips(*[SHAPES[0]] * 2))


def test_errors_of_torch_are_told_apart():
    import torch

    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    assert not is_device_failure(torch.AcceleratorError("CUDA error: out of memory"))
    assert is_device_failure(torch.AcceleratorError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_device_failure(RuntimeError("shapes differ"))
