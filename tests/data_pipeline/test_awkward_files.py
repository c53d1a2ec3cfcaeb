"""Every file under awkward/ of the test data: either the right frames, or a DecodeError with a name.

What is right is known from elsewhere: the table holds frames and size as ffprobe 5.1 counts and states them, turned as
its side data say; pixels are compared with a bare PyAV loop over all frames. Needs STPREDICT_TEST_DATA.
"""

import io
import os
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import ClipConfig, ClipDataConfig, FolderSource
from data_pipeline.decode import DecodeError, decode_clip, probe
from data_pipeline.manifest import merge, read_record
from data_pipeline.order import Share
from data_pipeline.shards import plan_shards, write_shards
from data_pipeline.sources.source import describe, walk
from data_pipeline.stream import clip_evaluation_batches

# name: frames, height, width, decoder
RIGHT = {
    "codecs/asl_milk.mkv": (51, 480, 640, "decord"),
    "codecs/bt709_full_range.mp4": (30, 720, 1280, "decord"),
    "codecs/h264_10bits.mp4": (30, 200, 200, "pyav"),  # decord's colours are 3.5 levels off
    "codecs/h265_video.mp4": (10, 128, 128, "pyav"),  # decord is one frame late after a seek
    "corrupt/truncated_xvid.avi": (194, 480, 640, "pyav"),  # ffprobe: 195, the last of them flagged corrupt
    "corrupt/video_with_failing_audio.mp4": (280, 360, 640, "decord"),
    "fate/av1_av1-1-b10-23-film_grain-50.mp4": (10, 288, 352, "pyav"),  # decord knows no AV1
    "fate/cfhd_cfhd_odd.mp4": (10, 241, 496, "decord"),
    "fate/h264_cropdetect.mp4": (32, 486, 720, "decord"),
    "fate/h264_dts_5frames.mkv": (5, 256, 512, "pyav"),  # without timestamps decord may mistake the last frames
    "fate/h264_extradata-reload-multi-stsd.mp4": (4, 128, 256, "pyav"),  # 256x128, then 128x128
    "fate/h264_interlaced_crop.mp4": (126, 360, 640, "pyav"),  # decord is three frames late after a seek
    "fate/h264_mov-3elist.mp4": (48, 480, 640, "pyav"),  # decord also gives the frames that the edit list leaves out
    "fate/h264_mov_neg_first_pts_discard.mp4": (15, 240, 320, "pyav"),  # decord also gives what is before time 0
    "fate/h264_mp4-init-nonkeyframe.mp4": (27, 720, 1280, "pyav"),  # 91 packets before the first keyframe
    "fate/h264_white_zombie_scrunch-part.mp4": (64, 240, 160, "pyav"),  # ffprobe: 65, the last flagged corrupt
    "fate/hevc_hdr10tags-both.mkv": (10, 560, 320, "pyav"),  # rotated by an SEI message, which decord and ffprobe miss
    "fate/mpeg2video_dvd_single_frame.mp4": (1, 576, 720, "pyav"),
    "fate/mpeg4_packed_bframes.avi": (15, 352, 544, "decord"),
    "fate/prores_gray.mp4": (2, 576, 720, "decord"),
    "fate/vp90-2-02-size-08x08.mp4": (10, 8, 8, "pyav"),  # decord: 12 channels
    "fate/vp90-2-02-size-34x18.mp4": (10, 18, 34, "decord"),
    "fate/vp91-2-04-yuv444.mp4": (10, 288, 352, "decord"),
    "odd/big_buck_bunny_432_433.webm": (24, 720, 1280, "decord"),
    "odd/no_duration.webm": (74, 720, 1280, "pyav"),
    "odd/realshort.mp4": (36, 240, 320, "decord"),
    "odd/smpte-2997.mp4": (251, 1080, 1920, "decord"),
    "odd/transparent.webm": (150, 200, 200, "decord"),
    "rotated/ios9.mov": (14, 1280, 720, "decord"),
    "rotated/sideways_movie.mov": (25, 640, 480, "decord"),
    "rotated/video_0.mov": (3, 320, 568, "decord"),
    "rotated/video_270.mov": (3, 568, 320, "decord"),
}
REFUSED = {
    "corrupt/broken.mp4": "Invalid data found",
    "corrupt/html_page_named.avi": "Invalid data found",
    "odd/audio_only.mp4": "no video in the file",
    "odd/invalid_userdata.mp4": "no frame can be decoded",  # the index is there, the frames are cut off
}
FOLDER = Path(os.environ.get("STPREDICT_TEST_DATA", ""), "awkward")
FILES = sorted(
    path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file() and path.name != "SOURCE.txt"
)


def rng():
    return np.random.default_rng(0)


