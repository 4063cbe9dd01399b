"""The loader: an endless stream of micro-batches that can be continued at any layout of ranks.

The stream is one sequence of global batches, cut from the epoch orders; ranks and micro-batches
only divide it up. So its state is one integer, the samples consumed. Threads read ahead from the
tars into the batches' own memory; there are no worker processes and nothing is parsed.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from train.data.order import epoch_batches, steps_per_epoch
from train.data.payload import PayloadReader
from train.data.view import View
from train.errors import ResumeError
from train.latents import LatentBatch, LatentSpec
from train.rng import uniform

log = logging.getLogger(__name__)

# Captions kept in memory: all of VGGSound's (310), and 0.7 GB at most with T5-XXL (40 tokens each).
CACHED_CAPTIONS = 2048
TEXT_MULTIPLE = 4  # text lengths are rounded up to this, for fewer shapes to compile and plan for


class LatentLoader:
    """Yields this rank's micro-batches for ever, epoch after epoch; an iterator.

    Micro-batch m of rank r holds the samples [(m·R + r)·B, (m·R + r + 1)·B) of the stream, with R
    ranks of micro-batch B: over all ranks and accumulation steps they are the global batch.
    A batch stays valid as long as it, or a tensor over its memory, is referenced; the memory is
    used again afterwards. Call ``close`` (or use ``with``) to end the threads.

    Args:
        view: the clips.
        seed: seed of the run: keys order and crops.
        global_batch: samples per optimiser step over all ranks.
        micro_batch: samples per batch; ``TrainConfig.accumulation`` has checked that it divides
            ``global_batch`` / ``num_ranks``.
        rank: this rank.
        num_ranks: all ranks.
        device: where batches go; on a GPU by way of pinned memory.
    """

    def __init__(
        self,
        view: View,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        num_ranks: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(view.num_clips, global_batch)
        if view.num_clips < global_batch:
            log.warning(
                "%d clips are fewer than the global batch of %d: every step repeats them",
                view.num_clips,
                global_batch,
            )
        self._view, self._seed, self._global_batch = view, seed, global_batch
        self._micro_batch, self._rank, self._num_ranks = micro_batch, rank, num_ranks
        self._accumulation = global_batch // (micro_batch * num_ranks)
        self._device = torch.device(device)
        config = view.config
        # Two windows are open while reading passes from one to the next.
        max_open = 2 * config.window_shards
        self._readers = {
            name: PayloadReader(column, max_open, config.verify_crc)
            for name, column in view.opened.items()
        }
        self._caption = lru_cache(CACHED_CAPTIONS)(self._read_caption)
        self._batches = lru_cache(2)(self._epoch_batches)
        self._memory = BatchMemory(is_pinned=self._device.type == "cuda")
        self._pool = ThreadPoolExecutor(config.read_threads, thread_name_prefix="loader")
        self._pending: deque[Future[LatentBatch]] = deque()
        self._num_yielded = 0  # micro-batches of this rank, from the start of the stream

    def __enter__(self) -> LatentLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and close the tars."""
        self._forget_pending()
        self._pool.shutdown()
        for reader in self._readers.values():
            reader.close()

    def __iter__(self) -> Iterator[LatentBatch]:
        return self

    def __next__(self) -> LatentBatch:
        """Return the next micro-batch.

        Raises:
            FormatError: a row can't be read, or its checksum is wrong; again at every call.
        """
        while len(self._pending) < self._view.config.prefetch_steps:
            self._submit(self._num_yielded + len(self._pending))
        batch = self._pending[0].result()
        self._pending.popleft()
        self._num_yielded += 1
        return batch if self._device.type == "cpu" else to_device(batch, self._device)

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream is, after the last global batch that was yielded whole."""
        steps = self._num_yielded // self._accumulation
        return {"samples_consumed": steps * self._global_batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the stream of a saved state, whatever ranks and micro-batches it had.

        Raises:
            ResumeError: the state is of another stream; names what differs.
        """
        for name, expected in self._identity().items():
            if state.get(name) != expected:
                raise ResumeError(
                    f"the saved stream of samples has {name} {state.get(name)!r}, this run has "
                    f"{expected!r}; restore the setting, or start in another run_dir"
                )
        samples = state.get("samples_consumed")
        if not isinstance(samples, int) or samples < 0 or samples % self._global_batch:
            raise ResumeError(
                f"samples_consumed is {samples!r}, expected a multiple of the global batch "
                f"{self._global_batch}; the saved state is damaged: use an older checkpoint"
            )
        self._forget_pending()
        self._num_yielded = samples // self._global_batch * self._accumulation

    def position(self) -> str:
        """Return where the stream is, for people: epoch, sample within it and the next keys."""
        epoch, step = divmod(self._num_yielded // self._accumulation, self.steps_per_epoch)
        size = self._global_batch
        first = self._batches(epoch)[step][:3]
        keys = ", ".join(self._view.clips.keys[clip] for clip in first)
        return f"epoch {epoch}, sample {step * size} of {self.steps_per_epoch * size}; next {keys}"

    def _identity(self) -> dict[str, Any]:
        return {
            "view_id": self._view.view_id,
            "plan_id": self._view.plan_id,
            "seed": self._seed,
            "global_batch": self._global_batch,
        }

    def _forget_pending(self) -> None:
        for future in self._pending:
            future.cancel()
        self._pending.clear()

    def _epoch_batches(self, epoch: int) -> np.ndarray:
        view, window = self._view, self._view.config.window_shards
        return epoch_batches(view.rows_per_shard, self._global_batch, window, self._seed, epoch)

    def _submit(self, number: int) -> None:
        """Start reading this rank's micro-batch ``number``."""
        step, micro_step = divmod(number, self._accumulation)
        first = (micro_step * self._num_ranks + self._rank) * self._micro_batch
        epoch, position = divmod(step, self.steps_per_epoch)
        clips = self._batches(epoch)[position][first : first + self._micro_batch]
        samples = step * self._global_batch + first + np.arange(self._micro_batch)
        self._pending.append(self._pool.submit(self._read, clips, samples))

    def _read(self, clips: np.ndarray, samples: np.ndarray) -> LatentBatch:
        """Read one micro-batch; runs in a thread."""
        view, size = self._view, len(clips)
        video = self._memory.take((size, *view.video.shape))
        audio = self._memory.take((size, *view.audio.shape))
        video_array, audio_array = video.numpy(), audio.numpy()
        audio_start_s = torch.zeros(size)
        for place, (clip, sample) in enumerate(zip(clips.tolist(), samples.tolist(), strict=True)):
            video_first, audio_first = self._crop(clip, sample)
            self._read_span("video", clip, video_first, video_array[place])
            self._read_span("audio", clip, audio_first, audio_array[place])
            video_s = video_first / view.video.rate_hz
            audio_start_s[place] = audio_first / view.audio.rate_hz - video_s
        text, text_mask = self._pad([self._caption(int(view.clips.text_rows[c])) for c in clips])
        return LatentBatch(
            samples=torch.from_numpy(samples),
            keys=tuple(view.clips.keys[clip] for clip in clips),
            video=video,
            audio=audio,
            video_start_s=torch.zeros(size),
            audio_start_s=audio_start_s,
            text=text,
            text_mask=text_mask,
        )

    def _read_span(self, name: str, clip: int, first: int, out: np.ndarray) -> None:
        clips = self._view.clips
        place = (int(clips.shards[clip]), int(clips.rows[clip]), clips.keys[clip])
        self._readers[name].read_span(*place, self._view.index[name][clip], first, out)

    def _crop(self, clip: int, sample: int) -> tuple[int, int]:
        """Return the first video and audio latent of a sample's crop."""
        view = self._view
        if not all(view.opened[name].spec.croppable for name in ("video", "audio")):
            return 0, 0
        video_length, audio_length = (
            int(view.index[name]["shape"][clip, 0]) for name in ("video", "audio")
        )
        draw = uniform(self._seed, "crop", sample)
        return crop_starts(view.video, view.audio, video_length, audio_length, draw)

    def _read_caption(self, row: int) -> np.ndarray:
        record = self._view.index["text"][row]
        return self._readers["text"].read_row(*self._view.text_place(row), f"caption {row}", record)

    def _pad(self, captions: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return captions side by side, float16 [B, S, D], and which tokens are real, [B, S]."""
        longest = max(len(caption) for caption in captions)
        length = -(-longest // TEXT_MULTIPLE) * TEXT_MULTIPLE
        text = self._memory.take((len(captions), length, self._view.text_width)).zero_()
        mask = torch.zeros(len(captions), length, dtype=torch.bool)
        for place, caption in enumerate(captions):
            text[place, : len(caption)] = torch.from_numpy(caption)
            mask[place, : len(caption)] = True
        return text, mask


class BatchMemory:
    """Float16 tensors whose memory is used again once nothing refers to it any more.

    Filling fresh memory costs more in page faults than the copy from the page cache does.
    """

    def __init__(self, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._free: dict[int, deque[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return an uninitialised CPU tensor; threads may call this at the same time."""
        if self._is_pinned:  # torch keeps freed pinned memory, and waits for copies out of it
            return torch.empty(shape, dtype=torch.float16, pin_memory=True)
        num_values = math.prod(shape)
        free = self._free.setdefault(num_values, deque())
        try:
            block = free.pop()
        except IndexError:
            block = np.empty(num_values, dtype=np.float16)
        # All tensors over the block hold this array, so it dies with the last of them.
        lent = block.view()
        weakref.finalize(lent, free.append, block)
        return torch.from_numpy(lent).view(shape)


def crop_starts(
    video: LatentSpec, audio: LatentSpec, video_length: int, audio_length: int, draw: float
) -> tuple[int, int]:
    """Return the first latents of a crop: any in video, the nearest in time in audio.

    Args:
        video: the crops of video.
        audio: the crops of audio.
        video_length: video latents in the clip.
        audio_length: audio latents in the clip.
        draw: number in (0, 1) that chooses the start.
    """
    video_last = video_length - video.shape[0]
    audio_last = audio_length - audio.shape[0]
    # The last start in video that leaves a whole crop of audio.
    within_audio = int(audio_last / audio.rate_hz * video.rate_hz + 1e-6)
    video_first = int(draw * (min(video_last, within_audio) + 1))
    audio_first = round(video_first / video.rate_hz * audio.rate_hz)
    return video_first, min(audio_first, audio_last)


def to_device(batch: LatentBatch, device: torch.device) -> LatentBatch:
    """Copy a batch to a GPU; the big tensors, which are pinned, without waiting.

    ``samples`` stays: it seeds generators on the host, and reading it back would wait for the GPU.
    """
    tensors = {
        name: value.to(device, non_blocking=value.is_pinned())
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor) and name != "samples"
    }
    return LatentBatch(keys=batch.keys, samples=batch.samples, **tensors)
