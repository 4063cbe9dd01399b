import dataclasses
from pathlib import Path

import pytest
import torch

from pipeline.settings import ConfigError, build, read_yaml
from train.latents import LatentSpec
from train.model import DiT, ModelConfig, num_tokens

PRESETS = Path(__file__).parents[2] / "configs" / "model"
VIDEO = LatentSpec(
    "video",
    ("time", "channel", "height", "width"),
    (4, 3, 8, 8),
    8.0,
    1 / 16,
    (0.0,) * 3,
    (1.0,) * 3,
)
AUDIO = LatentSpec(
    "audio", ("time", "frequency", "channel"), (12, 4, 2), 25.0, 0.02, (0.0,) * 2, (1.0,) * 2
)
TEXT_WIDTH = 10
SMALL = ModelConfig(width=64, depth=2, heads=2)


def small_model(randomised=True, **settings):
    """A small DiT; at random, as every gate is closed at initialisation."""
    torch.manual_seed(0)
    model = DiT(dataclasses.replace(SMALL, **settings), VIDEO, AUDIO, TEXT_WIDTH, num_tasks=3)
    if randomised:
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn_like(weight) * (0.5 if weight.ndim == 1 else 0.15))
    return model


def inputs(batch=3):
    torch.manual_seed(1)
    mask = torch.arange(5)[None] < torch.tensor([5, 1, 3, 2])[:batch, None]
    return {
        "video": torch.randn(batch, *VIDEO.shape),
        "audio": torch.randn(batch, *AUDIO.shape),
        "t_video": torch.rand(batch),
        "t_audio": torch.rand(batch),
        "task": torch.arange(batch) % 3,
        "text": torch.randn(batch, 5, TEXT_WIDTH),
        "text_mask": mask,
        "video_start_s": torch.zeros(batch),
        "audio_start_s": torch.rand(batch) * 0.02,
    }


def test_output_is_zero_at_initialisation_and_has_the_shape_of_the_input():
    given = inputs()
    video, audio = small_model(randomised=False)(**given)
    assert video.shape == given["video"].shape and audio.shape == given["audio"].shape
    assert not video.any() and not audio.any()


def test_shifting_both_starts_changes_nothing():
    model, given = small_model(), inputs()
    moved = given | {name: given[name] + 2.5 for name in ("video_start_s", "audio_start_s")}
    for here, there in zip(model(**given), model(**moved), strict=True):
        assert here.abs().mean() > 0.1
        torch.testing.assert_close(here, there, atol=2e-3, rtol=2e-3)


def test_shifting_audio_against_video_changes_both():
    model, given = small_model(), inputs()
    moved = given | {"audio_start_s": given["audio_start_s"] + 0.1}
    for here, there in zip(model(**given), model(**moved), strict=True):
        assert not torch.allclose(here, there, atol=1e-2)


def test_permuting_the_batch_permutes_the_answer():
    model, given = small_model(), inputs()
    order = torch.tensor([2, 0, 1])
    permuted = {name: value[order] for name, value in given.items()}
    for answer, expected in zip(model(**permuted), model(**given), strict=True):
        torch.testing.assert_close(answer, expected[order], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["video", "audio", "t_video", "t_audio", "task", "text", "text_mask"]
)
def test_every_input_reaches_both_modalities(name):
    model, given = small_model(), inputs()
    changed = {
        "task": lambda x: (x + 1) % 3,
        "text_mask": torch.ones_like,
    }.get(name, lambda x: x.roll(1, dims=0) * 0.5)
    before, after = model(**given), model(**given | {name: changed(given[name])})
    for here, there in zip(before, after, strict=True):
        assert not torch.allclose(here, there, atol=1e-4)


def test_padding_of_the_text_has_no_influence():
    model, given = small_model(), inputs()
    hidden = ~given["text_mask"][..., None]
    filled = given | {"text": given["text"] + 9.0 * hidden}
    for here, there in zip(model(**given), model(**filled), strict=True):
        torch.testing.assert_close(here, there)


def test_every_weight_gets_a_gradient_whatever_the_task():
    model, given = small_model(modality_ffn=True), inputs()
    video, audio = model(**given | {"task": torch.ones(3, dtype=torch.int64)})
    (0 * video.square().mean() + audio.square().mean()).backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_no_submodule_runs_twice_in_a_forward():
    model, calls = small_model(modality_ffn=True), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(**inputs())
    assert len(calls) == len(set(calls))


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = small_model(checkpoint_activations=checkpointing)
        sum(answer.square().mean() for answer in model(**inputs())).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_bfloat16_weights_answer_float32_and_close():
    given = inputs()
    exact, rounded = small_model()(**given), small_model().bfloat16()(**given)
    for here, there in zip(exact, rounded, strict=True):
        assert there.dtype == torch.float32
        assert (here - there).abs().mean() < 0.1 * here.abs().mean()


def test_another_length_runs_and_one_that_does_not_divide_is_named():
    model, given = small_model(), inputs()
    video, _ = model(**given | {"video": given["video"][:, :2]})
    assert video.shape[1] == 2
    with pytest.raises(ValueError, match=r"video time of 3 latents .* patches of 2"):
        model(**given | {"video": given["video"][:, :3]})


# Attention 4·D², to the text 4·D², feed-forward 8·D² per block, and little beside: millions.
@pytest.mark.parametrize(
    ("name", "size", "millions"),
    [
        ("tiny", (192, 4, 4), (2.8, 3.3)),
        ("s", (384, 12, 6), (28, 32)),
        ("b", (768, 12, 12), (113, 121)),
        ("l", (1024, 24, 16), (402, 420)),
        ("xl", (1152, 28, 16), (594, 615)),
    ],
)
def test_presets_have_the_sizes_of_their_names(name, size, millions):
    config = build(ModelConfig, read_yaml(PRESETS / f"{name}.yaml"), name)
    assert (config.width, config.depth, config.heads) == size
    video = dataclasses.replace(VIDEO, shape=(64, 16, 32, 32))
    audio = dataclasses.replace(AUDIO, shape=(200, 16, 8))
    with torch.device("meta"):
        model = DiT(config, video, audio, text_width=256, num_tasks=3)
    assert len(model.blocks) == size[1]
    assert millions[0] < model.num_parameters / 1e6 < millions[1]
    shapes = (video.shape, audio.shape)
    assert num_tokens(model.patchings, shapes) == (2249 if name == "tiny" else 4297)


def test_defaults_are_the_preset_tiny():
    assert build(ModelConfig, read_yaml(PRESETS / "tiny.yaml"), "tiny") == ModelConfig()


def test_width_that_heads_do_not_divide_is_a_config_error():
    with pytest.raises(ConfigError, match="multiple of 8"):
        build(ModelConfig, {"width": 100, "heads": 4}, "test")