@lru_cache(maxsize=1)
def bare_pyav(name, frames):
    """The first, middle and last of ``frames`` frames, and thumbnails of all, or of every n-th where there are many:
    decoded by libavcodec's defaults."""
    shown, thumbnails = {}, []
    with av.open(io.BytesIO((FOLDER / name).read_bytes())) as container:
        try:
            for number, frame in enumerate(container.decode(video=0)):
                if number >= frames:
                    break
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                if number % stride(frames) == 0:
                    thumbnails.append(stretched(pixels, 16, 16))
                if number in (0, frames // 2, frames - 1):
                    shown[number] = pixels
        except av.FFmpegError:
            pass  # of a cut file
    return shown, np.stack(thumbnails)


def stride(frames):
    return 1 + frames // 60


def stretched(pixels, height, width):
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def difference(clip, expected):
    return np.abs(clip.astype(int) - expected).mean(axis=tuple(range(1, clip.ndim))).max()


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_the_folder_has_an_expected_outcome(name):
    assert (name in RIGHT) != (name in REFUSED), "say in the table what is right for this file"


@pytest.mark.parametrize("name", [name for name in FILES if name in RIGHT])
def test_number_size_order_and_pixels_of_the_frames_are_right(name):
    frames, height, width, decoder = RIGHT[name]
    encoded = (FOLDER / name).read_bytes()
    info = probe(encoded)
    assert (info.frames, info.height, info.width, info.decoder) == (frames, height, width, decoder)

    shown, thumbnails = bare_pyav(name, frames)
    whole = ClipConfig(frames=len(thumbnails), stride=stride(frames), size=(16, 16), resize="stretch", start="first")
    assert difference(decode_clip(encoded, whole, rng(), info), thumbnails) < 1
    single = ClipConfig(frames=1, size=(height, width), resize="stretch", start="first")
    for number, pixels in shown.items():
        clip = decode_clip(encoded, single, rng(), info, part=(number, frames))
        assert difference(clip, stretched(pixels, height, width)[None]) < 0.5, number


@pytest.mark.parametrize("name", [name for name in FILES if name in REFUSED])
def test_what_cannot_be_decoded_is_a_decode_error_with_a_reason(name):
    with pytest.raises(DecodeError, match=f"pyav: .*{REFUSED[name]}") as caught:
        probe(FOLDER / name)
    assert "\n" not in str(caught.value)


def test_frames_that_change_their_size_are_resized_each_from_its_own(test_data):
    encoded = (test_data / "awkward" / "fate/h264_extradata-reload-multi-stsd.mp4").read_bytes()
    with av.open(io.BytesIO(encoded)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape[:2] for frame in frames] == [(128, 256)] * 2 + [(128, 128)] * 2
    clip = decode_clip(encoded, ClipConfig(frames=4, size=(32, 32)), rng())
    cropped = [frame[:, (frame.shape[1] - 128) // 2 :][:, :128] for frame in frames]
    assert difference(clip, np.stack([stretched(frame, 32, 32) for frame in cropped])) < 3


def test_decord_is_not_asked_for_the_last_frame_of_packed_b_frames(test_data):
    """Read after a jump, it is an earlier frame every other time."""
    encoded = (test_data / "awkward" / "fate/mpeg4_packed_bframes.avi").read_bytes()
    with av.open(io.BytesIO(encoded)) as container:
        *_, last = container.decode(video=0)
    info = probe(encoded)
    assert info.decoder == "decord"
    config = ClipConfig(frames=2, stride=14, size=(info.height, info.width))
    for _ in range(15):
        clip = decode_clip(encoded, config, rng(), info)
        assert difference(clip[1:], last.to_ndarray(format="rgb24")[None]) < 0.5


def test_the_whole_folder_goes_through_shards_and_data_workers(test_data, tmp_path):
    """What is refused is left out of the shards by name; a worker gives the first frames of all the rest."""
    source = FolderSource(path=test_data / "awkward", validation_fraction=0)
    samples = walk(source)
    plans = plan_shards(source, samples, describe(source, samples), shards=4, window_bytes=2**22, seed=0)
    write_shards(tmp_path / "train", plans, workers=2)
    merge(tmp_path / "train")
    names = {sample.key: sample.name for sample in samples}
    left_out = {names[key] for n in range(4) for key in read_record(tmp_path / "train", n).skipped}
    assert left_out == REFUSED.keys()

    clip = ClipConfig(frames=1, size=(32, 32), start="first", resize="stretch")
    config = ClipDataConfig(shards=tmp_path, clip=clip, workers=2)
    found = {}
    for batch in clip_evaluation_batches(config, "train", seed=0, share=Share(0, 1, 4)):
        for key, frame, weight in zip(batch["key"], batch["clip"], batch["weight"], strict=True):
            if weight:
                found[names[key]] = frame.numpy()
    assert found.keys() == RIGHT.keys()
    for name, frame in found.items():
        encoded = (test_data / "awkward" / name).read_bytes()
        np.testing.assert_array_equal(frame, decode_clip(encoded, clip, np.random.default_rng(0)), err_msg=name)
        assert frame.any(), name
