import contextlib
import dataclasses
import io
import resource

import av
import decord
import numpy as np
import pytest
from av.stream import Disposition
from damaged_videos import claim_size, encode
from numbered_videos import frame_numbers, numbered_frames
from PIL import Image
from pydantic import ValidationError

from data_pipeline.clips import shown_frames
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


@pytest.mark.parametrize("format", ["matroska", "mp4"])
@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_frames_at_a_target_rate_are_those_a_player_would_show(format, decoder):
    """A video of variable frame rate: frame 2 stays from 0.20 s to 0.65 s."""
    times = [0, 100, 200, 650, 700, 800, 900, 1000]
    video = encode(numbered_frames(8), format, "libx264", times=times)
    info = VideoInfo(8, probe(video).fps, 32, 32, decoder, "")
    expected = [max(n for n, time in enumerate(times) if time <= 125 * k) for k in range(9)]
    assert expected == [0, 1, 2, 2, 2, 2, 4, 5, 7]
    config = ClipConfig(frames=8, fps=8, size=(32, 32), start="first")
    assert frame_numbers(decode_clip(video, config, rng(), info)) == expected[:8]
    every_other = config.model_copy(update={"frames": 4, "stride": 2})
    assert frame_numbers(decode_clip(video, every_other, rng(), info)) == expected[:8:2]


def test_the_length_at_a_target_rate_is_the_videos_duration(encoded):
    clips = ClipConfig(frames=12, fps=10, size=(32, 32), start="first")  # 30 frames at 25 a second: 1.2 s
    assert frame_numbers(decode_clip(encoded, clips, rng())) == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]
    with pytest.raises(DecodeError, match="12 frames found, 13 needed"):
        decode_clip(encoded, ClipConfig(frames=13, fps=10, size=(32, 32)), rng())
    twice = decode_clip(encoded, ClipConfig(frames=6, fps=50, size=(32, 32), start="first"), rng())
    assert frame_numbers(twice) == [0, 0, 1, 1, 2, 2]


def test_times_that_matroska_rounds_to_milliseconds_lose_no_frame():
    exact = np.arange(300) / 30
    for offset in np.arange(0, 0.033, 0.0017):
        rounded = np.round(exact + offset, 3)
        assert shown_frames(rounded, 30, 30).tolist() == list(range(300))
        assert shown_frames(rounded, 30, 10).tolist() == list(range(0, 300, 3))


def test_avi_has_no_times_but_its_rate():
    video = encode(numbered_frames(12), "avi", "mpeg4", {"bf": "2"})  # 10 a second
    config = ClipConfig(frames=6, fps=5, size=(32, 32), start="first")
    assert frame_numbers(decode_clip(video, config, rng())) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("start", ["first", "centre", "random"])
def test_clips_of_a_video_lie_in_its_parts_in_order(encoded, start):
    config = ClipConfig(frames=3, size=(32, 32), start=start)  # 28 possible starts: 0-6, 7-13, 14-20, 21-27
    info = probe(encoded)
    starts = [
        {frame_numbers(decode_clip(encoded, config, rng(seed), info, (part, 4)))[0] for seed in range(30)}
        for part in range(4)
    ]
    expected = {"first": [0], "centre": [3], "random": range(7)}[start]
    for part, found in enumerate(starts):
        assert found <= {7 * part + place for place in expected}
        assert len(found) >= min(4, len(expected))


@pytest.mark.parametrize("start", ["first", "centre", "random"])
def test_where_there_are_fewer_starts_than_parts_every_clip_still_lies_in_the_video(start):
    config = ClipConfig(frames=4, start=start)  # 2 possible starts
    clips = [clip_indices(5, config, where, (part, 3)) for part in range(3) for where in (0.0, 0.99)]
    assert {clip.start for clip in clips} == {0, 1}


def test_the_generator_is_drawn_from_alike_whatever_happens(encoded):
    states = []
    for config in (
        ClipConfig(frames=3, size=(32, 32)),
        ClipConfig(frames=3, size=(32, 32), start="first", resize="stretch", fps=5),
        ClipConfig(frames=3, size=(16, 16), short_side=20, crop="random", flip=True),
        ClipConfig(frames=99, size=(16, 16)),
    ):
        generator = rng(3)
        with contextlib.suppress(DecodeError):
            decode_clip(encoded, config, generator)
        states.append(generator.random())
    assert len(set(states)) == 1


