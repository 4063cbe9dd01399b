"""A micro-batch on its way from rows to tensors: memory that threads fill, then a `LatentBatch`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from train.data.batch_memory import BatchMemory
from train.data.classes import CLIP_MODALITIES
from train.data.posterior import sample_posterior
from train.data.stream import GlobalBatch
from train.data.view import View
from train.latents import LatentBatch, LatentSpec

TEXT_MULTIPLE = 4  # text lengths are rounded up to this, for fewer shapes to compile and plan for


class Draft:
    """A micro-batch while it is read: B samples, of which threads fill some each.

    Args:
        batch: the global batch.
        first: place in it of the first sample.
        size: B.
        allocate: gives by modality uninitialised float16 [B, …], as latents are stored.
        assemble: makes the batch, once all is known of its samples but what the latents are.

    Attributes:
        latents: by modality, what ``allocate`` gave.
        made: what ``assemble`` gave.
        rows_of: by modality, the B rows of ``latents`` as bytes.
        latent_bytes: by modality, bytes of one latent.
        has: by modality, bool [B].
        audio_start_s: float32 [B].
        keys: B keys.
        captions: B captions, float16 [S, D] each.
    """

    latents: dict[str, torch.Tensor]
    made: LatentBatch

    def __init__(
        self,
        batch: GlobalBatch,
        first: int,
        size: int,
        allocate: Callable[[], dict[str, torch.Tensor]],
        assemble: Callable[[Draft], LatentBatch],
    ) -> None:
        self.batch, self.first, self.size = batch, first, size
        self.rows_of: dict[str, list[np.ndarray]] = {}
        self.latent_bytes: dict[str, int] = {}
        self.has = {name: np.ones(size, np.bool_) for name in CLIP_MODALITIES}
        self.audio_start_s = np.zeros(size, np.float32)
        self.keys = [""] * size
        self.captions: list[np.ndarray] = [np.empty((0, 0), np.float16)] * size
        self._allocate, self._assemble = allocate, assemble
        self._error: BaseException | None = None
        self._num_unknown = self._num_unread = size
        self._lock = threading.Lock()
        self._is_read = threading.Event()

    def open(self) -> None:
        """Get the memory, unless another thread has.

        Not before reading begins: until then, the caller may let go of a batch, whose memory is
        used again while the CPU's cache still holds it.
        """
        with self._lock:
            if self.rows_of:
                return
            self.latents = self._allocate()
            for name, tensor in self.latents.items():
                rows = tensor.numpy().reshape(self.size, -1).view(np.uint8)
                self.latent_bytes[name] = rows.shape[1] // tensor.shape[1]
                self.rows_of[name] = list(rows)

    def clear(self, place: int) -> None:
        """Forget what was noted of a sample."""
        self.audio_start_s[place] = 0
        for has in self.has.values():
            has[place] = True

    def note_known(self, num_samples: int) -> None:
        """Note that all is known of some samples; of the last ones, make the batch."""
        with self._lock:
            self._num_unknown -= num_samples
            is_known = not self._num_unknown
        if is_known:
            self.made = self._assemble(self)

    def note_read(self, num_samples: int, error: BaseException | None) -> None:
        """Note that some samples are filled, or why they are not."""
        with self._lock:
            self._num_unread -= num_samples
            self._error = self._error or error
            is_read = not self._num_unread
        if is_read:
            self._is_read.set()

    def give_up(self, error: BaseException) -> None:
        """Have whoever waits get an error, unless all is read."""
        with self._lock:
            if self._num_unread:
                self._error = self._error or error
        self._is_read.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all samples are filled; return whether they are.

        Raises:
            Exception: what reading raised, at every call.
        """
        is_read = self._is_read.wait(timeout_s)
        if is_read and self._error is not None:
            raise self._error
        return is_read


