import io

import av
import decord
import numpy as np
import pytest
from numbered_videos import frame_numbers, numbered_frames
from PIL import Image

from data_pipeline.config import ClipConfig
from data_pipeline.decode import DecodeError, VideoInfo, clip_indices, decode_clip, probe
from data_pipeline.video_files import write_gif, write_mp4


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    path = tmp_path_factory.mktemp("decode") / "numbered.mp4"
    write_mp4(path, numbered_frames(30, 48, 64), fps=25)
    return path.read_bytes()


@pytest.fixture(scope="module")
def gif(tmp_path_factory):
    path = tmp_path_factory.mktemp("decode") / "numbered.gif"
    write_gif(path, numbered_frames(10), fps=10)
    return path.read_bytes()


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("start", "frames", "stride", "expected"),
    [
        ("first", 5, 1, [0, 1, 2, 3, 4]),
        ("first", 4, 3, [0, 3, 6, 9]),
        ("centre", 4, 2, [11, 13, 15, 17]),
        ("first", 10, 3, list(range(0, 28, 3))),
    ],
)
def test_the_frames_asked_for_are_the_frames_decoded(encoded, start, frames, stride, expected):
    clip = decode_clip(encoded, ClipConfig(frames=frames, stride=stride, start=start, size=(48, 64)), rng())
    assert clip.dtype == np.uint8
    assert clip.shape == (frames, 48, 64, 3)
    assert frame_numbers(clip) == expected


def test_random_starts_reach_every_place_and_follow_the_generator(encoded):
    config = ClipConfig(frames=27, size=(32, 32))
    starts = {frame_numbers(decode_clip(encoded, config, rng(seed)))[0] for seed in range(40)}
    assert starts == {0, 1, 2, 3}
    first, second = (decode_clip(encoded, config, rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_last_possible_start_is_never_passed():
    assert clip_indices(30, ClipConfig(frames=10, stride=3), where=np.nextafter(1, 0)) == range(2, 30, 3)


def test_pixels_equal_those_of_an_independent_decoder(encoded):
    with av.open(io.BytesIO(encoded)) as container:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][4:20:2])
    config = ClipConfig(frames=8, stride=2, start="first", size=(48, 64))
    clip = decode_clip(encoded, config.model_copy(update={"frames": 10}), rng())[2:]
    assert np.abs(clip.astype(int) - expected).max() <= 1


def test_crop_keeps_the_centre_square_and_stretch_keeps_everything(tmp_path):
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:, :16] = frame[:, 48:] = 255  # exactly what the centre crop cuts off
    write_mp4(tmp_path / "v.mp4", np.stack([frame] * 3), fps=10)
    encoded = (tmp_path / "v.mp4").read_bytes()
    cropped = decode_clip(encoded, ClipConfig(frames=1, size=(16, 16), resize="crop"), rng())[0]
    stretched = decode_clip(encoded, ClipConfig(frames=1, size=(16, 16), resize="stretch"), rng())[0]
    assert cropped[:, 2:-2].max() < 20
    assert stretched[:, :3].min() > 230
    assert stretched[:, 6:10].max() < 20
    assert stretched[:, -3:].min() > 230


def test_shrinking_averages_instead_of_picking_pixels(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    write_mp4(tmp_path / "v.mp4", stripes[None], fps=10, crf=0)
    clip = decode_clip((tmp_path / "v.mp4").read_bytes(), ClipConfig(frames=1, size=(16, 16)), rng())
    assert clip[0, 2:-2, 2:-2].min() > 80
    assert clip[0, 2:-2, 2:-2].max() < 120


def test_one_channel_is_the_luminance(tmp_path):
    red = np.zeros((2, 32, 32, 3), np.uint8)
    red[..., 0] = 255
    write_mp4(tmp_path / "v.mp4", red, fps=10)
    clip = decode_clip((tmp_path / "v.mp4").read_bytes(), ClipConfig(frames=2, size=(16, 16), channels=1), rng())
    assert clip.shape == (2, 16, 16, 1)
    assert abs(float(clip.mean()) - 0.299 * 255) < 3


def test_too_short_a_video_says_how_many_frames_were_found_and_needed(encoded):
    with pytest.raises(DecodeError, match="30 frames found, 49 needed"):
        decode_clip(encoded, ClipConfig(frames=17, stride=3), rng())


def test_what_decord_refuses_pyav_reads(gif):
    info = probe(gif)
    assert (info.decoder, info.frames) == ("pyav", 10)
    config = ClipConfig(frames=3, stride=2, start="centre", size=(32, 32))
    assert frame_numbers(decode_clip(gif, config, rng())) == [2, 4, 6]
    np.testing.assert_array_equal(decode_clip(gif, config, rng(), info), decode_clip(gif, config, rng()))


def test_both_decoders_take_the_same_random_frames(encoded):
    config = ClipConfig(frames=5, size=(32, 32))
    for seed in range(5):
        by_decord = decode_clip(encoded, config, rng(seed))
        by_pyav = decode_clip(encoded, config, rng(seed), VideoInfo(30, 25, 48, 64, "pyav", ""))
        assert frame_numbers(by_decord) == frame_numbers(by_pyav)


def test_probe_tells_frames_rate_and_size(encoded):
    assert probe(encoded) == VideoInfo(30, 25.0, 48, 64, decoder="decord", decoder_version=decord.__version__)


def test_noise_is_a_decode_error_of_one_line_and_is_not_printed(capfd):
    with pytest.raises(DecodeError) as caught:
        probe(b"<html>not a video</html>" * 1000)
    assert "\n" not in str(caught.value)
    assert "pyav: " in str(caught.value)
    assert "html" not in "".join(capfd.readouterr())  # decord would print the name of its source: every byte


def test_a_missing_frame_in_the_middle_of_a_cut_file_is_an_error_not_a_shorter_clip(encoded):
    info = VideoInfo(60, 25, 48, 64, "pyav", "")  # more frames promised than there are
    with pytest.raises(DecodeError, match="frame 30 is missing"):
        decode_clip(encoded, ClipConfig(frames=60, size=(32, 32)), rng(), info)


def test_pil_and_config_agree_on_what_height_and_width_are(encoded):
    assert decode_clip(encoded, ClipConfig(frames=1, size=(16, 40)), rng()).shape == (1, 16, 40, 3)
    assert Image.fromarray(np.zeros((16, 40, 3), np.uint8)).size == (40, 16)
