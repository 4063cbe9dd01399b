"""What tests of encoders share: a job, and a pool that decodes in this process, in any order."""

from __future__ import annotations

import queue
import random

from pipeline.config import CheckSettings, EncodeConfig, decode_settings
from pipeline.jobs import Job
from pipeline.pool import Line


def make_job(**given):
    """Return a job for which only what a test is about must be said."""
    defaults = {
        "root": "",
        "facts": "facts@probe-00000000",
        "plan_id": "plan",
        "run_id": "run",
        "columns": {},
        "batch": {},
        "media_root": "",
        "cache_dir": None,
        "cache_bytes": 1_000_000,
        "decode": decode_settings(EncodeConfig()),
        "checks": CheckSettings(),
        "decode_timeout_s": 60.0,
        "fetch_timeout_s": 60.0,
        "encode_timeout_s": 60.0,
        "clips_per_decoder": 1000,
        "window_bytes": 100_000_000,
    }
    return Job(**(defaults | given))


def mailbox_of(*tasks):
    """Return a mailbox with tasks, and the end behind them."""
    mailbox = queue.SimpleQueue()
    for task in (*tasks, None):
        mailbox.put(task)
    return mailbox


class InProcessPool:
    """A pool whose decoders finish in a random order, and now and then none does.

    Attributes:
        given, popped: keys of the clips given to decoders, and back to the encoder.
        log: ("given" or "popped", key), in the order in which it happened.
        most_beyond_window: bytes in flight, at most, when an item that did not fit was given.
    """

    def __init__(self, window_bytes, decode, num_decoders=2, seed=0):
        self.window_bytes, self.decode, self.num_decoders = window_bytes, decode, num_decoders
        self.random = random.Random(seed)
        self.line, self.busy, self.log = Line(window_bytes), [], []
        self.most_beyond_window = 0

    @property
    def bytes_in_flight(self):
        return self.line.bytes_in_flight

    @property
    def given(self):
        return [key for event, key in self.log if event == "given"]

    @property
    def popped(self):
        return [key for event, key in self.log if event == "popped"]

    def submit(self, items):
        self.line.submit(items)
        self._fill(beyond=False)

    def _fill(self, beyond):
        while len(self.busy) < self.num_decoders and self.line.next(beyond):
            before = self.bytes_in_flight
            self.busy.append(item := self.line.give())
            self.log.append(("given", item.clip.key))
            if before < self.bytes_in_flight > self.window_bytes:
                self.most_beyond_window = max(self.most_beyond_window, before)

    def poll(self, timeout_s):
        self._fill(beyond=True)
        while not (found := self.line.pop()):
            if not self.busy or self.random.random() < 0.1:
                return None
            item = self.busy.pop(self.random.randrange(len(self.busy)))
            if self.random.random() < 0.1:  # its decoder was lost
                self.line.give_back([item])
            else:
                self.line.finish(item, self.decode(item.clip, set(item.wanted)))
            self._fill(beyond=True)
        self.log.append(("popped", found[0].clip.key))
        return found

    def release(self, item):
        self.line.release(item)
