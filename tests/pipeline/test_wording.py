"""Figures are short and have units, whatever their size."""

import pytest

from pipeline.wording import age_text, counted, duration_text, rate_text, share_text, size_text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (10_000, "10.0 kB"),
        (999_700, "1.0 MB"),
        (2_500_000, "2.5 MB"),
        (7.2e15, "7,200.0 TB"),
    ],
)
def test_sizes_have_the_unit_that_fits(num_bytes, text):
    assert size_text(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (12.3, "12 s"), (300, "5 min"), (9000, "2.5 h"), (86400 * 12, "12.0 days")],
)
def test_ages_have_the_unit_that_fits(seconds, text):
    assert age_text(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "unknown"), (4.6, "0:05"), (3723, "1:02:03"), (86400 * 3 + 3600 * 4, "3 d 4 h")],
)
def test_durations_are_short(seconds, text):
    assert duration_text(seconds) == text


def test_counts_rates_and_shares():
    assert [counted(n, "shard") for n in (0, 1, 2000)] == ["0 shards", "1 shard", "2,000 shards"]
    assert [rate_text(rate) for rate in (0.4567, 1234.5)] == ["0.457", "1,234"]
    assert [share_text(s, 1) for s in (0.456, None)] == ["45.6%", "–"]
