import dataclasses
import statistics

import pytest
import torch

from pipeline.settings import ConfigError, build
from tests.train.test_dit import AUDIO, SMALL, TEXT_WIDTH, VIDEO
from train.latents import LatentBatch
from train.model import DiT
from train.objective import flow
from train.objective.flow import FlowConfig, flow_loss, standardise, unstandardise
from train.objective.tasks import TASKS, task_by_name

SPECS = (VIDEO, AUDIO)
NULL_TEXT = torch.ones(1, TEXT_WIDTH)
PLAIN = FlowConfig(drop_text=0, drop_given=0)


def batch_of(samples, has_video=None, has_audio=None):
    """One clip per sample number; every place of a frame and every band is at 1 or -1.

    What a sample lacks is zeros, as the loader leaves it.
    """
    whole = [True] * len(samples)
    has_video, has_audio = torch.tensor(has_video or whole), torch.tensor(has_audio or whole)
    clips = [torch.Generator().manual_seed(sample) for sample in samples]

    def signs(*shape):
        return torch.stack([torch.randn(*shape, generator=clip).sign() for clip in clips])

    video = signs(1, *VIDEO.shape[1:]).expand(-1, *VIDEO.shape)
    audio = signs(1, *AUDIO.shape[1:]).expand(-1, *AUDIO.shape)
    text = signs(3, TEXT_WIDTH)
    return LatentBatch(
        samples=torch.tensor(samples),
        keys=tuple(str(sample) for sample in samples),
        bucket=0,
        video=video.half() * has_video.view(-1, 1, 1, 1, 1),
        audio=audio.half() * has_audio.view(-1, 1, 1, 1),
        has_video=has_video,
        has_audio=has_audio,
        video_start_s=torch.zeros(len(samples)),
        audio_start_s=torch.zeros(len(samples)),
        text=text.half(),
        text_mask=torch.ones(len(samples), 3, dtype=torch.bool),
    )


class Recorder:
    """A model that keeps what it is asked and answers with zeros that can be differentiated."""

    def __call__(self, video, audio, t_video, t_audio, task, text, text_mask, *starts):
        self.video, self.audio, self.t_video, self.t_audio = video, audio, t_video, t_audio
        self.task, self.text, self.text_mask = task, text, text_mask
        self.answers = [torch.zeros_like(x, requires_grad=True) for x in (video, audio)]
        return tuple(self.answers)


def ask(samples, task_name="T2AV", config=PLAIN, seed=0, has=(None, None), **options):
    recorder, task = Recorder(), task_by_name(task_name)
    batch = batch_of(samples, *has)
    loss = flow_loss(recorder, batch, NULL_TEXT, task, SPECS, config, seed, **options)
    return recorder, loss


def test_data_is_the_noisy_value_less_time_times_velocity():
    x, noise, t = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.rand(4)
    there = flow.interpolate(x, noise, t)
    torch.testing.assert_close(there - t[:, None, None] * flow.velocity(x, noise), x)
    assert torch.equal(flow.interpolate(x, noise, torch.zeros(4)), x)
    assert torch.equal(flow.interpolate(x, noise, torch.ones(4)), noise)


def test_standardise_gives_unit_channels_and_is_undone():
    spec = dataclasses.replace(VIDEO, mean=(1.0, -2.0, 0.5), std=(2.0, 0.5, 1.0))
    x = torch.randn(20, *VIDEO.shape) * torch.tensor(spec.std)[:, None, None]
    x = x + torch.tensor(spec.mean)[:, None, None]
    unit = standardise(x, spec)
    torch.testing.assert_close(unit.mean((0, 1, 3, 4)), torch.zeros(3), atol=0.05, rtol=0)
    torch.testing.assert_close(unit.std((0, 1, 3, 4)), torch.ones(3), atol=0.05, rtol=0)
    torch.testing.assert_close(unstandardise(unit, spec), x)


@pytest.mark.parametrize("std", [0.0, 1e-8])
def test_a_constant_channel_standardises_to_zero(std):
    spec = dataclasses.replace(AUDIO, mean=(3.0, 0.0), std=(std, 1.0))
    x = torch.randn(2, *AUDIO.shape)
    x[..., 0] = 3.0
    assert not standardise(x, spec)[..., 0].any()
    torch.testing.assert_close(unstandardise(standardise(x, spec), spec), x)


def test_shift_keeps_the_ends_and_is_undone_by_its_inverse():
    t = torch.linspace(0, 1, 11)
    assert flow.shift_time(t, 3.0)[[0, -1]].tolist() == [0, 1]
    assert (flow.shift_time(t, 3.0)[1:-1] > t[1:-1]).all()
    torch.testing.assert_close(flow.shift_time(flow.shift_time(t, 3.0), 1 / 3), t)


