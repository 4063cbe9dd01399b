import pytest
import torch

from tests.train.test_dit import AUDIO, TEXT_WIDTH, VIDEO, small_model
from train.objective.flow import FlowConfig
from train.objective.sampler import euler, guide, sample, time_grid
from train.objective.tasks import ABSENT, GENERATED, Task, task_by_name

T2AV, V2A, A2V = (task_by_name(name) for name in ("T2AV", "V2A", "A2V"))
CONFIG = FlowConfig()


def draw(model, task=T2AV, given=(None, None), guidance=1.0, keys=("a", "b"), steps=3, seed=0):
    text = torch.ones(len(keys), 4, TEXT_WIDTH) * torch.linspace(-1, 1, TEXT_WIDTH)
    return sample(
        model=model,
        task=task,
        given=given,
        text=text,
        text_mask=torch.ones(len(keys), 4, dtype=torch.bool),
        null_text=torch.ones(1, TEXT_WIDTH),
        specs=(VIDEO, AUDIO),
        config=CONFIG,
        steps=steps,
        guidance=guidance,
        seed=seed,
        keys=keys,
    )


@pytest.mark.parametrize("steps", [1, 7])
def test_euler_is_exact_on_straight_paths(steps):
    data, noise = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    path = noise - data
    video, audio = euler(
        lambda x, t: (path, 2 * path), (noise, data + 2 * path), time_grid(T2AV, CONFIG, steps)
    )
    torch.testing.assert_close(video, data)
    torch.testing.assert_close(audio, data)


def test_euler_converges_on_a_linear_field():
    # dx/dt = x from t = 1 to 0 shrinks x by e; the error of Euler falls with the step.
    def error(steps):
        times = torch.linspace(1, 0, steps + 1)[:, None].expand(-1, 2)
        video, _ = euler(lambda x, t: x, (torch.ones(1), torch.ones(1)), times)
        # A closed form for every number of steps: (1 - 1/n)^n.
        torch.testing.assert_close(video.item(), (1 - 1 / steps) ** steps)
        return abs(video.item() - torch.e**-1)

    assert error(64) < error(32) / 1.9


def test_grid_runs_from_noise_to_data_with_the_shifts_of_training():
    grid = time_grid(T2AV, CONFIG, 4)
    assert grid[0].tolist() == [1, 1] and grid[-1].tolist() == [0, 0]
    assert (grid.diff(dim=0) < 0).all()
    s, t = CONFIG.video_shift, grid[1:-1, 1]
    torch.testing.assert_close(grid[1:-1, 0], s * t / (1 + (s - 1) * t))


def test_a_given_modality_comes_back_bit_identical_and_the_other_is_generated():
    given = torch.randn(2, *VIDEO.shape)
    video, audio = draw(small_model(), V2A, (given, None), guidance=3.0)
    assert torch.equal(video, given) and audio.shape == (2, *AUDIO.shape)
    given = torch.randn(2, *AUDIO.shape)
    video, audio = draw(small_model(), A2V, (None, given))
    assert torch.equal(audio, given) and video.shape == (2, *VIDEO.shape)


def test_what_is_given_decides_what_is_generated():
    model = small_model()
    first, second = (draw(model, V2A, (torch.randn(2, *VIDEO.shape), None))[1] for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-3)


def test_an_absent_modality_stays_noise():
    t2a = Task("T2A", 0, video=ABSENT, audio=GENERATED)
    before, after = (draw(small_model(), t2a, steps=steps) for steps in (1, 3))
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_a_missing_given_modality_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="given video"):
        draw(small_model(), V2A)


def test_noise_follows_seed_and_key_in_any_batch():
    model = small_model()
    both, alone = draw(model, keys=("a", "b")), draw(model, keys=("b",))
    for together, single in zip(both, alone, strict=True):
        torch.testing.assert_close(together[1:], single, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(both[0], draw(model, seed=1)[0], atol=1e-2)


def test_guidance_1_costs_no_extra_forward_and_more_doubles_the_batch():
    sizes = []

    def model(video, audio, *_):
        sizes.append(len(video))
        return torch.zeros_like(video), torch.zeros_like(audio)

    draw(model, guidance=1.0, steps=2)
    draw(model, guidance=4.0, steps=2)
    assert sizes == [2, 2, 4, 4]


def test_guidance_leads_from_the_empty_caption_through_the_text():
    with_text, without = torch.randn(2, 3), torch.randn(2, 3)
    both = torch.cat([with_text, without])
    torch.testing.assert_close(guide(both, 1.0), with_text)
    torch.testing.assert_close(guide(both, 0.0), without)
    torch.testing.assert_close(guide(both, 3.0), with_text + 2 * (with_text - without))


def test_guidance_just_above_1_is_close_to_none():
    model = small_model()
    for plain, guided in zip(draw(model), draw(model, guidance=1 + 1e-5), strict=True):
        torch.testing.assert_close(plain, guided, atol=1e-2, rtol=1e-2)
