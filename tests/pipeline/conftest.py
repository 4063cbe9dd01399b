"""What the tests of decoding share: rendered films."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline import films
from tests.pipeline.films import Film


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    """Render a film once for all tests: film -> its file."""
    folder, known = tmp_path_factory.mktemp("films"), {}

    def render(film: Film) -> Path:
        key = repr(film)
        if key not in known:
            known[key] = folder / f"{len(known)}.{film.suffix}"
            films.record(known[key], film.picture, film.sound, film.options)
        return known[key]

    return render
