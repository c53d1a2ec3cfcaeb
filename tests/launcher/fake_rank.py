"""A rank without torch: does what FAKE_RANKS says for its rank, writes the status that a real job would."""

import json
import os
import signal
import sys
import time

from launcher.rank import end_with
from stpredict.run import Progress, Run, now, write_atomically


def main() -> int:
    run, parent, plan = Run(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    end_with(parent)
    rank = int(os.environ["RANK"])
    what = plan[rank]
    stopped = []
    if what in ("save", "hurt", "fail", "ok"):
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, lambda number, _: stopped.append(signal.Signals(number).name))
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"pid {os.getpid()} threads {os.environ['OMP_NUM_THREADS']} world {os.environ['WORLD_SIZE']}", flush=True)
    write_atomically(run.path / f"pid_{rank}", str(os.getpid()))
    everyone = [run.path / f"pid_{other}" for other in range(int(os.environ["WORLD_SIZE"]))]
    deadline = time.monotonic() + 20
    while not all(path.exists() for path in everyone) and time.monotonic() < deadline:
        time.sleep(0.01)  # so that nobody is ended before it has begun
    if rank == 0:
        run.update_status(state="running")
        progress = Progress(run, 4, "step", interval_s=0)
        for step in range(1, 5):
            progress.update(step, "training", loss=1 / step)
    match what:
        case "ok":
            if rank == 0:
                run.update_status(state="done", finished=now())
            return 0
        case "save" | "hurt" | "sleep" | "deaf":
            for _ in range(600):
                if stopped and what == "hurt":
                    return fail(run, rank, "connection closed by peer")
                if stopped:
                    if rank == 0:
                        run.update_status(state="preempted", error=f"stopped by {stopped[0]}")
                    return 75
                time.sleep(0.05)
            return 0
        case "fail":
            return fail(run, rank, "no videos in /nowhere; give a folder that has some")
        case "abort":  # as C++ does at the end of a process, after the job
            while run.status().state != "done":
                time.sleep(0.02)
            os.abort()
        case "crash":
            raise RuntimeError("the roof fell in")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    return int(what)


def fail(run, rank, error):
    run.write_error(rank, error)
    if rank == 0:
        run.update_status(state="failed", error=error)
    return 1


if __name__ == "__main__":
    sys.exit(main())
