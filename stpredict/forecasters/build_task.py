"""How a forecaster of each kind is trained."""

from stpredict.forecasters.config import AnyForecaster, ForecasterDataConfig, ForecasterLossConfig, RecurrentConfig
from stpredict.forecasters.recurrent_task import RecurrentTask
from stpredict.forecasters.scaling import Scaling
from stpredict.forecasters.task import ForecasterTask


def build_forecaster_task(
    model: AnyForecaster,
    loss: ForecasterLossConfig,
    data: ForecasterDataConfig,
    scalings: tuple[Scaling, Scaling],
    seed: int,
) -> ForecasterTask:
    """``scalings``: of the training and of the validation split."""
    task = RecurrentTask if isinstance(model, RecurrentConfig) else ForecasterTask
    return task(model, loss, data, scalings, seed)
