"""SLURM's logs of a pipeline's jobs, RUN/launcher/slurm/JOB/: what the batch script and srun said, beside what each
rank says in its own log. They tell of jobs that ended before a rank had a log."""

from pathlib import Path

from launcher.slurm.failure import this_start

NOT_ITS_OWN = ("submitit ", "slurmstepd: ", "srun: ", "after: ")


def log_files(folder: Path, slurm_id: str, rank: int = 0) -> list[Path]:
    """What ``rank`` of the SLURM job printed, and what it complained of; those that are there and not empty."""
    files = [folder / f"{slurm_id}_{rank}_log.{kind}" for kind in ("out", "err")]
    return [file for file in files if file.is_file() and file.stat().st_size]


def last_words(folder: Path, slurm_id: str) -> str | None:
    """The line that most likely says why the job failed: its last error. None where it never started."""
    files = log_files(folder, slurm_id)
    if not files:
        return None
    lines = [line.strip() for file in files for line in this_start(_end(file)).splitlines() if line.strip()]
    words = [line for line in lines if not line.startswith(NOT_ITS_OWN) or "error: " in line]
    own = [line for line in words if line.startswith("error: ")]
    return (own or words or ["ended without a word"])[-1].removeprefix("error: ")


def _end(path: Path, size: int = 8192) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors="replace")
