import io
from itertools import pairwise

import numpy as np
import pytest
from numbered_videos import frame_numbers, numbered_frames

from data_pipeline.arrays import cut_array, load_array
from data_pipeline.clips import clip_indices
from data_pipeline.config import ClipConfig
from data_pipeline.decode import DecodeError, VideoInfo, decode_clip
from data_pipeline.errors import UsageError
from data_pipeline.video_files import write_mp4


def rng(seed=0):
    return np.random.default_rng(seed)


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def field():
    """(6, 10, 12, 2): every value says where it stands."""
    return np.arange(6 * 10 * 12 * 2, dtype=np.float32).reshape(6, 10, 12, 2)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_numpy_saved_is_loaded(dtype, order):
    array = np.asarray(rng().random((3, 4, 5, 2)) * 255, dtype, order=order)
    np.testing.assert_array_equal(load_array(npy(array)), array)


def test_a_pickle_is_refused_and_not_run():
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("it was unpickled",)

    with pytest.raises(DecodeError, match="npy: holds pickled objects"):
        load_array(npy(np.array([Bomb()], dtype=object), allow_pickle=True))


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_whatever_a_damaged_header_says_is_a_decode_error_of_one_line():
    whole, rng, messages = npy(np.zeros((2, 4, 4, 1), np.uint8)), np.random.default_rng(0), []
    for _ in range(2000):
        damaged = bytearray(whole)
        for place in rng.integers(0, 80, size=3):
            damaged[place] = rng.integers(32, 127)
        try:
            load_array(bytes(damaged))
        except DecodeError as error:
            messages.append(str(error))
    assert len(messages) > 1900
    assert not any("\n" in message for message in messages)


def test_a_header_of_negative_sizes_is_refused():
    whole = npy(np.zeros((1, 2, 3, 1), np.uint8))
    with pytest.raises(DecodeError, match=r"6 bytes, 6 claimed by shape \(-1, -2, 3, 1\)"):
        load_array(whole.replace(b"(1, 2, 3, 1), }  ", b"(-1, -2, 3, 1), }"))


def test_a_header_that_claims_more_than_there_is_is_refused_before_it_is_allocated():
    whole = npy(np.zeros((2, 8, 8, 1), np.uint8))
    claim = whole.replace(b"(2, 8, 8, 1), }" + b" " * 12, b"(99999999999, 8, 8, 1), }  ")
    assert len(claim) == len(whole)
    with pytest.raises(DecodeError, match=r"128 bytes, 6399999999936 claimed by shape \(99999999999, 8, 8, 1\)"):
        load_array(claim)
    with pytest.raises(DecodeError, match="129 bytes, 128 claimed"):
        load_array(whole + b"\0")
    with pytest.raises(DecodeError, match="127 bytes, 128 claimed"):
        load_array(whole[:-1])


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"", "npy: "),
        (b"<html>not an array</html>", "npy: "),
        (npy(np.zeros((2, 8, 8), np.uint8)), r"shape \(2, 8, 8\); \(t, h, w, c\) is needed"),
        (npy(np.zeros((2, 0, 8, 1), np.uint8)), r"shape \(2, 0, 8, 1\)"),
        (npy(np.zeros((2, 8, 8, 1), np.float64)), "holds float64; uint8 and float32 are read"),
    ],
)
def test_what_is_no_array_of_frames_is_refused_in_one_line(encoded, message):
    with pytest.raises(DecodeError, match=message) as caught:
        load_array(encoded)
    assert "\n" not in str(caught.value)


def test_arrays_and_videos_of_the_same_frames_give_the_same_clips(tmp_path):
    frames = np.repeat(np.repeat(rng().integers(0, 256, (24, 6, 8, 3), dtype=np.uint8), 8, 1), 8, 2)
    write_mp4(tmp_path / "v.mp4", frames, fps=10, crf=0)
    encoded = (tmp_path / "v.mp4").read_bytes()
    as_decoded = decode_clip(encoded, ClipConfig(frames=24, size=(48, 64)), rng())
    info = VideoInfo(24, 10.0, 48, 64, "decord", "")
    for config in (
        ClipConfig(frames=5, stride=2, size=(16, 16), flip=True),
        ClipConfig(frames=3, size=(16, 16), short_side=24, crop="random", flip=True, channels=1),
        ClipConfig(frames=4, size=(20, 30), resize="stretch", start="centre"),
    ):
        for seed, part in ((0, (0, 1)), (1, (2, 3)), (2, (0, 2))):
            expected = decode_clip(encoded, config, rng(seed), info, part)
            np.testing.assert_array_equal(cut_array(as_decoded, config, rng(seed), part), expected)


