"""Arrays with a row for each clip, in a run's samples/, of which some clips could not be read."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.errors import UsageError

log = logging.getLogger(__name__)


def keep_read(folder: Path, arrays: dict[str, np.ndarray], rows: Sequence[int]) -> None:
    """Leaves the ``rows`` that were read in ``arrays`` and in their files, NAME.npy in ``folder``. UsageError where
    there are none."""
    if not rows:
        raise UsageError(f"{folder.parent}: not one held-out clip could be read; look at the log for their names")
    wanted = len(next(iter(arrays.values())))
    if len(rows) == wanted:
        return
    log.warning("%d of %d clips could not be read and are left out", wanted - len(rows), wanted)
    for name in arrays:
        arrays[name] = arrays[name][list(rows)]
        np.save(folder / f"{name}.npy", arrays[name])
