"""Tables in numpy's file format, whose known header is compared and not evaluated.

``np.load`` reads headers with ``ast.literal_eval``, which takes longer than all the rest and, up to
Python 3.11, fails at random when several threads do so (github.com/python/cpython/issues/106905).
"""

from __future__ import annotations

import io

import numpy as np


def parse_table(data: bytes, dtype: np.dtype, num_rows: int) -> np.ndarray:
    """Return the array in an .npy file's bytes; read-only where it is ``dtype`` [num_rows].

    Raises:
        ValueError, EOFError: it is no array of plain values, or cut short.
    """
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    facts = {"descr": descr, "fortran_order": False, "shape": (num_rows,)}
    np.lib.format.write_array_header_1_0(header, facts)
    known = header.getvalue()
    if data.startswith(known) and len(data) == len(known) + num_rows * dtype.itemsize:
        return np.frombuffer(data, dtype, offset=len(known))
    # Another array, or the same one as another version of numpy writes it.
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (MemoryError, OverflowError):
        raise ValueError("its header tells of more rows than memory can hold") from None
