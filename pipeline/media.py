"""Value types between the stages: a clip of the plan, what a source declares, what was decoded.

Numpy and the standard library only. Second 0 of a clip is the same instant in both modalities.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


class ClipError(Exception):
    """A clip, or one modality of it, can't be encoded, for a reason that has a status.

    Attributes:
        status: one of ``pipeline.format.STATUSES``.
        message: what was found and what was expected.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message


@dataclass(frozen=True)
class Clip:
    """One row of the plan.

    Attributes:
        key: unique name, ``[A-Za-z0-9_-]+``.
        uri: where the media is below the source's root, see ``pipeline.storage``.
        start_s: second of the file at which the clip starts, from its first video frame.
        duration_s: the clip ends here at the latest; files that end earlier give less.
        caption: text, "" where there is none.
        label: class name, "" where there is none.
        split: "train", "test" or another name.
    """

    key: str
    uri: str
    start_s: float
    duration_s: float
    caption: str = ""
    label: str = ""
    split: str = "train"


@dataclass(frozen=True)
class DecodeSettings:
    """What a decoder makes of a clip; a part of the fingerprint of the columns it feeds.

    Attributes:
        fps: frame k is the one being presented at second k / fps.
        sizes: (height, width) in pixels to choose from: the one of the nearest aspect ratio.
        fit: "crop" fills the size and cuts what is over; "pad" shows all, black around it.
        decoder: "pyav", or "decord" where its frames can be trusted.
        sample_rate: PCM rate in Hz.
        channels: 1 averages all channels; 2 keeps stereo, doubles mono, and averages those of
            surround sound on each side with the centre.
    """

    fps: float
    sizes: tuple[tuple[int, int], ...]
    fit: str
    decoder: str
    sample_rate: int
    channels: int


@dataclass(frozen=True)
class Decoded:
    """What a decoder found in one clip.

    Attributes:
        frames: uint8 [T, height, width, 3] RGB, or None (not asked for, or a problem).
        sound: float32 [channels, N] in about [-1, 1], or None.
        problems: modality -> (status, message) for what can't be encoded.
        facts: what was measured on the way, see ``pipeline.checks``.
        seconds: that decoding took.
    """

    frames: np.ndarray | None
    sound: np.ndarray | None
    problems: dict[str, tuple[str, str]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def failed(cls, status: str, message: str) -> Decoded:
        """Return what there is of a clip of which nothing could be decoded."""
        return cls(None, None, {"video": (status, message), "audio": (status, message)})
