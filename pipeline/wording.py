"""Figures as a person reads them: sizes, times, rates, shares, counts. One way for all commands."""

from __future__ import annotations

UNKNOWN = "–"


def size_text(num_bytes: float) -> str:
    """Return a size as 17 B, 9.5 kB, 2.0 MB or 1.2 TB, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:,.1f} {unit}"


def age_text(seconds: float) -> str:
    """Return an age as 12 s, 5 min, 3.4 h or 12.0 days."""
    if seconds < 60:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"


def duration_text(seconds: float | None) -> str:
    """Return a time as 0:05, 2:03:04 or 3 d 4 h."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate_text(value: float) -> str:
    """Return a rate in three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def share_text(share: float | None, digits: int = 0) -> str:
    """Return a share in percent; None is one that is not known."""
    return UNKNOWN if share is None else f"{share:.{digits}%}"


def counted(number: int, thing: str) -> str:
    """Return how many there are of a thing, such as 1 shard, 2,000 shards."""
    return f"{number:,} {thing}{'s' * (number != 1)}"
