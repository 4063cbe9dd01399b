import pytest
import torch

from pipeline.settings import ConfigError
from tests.train.columns import Dataset
from train.config import load_train_config
from train.data.view import open_view
from train.new_model import describe_model, new_model, tokens_by_bucket

VERY_SMALL = ["model.width=32", "model.depth=1", "model.heads=2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """30 clips of twice the width, 10 of the usual one."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    return Dataset(folder, wide=frozenset(range(30))).build().root


def opened(root, *more):
    values = [f"data.root={root}", f"data.cache_dir={root.parent}", "data.seconds=2"]
    config = load_train_config(None, [*values, "data.heldout_share=0", *VERY_SMALL, *more])
    return config, open_view(config.data, "train", config.model.time_patches)


def test_initial_weights_follow_the_seed_alone(root):
    first, again, other = (
        new_model(*opened(root, "model.video_patch=[2, 0, 3]", f"seed={seed}")).state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_tokens_of_every_shape_are_told(root):
    config, view = opened(root, "model.video_patch=[2, 0, 3]")
    # The task, 4 pairs of frames of 2 patches or 1, 50 frames of sound.
    assert tokens_by_bucket(config.model, view) == [59, 55]
    described = describe_model(new_model(config, view), view)
    assert described.endswith("M parameters, 55 to 59 tokens a sample in 2 shapes")


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ("[2, 2, 3]", r"bucket 0 \(30 clips of video \(8, 2, 3, 6\) .* video height of 3 latents"),
        # A patch of the whole width is one of the first bucket's width.
        ("[2, 0, 0]", r"bucket 1 \(10 clips of video \(8, 2, 3, 3\) .* video width of 3 latents"),
    ],
)
def test_a_bucket_that_the_model_does_not_fit_is_named(root, patch, expected):
    with pytest.raises(ConfigError, match=expected):
        new_model(*opened(root, f"model.video_patch={patch}"))
