"""Temporal crops: the same span of seconds in both modalities, as first latents of each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from train.latents import LatentSpec


def num_starts(
    video: LatentSpec,
    audio: LatentSpec,
    num_latents: Mapping[str, np.ndarray],
    has: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Return at how many latents of video crops may start, int64 [R], at least 1.

    Args:
        video: the crops of video.
        audio: the crops of audio.
        num_latents: "video" and "audio": int64 [R], in the clips.
        has: "video" and "audio": bool [R]; where there is no video, its clock counts still.
    """
    most = np.iinfo(np.int64).max - 1
    in_video = np.where(has["video"], num_latents["video"] - video.shape[0], most)
    # The last start in video that leaves a whole crop of audio; 0.3 s · 10 Hz is 2.9999…
    last = (num_latents["audio"] - audio.shape[0]) / audio.rate_hz * video.rate_hz + 1e-6
    in_audio = np.where(has["audio"], last.astype(np.int64), most)
    starts = np.minimum(in_video, in_audio)
    return np.where(has["video"] | has["audio"], np.maximum(starts, 0), 0) + 1


def audio_start(video: LatentSpec, audio: LatentSpec, video_first: int) -> int:
    """Return the first audio latent of the crop that starts at a latent of video: the nearest."""
    return round(video_first / video.rate_hz * audio.rate_hz)
