import torch

from train.latents import LatentSpec
from train.model.rope import coordinates, rotary_table, rotate
from train.model.tokens import patching_of

CPU = torch.device("cpu")


def places(spec, patch):
    return coordinates(patching_of(spec, patch), spec, spec.shape, CPU)


def video(rate_hz, frames, offset_s=0.0):
    axes = ("time", "channel", "height", "width")
    return LatentSpec("video", axes, (frames, 2, 4, 4), rate_hz, offset_s, (0.0,), (1.0,))


def audio(rate_hz, frames, offset_s=0.0):
    axes = ("time", "frequency", "channel")
    return LatentSpec("audio", axes, (frames, 16, 2), rate_hz, offset_s, (0.0,), (1.0,))


def test_time_is_the_middle_of_the_patch_in_seconds_for_both_modalities():
    # Latents of 1/8 s in pairs, and of 1/4 s alone: both cover the same quarters of a second.
    pairs = places(video(8.0, 8, offset_s=1 / 16), (2, 4, 4))[:, 0]
    single = places(audio(4.0, 4, offset_s=1 / 8), (1, 0))[:, 0]
    torch.testing.assert_close(pairs, single)
    torch.testing.assert_close(single, torch.tensor([0.125, 0.375, 0.625, 0.875]))


def test_rows_and_columns_are_fractions_of_the_frame():
    middles = torch.tensor([[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]])
    torch.testing.assert_close(places(video(8.0, 2), (2, 2, 2))[:, 1:], middles)


def test_audio_stands_at_the_centre_unless_cut_along_frequency():
    assert (places(audio(25.0, 5), (1, 0))[:, 1:] == 0.5).all()
    bands = places(audio(25.0, 1), (1, 8))
    torch.testing.assert_close(bands[:, 1:], torch.tensor([[0.25, 0.5], [0.75, 0.5]]))


def test_order_of_coordinates_follows_the_order_of_tokens():
    axes = ("time", "frequency", "channel")
    swapped = LatentSpec(
        "audio", ("time", "channel", "frequency"), (3, 2, 16), 25, 0, (0.0,), (1.0,)
    )
    plain = LatentSpec("audio", axes, (3, 16, 2), 25, 0, (0.0,), (1.0,))
    assert torch.equal(places(swapped, (1, 4)), places(plain, (1, 4)))


def test_scores_depend_on_differences_of_position_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 3, 6, 48)
    where = torch.rand(1, 6, 3) * torch.tensor([10.0, 1.0, 1.0])

    def scores(positions):
        table = rotary_table(positions, 48)
        return rotate(q, table) @ rotate(k, table).transpose(-1, -2)

    moved = where + torch.tensor([3.7, 0.2, -0.1])
    torch.testing.assert_close(scores(where), scores(moved), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(scores(where), q @ k.transpose(-1, -2), atol=0.1)


def test_neighbours_at_25_hz_and_both_ends_of_a_clip_are_told_apart():
    steps = torch.arange(251) / 25
    positions = torch.stack([steps, *[torch.full_like(steps, 0.5)] * 2], dim=-1)[None]
    cos, sin = (part[0, 0] for part in rotary_table(positions, 48))
    similarity = (cos @ cos[0] + sin @ sin[0]) / cos.shape[1]  # 1 where the rotation is the same
    assert similarity[0] > 0.999
    assert similarity[1:].max() < 0.95
