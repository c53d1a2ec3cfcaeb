"""The forecaster of each kind of config."""

from stpredict.forecasters.config import AnyForecaster, ConvLstmConfig, PredRnnConfig, SimVPConfig
from stpredict.forecasters.recurrent import ConvLstm, PredRnn
from stpredict.forecasters.simvp import SimVP


def build_forecaster(config: AnyForecaster) -> SimVP | ConvLstm | PredRnn:
    """A module from scaled frames ``(b, c, t_in, h, w)`` to a :class:`~stpredict.forecasters.simvp.Forecast`.
    UsageError where widths do not fit the translator or the quantizer."""
    match config:
        case SimVPConfig():
            return SimVP(config)
        case ConvLstmConfig():
            return ConvLstm(config)
        case PredRnnConfig():
            return PredRnn(config)
