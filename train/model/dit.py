"""One diffusion transformer over video and audio (UniForm's layout, arXiv 2502.03897).

    [task token | video tokens | audio tokens] → blocks → velocity of both

What is given and what is generated reaches the model as data only: two diffusion times (0 for
a clean modality) and a task number. ``forward`` never branches on their values, because ranks
that run different graphs hang or crash ZeRO, and calls no submodule twice, because DeepSpeed has
got the gradients of such modules wrong (DeepSpeed #8224).

Shapes: B batch, N tokens, D width, S text tokens, P values per token, T frames, L sound frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.settings import STRICT
from train.latents import LatentSpec
from train.model.layers import Block, TimestepEmbedder, modulate, normalise
from train.model.rope import CENTRE, coordinates, rotary_table
from train.model.tokens import Patching, patchify, patching_of, unpatchify

NUM_SEGMENTS = 3  # task, video, audio


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The transformer's size. The defaults are the preset ``tiny``.

    Attributes:
        width: channels of a token.
        depth: blocks.
        heads: attention heads; each must be a multiple of 8 wide.
        mlp_ratio: width of the feed-forward's middle over ``width``.
        video_patch: latent frames, rows and columns per token; 0 takes the whole axis.
        audio_patch: latent frames and frequency bins per token; 0 takes the whole axis.
        modality_ffn: a feed-forward of its own for audio.
        checkpoint_activations: compute each block again in backward, to save memory.
    """

    width: PositiveInt = 192
    depth: PositiveInt = 4
    heads: PositiveInt = 4
    mlp_ratio: PositiveFloat = 4.0
    video_patch: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] = (2, 4, 4)
    audio_patch: tuple[NonNegativeInt, NonNegativeInt] = (1, 0)
    modality_ffn: bool = False
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        if self.width % (8 * self.heads):
            raise ValueError(
                f"width {self.width} over {self.heads} heads: a head must be a multiple of 8 wide"
            )

    @property
    def time_patches(self) -> dict[str, int]:
        """What the number of latents in a crop must divide by, per modality."""
        return {"video": self.video_patch[0] or 1, "audio": self.audio_patch[0] or 1}


def patchings_of(
    config: ModelConfig, video: LatentSpec, audio: LatentSpec
) -> tuple[Patching, Patching]:
    """Return how a model cuts video and audio into tokens; a patch of 0 is the whole axis here.

    Raises:
        ValueError: as ``patching_of``.
    """
    return patching_of(video, config.video_patch), patching_of(audio, config.audio_patch)


