"""stpredict report RUN of a study: before, while and after its trials run, and wherever its run is."""

import shutil

import pytest
import yaml

from data_pipeline.errors import UsageError
from launcher.cli import app
from launcher.pipeline import Job, plan
from launcher.rundir import fingerprint, is_done
from stpredict.config import load
from stpredict.jobs.config import StudyReportConfig
from tests.stpredict.studies.made_up_study import write_sizes


@pytest.fixture
def study(tmp_path):
    """The run of a study as a launch leaves it, its trials done."""
    folder = tmp_path / "study"
    config = write_sizes(folder, {"small": 100_000, "middle": 300_000, "large": 900_000}, seeds=2)
    jobs = {path.name: {"config": "x.yaml", "set": {}} for path in folder.iterdir()}
    jobs["report"] = {"config": None, "set": {"kind": "study_report"}}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({"kind": "pipeline", "name": "study", "jobs": jobs}))
    (folder / "launcher" / "configs").mkdir(parents=True)
    (folder / "launcher" / "configs" / "report.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return folder


def report(run, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        app(["report", str(run)])
    assert ended.value.code == 0
    return capsys.readouterr().out.strip()


def test_the_report_of_a_study_is_written_into_its_run(study, capsys):
    assert report(study, capsys) == f"{study}/report/report.html"
    assert "6 done" in (study / "report" / "report.html").read_text()
    assert {path.name for path in (study / "report").iterdir()} >= {"runs.csv", "analysis.json", "curves.png"}


def test_a_study_that_was_moved_is_read_where_it_is(study, tmp_path, capsys):
    shutil.move(study, tmp_path / "elsewhere")
    assert report(tmp_path / "elsewhere", capsys) == f"{tmp_path}/elsewhere/report/report.html"
    page = (tmp_path / "elsewhere" / "report" / "report.html").read_text()
    assert "6 done" in page
    assert str(study) not in page


def test_a_study_of_which_nothing_ran_yet_has_a_report(study, capsys):
    for path in study.glob("*-prior"):
        shutil.rmtree(path)
    report(study, capsys)
    assert "6 not started" in (study / "report" / "report.html").read_text()


def test_a_page_that_was_asked_for_early_is_not_in_the_way_of_the_studys_own_job(study, capsys):
    report(study, capsys)
    config = load(StudyReportConfig, study / "launcher/configs/report.yaml")
    config = config.model_copy(update={"run": study / "report"})
    job = Job("report", (), config, fingerprint(config))
    assert plan([job]) == {"report": "run"}
    assert not is_done(job.run, config)


def test_files_of_a_persons_own_are_not_mixed_with_a_studys_report(study):
    (study / "report").mkdir()
    (study / "report" / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="not a run directory"):
        app(["report", str(study)], standalone_mode=False)
    assert [path.name for path in (study / "report").iterdir()] == ["thesis.tex"]
