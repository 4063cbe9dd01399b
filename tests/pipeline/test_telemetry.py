"""Prometheus metrics of a run, scraped from a real Ray as a Prometheus server would."""

import re
import time
import urllib.request
from collections import Counter

import pytest
import ray

from pipeline.jobs import ShardUpdate
from pipeline.tally import Tally
from pipeline.telemetry import Telemetry
from tests.pipeline.servers import free_ports

DEADLINE_S = 120.0
SAMPLE = re.compile(r"(ray_av_latents_\w+)\{(.*)\} (\S+)")
GAUGES = {"clips_done", "clips_to_do", "shards_to_do", "bytes_in_flight", "cells", "decoders"}
COUNTERS = {"clips", "media_seconds", "decode_seconds", "encode_seconds", "write_seconds", "shards"}


@pytest.fixture(scope="module")
def metrics_port():
    pytest.importorskip("ray.dashboard.modules.reporter.reporter_agent", reason="no ray[default]")
    (port,) = free_ports(1)
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _metrics_export_port=port,
    )
    yield port
    ray.shutdown()


def scraped(port):
    """Return {(name, status): value} of the metrics of the run r1."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in SAMPLE.findall(text):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags["run"] == "r1":
            found[name.removeprefix("ray_av_latents_"), tags.get("status", "")] = float(value)
    return found


def scraped_until(port, is_there):
    """Scrape until the metrics are as expected; Ray exports them every few seconds."""
    deadline, found = time.monotonic() + DEADLINE_S, {}
    while time.monotonic() < deadline:
        try:
            found = scraped(port)
        except OSError:  # the agent is starting
            found = {}
        if is_there(found):
            return found
        time.sleep(0.5)
    pytest.fail(f"after {DEADLINE_S} s there is {found}")


def test_metrics_of_a_run_are_scraped_and_counters_only_grow(metrics_port):
    task, telemetry = ("clips", 0), Telemetry("r1")
    tally = Tally(40, 4, 0.0)
    tally.set_cells(1, 3, 0.0)
    news = {"media_s": 60.0, "decode_s": 5.0, "encode_s": 2.0, "write_s": 0.5}
    counts = Counter(ok=6, missing=2)
    tally.update(ShardUpdate("progress", "n/0", task, counts, bytes_in_flight=10**6, **news), 1.0)
    telemetry.publish(tally)
    tally.take_back(task)  # lost: the second attempt comes to the end
    telemetry.publish(tally)
    tally.update(ShardUpdate("committed", "n/0", task, counts, **news), 2.0)
    telemetry.publish(tally)
    found = scraped_until(metrics_port, lambda found: found.get(("shards_total", "")) == 1)
    names = {name for name, _ in found}
    assert names == GAUGES | {f"{name}_total" for name in COUNTERS}
    assert found["clips_total", "ok"] == 12 and found["clips_total", "missing"] == 4
    assert found["clips_done", ""] == 8 and found["clips_to_do", ""] == 40
    assert found["media_seconds_total", ""] == 120.0 and found["encode_seconds_total", ""] == 4.0
    assert (found["cells", ""], found["decoders", ""]) == (1, 3)
    assert found["bytes_in_flight", ""] == 0


def test_without_ray_nothing_happens(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    telemetry = Telemetry("r2")
    telemetry.publish(Tally(40, 4, 0.0))
    assert not telemetry._counters and not telemetry._gauges