def num_tokens(
    patchings: tuple[Patching, Patching], shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> int:
    """Return the tokens of one sample of these shapes of video and audio, the task's too.

    Raises:
        ValueError: the latents don't divide into patches; names the axis.
    """
    return 1 + sum(p.num_tokens(shape) for p, shape in zip(patchings, shapes, strict=True))


class DiT(nn.Module):
    """The velocity of video and audio latents, given their noisy values, times, task and text.

    Weights come from torch's global generator: seed it first, alike on all ranks.

    Args:
        config: size.
        video: video latents; ``shape`` must divide into patches. Other shapes that do may be
            passed to ``forward``, step by step; a patch size of 0 is that of this shape.
        audio: audio latents, the same.
        text_width: width of the text vectors.
        num_tasks: number of tasks.

    Raises:
        ValueError: the latents don't divide into patches; names the axis.
    """

    def __init__(
        self,
        config: ModelConfig,
        video: LatentSpec,
        audio: LatentSpec,
        text_width: int,
        num_tasks: int,
    ) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.specs = (video, audio)
        self.patchings = patchings_of(config, video, audio)
        num_tokens(self.patchings, (video.shape, audio.shape))  # raises where they don't divide

        values = [patching.num_values for patching in self.patchings]
        self.embed = nn.ModuleList(nn.Linear(size, width) for size in values)
        self.text_in = nn.Linear(text_width, width)
        self.text_out = nn.Linear(width, width)
        self.task_embedding = nn.Embedding(num_tasks, width)
        self.segment_embedding = nn.Parameter(torch.empty(NUM_SEGMENTS, width))
        self.timestep = TimestepEmbedder(width)
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, NUM_SEGMENTS, config.modality_ffn)
            for _ in range(config.depth)
        )
        self.final_modulation = nn.Linear(width, 2 * width)
        self.outputs = nn.ModuleList(nn.Linear(width, size) for size in values)
        self.skips = nn.ModuleList(nn.Linear(width, size) for size in values)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every weight; the model answers zero and every block is the identity.

        linear layers       Xavier uniform, zero bias
        embeddings, t       normal, std 0.02
        modulation, tables  zero: gates closed
        text attention out  zero
        outputs, skips      zero
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        for weight in (self.task_embedding.weight, self.segment_embedding):
            nn.init.normal_(weight, std=0.02)
        for layer in (self.timestep.first, self.timestep.second):
            nn.init.normal_(layer.weight, std=0.02)
        closed = (self.modulation, self.final_modulation)
        for layers in (closed, self.outputs, self.skips):
            for layer in layers:
                assert isinstance(layer, nn.Linear)
                nn.init.zeros_(layer.weight)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.table)
            nn.init.zeros_(block.text_attention.out.weight)

    @property
    def num_parameters(self) -> int:
        """Weights of the model; count them before ZeRO-3 partitions them."""
        return sum(weight.numel() for weight in self.parameters())

    def forward(
        self,
        video: torch.Tensor,
        audio: torch.Tensor,
        t_video: torch.Tensor,
        t_audio: torch.Tensor,
        task: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor,
        video_start_s: torch.Tensor,
        audio_start_s: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the velocities of video and audio, float32, shaped as they came.

        Inputs are cast to the dtype of the weights here; times and positions stay float32.

        Args:
            video: [B, T, C, H, W], standardised and noised (axes of its spec behind B).
            audio: [B, L, F, C] or [B, L, C], the same.
            t_video: [B] in [0, 1]; 0 is clean, 1 is noise.
            t_audio: [B], the same.
            task: int64 [B].
            text: [B, S, text_width].
            text_mask: bool [B, S], True on real tokens, of which each sample has one or more.
            video_start_s: [B], added to the times of the video latents.
            audio_start_s: [B], the same for audio.

        Raises:
            ValueError: the latents don't divide into patches; names the axis.
        """
        dtype = self.text_in.weight.dtype
        latents = (video, audio)
        tokens = [
            patchify(x.to(dtype), patching)  # [B, N, P]
            for x, patching in zip(latents, self.patchings, strict=True)
        ]
        rotary = self.rotary(latents, video_start_s, audio_start_s)
        task_vector = self.task_embedding(task)
        condition = self.condition(t_video, t_audio, task_vector)
        modulation = self.modulation(F.silu(condition)).unflatten(-1, (6, -1))  # [B, 3, 6, D]
        # Without weights or bias the norm makes any text encoder's scale the same.
        text = F.rms_norm(text.float(), text.shape[-1:]).to(dtype)
        text = self.text_out(F.gelu(self.text_in(text), approximate="tanh"))
        mask = text_mask[:, None, None, :]

        embedded = [embed(x) for embed, x in zip(self.embed, tokens, strict=True)]
        x = torch.cat([task_vector[:, None], *embedded], dim=1)  # [B, N, D]
        lengths = [1, *(y.shape[1] for y in tokens)]
        for block in self.blocks:
            inputs = (x, modulation, rotary, text, mask, lengths)
            if self.config.checkpoint_activations:
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        return self.velocities(x, condition, tokens, latents)

    def condition(
        self, t_video: torch.Tensor, t_audio: torch.Tensor, task_vector: torch.Tensor
    ) -> torch.Tensor:
        """Return what steers each segment, [B, 3, D]: its time, the task, which segment it is."""
        t = torch.stack([torch.zeros_like(t_video), t_video, t_audio], dim=1).float()
        return self.timestep(t) + task_vector[:, None] + self.segment_embedding

    def rotary(
        self,
        latents: tuple[torch.Tensor, torch.Tensor],
        video_start_s: torch.Tensor,
        audio_start_s: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rotary table of the whole sequence, two of float32 [B, 1, N, R/2].

        The task token stands where the video starts, in the centre of the frame.
        """
        device = video_start_s.device
        places = [torch.tensor([[0.0, CENTRE, CENTRE]], device=device)]
        for x, spec, patching in zip(latents, self.specs, self.patchings, strict=True):
            places.append(coordinates(patching, spec, tuple(x.shape[1:]), device))
        shifted = [
            place + F.pad(start.float()[:, None, None], (0, 2))  # seconds move, places do not
            for place, start in zip(
                places, (video_start_s, video_start_s, audio_start_s), strict=True
            )
        ]
        return rotary_table(torch.cat(shifted, dim=1), self.config.width // self.config.heads)

    def velocities(
        self,
        x: torch.Tensor,
        condition: torch.Tensor,
        tokens: list[torch.Tensor],
        latents: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both velocities from the last block's x [B, N, D].

        A token's noise has P degrees of freedom, of which the output layer answers at most D. The
        skip, one factor per value of the noisy token, carries the rest: tiny
        has 512 values a video token on a width of 192.
        """
        lengths = [1, *(y.shape[1] for y in tokens)]
        shift, scale = self.final_modulation(F.silu(condition)).chunk(2, dim=-1)
        pieces = modulate(normalise(x), shift, scale, lengths).split(lengths, dim=1)[1:]
        answers = [
            (output(piece) + skip(condition[:, i, None]) * noisy).float()
            for i, (output, skip, piece, noisy) in enumerate(
                zip(self.outputs, self.skips, pieces, tokens, strict=True), start=1
            )
        ]
        video, audio = (
            unpatchify(answer, patching, tuple(y.shape[1:]))
            for answer, patching, y in zip(answers, self.patchings, latents, strict=True)
        )
        return video, audio
