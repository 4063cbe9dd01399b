"""The parts of a transformer block. Knows nothing of video, audio, tasks or diffusion.

A sequence is a row of segments (task token, video, audio), each with its own modulation.
Shapes: B batch, N tokens, G segments, D width, H heads, R head width, S text tokens.
"""

from __future__ import annotations

from math import log

import torch
import torch.nn.functional as F
from torch import nn

from train.model.rope import rotate

Rotary = tuple[torch.Tensor, torch.Tensor]
NORM_EPSILON = 1e-6


class TimestepEmbedder(nn.Module):
    """Diffusion times to vectors: 256 sinusoids in float32, then a two-layer perceptron."""

    num_sinusoids = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(self.num_sinusoids, width)
        self.second = nn.Linear(width, width)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Embed t float32 [...] in [0, 1] to [..., D]."""
        half = torch.arange(self.num_sinusoids // 2, dtype=torch.float32, device=t.device)
        # 1000·t, so that the frequencies of DDPM's 1000 integer steps apply.
        angle = 1000 * t[..., None] * torch.exp(-log(10_000) * half / len(half))
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.second(F.silu(self.first(waves.to(self.first.weight.dtype))))


class SelfAttention(nn.Module):
    """Attention of all tokens to all tokens, without a mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = nn.RMSNorm(width // heads, eps=NORM_EPSILON)
        self.key_norm = nn.RMSNorm(width // heads, eps=NORM_EPSILON)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """x [B, N, D] → [B, N, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = rotate(self.query_norm(q), rotary)  # [B, H, N, R]
        k = rotate(self.key_norm(k), rotary)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of all tokens to the text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.query_norm = nn.RMSNorm(width // heads, eps=NORM_EPSILON)
        self.key_norm = nn.RMSNorm(width // heads, eps=NORM_EPSILON)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x [B, N, D], text [B, S, D], mask bool [B, 1, 1, S] (True attends) → [B, N, D]."""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.query_norm(q), self.key_norm(k)
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.first = nn.Linear(width, int(width * ratio))
        self.second = nn.Linear(int(width * ratio), width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, N, D] → [B, N, D]."""
        return self.second(F.gelu(self.first(x), approximate="tanh"))


def normalise(x: torch.Tensor) -> torch.Tensor:
    """Layer norm without weights over D; what follows it scales and shifts."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPSILON)


# Rows are spread over their segments by broadcasting, not by an index: the gradient is then a
# plain sum (an index's is an atomic add on CUDA, another result in every run), and no [B, N, D]
# copy of each row is kept for it.
def modulate(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """Return x·(1 + scale) + shift; x [B, N, D], rows [B, G, D], ``lengths`` of the segments."""
    pieces = [
        piece * (1 + scale[:, i, None]) + shift[:, i, None]
        for i, piece in enumerate(x.split(lengths, dim=1))
    ]
    return torch.cat(pieces, dim=1)


def gated(x: torch.Tensor, gate: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Return x·gate; x [B, N, D], gate [B, G, D], ``lengths`` of the segments."""
    pieces = [piece * gate[:, i, None] for i, piece in enumerate(x.split(lengths, dim=1))]
    return torch.cat(pieces, dim=1)


class Block(nn.Module):
    """Joint self-attention, attention to the text, feed-forward; AdaLN-single (PixArt-α §2.3).

    ``table`` is what the block adds to the modulation that all blocks share. There is one
    feed-forward for all segments, or with ``split_ffn`` another one for the last segment.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, num_segments: int, split_ffn: bool
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.text_attention = CrossAttention(width, heads)
        self.feed_forwards = nn.ModuleList(
            FeedForward(width, mlp_ratio) for _ in range(2 if split_ffn else 1)
        )
        self.table = nn.Parameter(torch.empty(num_segments, 6, width))

    def forward(
        self,
        x: torch.Tensor,
        modulation: torch.Tensor,
        rotary: Rotary,
        text: torch.Tensor,
        text_mask: torch.Tensor,
        lengths: list[int],
    ) -> torch.Tensor:
        """x [B, N, D], modulation [B, G, 6, D], text [B, S, D] → [B, N, D]."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = (modulation + self.table).unbind(2)
        update = self.attention(modulate(normalise(x), shift, scale, lengths), rotary)
        x = x + gated(update, gate, lengths)
        x = x + self.text_attention(normalise(x), text, text_mask)
        update = self.feed_forward(modulate(normalise(x), shift_ff, scale_ff, lengths), lengths)
        return x + gated(update, gate_ff, lengths)

    def feed_forward(self, x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """x [B, N, D] → [B, N, D]."""
        if len(self.feed_forwards) == 1:
            return self.feed_forwards[0](x)
        pieces = x.split([sum(lengths[:-1]), lengths[-1]], dim=1)
        return torch.cat([ff(y) for ff, y in zip(self.feed_forwards, pieces, strict=True)], dim=1)
