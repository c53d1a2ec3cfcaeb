import io

import av
import numpy as np
import pytest
from numbered_videos import frame_numbers, numbered_frames
from PIL import Image

from data_pipeline.video_files import write_gif, write_mp4


def read(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        facts = stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.average_rate)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), facts


def test_mp4_comes_back_as_the_same_frames(tmp_path):
    frames = numbered_frames(20, 40, 56)
    write_mp4(tmp_path / "v.mp4", frames, fps=12.5)
    decoded, facts = read(tmp_path / "v.mp4")
    assert facts == ("h264", "yuv420p", 12.5)
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).max() <= 4


def test_odd_sizes_gain_a_repeated_row_and_column(tmp_path):
    write_mp4(tmp_path / "v.mp4", numbered_frames(3, 33, 35), fps=10)
    decoded, _ = read(tmp_path / "v.mp4")
    assert decoded.shape == (3, 34, 36, 3)
    assert np.abs(decoded[:, -1].astype(int) - decoded[:, -3]).max() <= 2


def test_the_same_frames_give_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(10):
        frames = np.repeat(np.repeat(rng.integers(0, 256, (17, 8, 8, 3), dtype=np.uint8), 8, 1), 8, 2)
        write_mp4(tmp_path / "a.mp4", frames, fps=10)
        moved = [rng.bytes(n) for n in (1_000, 30_000 + number, 100_000)]  # frames land elsewhere in memory
        write_mp4(tmp_path / "b.mp4", frames, fps=10)
        assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes(), len(moved)


def test_gif_comes_back_as_the_same_frames(tmp_path):
    write_gif(tmp_path / "v.gif", numbered_frames(8), fps=10)
    with Image.open(io.BytesIO((tmp_path / "v.gif").read_bytes())) as image:
        assert image.n_frames == 8
        assert image.info["duration"] == 100
        frames = []
        for number in range(8):
            image.seek(number)
            frames.append(np.asarray(image.convert("RGB")))
    assert frame_numbers(np.stack(frames)) == list(range(8))


@pytest.mark.parametrize("write", [write_mp4, write_gif])
def test_wrong_frames_are_refused_and_leave_nothing(tmp_path, write):
    with pytest.raises(ValueError, match="expected uint8 frames"):
        write(tmp_path / "v", numbered_frames(3).astype(np.float32), fps=10)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_neither_a_file_nor_half_of_one(tmp_path, monkeypatch):
    class FullDisk:
        frames = 0

        @classmethod
        def from_ndarray(cls, *arguments, **options):
            cls.frames += 1
            if cls.frames == 3:
                raise OSError("disk full")
            return whole(*arguments, **options)

    whole = av.VideoFrame.from_ndarray
    monkeypatch.setattr(av, "VideoFrame", FullDisk)
    with pytest.raises(OSError, match="disk full"):
        write_mp4(tmp_path / "v.mp4", numbered_frames(5), fps=10)
    assert not list(tmp_path.iterdir())