def test_times_follow_the_logit_normal_quantiles():
    config = FlowConfig(logit_mean=0.5, logit_std=0.8, uniform_share=0)
    draws = sorted(flow.draw_time(config, 0, sample) for sample in range(4000))
    law = statistics.NormalDist(0.5, 0.8)
    for share in (0.1, 0.5, 0.9):
        expected = torch.tensor(law.inv_cdf(share)).sigmoid()
        assert abs(draws[int(share * 4000)] - expected) < 0.02
    uniform = sorted(flow.draw_time(FlowConfig(uniform_share=1), 0, i) for i in range(4000))
    assert abs(uniform[400] - 0.1) < 0.02 and abs(uniform[3600] - 0.9) < 0.02


def test_draws_of_a_sample_do_not_depend_on_its_batch():
    config = FlowConfig(drop_text=0.5, drop_given=0.5)
    together, _ = ask([3, 8, 11, 20], "V2A", config)
    alone, _ = ask([11], "V2A", config)
    for name in ("video", "audio", "t_video", "t_audio", "text", "text_mask"):
        assert torch.equal(getattr(together, name)[2], getattr(alone, name)[0]), name


def test_draws_change_with_seed_and_sample_and_differ_between_modalities():
    first, _ = ask([1, 2])
    second, _ = ask([1, 2], seed=1)
    assert not torch.equal(first.audio, second.audio)
    assert len(set(first.t_video.tolist() + second.t_video.tolist())) == 4
    noise = flow.draw_noise((100,), torch.device("cpu"), "video noise", 0, [1])
    assert not torch.equal(noise, flow.draw_noise((100,), noise.device, "audio noise", 0, [1]))


def test_t2av_shares_one_time_before_the_shifts():
    asked, _ = ask(list(range(8)))
    shifted = flow.shift_time(asked.t_audio, PLAIN.video_shift)
    torch.testing.assert_close(asked.t_video, shifted)


@pytest.mark.parametrize(("task_name", "given"), [("V2A", "video"), ("A2V", "audio")])
def test_a_given_modality_is_bit_identical_and_has_no_loss(task_name, given):
    asked, loss = ask(list(range(4)), task_name)
    place = ("video", "audio").index(given)
    clean = standardise(getattr(batch_of(list(range(4))), given), SPECS[place])
    assert torch.equal(getattr(asked, given), clean)
    assert not getattr(asked, f"t_{given}").any()
    loss.total.backward()
    assert not asked.answers[place].grad.any() and asked.answers[1 - place].grad.any()
    assert loss.sums[place] == 0 and loss.counts.tolist() == [4 * (place == 1), 4 * (place == 0)]


def test_a_dropped_given_modality_is_pure_noise_without_loss():
    config = dataclasses.replace(PLAIN, drop_given=1.0)
    asked, loss = ask([5], "V2A", config)
    noise = flow.draw_noise(VIDEO.shape, asked.video.device, "video noise", 0, [5])
    assert torch.equal(asked.video, noise) and asked.t_video.tolist() == [1]
    assert loss.counts.tolist() == [0, 1]
    generated, _ = ask([5], "T2AV", config)
    assert generated.t_video.item() < 1


# Clips with both modalities, video only, audio only, nothing.
HAS = ([True, True, False, False], [True, False, True, False])


