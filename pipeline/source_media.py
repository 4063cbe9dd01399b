"""The source media of a data set's clips, decoded again as its columns' were.

For commands that compare latents with what they were made of: preview and verify --reencode.
Decoding runs in a child process with a deadline: media may be damaged by now.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline import format as fmt
from pipeline.child import ChildProcess
from pipeline.config import EncodeConfig
from pipeline.media import Clip, ClipError, Decoded, DecodeSettings
from pipeline.storage import MediaStore

# Of a column's modality that is not there; the highest rate, because a clip needs one frame.
NO_PICTURE = {"fps": 120.0, "sizes": ((16, 16),), "fit": "crop", "decoder": "pyav"}
NO_SOUND = {"sample_rate": 16000, "channels": 1}


@dataclass(frozen=True)
class Wanted:
    """A clip, what to decode of it, and how."""

    clip: Clip
    settings: DecodeSettings
    modalities: frozenset[str]


def decode_settings_of(specs: dict[str, fmt.ColumnSpec]) -> DecodeSettings:
    """Return what the decoders were told when these columns, by modality, were written.

    Raises:
        FormatError: a column does not say.
    """
    known: dict[str, Any] = {}
    for modality, default in (("video", NO_PICTURE), ("audio", NO_SOUND)):
        given = specs[modality].preprocessing if modality in specs else default
        if lacking := default.keys() - given:
            raise fmt.FormatError(
                f"{specs[modality].directory}: column.json does not tell {', '.join(lacking)} of "
                "its preprocessing, expected what pipeline.encode writes; restore it"
            )
        known |= {name: given[name] for name in default}
    known["sizes"] = tuple((height, width) for height, width in known["sizes"])
    return DecodeSettings(**known)


class SourceMedia:
    """Decodes clips of a source; a context manager, which ends the child process.

    Args:
        root: folder or URL of the media; None where the plan does not say.
    """

    def __init__(self, root: str | None) -> None:
        config = EncodeConfig()
        cache_bytes = int(config.cache_gb * 1e9)
        self._store = MediaStore(root, config.cache_dir, cache_bytes) if root else None
        self._decode_s, self._fetch_s = config.decode_timeout_s, config.fetch_timeout_s
        self._child = ChildProcess(_Prepare(self._store), self._decode_s)

    def __enter__(self) -> SourceMedia:
        return self

    def __exit__(self, *exception: object) -> None:
        self._child.__exit__(*exception)

    def decode(self, clip: Clip, settings: DecodeSettings, modalities: set[str]) -> Decoded:
        """Decode one clip; whatever is wrong with it is in the result."""
        if self._store is None:
            return Decoded.failed("missing", "plan.json does not say where the media are")
        if self._store.is_missing(clip.uri):
            return Decoded.failed("missing", f"no file {clip.uri} in {self._store.root}")
        is_copied = self._store.is_copied(clip.uri)
        self._child.timeout_s = self._decode_s + self._fetch_s * is_copied
        try:
            return self._child.call(Wanted(clip, settings, frozenset(modalities)))
        except ClipError as error:
            return Decoded.failed(error.status, error.message)


@dataclass(frozen=True)
class _Prepare:
    """Runs in the child: loads the decoders, returns the function to call."""

    store: MediaStore | None

    def __call__(self) -> Callable[[Wanted], Decoded]:
        from pipeline.decode import decode_clip

        store = self.store
        assert store  # else nothing is called

        def decode(wanted: Wanted) -> Decoded:
            with store.local(wanted.clip.uri) as path:
                return decode_clip(path, wanted.clip, wanted.settings, set(wanted.modalities))

        return decode