@pytest.fixture(scope="module")
def places():
    """Lossless, 4 frames of 40x60 in which red grows downwards and green to the right: pixels say where they were."""
    frame = np.zeros((40, 60, 3), np.uint8)
    frame[..., 0], frame[..., 1] = 5 * np.arange(40)[:, None], 4 * np.arange(60)
    return encode(np.stack([frame] * 4), "avi", "ffv1", pix_fmt="bgr0")


def test_random_crops_are_the_same_in_all_frames_and_reach_every_place(places):
    config = ClipConfig(frames=4, size=(20, 20), short_side=40, crop="random")
    corners = []
    for seed in range(60):
        clip = decode_clip(places, config, rng(seed)).astype(float)
        assert (clip == clip[0]).all()
        corners.append((clip[0, 0, 0, 0] / 5, clip[0, 0, 0, 1] / 4))
        assert abs(clip[0, -1, -1, 0] / 5 - corners[-1][0] - 19) < 0.5
    top, left = np.array(corners).T
    assert (top.min() < 2, top.max() > 18, left.min() < 4, left.max() > 36) == (True,) * 4
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.4


def test_the_short_side_is_resized_before_the_centre_is_cut_out(places):
    clip = decode_clip(places, ClipConfig(frames=1, size=(10, 10), short_side=20), rng())[0].astype(float)
    np.testing.assert_allclose(clip[:, 0, 0], 5 * (10.5 + 2 * np.arange(10)), atol=2.5)  # rows 10 to 30 of 40
    np.testing.assert_allclose(clip[0, :, 1], 4 * (20.5 + 2 * np.arange(10)), atol=2.5)  # columns 20 to 40 of 60


def test_every_other_clip_is_mirrored_as_a_whole(places):
    config = ClipConfig(frames=4, size=(40, 60), flip=True)
    straight = decode_clip(places, config.unaugmented, rng())
    mirrored = 0
    for seed in range(60):
        clip = decode_clip(places, config, rng(seed))
        is_mirrored = (clip == straight[:, :, ::-1]).all()
        assert is_mirrored or (clip == straight).all()
        mirrored += is_mirrored
    assert 18 <= mirrored <= 42


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"resize": "stretch", "short_side": 80}, "stretch keeps all of a frame"),
        ({"resize": "stretch", "crop": "random"}, "stretch keeps all of a frame"),
        ({"size": (64, 96), "short_side": 80}, "short_side 80 is less than size .* set it to 96"),
    ],
)
def test_configs_of_impossible_crops_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        ClipConfig(**wrong)


def test_the_cover_picture_of_a_song_is_no_video():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=48000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1, width=64, height=64, pix_fmt="yuvj420p")
        cover.disposition = Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 48000
        container.mux([*sound.encode(silence), *sound.encode(None)])
        white = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 255, np.uint8), format="rgb24")
        container.mux([*cover.encode(white), *cover.encode(None)])
    with pytest.raises(DecodeError, match="no video in the file"):
        probe(file.getvalue())


@pytest.mark.parametrize("first", [0, 4], ids=["from the start", "midway"])
@pytest.mark.parametrize(
    ("format", "codec", "side"),
    [("avi", "mjpeg", 30000), ("mp4", "mjpeg", 30000), ("matroska", "mjpeg", 30000), ("webm", "libvpx", 16000)],
)
def test_a_gigantic_frame_is_refused_by_name_and_never_allocated(format, codec, side, first):
    video = encode(numbered_frames(8, 64, 64), format, codec, {"g": "1"})
    assert probe(video).frames == 8
    forged = claim_size(video, side, first)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecodeError, match=rf"claim {side}x{side} pixels, over the limit of max_pixels: {2**25}"):
        probe(forged)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 100 * 1024  # kB; one frame: 384 MB or more


def test_the_limit_of_size_is_the_configs(encoded):
    config = ClipConfig(frames=1, size=(32, 32), max_pixels=48 * 64 - 1)
    for info in (None, probe(encoded)):
        with pytest.raises(DecodeError, match="64x48 pixels, over the limit of max_pixels: 3071"):
            decode_clip(encoded, config, rng(), info)
    assert probe(encoded, max_pixels=48 * 64).frames == 30