@pytest.mark.parametrize(
    ("task_name", "video_counts", "audio_counts"),
    [
        ("T2AV", [1, 1, 0, 0], [1, 0, 1, 0]),
        ("V2A", [0, 0, 0, 0], [1, 0, 0, 0]),
        ("A2V", [1, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_a_clip_that_lacks_a_modality_counts_where_it_can_serve(
    task_name, video_counts, audio_counts
):
    asked, loss = ask([1, 2, 3, 4], task_name, has=HAS)
    loss.total.backward()
    grads = [answer.grad.flatten(1).any(1).int().tolist() for answer in asked.answers]
    assert grads == [video_counts, audio_counts]
    assert loss.counts.tolist() == [sum(video_counts), sum(audio_counts)]
    served = [video or audio for video, audio in zip(video_counts, audio_counts, strict=True)]
    assert loss.num_unserved == 4 - sum(served)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_missing_modality_is_pure_noise_at_time_1_and_the_other_is_as_ever(task):
    config = dataclasses.replace(PLAIN, drop_given=0.5)
    asked, _ = ask([1, 2, 3, 4], task.name, config, has=HAS)
    whole, _ = ask([1, 2, 3, 4], task.name, config)
    for name, spec, has in zip(("video", "audio"), SPECS, HAS, strict=True):
        noise = flow.draw_noise(spec.shape, torch.device("cpu"), f"{name} noise", 0, [1, 2, 3, 4])
        for place, is_there in enumerate(has):
            found = getattr(asked, name)[place], getattr(asked, f"t_{name}")[place]
            wanted = getattr(whole, name)[place], getattr(whole, f"t_{name}")[place]
            expected = wanted if is_there else (noise[place], torch.tensor(1.0))
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_clip_without_sound_has_the_loss_of_its_video_alone():
    _, loss = ask([1, 2], has=([True, True], [True, False]))
    first, second = (ask([sample])[1].sums for sample in (1, 2))
    torch.testing.assert_close(loss.sums, first + second * torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(loss.total, loss.sums.sum() / 2)


def test_the_graph_does_not_depend_on_what_clips_lack():
    def functions(has):
        """The backward functions of a loss, in the order of their discovery."""
        names, left = [], [ask([1, 2, 3, 4], "V2A", has=has)[1].total.grad_fn]
        while left:
            function = left.pop()
            names.append(type(function).__name__)
            left += [parent for parent, _ in function.next_functions if parent]
        return names

    assert functions(HAS) == functions((None, None)) == functions(([False] * 4, [False] * 4))


def test_a_dropped_text_is_the_empty_caption_with_its_own_mask():
    asked, _ = ask([0, 1], config=dataclasses.replace(PLAIN, drop_text=1.0))
    assert asked.text_mask.tolist() == [[True, False, False]] * 2
    assert torch.equal(asked.text[:, 0].float(), NULL_TEXT.expand(2, -1))
    long = torch.ones(5, TEXT_WIDTH)
    text, mask = flow.drop_text(
        torch.ones(2, 3, TEXT_WIDTH), torch.ones(2, 3).bool(), long, torch.tensor([True, False])
    )
    assert text.shape[1] == 5 and mask.sum(1).tolist() == [5, 3]


def test_drop_rates_are_those_of_the_settings():
    dropped = flow.draw_dropped(0.1, "drop text", 0, range(4000)).mean()
    assert abs(dropped - 0.1) < 3 * (0.1 * 0.9 / 4000) ** 0.5


def test_total_is_the_weighted_mean_over_samples_of_means_over_each_modality():
    config = dataclasses.replace(PLAIN, video_weight=2.0, audio_weight=0.5)
    _, loss = ask([1, 2, 3], config=config)
    video, audio = (loss.sums / loss.counts).tolist()
    assert loss.total.item() == pytest.approx(2.0 * video + 0.5 * audio)
    # Zeros against ε - x with both of unit variance.
    assert video == pytest.approx(2, abs=0.3) and audio == pytest.approx(2, abs=0.5)


def test_sums_and_counts_of_parts_add_up_to_the_whole():
    whole = ask([1, 2, 3, 4], "A2V")[1]
    parts = [ask(samples, "A2V")[1] for samples in ([1, 3], [2, 4])]
    torch.testing.assert_close(parts[0].sums + parts[1].sums, whole.sums)
    assert torch.equal(parts[0].counts + parts[1].counts, whole.counts)


def test_a_set_time_takes_the_place_of_the_drawn_one():
    asked, _ = ask([1, 2], time=0.25)
    assert asked.t_audio.tolist() == [0.25, 0.25]


@pytest.mark.parametrize("values", [{"drop_text": 2}, {"logit_std": 0}, {"video_shift": -1}])
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(ConfigError):
        build(FlowConfig, values, "test")


def test_shapes_may_change_from_step_to_step():
    """One model and buckets of three shapes, in turn: the losses fall in all."""
    torch.manual_seed(0)
    model = DiT(SMALL, VIDEO, AUDIO, TEXT_WIDTH, num_tasks=len(TASKS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    frames, channels, height, width = VIDEO.shape
    shapes = [(frames, channels, 2 * height, width), (2 * frames, channels, height, width)]
    batches = [batch_of([0, 1])]
    for shape in shapes:
        video = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).sign().half()
        batches.append(dataclasses.replace(batch_of([0, 1]), video=video))
    losses = []
    for step in range(120):
        batch = batches[step % 3]
        loss = flow_loss(model, batch, NULL_TEXT, TASKS[0], SPECS, PLAIN, seed=step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    for bucket in range(3):
        assert statistics.fmean(losses[bucket::3][-5:]) < 0.6 * losses[bucket]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_overfits_four_samples(task):
    torch.manual_seed(0)
    model = DiT(SMALL, VIDEO, AUDIO, TEXT_WIDTH, num_tasks=len(TASKS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch, losses = batch_of([0, 1, 2, 3]), []
    for step in range(60):
        # Another noise in every step, as in training: the clips are learned, not the noise.
        loss = flow_loss(model, batch, NULL_TEXT, task, SPECS, PLAIN, seed=step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert statistics.fmean(losses[-10:]) < 0.5 * losses[0]