def test_luminance_becomes_rgb_where_the_config_wants_three_channels():
    frames = numbered_frames(4)[..., :1]
    clip = cut_array(frames, ClipConfig(frames=4, size=(32, 32)), rng())
    assert clip.shape == (4, 32, 32, 3)
    assert frame_numbers(clip) == [0, 1, 2, 3]
    assert cut_array(frames, ClipConfig(frames=4, size=(8, 8), channels=1), rng()).shape == (4, 8, 8, 1)
    with pytest.raises(DecodeError, match="2 channels of uint8"):
        cut_array(np.zeros((4, 8, 8, 2), np.uint8), ClipConfig(frames=4, size=(8, 8)), rng())


def test_a_field_keeps_its_values_when_cut_in_time_cropped_and_mirrored(field):
    config = ClipConfig(frames=2, stride=2, size=(4, 6), short_side=10, crop="random", flip=True)
    places, mirrored = set(), 0
    for seed in range(60):
        clip = cut_array(field, config, rng(seed))
        assert (clip.dtype, clip.shape) == (np.float32, (2, 4, 6, 2))
        if flipped := clip[0, 0, 0, 0] > clip[0, 0, -1, 0]:
            clip = clip[:, :, ::-1]
        mirrored += bool(flipped)
        time, top, left, _ = np.unravel_index(int(clip[0, 0, 0, 0]), field.shape)
        np.testing.assert_array_equal(clip, field[time : time + 3 : 2, top : top + 4, left : left + 6])
        places.add((int(top), int(left)))
    assert {top for top, _ in places} == set(range(7))
    assert {left for _, left in places} == set(range(7))
    assert 15 < mirrored < 45


def test_a_whole_field_is_the_field(field):
    np.testing.assert_array_equal(cut_array(field, ClipConfig(frames=6, size=(10, 12)), rng()), field)
    np.testing.assert_array_equal(cut_array(field, ClipConfig(frames=6, size=(10, 12), resize="stretch"), rng()), field)
    centre = cut_array(field, ClipConfig(frames=6, size=(10, 10)), rng())  # one side fits: a crop, no resize
    np.testing.assert_array_equal(centre, field[:, :, 1:11])


@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_a_field_is_never_resized(field, resize):
    with pytest.raises(
        DecodeError, match=r"a field of 10x12 .* is not resized to 5x6: .* crop with clip.short_side 10"
    ):
        cut_array(field, ClipConfig(frames=6, size=(5, 6), resize=resize), rng())


def test_arrays_have_no_times_and_a_limit_of_size(field):
    with pytest.raises(UsageError, match="arrays carry no times"):
        cut_array(field, ClipConfig(frames=2, size=(10, 12), fps=5), rng())
    with pytest.raises(DecodeError, match="12x10 pixels, over the limit of max_pixels: 100"):
        cut_array(field, ClipConfig(frames=2, size=(10, 12), max_pixels=100), rng())


def test_a_clip_can_be_written_to_and_leaves_its_source_alone():
    encoded = npy(np.zeros((4, 8, 8, 1), np.float32))
    clip = cut_array(load_array(encoded), ClipConfig(frames=4, size=(8, 8)), rng())
    clip += 1
    assert load_array(encoded).max() == 0


@pytest.mark.parametrize("frames", [5, 6, 12, 30, 31])
def test_parts_tile_the_possible_starts(frames):
    config = ClipConfig(frames=5)
    whole = {clip_indices(frames, config, where).start for where in np.linspace(0, 0.999, 500)}
    for parts in (1, 2, 3, 7):
        by_part = [
            {clip_indices(frames, config, where, (index, parts)).start for where in np.linspace(0, 0.999, 200)}
            for index in range(parts)
        ]
        assert all(max(earlier) <= min(later) for earlier, later in pairwise(by_part))
        if len(whole) >= parts:
            assert sum(map(len, by_part)) == len(whole)  # none twice
            assert set.union(*by_part) == whole
        else:
            assert set.union(*by_part) <= whole
