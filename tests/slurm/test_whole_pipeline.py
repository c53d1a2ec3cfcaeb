"""A whole pipeline on a real SLURM of two nodes."""

import pytest

from stpredict.run import Run

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def launched(pipelines, tmp_path_factory):
    run = tmp_path_factory.mktemp("pipeline") / "run"
    record = pipelines.launch(run)
    pipelines.wait(run)
    return run, record


def test_a_launch_submits_every_job_and_all_of_them_end_well_in_their_order(launched):
    run, record = launched
    statuses = {name: Run(run / name).status() for name in record.jobs}
    assert {name: status and status.state for name, status in statuses.items()} == dict.fromkeys(record.jobs, "done")
    finished = [statuses[name].finished for name in record.jobs]
    assert finished == sorted(finished)
    assert [statuses[name].fingerprint for name in record.jobs] == [job.fingerprint for job in record.jobs.values()]
    assert "<html" in (run / "report" / "report.html").read_text()