@pytest.mark.parametrize("filling", ["nothing", "zeros", "noise"])
@pytest.mark.parametrize(("format", "codec"), [("mp4", "libx264"), ("avi", "mpeg4"), ("matroska", "libx264")])
def test_of_a_damaged_video_the_frames_before_the_damage_are_used_and_no_other(format, codec, filling):
    """From the twelfth packet on 3000 bytes are overwritten, or it is the last and cut in two."""
    textured = rng().integers(0, 256, (24, 8, 8, 3), dtype=np.uint8).repeat(12, 1).repeat(12, 2)
    video = encode(textured, format, codec, {"g": "100"})
    whole = decode_clip(video, ClipConfig(frames=24, size=(96, 96)), rng())
    with av.open(io.BytesIO(video)) as container:
        packet = list(container.demux(video=0))[11]
    if filling == "nothing":
        index = video.index(b"moov") - 4 if format == "mp4" else len(video)
        damaged = video[: packet.pos + packet.size // 2]
        damaged += bytes(0 if format != "mp4" else index - len(damaged)) + video[index:]
    else:
        damage = {"zeros": bytes(3000), "noise": rng(1).bytes(3000)}[filling]
        damaged = video[: packet.pos] + damage + video[packet.pos + 3000 :]
    info = probe(damaged)
    assert 0 < info.frames < 24
    clip = decode_clip(damaged, ClipConfig(frames=info.frames, size=(96, 96)), rng(), info)
    assert np.abs(clip.astype(int) - whole[: info.frames]).mean(axis=(1, 2, 3)).max() < 0.5
    promised = dataclasses.replace(info, frames=24, decoder="pyav")
    with pytest.raises(DecodeError, match=r"frame \d+ is missing"):
        decode_clip(damaged, ClipConfig(frames=24, size=(96, 96)), rng(), promised)


def test_frames_at_the_end_are_never_earlier_ones_where_packets_do_not_tell_their_order():
    """decord's last two frames of H.264 with B-frames in AVI are wrong in half of the reads."""
    video = encode(numbered_frames(24), "avi", "libx264", {"bf": "2"})
    info = probe(video)
    assert info.frames == 24
    for end in [21, 22, 23] * 5:
        clip = decode_clip(video, ClipConfig(frames=2, stride=end, size=(32, 32), start="first"), rng(), info)
        assert frame_numbers(clip) == [0, end]


def test_a_recorded_decoder_that_fails_leaves_its_turn_to_the_other(gif):
    info = dataclasses.replace(probe(gif), decoder="decord")
    assert frame_numbers(decode_clip(gif, ClipConfig(frames=10, size=(32, 32)), rng(), info)) == list(range(10))


@pytest.mark.parametrize(("format", "options"), [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_images_are_videos_of_one_frame(format, options):
    ramp = np.zeros((40, 60, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = 5 * np.arange(40)[:, None], 4 * np.arange(60)
    image = image_file(ramp, format, **options)
    info = probe(image)
    assert (info.frames, info.fps, info.height, info.width, info.decoder) == (1, 0, 40, 60, "pillow")
    clip = decode_clip(image, ClipConfig(frames=1, size=(40, 60), fps=10), rng(), info, part=(1, 2))
    assert clip.shape == (1, 40, 60, 3)
    assert np.abs(clip[0].astype(int) - ramp).mean() < 2
    with pytest.raises(DecodeError, match="1 frames found, 2 needed"):
        decode_clip(image, ClipConfig(frames=2), rng(), info)
    with pytest.raises(DecodeError, match="pillow: its frames claim 60x40 pixels, over the limit of max_pixels: 2399"):
        probe(image, max_pixels=2399)
    with pytest.raises(DecodeError, match="pillow: "):
        probe(image[: len(image) // 2])


def test_photographs_are_turned_upright_and_what_is_no_8_bit_image_is_refused():
    upright = np.zeros((40, 20, 3), np.uint8)
    upright[:10] = 250
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    photograph = image_file(np.rot90(upright), "JPEG", exif=exif)
    assert (probe(photograph).height, probe(photograph).width) == (40, 20)
    clip = decode_clip(photograph, ClipConfig(frames=1, size=(40, 20)), rng())
    assert np.abs(clip[0].astype(int) - upright).mean() < 3
    with pytest.raises(DecodeError, match="8 bits per channel"):
        probe(image_file(np.zeros((8, 8), np.uint16), "PNG"))
    frames = [Image.fromarray(frame) for frame in numbered_frames(3)]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    with pytest.raises(DecodeError, match="is an animation"):
        probe(file.getvalue())


def image_file(pixels, format, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()
