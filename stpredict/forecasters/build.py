"""The forecaster of each kind of config."""

from stpredict.forecasters.config import AnyForecaster, SimVPConfig
from stpredict.forecasters.simvp import SimVP


def build_forecaster(config: AnyForecaster) -> SimVP:
    match config:
        case SimVPConfig():
            return SimVP(config)
    raise NotImplementedError(config.kind)
