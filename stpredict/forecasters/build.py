"""The forecaster of each kind of config."""

from stpredict.forecasters.config import AnyForecaster, ConvLstmConfig, PredRnnConfig, SimVPConfig
from stpredict.forecasters.recurrent import ConvLstm, PredRnn
from stpredict.forecasters.simvp import SimVP


def build_forecaster(config: AnyForecaster) -> SimVP | ConvLstm | PredRnn:
    match config:
        case SimVPConfig():
            return SimVP(config)
        case ConvLstmConfig():
            return ConvLstm(config)
        case PredRnnConfig():
            return PredRnn(config)
