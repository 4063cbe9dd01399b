"""A run as Prometheus metrics, through Ray's own: they appear where a cluster's are scraped.

Needs ``ray[default]``, whose agent serves them; without it nothing happens. A Ray that this
program starts serves them at http://127.0.0.1:<metrics_port>/metrics.
"""

from __future__ import annotations

from collections import defaultdict

import ray
from ray.util.metrics import Counter, Gauge

from pipeline.tally import Tally

PREFIX = "av_latents_"  # Ray puts `ray_` before it, and `_total` behind counters


class Telemetry:
    """Publishes the tally of a run.

    Counters go on only: they count what was done, lost attempts too. The gauge ``clips_done``
    is what counts.

    Args:
        run_id: the label ``run`` of every series.
    """

    def __init__(self, run_id: str) -> None:
        self._run = {"run": run_id}
        self._published: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}

    def publish(self, tally: Tally) -> None:
        """Set all metrics; nothing happens while Ray is not there."""
        if not ray.is_initialized():
            return
        spent = tally.spent
        for status, count in spent.statuses.items():
            self._count("clips", "clips encoded or failed, by status", count, status)
        self._count("media_seconds", "seconds of clips encoded or failed", spent.media_s)
        self._count("decode_seconds", "seconds of decoders busy", spent.decode_s)
        self._count("encode_seconds", "seconds of codecs busy", spent.encode_s)
        self._count("write_seconds", "seconds of writing and committing", spent.write_s)
        self._count("attempts_lost", "attempts of shards that came to nothing", tally.num_lost)
        self._count("shards", "shards committed", tally.shards_done)
        self._set("clips_done", "clips in committed shards and those under way", tally.clips_done)
        self._set("clips_to_do", "clips of the run", tally.num_clips)
        self._set("shards_to_do", "shards of the run", tally.num_shards)
        self._set("bytes_in_flight", "decoded frames and sound in cells", tally.bytes_in_flight)
        self._set("cells", "cells alive", tally.num_cells)
        self._set("decoders", "decoders alive, in all cells", tally.num_decoders)

    def _count(self, name: str, text: str, value: float, status: str = "") -> None:
        tags = self._run | ({"status": status} if status else {})
        if name not in self._counters:
            self._counters[name] = Counter(PREFIX + name, text, tag_keys=tuple(tags))
        if (step := value - self._published[name, status]) > 0:
            self._counters[name].inc(step, tags)
            self._published[name, status] = value

    def _set(self, name: str, text: str, value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(PREFIX + name, text, tag_keys=("run",))
        self._gauges[name].set(value, self._run)
