"""A gallery is one page with its media inside, whatever parts a take has."""

import base64
import io
import re
import wave

import av
import numpy as np
import pytest
from PIL import Image

from pipeline.gallery import MEL_BANDS, Entry, Take, mel_decibels, playable, write_gallery

FRAMES = np.zeros((4, 32, 48, 3), np.uint8)
TONE = np.sin(np.arange(16000) * 0.3)[None].astype(np.float32) / 2


def page_of(folder, *takes, **fields):
    path = write_gallery(folder, "A & B", "", [Entry("k", "<b>", takes, **fields)])
    return path.read_text()


def embedded(page, kind):
    return [base64.b64decode(data) for data in re.findall(f'data:{kind};base64,([^"]*)', page)]


def test_take_with_picture_and_sound_plays_as_a_film(tmp_path):
    page = page_of(tmp_path, Take("a", "a", FRAMES, 8.0, TONE, 16000))
    (film,) = embedded(page, "video/mp4")
    assert film == (tmp_path / "media" / "k.a.mp4").read_bytes()
    with av.open(io.BytesIO(film)) as container:
        assert container.streams.audio[0].rate == 16000
        assert sum(1 for _ in container.decode(video=0)) == 4
    sizes = [Image.open(io.BytesIO(png)).size for png in embedded(page, "image/png")]
    assert sizes == [(8 * 108, 72), (576, 96)]


def test_take_without_sound_has_no_spectrogram(tmp_path):
    page = page_of(tmp_path, Take("a", "a", FRAMES, 8.0, None, 0))
    with av.open(io.BytesIO(embedded(page, "video/mp4")[0])) as container:
        assert not container.streams.audio
    assert len(embedded(page, "image/png")) == 1


def test_take_without_picture_plays_as_sound(tmp_path):
    page = page_of(tmp_path, Take("a", "a", None, 0.0, np.repeat(TONE, 2, axis=0), 16000))
    (sound,) = embedded(page, "audio/wav")
    with wave.open(io.BytesIO(sound)) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 16000, 16000)
        samples = np.frombuffer(file.readframes(16000), "<i2").reshape(-1, 2)
    np.testing.assert_allclose(samples[:, 1] / 32767, TONE[0], atol=1e-4)
    assert len(embedded(page, "image/png")) == 1


def test_take_of_nothing_is_its_note(tmp_path):
    page = page_of(tmp_path, Take("a", "a", None, 0.0, None, 0, note="missing <x>"))
    assert "missing &lt;x&gt;" in page and "base64" not in page
    assert not list((tmp_path / "media").iterdir())


def test_texts_are_escaped(tmp_path):
    page = page_of(tmp_path, note="<i>")
    assert "A &amp; B" in page and "&lt;b&gt;" in page and "&lt;i&gt;" in page


@pytest.mark.parametrize(("rate", "expected"), [(16000, 16000), (20000, 22050), (192000, 96000)])
def test_sound_of_any_rate_is_playable(rate, expected):
    sound, found = playable(TONE, rate)
    assert found == expected and sound.shape[1] == -(-16000 * expected // rate)


def test_page_that_fails_leaves_the_old_one(tmp_path):
    page_of(tmp_path)
    before = (tmp_path / "index.html").read_text()

    def fail():
        yield Entry("new", "", ())
        raise OSError("stop")

    with pytest.raises(OSError, match="stop"):
        write_gallery(tmp_path, "", "", fail())
    assert (tmp_path / "index.html").read_text() == before
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "media"}


def test_mel_decibels_of_a_tone_are_loudest_in_its_band_and_silence_is_at_the_floor():
    tone = mel_decibels(TONE, 16000)
    louder = mel_decibels(2 * TONE, 16000)
    assert tone.shape == (MEL_BANDS, 101)
    middle = tone[:, 50]
    assert middle.max() - np.median(middle) > 40
    np.testing.assert_allclose((louder - tone)[middle.argmax(), 50], 6.02, atol=0.01)
    silence = mel_decibels(np.zeros((1, 10), np.float32), 16000)
    np.testing.assert_allclose(silence, -100, atol=1e-4)
