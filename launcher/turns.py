"""Whose turn it is: where only so many trials run at once, which of them waits for which, and, on one machine, which
job is next. Decides only; asks and starts nothing."""

from collections.abc import Collection, Mapping, Sequence

from launcher.pipeline import Job


def lanes(trials: Sequence[str], most: int | None, queued: Mapping[str, Collection[str]]) -> dict[str, tuple[str, ...]]:
    """For each of ``trials``, that are to be given to SLURM, those whose end it waits for, so that at most ``most`` run
    at once: they follow each other in so many lanes. ``queued`` are those that SLURM has already, with those that they
    wait for; what is new lines up behind them."""
    if most is None:
        return dict.fromkeys(trials, ())
    awaited = {other for others in queued.values() for other in others}
    ends = [trial for trial in queued if trial not in awaited]
    last = [tuple(ends[lane::most]) for lane in range(most)]
    found = {}
    for number, trial in enumerate(trials, start=len(ends)):
        found[trial] = last[number % most]
        last[number % most] = (trial,)
    return found


class Schedule:
    """The jobs that are to do on one machine, in their order: each starts when those that it needs are done, those that
    it comes after have ended, and its trial is one of ``at_once``."""

    def __init__(self, jobs: Sequence[Job], done: Collection[str], at_once: int | None):
        self.waiting = {job.name: job for job in jobs if job.name not in done}
        self.done, self.at_once = set(done), at_once
        self.running: dict[str, Job] = {}
        self.ended: set[str] = set()  # not well, or never begun since another one did not end well
        self.begun: set[str] = set()  # trials

    def next(self) -> Job | None:
        """The first that may start now."""
        over = self.done | self.ended
        return next(
            (
                job
                for job in self.waiting.values()
                if self.done.issuperset(job.needs) and over.issuperset(job.after) and self._is_its_turn(job.trial)
            ),
            None,
        )

    def start(self, job: Job) -> None:
        self.running[job.name] = self.waiting.pop(job.name)
        if job.trial:
            self.begun.add(job.trial)

    def end(self, job: Job, well: bool) -> None:
        del self.running[job.name]
        (self.done if well else self.ended).add(job.name)
        for other in list(self.waiting.values()):  # each after those that it needs
            if self.ended.intersection(other.needs):
                self.ended.add(other.name)
                del self.waiting[other.name]

    def _is_its_turn(self, trial: str | None) -> bool:
        if trial is None or self.at_once is None:
            return True
        going_on = self.begun & {job.trial for job in (*self.running.values(), *self.waiting.values())}
        return trial in going_on or len(going_on) < self.at_once
