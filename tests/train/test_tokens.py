import pytest
import torch

from train.latents import LatentSpec
from train.model.tokens import patchify, patching_of, unpatchify


def spec(modality, axes, shape):
    return LatentSpec(modality, axes, shape, 8.0, 0.0, (0.0,), (1.0,))


TCHW = spec("video", ("time", "channel", "height", "width"), (4, 3, 8, 12))
LAYOUTS = [
    (TCHW, (2, 4, 4)),
    (spec("video", ("time", "height", "width", "channel"), (4, 8, 12, 3)), (1, 2, 6)),
    (spec("audio", ("time", "frequency", "channel"), (10, 16, 8)), (1, 0)),
    (spec("audio", ("time", "channel", "frequency"), (10, 8, 16)), (2, 4)),
    (spec("audio", ("time", "channel"), (10, 8)), (5, 0)),
]


@pytest.mark.parametrize(("layout", "patch"), LAYOUTS)
def test_unpatchify_undoes_patchify_in_any_order_of_axes(layout, patch):
    patching = patching_of(layout, patch)
    x = torch.randn(2, *layout.shape)
    tokens = patchify(x, patching)
    assert tokens.shape == (2, patching.num_tokens(layout.shape), patching.num_values)
    assert torch.equal(unpatchify(tokens, patching, layout.shape), x)


def test_a_token_is_one_block_of_the_latents():
    x = torch.randn(1, *TCHW.shape)
    tokens = patchify(x, patching_of(TCHW, (2, 4, 4)))
    # Tokens run over time, then rows, then columns: 2 × 2 × 3 of them.
    assert torch.equal(tokens[0, 3 * 2 + 2].view(2, 3, 4, 4), x[0, 2:4, :, 0:4, 8:12])


def test_a_size_that_the_patch_does_not_divide_names_axis_size_and_patch():
    with pytest.raises(ValueError, match=r"video height of 8 latents .* patches of 3"):
        patching_of(TCHW, (2, 3, 4)).counts(TCHW.shape)


def test_an_axis_the_column_lacks_takes_no_patch():
    layout = spec("audio", ("time", "channel"), (10, 8))
    with pytest.raises(ValueError, match=r"4 latents of frequency.*set it to 0"):
        patching_of(layout, (1, 4))
    with pytest.raises(ValueError, match="unknown axes"):
        patching_of(spec("audio", ("time", "mel"), (10, 8)), (1, 0))
