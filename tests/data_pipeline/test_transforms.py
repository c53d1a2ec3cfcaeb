import torch

from data_pipeline.transforms import to_clip, to_video


def test_every_level_survives_the_way_there_and_back():
    clip = torch.arange(256, dtype=torch.uint8).reshape(1, 4, 8, 8, 1).expand(2, 4, 8, 8, 3)
    video = to_video(clip)
    assert (video.dtype, tuple(video.shape)) == (torch.float32, (2, 3, 4, 8, 8))
    assert (video.min().item(), video.max().item()) == (-1, 1)
    assert torch.equal(video[1, 2, 3, 7], clip[1, 3, 7, :, 2].float() / 127.5 - 1)
    assert torch.equal(to_clip(video), clip)


def test_what_lies_outside_is_clamped_and_what_lies_between_is_rounded():
    video = torch.tensor([-3.0, 3.0, 0.0, 1 / 127.5 * 0.4, 1 / 127.5 * 0.6]).reshape(1, 1, 1, 1, 5)
    assert to_clip(video).flatten().tolist() == [0, 255, 128, 128, 128]
    assert to_clip(video.bfloat16()).dtype == torch.uint8
