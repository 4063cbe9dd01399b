"""Codecs give back what they took, and declare what they give."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.codecs import CODECS, all_finite, build_codec, builtin, column_spec
from pipeline.codecs.builtin import DctVideo, HashText, LogmelAudio, dct_matrix
from pipeline.config import EncodeConfig, column_specs, decode_settings
from pipeline.decode import decode_clip, read_sound
from pipeline.format import FormatError
from pipeline.media import Clip

VIDEO = {"fps": 8.0, "sizes": [[64, 64]]}
AUDIO = {"sample_rate": 16000}
TEXT = {"max_words": 8}
PREPROCESSING = {"dct": VIDEO, "logmel": AUDIO, "hash": TEXT}


def smooth_film(frames=16, height=64, width=64):
    """Slow waves of light in changing tints, as in nature: colours vary less than brightness."""
    time, rows, columns = np.ogrid[:frames, :height, :width]
    light = np.sin(rows / 9 + time / 9) + np.cos(columns / 7 - time / 8)
    tints = [0.1 * np.sin(rows / 20 + tint + 0 * light) for tint in range(3)]
    return (127.5 + 50 * np.stack([light + tint for tint in tints], axis=-1)).astype(np.uint8)


def noise_film(frames=4, size=32):
    return np.random.default_rng(0).integers(0, 256, (frames, size, size, 3), dtype=np.uint8)


def music(seconds=10.0, rate=16000):
    """A few gliding tones, float32 [1, N]."""
    time = np.arange(round(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * (f * time + 20 * np.sin(time))) for f in (220, 440, 1250)]
    return (0.2 * sum(tones) * (1.2 + np.sin(5 * time)))[None].astype(np.float32)


def psnr_db(one, other):
    return -10 * np.log10(np.mean((one.astype(float) - other) ** 2) / 255**2 + 1e-12)


def only(results):
    (result,) = results
    return result


# -- video


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_dct_matrix_is_orthonormal(size):
    np.testing.assert_allclose(dct_matrix(size) @ dct_matrix(size).T, np.eye(size), atol=1e-6)


@pytest.mark.parametrize(("frames", "block"), [(1, 8), (1, 4), (2, 8), (4, 4)])
def test_dct_with_every_coefficient_loses_nothing(frames, block):
    codec = DctVideo(VIDEO, frames=frames, block=block, channels=3 * frames * block**2)
    film = noise_film()
    decoded = only(codec.decode(codec.encode([film])))
    assert decoded.dtype == np.uint8 and decoded.shape == film.shape
    assert np.abs(decoded.astype(int) - film).max() <= 1


@pytest.mark.parametrize(
    ("frames", "channels", "least_db"), [(1, 16, 34), (2, 32, 34), (4, 32, 30), (1, 48, 38)]
)
def test_dct_keeps_a_smooth_film(frames, channels, least_db):
    codec = DctVideo(VIDEO, frames=frames, channels=channels)
    latent = only(codec.encode([smooth_film()]))
    assert latent.shape == (16 // frames, channels, 8, 8) and latent.dtype == np.float32
    assert psnr_db(only(codec.decode([latent])), smooth_film()) > least_db


@pytest.mark.parametrize("settings", [{}, {"frames": 2, "channels": 32}])
def test_dct_keeps_a_real_clip_through_half_precision(shared_clips, settings):
    path = shared_clips / "vggsound" / "video" / "3HgbEKrbA9s_000054.mp4"
    decode = decode_settings(EncodeConfig())
    frames = decode_clip(path, Clip("k", "", 0, 2.0), decode, {"video"}).frames
    codec = DctVideo({"fps": 8.0}, **settings)
    latent = only(codec.encode([frames])).astype(np.float16)
    assert psnr_db(only(codec.decode([latent])), frames) > 25


@pytest.mark.parametrize(("height", "width"), [(64, 112), (112, 64), (8, 128)])
def test_dct_keeps_the_shape_of_a_film_that_is_not_square(height, width):
    codec = DctVideo(VIDEO, frames=2, channels=64)
    film = smooth_film(16, height, width)
    latent = only(codec.encode([film]))
    assert latent.shape == (8, 64, height // 8, width // 8)
    assert psnr_db(only(codec.decode([latent])), film) > 34


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_dct_of_a_crop_is_the_crop_of_the_dct(frames):
    """What ``croppable`` promises: latents [a, b) are those of their own frames alone."""
    codec = DctVideo(VIDEO, frames=frames, channels=24)
    film = smooth_film()
    whole = only(codec.encode([film]))
    assert codec.croppable
    part = only(codec.encode([film[frames : 3 * frames]]))
    np.testing.assert_allclose(part, whole[1:3], atol=1e-4)
    cropped = only(codec.decode([whole]))[frames : 3 * frames]
    decoded = only(codec.decode([whole[1:3]]))
    assert np.abs(decoded.astype(int) - cropped).max() <= 1  # of rounding


@pytest.mark.parametrize("shape", [(37, 24, 40, 3), (2, 8, 8, 3), (50, 40, 56, 3)])
@pytest.mark.parametrize("piece_values", [1, 50_000])
def test_dct_in_pieces_is_the_dct_of_all(monkeypatch, shape, piece_values):
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    codec = DctVideo({"fps": 8}, frames=2, channels=20)
    (whole,) = codec.encode([frames])
    monkeypatch.setattr(builtin, "PIECE_VALUES", piece_values)
    (pieces,) = codec.encode([frames])
    assert pieces.shape == whole.shape and np.abs(pieces - whole).max() < 1e-5


def test_dct_cuts_off_what_fills_no_block():
    codec = DctVideo(VIDEO, frames=2)
    film = noise_film(5, 32)
    odd = np.pad(film, ((0, 0), (0, 3), (0, 7), (0, 0)))
    np.testing.assert_allclose(only(codec.encode([odd])), only(codec.encode([film[:4]])), atol=1e-4)
    assert only(codec.encode([film[:1]])).shape[0] == 0


def test_dct_of_grey_is_zero_and_values_stay_small():
    codec = DctVideo(VIDEO)
    assert np.abs(only(codec.encode([np.full((1, 8, 8, 3), 127.5)]))).max() < 1e-5
    for level in (0, 255):
        latent = only(codec.encode([np.full((1, 8, 8, 3), level, np.uint8)]))
        assert np.abs(latent).max() <= 4.01


# -- audio


def test_logmel_of_ten_seconds_has_the_shape_of_audioldm2():
    latent = only(LogmelAudio(AUDIO).encode([music()]))
    assert latent.shape == (250, 16, 8) and latent.dtype == np.float32


@pytest.mark.parametrize("settings", [{}, {"patch": 2, "channels": 4}, {"num_mels": 128}])
def test_logmel_with_every_coefficient_is_the_spectrogram(settings):
    patch = settings.get("patch", 4)
    codec = LogmelAudio(AUDIO, **{**settings, "channels": patch**2})
    latent = only(codec.encode([music()]))
    spectrogram = codec.mel(_tensor(music()[0])).clamp_min(1e-5).log().numpy().T
    np.testing.assert_allclose(
        codec.spectrogram(latent), spectrogram[: latent.shape[0] * patch], atol=1e-4
    )


def _tensor(values):
    import torch

    return torch.from_numpy(np.ascontiguousarray(values))


def test_real_sound_comes_back_with_its_spectrogram(shared_clips):
    """Measured on 17 real clips without patches: 0.20 (research/media.md)."""
    codec = LogmelAudio(AUDIO)
    sound = read_sound(shared_clips / "vggsound" / "video" / "3HgbEKrbA9s_000054.mp4", 16000)
    latent = only(codec.encode([sound[None, : 4 * 16000]]))
    again = only(codec.encode(codec.decode([latent])))
    assert again.shape == latent.shape
    error = np.abs(codec.spectrogram(again) - codec.spectrogram(latent))
    assert error.mean() < 0.4


@pytest.mark.parametrize("seconds", [0.6, 1.0, 3.33, 10.0])
def test_griffin_lim_is_deterministic_and_of_exact_length(seconds):
    codec = LogmelAudio(AUDIO)
    latent = only(codec.encode([music(seconds)]))
    first, second = (only(codec.decode([latent])) for _ in range(2))
    assert first.shape == (1, latent.shape[0] * 640) and first.dtype == np.float32
    np.testing.assert_array_equal(first, second)
    assert np.isfinite(first).all()


@given(st.integers(0, 4000))
def test_logmel_takes_sound_of_any_length(samples):
    codec = LogmelAudio(AUDIO)
    latent = only(codec.encode([music(1.0)[:, :samples]]))
    assert latent.shape[1:] == (16, 8)
    assert abs(latent.shape[0] * 640 - samples) < 640


@pytest.mark.parametrize("settings", [{"hop": 64, "patch": 1, "channels": 1}, {"n_fft": 4096}])
def test_logmel_takes_sound_shorter_than_its_window(settings):
    codec = LogmelAudio(AUDIO, **settings)
    for samples in (100, 700, 2000):
        only(codec.encode([music(1.0)[:, :samples]]))


def test_logmel_of_a_crop_is_the_crop_of_the_logmel():
    """Away from the cut, where the window of the transform reaches over the edge."""
    codec = LogmelAudio(AUDIO)
    sound = music(4.0)
    whole = only(codec.encode([sound]))
    part = only(codec.encode([sound[:, 20 * 640 : 60 * 640]]))
    assert codec.croppable and part.shape[0] == 40
    np.testing.assert_allclose(part[1:-1], whole[21:59], atol=1e-4)


def test_logmel_averages_channels():
    codec = LogmelAudio(AUDIO)
    stereo = np.concatenate([music(1.0), 0 * music(1.0)])
    mono = only(codec.encode([music(1.0) / 2]))
    np.testing.assert_allclose(only(codec.encode([stereo])), mono, atol=1e-4)


def test_silence_is_finite_both_ways():
    codec = LogmelAudio(AUDIO)
    latent = only(codec.encode([np.zeros((1, 16000), np.float32)]))
    assert np.isfinite(latent).all() and np.abs(latent).max() < 60
    assert np.abs(only(codec.decode([latent]))).max() < 0.01


# -- text


def test_finite_values_are_told_from_others_in_every_type():
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    assert [all_finite(half) for half in halves[:, None]] == np.isfinite(halves).tolist()
    assert all_finite(np.ones(3, np.float32)) and not all_finite(np.array([1, np.nan], np.float32))


def test_same_word_has_the_same_vector_wherever_it_stands():
    codec = HashText(TEXT)
    one, two = codec.encode(["A dog barks", "cat, DOG!"])
    np.testing.assert_array_equal(one[1], two[1])
    np.testing.assert_array_equal(one[-1], two[-1])
    assert one.shape == (4, 64) and two.shape == (3, 64) and one.dtype == np.float32
    assert np.abs(one[0] - two[0]).max() > 0.1


def test_empty_caption_is_the_end_token_alone():
    codec = HashText(TEXT)
    empty, dots, words = codec.encode(["", " … !", "dog"])
    assert empty.shape == (1, 64)
    np.testing.assert_array_equal(empty, dots)
    np.testing.assert_array_equal(empty[0], words[-1])


@given(st.text(max_size=60))
def test_text_has_between_one_and_the_most_tokens(caption):
    latent = only(HashText(TEXT, width=4).encode([caption]))
    assert 1 <= latent.shape[0] <= 9 and latent.shape[1] == 4


def test_words_are_unit_noise_that_fits_half_precision():
    vectors = only(HashText({"max_words": 500}).encode([" ".join(map(str, range(400)))]))
    assert abs(vectors.mean()) < 0.02 and abs(vectors.std() - 1) < 0.02
    assert np.isfinite(vectors.astype(np.float16)).all()


def test_hash_text_cannot_be_decoded():
    with pytest.raises(NotImplementedError):
        HashText(TEXT).decode([np.zeros((1, 64))])


# -- all of them

ITEMS = {"dct": smooth_film(), "logmel": music(2.0), "hash": "a dog barks"}


@pytest.mark.parametrize("name", CODECS)
def test_latent_has_the_declared_axes_and_rate(name):
    codec = build_codec({"name": name}, PREPROCESSING[name])
    latent = only(codec.encode([ITEMS[name]]))
    assert latent.ndim == len(codec.axes) and "channel" in codec.axes
    if name != "hash":
        assert codec.axes[0] == "time" and latent.shape[0] == 2.0 * codec.rate_hz


@pytest.mark.parametrize("name", CODECS)
def test_batch_is_the_items_one_by_one_and_repeats(name):
    codec = build_codec({"name": name}, PREPROCESSING[name])
    item = ITEMS[name]
    shorter = item[:6] if name != "logmel" else item[:, : item.shape[1] // 2]
    together = codec.encode([item, shorter, item])
    for latent, alone in zip(together, (item, shorter, item), strict=True):
        np.testing.assert_array_equal(latent, only(codec.encode([alone])))
    assert codec.encode([]) == []


@pytest.mark.parametrize(("frames", "offset_s"), [(1, 0.0), (2, 0.0625), (4, 0.1875)])
def test_offset_is_the_middle_of_the_frames_of_the_first_latent(frames, offset_s):
    codec = DctVideo(VIDEO, frames=frames)
    assert codec.offset_s == offset_s == np.mean(np.arange(frames) / 8)
    assert codec.rate_hz == 8 / frames


def test_click_is_in_the_latent_whose_time_is_declared():
    codec = LogmelAudio(AUDIO)
    for second in (0.5, 0.9, 1.53):
        sound = np.zeros((1, 32000), np.float32)
        sound[0, round(second * 16000)] = 1
        loudness = only(codec.encode([sound]))[:, :, 0].sum(axis=1)
        middle_s = codec.offset_s + loudness.argmax() / codec.rate_hz
        assert abs(middle_s - second) <= 0.5 / codec.rate_hz + 0.01


def test_column_json_is_enough_to_build_the_codec_again():
    for modality, spec in column_specs(EncodeConfig()).items():
        codec = build_codec(spec.codec, spec.preprocessing)
        assert column_spec(modality, spec.codec, spec.preprocessing) == spec
        assert (spec.axes, spec.rate_hz, spec.offset_s) == (
            codec.axes, codec.rate_hz, codec.offset_s
        )  # fmt: skip
        assert spec.croppable == codec.croppable and spec.weights == codec.fingerprint()


def test_unknown_codec_lists_the_known():
    with pytest.raises(FormatError, match=r"'vae' is unknown.*dct, hash, logmel"):
        build_codec({"name": "vae"}, VIDEO)


@pytest.mark.parametrize(
    ("codec", "preprocessing"),
    [
        ({"name": "dct", "colour": 3}, VIDEO),
        ({"channels": 3}, VIDEO),
        ({"name": "dct"}, {}),
        ({"name": "dct", "channels": 193}, VIDEO),
        ({"name": "logmel", "num_mels": 65}, AUDIO),
        ({"name": "logmel", "patch": 2}, AUDIO),  # 8 channels of 4
    ],
)
def test_settings_that_no_codec_can_have_are_refused(codec, preprocessing):
    with pytest.raises(FormatError):
        build_codec(codec, preprocessing)


LATENT_PROGRAM = """
import hashlib, sys
import numpy as np
from pipeline.codecs import build_codec
sound = np.sin(np.arange(16000) / 7, dtype=np.float32)[None]
latent = build_codec({"name": "logmel"}, {"sample_rate": 16000}).encode([sound])[0]
words = build_codec({"name": "hash"}, {"max_words": 8}).encode(["a dog"])[0]
print(hashlib.sha256(latent.tobytes() + words.tobytes()).hexdigest(), latent.shape)
"""


def test_fresh_processes_without_torchaudio_s_compiled_part_agree():
    """The stand-in for the compiled part works, and no latent depends on the process."""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", LATENT_PROGRAM], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(outputs) == 1 and "(25, 16, 8)" in outputs.pop()