class Drafting:
    """Makes drafts for a view, and batches of them.

    Args:
        view: the view.
        seed: seed of the run: keys what is drawn from posteriors.
        device: where batches go; on a GPU by way of pinned memory.
    """

    def __init__(self, view: View, seed: int, device: torch.device) -> None:
        if device.type == "cuda" and device.index is None:  # of this thread, not of those that read
            device = torch.device("cuda", torch.cuda.current_device())
        self._view, self._seed, self._device = view, seed, device
        self._text_width = view.text_width
        self._memory = BatchMemory(device)
        self._is_moments = {
            name: view.parts[0].opened[name].spec.stores_moments for name in CLIP_MODALITIES
        }

    def begin(self, batch: GlobalBatch, first: int, size: int) -> Draft:
        """Return a micro-batch to be filled: the samples [first, first + size) of a global one."""
        allocate = partial(self._allocate, batch.bucket, size)
        return Draft(batch, first, size, allocate, self._assemble)

    def finish(self, draft: Draft) -> LatentBatch:
        """Return a draft that was read as a batch on the device."""
        batch = draft.made
        if self._device.type != "cpu":
            batch = to_device(batch, self._device)
        if any(self._is_moments.values()):
            batch = self._sampled(batch)
        return batch

    def _assemble(self, draft: Draft) -> LatentBatch:
        text, text_mask = self._pad(draft.captions)
        first_sample = draft.batch.first_sample + draft.first
        # By numpy: to call one of torch's operations takes ten times as long as these small ones.
        return LatentBatch(
            samples=torch.from_numpy(np.arange(first_sample, first_sample + draft.size)),
            keys=tuple(draft.keys),
            bucket=draft.batch.bucket,
            video=draft.latents["video"],
            audio=draft.latents["audio"],
            has_video=torch.from_numpy(draft.has["video"]),
            has_audio=torch.from_numpy(draft.has["audio"]),
            video_start_s=torch.from_numpy(np.zeros(draft.size, np.float32)),
            audio_start_s=torch.from_numpy(draft.audio_start_s),
            text=text,
            text_mask=text_mask,
        )

    def _allocate(self, bucket: int, size: int) -> dict[str, torch.Tensor]:
        specs = (self._view.buckets[bucket].video, self._view.buckets[bucket].audio)
        take = self._memory.take
        return {spec.modality: take((size, *self._stored_shape(spec))) for spec in specs}

    def _stored_shape(self, spec: LatentSpec) -> tuple[int, ...]:
        """Return the shape of a crop in the tar: moments have twice the channels."""
        shape = list(spec.shape)
        if self._is_moments[spec.modality]:
            shape[spec.channel_axis] *= 2
        return tuple(shape)

    def _pad(self, captions: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return captions side by side, float16 [B, S, D], and which tokens are real, [B, S]."""
        lengths = [len(caption) for caption in captions]
        longest = -(-max(lengths) // TEXT_MULTIPLE) * TEXT_MULTIPLE
        text = self._memory.take((len(captions), longest, self._text_width))
        padded = text.numpy()
        padded[:, min(lengths) :] = 0
        for place, caption in enumerate(captions):
            padded[place, : lengths[place]] = caption
        return text, torch.from_numpy(np.arange(longest) < np.array(lengths)[:, None])

    def _sampled(self, batch: LatentBatch) -> LatentBatch:
        """Draw latents from the posteriors of what is stored as moments."""
        bucket, drawn = self._view.buckets[batch.bucket], {}
        for spec, has in ((bucket.video, batch.has_video), (bucket.audio, batch.has_audio)):
            name = spec.modality
            if self._is_moments[name]:
                moments = getattr(batch, name)
                latents = sample_posterior(
                    moments, spec.channel_axis, name, self._seed, batch.samples
                )
                is_there = has.view(-1, *[1] * (latents.dim() - 1))
                drawn[name] = torch.where(is_there, latents, 0)
        return replace(batch, **drawn)


def to_device(batch: LatentBatch, device: torch.device) -> LatentBatch:
    """Copy a batch to a GPU without waiting: a copy from pageable memory would wait for the stream.

    ``samples`` stays: it seeds generators on the host, and reading it back would wait for the GPU.
    """
    tensors = {
        name: value.pin_memory().to(device, non_blocking=True)
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor) and name != "samples"
    }
    return replace(batch, **tensors)
