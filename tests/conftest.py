"""What all tests share: one thread per library, and where the real clips are."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Shared machines stall: no example may fail for its time.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Test machines are small and tests start many processes: set before torch and numpy are loaded.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# What a shell runs in the background ignores Ctrl-C, and so would the processes of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"


@pytest.fixture(scope="session")
def shared_clips() -> Path:
    """The folder of real clips beside the repository; tests that need it skip without it."""
    if not SHARED_CLIPS.is_dir():
        pytest.skip(f"no real clips at {SHARED_CLIPS}")
    return SHARED_CLIPS
