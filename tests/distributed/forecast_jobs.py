"""Runs forecast jobs, several after one another in the same ranks: ``python forecast_jobs.py OUT`` with a JSON list of
their configs on standard input, in every rank."""

import json
import os
import sys
from pathlib import Path

from launcher.rank import leave
from stpredict.jobs.config import ForecastConfig
from stpredict.jobs.start import start


def main(out: Path) -> None:
    for job in json.load(sys.stdin):
        config = ForecastConfig(**{**job, "run": out / job["run"]})
        code = start(config, shared_terminal=True)
        assert code == 0, f"exit status {code}: {config.run}"
    if os.environ["RANK"] == "0":
        print(json.dumps({"done": True}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
