"""Many small waits at once: requests, and files that are opened and closed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

NUM_THREADS = 8
REPORT_EVERY = 1000

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], what: str
) -> list[Result]:
    """Return the function's results in the order of the items; progress of many on stderr."""
    results = []
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        try:
            for result in pool.map(function, items):
                results.append(result)
                if len(results) % REPORT_EVERY == 0:
                    sys.stderr.write(f"{len(results)} of {len(items)} {what} read\n")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results
