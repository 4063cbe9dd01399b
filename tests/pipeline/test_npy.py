"""Tables in .npy files: what numpy writes is read, in threads too, and nothing is unpickled."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.format import INDEX_DTYPE
from pipeline.npy import parse_table


def saved(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def records(num_rows: int) -> np.ndarray:
    index = np.zeros(num_rows, INDEX_DTYPE)
    index["crc32c"], index["shape"][:, 1] = np.arange(num_rows), 7
    return index


@given(num_rows=st.integers(0, 20_000))
def test_tables_are_read_as_numpy_saved_them(num_rows: int) -> None:
    expected = records(num_rows)
    np.testing.assert_array_equal(parse_table(saved(expected), INDEX_DTYPE, num_rows), expected)


def test_header_of_another_numpy_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.lib._format_impl, "GROWTH_AXIS_MAX_DIGITS", 90)
    data = saved(records(5))
    monkeypatch.undo()
    assert len(data) != len(saved(records(5)))
    np.testing.assert_array_equal(parse_table(data, INDEX_DTYPE, 5), records(5))


@pytest.mark.parametrize("num_rows", [4, 6])
def test_another_number_of_rows_is_returned_as_it_is(num_rows: int) -> None:
    assert len(parse_table(saved(records(num_rows)), INDEX_DTYPE, 5)) == num_rows


@pytest.mark.parametrize("cut", [0, 10, 100, 300])
def test_tables_cut_short_are_refused(cut: int) -> None:
    with pytest.raises((ValueError, EOFError)):
        parse_table(saved(records(5))[:cut], INDEX_DTYPE, 5)


@pytest.mark.parametrize("num_rows", [10**10, 10**13, 10**18, 10**30])
def test_headers_that_tell_of_more_than_there_is_are_refused(num_rows: int) -> None:
    header = io.BytesIO()
    facts = {"descr": INDEX_DTYPE.descr, "fortran_order": False, "shape": (num_rows,)}
    np.lib.format.write_array_header_1_0(header, facts)
    with pytest.raises(ValueError, match=r"memory|reading array data|too big|too large"):
        parse_table(header.getvalue() + bytes(100), INDEX_DTYPE, 5)


def test_objects_are_not_unpickled() -> None:
    data = saved(np.array([{"a": 1}] * 5, object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        parse_table(data, INDEX_DTYPE, 5)


def test_known_headers_are_not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11's parser fails at random in threads."""
    data, expected = saved(records(512)), records(512)
    monkeypatch.setattr("ast.literal_eval", None)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: parse_table(data, INDEX_DTYPE, 512), range(40)):
            np.testing.assert_array_equal(found, expected)
