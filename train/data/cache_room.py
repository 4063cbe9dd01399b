"""How much the node's cache has to hold of remote shards, told before it is full of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from pipeline.settings import ConfigError
from train.data.part import ShardRows
from train.data.tar_bytes import TarFacts
from train.data.view import View


class CacheRoom:
    """Adds up the copies that are open at once: of two windows of shards, or more; safe in threads.

    Args:
        view: the view.
        cache_bytes: what the cache holds.
        num_ahead: shards of one data set that are open at once.
    """

    def __init__(self, view: View, cache_bytes: int, num_ahead: int) -> None:
        self._view, self._cache_bytes, self._num_ahead = view, cache_bytes, num_ahead
        # Of the shards so far, by data set: the largest one, the most captions for one, and the
        # sizes of the tars of captions, which shards may share.
        self._largest: dict[int, int] = {}
        self._most_text: dict[int, int] = {}
        self._texts: dict[int, dict[TarFacts, int]] = {}
        self._lock = threading.Lock()

    def check(self, part: int, rows: ShardRows, texts: Sequence[TarFacts]) -> None:
        """Note what a shard of a remote data set needs.

        Raises:
            ConfigError: it is too much for the cache; tells what that should hold.
        """
        nbytes, text_bytes = sum(rows.tar_bytes.values()), sum(text.nbytes for text in texts)
        with self._lock:
            self._largest[part] = max(nbytes, self._largest.get(part, 0))
            self._most_text[part] = max(text_bytes, self._most_text.get(part, 0))
            self._texts.setdefault(part, {}).update({text: text.nbytes for text in texts})
            needed = sum(map(self._needed_by, self._largest))
        if needed > self._cache_bytes:
            config = self._view.config
            raise ConfigError(
                f"data.cache_gb={config.cache_gb:g} can't hold the remote shards that are open at "
                f"once: two windows of data.window_shards={config.window_shards}, or what a global "
                f"batch needs, here {self._num_ahead} shards of {nbytes / 1e9:.3g} GB; set "
                f"data.cache_gb to {needed * 1.1 / 1e9:.3g} or more, or lower data.window_shards"
            )

    def _needed_by(self, part: int) -> int:
        num_open = min(self._num_ahead, len(self._view.parts[part].counts))
        text = min(num_open * self._most_text[part], sum(self._texts[part].values()))
        return num_open * self._largest[part] + text
