"""A translator from its config."""

from torch import nn

from data_pipeline.errors import UsageError
from stpredict.forecasters.config import (
    AnyTranslator,
    ConvMixerConfig,
    ConvNextConfig,
    GstaConfig,
    HorNetConfig,
    IncepUConfig,
    MlpMixerConfig,
    MogaNetConfig,
    PoolFormerConfig,
    SwinConfig,
    TauConfig,
    UniFormerConfig,
    VanConfig,
    VitConfig,
)
from stpredict.forecasters.translators.conv_mixer import ConvMixerBlock
from stpredict.forecasters.translators.convnext import ConvNextBlock
from stpredict.forecasters.translators.gsta import gsta_block
from stpredict.forecasters.translators.hornet import hornet_block
from stpredict.forecasters.translators.incepu import IncepU
from stpredict.forecasters.translators.metaformer import MetaFormer
from stpredict.forecasters.translators.mlp_mixer import mlp_mixer_block
from stpredict.forecasters.translators.moganet import moganet_block
from stpredict.forecasters.translators.poolformer import poolformer_block
from stpredict.forecasters.translators.swin import swin_block
from stpredict.forecasters.translators.tau import tau_block
from stpredict.forecasters.translators.uniformer import uniformer_block
from stpredict.forecasters.translators.van import van_block
from stpredict.forecasters.translators.vit import vit_block


def build_translator(
    config: AnyTranslator, channels: int, hidden: int, blocks: int, grid: tuple[int, int]
) -> nn.Module:
    """``(b, channels, h, w)`` → the same. ``channels`` is T·hid_S, ``hidden`` hid_T, ``blocks`` N_T; (h, w) is
    ``grid``: MLP-Mixer and Swin are made for one, the others take any.

    Its attribute ``blocks`` lists what may be recomputed or compiled by itself, in order, and ``drop_rates`` how likely
    each residual branch is to be left out in training: where there are any, ``forward`` takes what is kept of them
    (:class:`~stpredict.forecasters.translators.metaformer.MetaFormer`). UsageError where the widths do not fit the
    translator.
    """
    _check(config, channels, hidden)
    if isinstance(config, IncepUConfig):
        return IncepU(config, channels, hidden, blocks)

    def make(channels: int, index: int, drop_path: float) -> nn.Module:
        match config:
            case GstaConfig():
                return gsta_block(config, channels, drop_path)
            case VitConfig():
                return vit_block(config, channels, drop_path)
            case SwinConfig():
                return swin_block(config, channels, drop_path, grid, shifted=index % 2 == 1)
            case UniFormerConfig():
                return uniformer_block(config, channels, drop_path, local=index in (0, blocks - 1))
            case MlpMixerConfig():
                return mlp_mixer_block(config, channels, drop_path, grid)
            case ConvMixerConfig():
                return ConvMixerBlock(channels)
            case PoolFormerConfig():
                return poolformer_block(config, channels, drop_path)
            case ConvNextConfig():
                return ConvNextBlock(config, channels, drop_path)
            case VanConfig():
                return van_block(config, channels, drop_path)
            case HorNetConfig():
                return hornet_block(config, channels, drop_path)
            case MogaNetConfig():
                return moganet_block(config, channels, drop_path)
            case TauConfig():
                return tau_block(config, channels, drop_path)

    return MetaFormer(make, channels, hidden, blocks, 0.0 if isinstance(config, ConvMixerConfig) else config.drop_path)


def _check(config: AnyTranslator, channels: int, hidden: int) -> None:
    match config:
        case VitConfig() | SwinConfig() | UniFormerConfig():
            factor, why = 8, "its heads"
        case HorNetConfig() | MogaNetConfig():
            factor, why = 8, "how it splits its channels"
        case IncepUConfig(groups=groups):
            factor, why = groups, "its groups"
        case _:
            factor, why = 1, ""
    if isinstance(config, TauConfig) and min(channels, hidden) < 4:
        raise UsageError(
            f"model: translator tau needs 4 channels at least: input_frames x hid_S are {channels}, hid_T is {hidden}"
        )
    hidden_factor = 2 * factor if isinstance(config, IncepUConfig) else factor
    if channels % factor:
        raise UsageError(
            f"model: {channels} channels (input_frames x hid_S) are no multiple of {factor}, which translator "
            f"{config.kind} needs for {why}; change hid_S"
        )
    if hidden % hidden_factor:
        raise UsageError(
            f"model.hid_T: {hidden} is no multiple of {hidden_factor}, which translator {config.kind} needs for {why}"
        )
