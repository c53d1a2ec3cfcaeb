"""Changes to files that are made all together or not at all."""

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.disk import temporary_path
from launcher.rundir import locked

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Changes:
    """What is given to ``write`` and ``set_aside`` happens inside ``made``. All that needs room on the disk is done
    before; what is left are renames."""

    def __init__(self):
        self._files: list[tuple[Path, Path, Path | None]] = []  # new content, where it belongs, what was there
        self._folders: list[Path] = []

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        new, old = temporary_path(path), temporary_path(path) if path.exists() else None
        self._files.append((new, path, old))
        new.write_text(text)
        if old:
            shutil.copyfile(path, old)

    def set_aside(self, folder: Path) -> None:
        """Is renamed to the first free NAME.old-K. UsageError if a job is at work there."""
        self._folders.append(folder)

    @contextmanager
    def made(self) -> Iterator[list[tuple[Path, Path]]]:
        """Makes the changes; undoes them if the block fails. Yields the folders' old and new names."""
        written: list[tuple[Path, Path | None]] = []
        moved: list[tuple[Path, Path]] = []
        try:
            with uninterrupted():
                for folder in self._folders:
                    moved.append((folder, _aside(folder)))
                for new, path, old in self._files:
                    new.replace(path)
                    written.append((path, old))
            yield moved
        except BaseException:
            with uninterrupted():
                for path, old in reversed(written):
                    old.replace(path) if old else path.unlink()
                for folder, aside in reversed(moved):
                    aside.rename(folder)
            raise
        finally:
            self.forget()

    def forget(self) -> None:
        """Removes what was prepared."""
        for new, _, old in self._files:
            new.unlink(missing_ok=True)
            if old:
                old.unlink(missing_ok=True)
        self._files, self._folders = [], []


def _aside(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    with locked(folder):
        return folder.rename(aside)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that ask to stop come after the block. Programs started inside never see them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Being told to stop, in whatever way, is a KeyboardInterrupt: what has begun can be taken back."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
