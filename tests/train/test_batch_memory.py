"""Properties of the memory of batches: lent once at a time, and used again."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.data.batch_memory import BatchMemory

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=3))
def test_tensors_have_the_shape_asked_for(shape: list[int]) -> None:
    if math.prod(shape) > 1e7:
        shape = shape[:1]
    tensor = BatchMemory(CPU).take(tuple(shape))
    assert tensor.shape == tuple(shape)
    assert tensor.dtype == torch.float16
    assert tensor.is_contiguous()


def test_memory_is_used_again_once_nothing_refers_to_it() -> None:
    memory = BatchMemory(CPU)
    first = memory.take((4, 100))
    place, part = first.data_ptr(), first[1:3]
    del first
    other = memory.take((4, 100))
    assert other.data_ptr() != place  # a view of it is still there
    del part
    assert memory.take((4, 100)).data_ptr() == place


def test_similar_sizes_share_memory() -> None:
    memory = BatchMemory(CPU)
    first = memory.take((1000,))
    place = first.data_ptr()
    del first
    assert memory.take((990,)).data_ptr() == place


def test_newest_memory_is_used_first() -> None:
    memory = BatchMemory(CPU)
    one, two = memory.take((500,)), memory.take((500,))
    place = two.data_ptr()
    del one
    del two
    assert memory.take((500,)).data_ptr() == place


def test_memory_of_sizes_that_are_not_used_any_more_is_freed() -> None:
    memory = BatchMemory(CPU)
    for size in range(1000, 101_000, 1000):
        tensors = [memory.take((size,)) for _ in range(4)]
        del tensors
        assert memory.free_bytes <= 2 * 4 * 1.125 * size
    last = memory.take((100_000,))
    assert memory.free_bytes > 0
    assert len(last) == 100_000


def test_threads_never_share_memory() -> None:
    memory, wrong = BatchMemory(CPU), []

    def work(number: int) -> None:
        for _ in range(500):
            tensor = memory.take((64,))
            tensor.fill_(number)
            if not torch.all(tensor == number):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_memory_for_a_gpu_is_pinned() -> None:
    assert BatchMemory(torch.device("cuda", 0)).take((10,)).is_pinned()
