import pytest
import torch
import torch.nn.functional as F

from data_pipeline.errors import UsageError
from stpredict.config import validate
from stpredict.losses.config import AdversarialLossConfig, PatchGanConfig
from stpredict.losses.patch_gan import PatchDiscriminator, PatchGan

TINY = PatchGanConfig(channels=4, layers=2, groups=2)


def test_published_size_to_the_parameter():
    """TATS's: 4x4x4 kernels, 64 to 512 channels, norms of two values per channel."""
    with torch.device("meta"):
        found = sum(p.numel() for p in PatchDiscriminator(PatchGanConfig(), 3).parameters())
    kernels = 64 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    assert found == kernels + (64 + 128 + 256 + 512 + 1) + 2 * (128 + 256 + 512) == 11_057_857


@pytest.mark.parametrize("sides", [(17, 32, 32), (5, 16, 24), (1, 8, 8), (2, 7, 9)])
def test_any_size_has_the_logits_that_are_counted(sides):
    discriminator = PatchDiscriminator(TINY, 3)
    logits = discriminator(torch.randn(2, 3, *sides))
    assert logits.shape[:2] == (2, 1)
    assert logits[0].numel() == discriminator.logits(*sides)


def test_the_network_written_out():
    torch.manual_seed(0)
    discriminator, x = PatchDiscriminator(TINY, 3), torch.randn(2, 3, 5, 16, 16)
    convs = [layer for layer in discriminator.network if isinstance(layer, torch.nn.Conv3d)]
    assert all(conv.weight.std().item() == pytest.approx(0.02, rel=0.15) and not conv.bias.any() for conv in convs)
    expected = F.leaky_relu(F.conv3d(x, convs[0].weight, stride=2, padding=2), 0.2)
    for conv, stride in zip(convs[1:-1], (2, 1), strict=True):
        expected = F.leaky_relu(F.group_norm(F.conv3d(expected, conv.weight, stride=stride, padding=2), 2), 0.2)
    expected = F.conv3d(expected, convs[-1].weight, padding=2)
    torch.testing.assert_close(discriminator(x), expected)


def test_a_videos_logits_depend_on_no_other_video():
    torch.manual_seed(0)
    discriminator, videos = PatchDiscriminator(TINY, 1), torch.randn(3, 1, 5, 16, 16)
    alone = torch.cat([discriminator(video[None]) for video in videos])
    torch.testing.assert_close(discriminator(videos), alone)
    assert discriminator.training


def test_terms_are_those_of_the_papers_written_out():
    config = AdversarialLossConfig(weight=0.3, lecam=0.02, lecam_decay=0.5, r1=4, r1_every=3, discriminator=TINY)
    torch.manual_seed(0)
    gan = PatchGan(config, 1)
    real, fake = torch.randn(2, 2, 1, 5, 16, 16)
    discriminator = gan.discriminator
    for parameter in discriminator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    gan.updated({"logit_real": torch.tensor(0.2), "logit_fake": torch.tensor(-0.4)})
    of_real, of_fake = discriminator(real), discriminator(fake)
    sums, counts = gan.discriminator_step(discriminator, real, fake, 3), gan.counts(2, 5, 16, 16)
    real_again = real.clone().requires_grad_()
    gradient = torch.autograd.grad(discriminator(real_again).sum(), real_again)[0]
    loss = 0.5 * (F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean())
    loss += 0.02 * (F.relu(of_real + 0.4).square().mean() + F.relu(0.2 - of_fake).square().mean())
    loss += 3 * 4 / 2 * gradient.square().sum() / of_real.numel()
    found = sum(weight * sums[name] / counts[name] for name, weight in gan.weights.items())
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(sums["logit_fake"] / counts["logit_fake"], of_fake.mean())
    assert "r1" not in gan.discriminator_step(discriminator, real, fake, 4)
    judged = gan.model_step(discriminator, fake)["adversarial"] / counts["adversarial"]
    torch.testing.assert_close(judged, -of_fake.mean())
    assert gan.model_weights == {"adversarial": 0.3}


def test_without_regularizers_none_is_computed():
    gan = PatchGan(AdversarialLossConfig(discriminator=TINY), 1)
    clips = torch.randn(1, 1, 1, 8, 8)
    assert gan.discriminator_step(gan.discriminator, clips, clips, 0).keys() == {
        "real",
        "fake",
        "logit_real",
        "logit_fake",
    }
    assert not list(gan.discriminator.buffers())


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(UsageError, match=r"2 x channels \(10\) must be a multiple of groups \(4\)"):
        validate(PatchGanConfig, {"channels": 5, "groups": 4}, "loss.yaml")
