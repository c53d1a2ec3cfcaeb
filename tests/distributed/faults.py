"""What goes wrong in the toy's ranks by order of a test: each of these is called with the rank before training."""

import os
import shutil
import time
from pathlib import Path

from torch import nn

from stpredict.training import checkpointing, saving
from stpredict.training.checkpoint import complete_checkpoints, folder_of
from tests.distributed import toy

BALLAST = "ballast"
LEFT = 4096  # bytes: less than a checkpoint, and a page of memory


def fill(folder: Path, leave: int) -> None:
    """Takes what is free where ``folder`` is, but for ``leave`` bytes."""
    with (folder / BALLAST).open("wb") as file:
        file.write(b"x" * (os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - leave))


def at_save(step: int, action) -> None:
    """Has rank 0 call ``action(checkpoints)`` before it looks whether there is room for the checkpoint of ``step``."""
    start = saving.Saver.start

    def acting(saver, state):
        if saver.ranks.is_main and state.step == step:
            action(saver.checkpoints)
        return start(saver, state)

    saving.Saver.start = acting


def while_writing(step: int, action) -> None:
    """Calls ``action(folder)`` when this rank begins to write the checkpoint of ``step``, the look for room passed."""
    write = saving._write

    def acting(folder, *arguments):
        if folder == folder_of(folder.parent, step):
            action(folder)
        return write(folder, *arguments)

    saving._write = acting


def full_before(rank: int) -> None:
    at_save(4, lambda checkpoints: fill(checkpoints, LEFT))


def full_while_writing(rank: int) -> None:
    if rank == 0:
        while_writing(4, lambda folder: fill(folder.parent, 2 * LEFT))


def full_and_room_again(rank: int) -> None:
    full_while_writing(rank)
    at_save(6, lambda checkpoints: (checkpoints / BALLAST).unlink())


def full_at_the_end(rank: int) -> None:
    if rank == 0:
        while_writing(8, lambda folder: fill(folder.parent, 2 * LEFT))


def full_on_rank_1(rank: int) -> None:
    if rank == 1:
        while_writing(4, lambda folder: (folder / "random_00001.pt").symlink_to("/dev/full"))


def slow_disk(rank: int) -> None:
    if rank == 1:
        while_writing(4, lambda folder: time.sleep(2))


def removed_by_hand(_rank: int) -> None:
    """Somebody removes what retention is about to remove."""
    surplus = saving.surplus

    def removing(*arguments):
        found = surplus(*arguments)
        for folder in found:
            shutil.rmtree(folder)
        return found

    saving.surplus = removing


def narrower(_rank: int) -> None:
    """The toy's hidden layer gets 12 units."""

    class Narrower(toy.ToyModel):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.first, self.second = nn.Linear(toy.WIDTH, 12), nn.Linear(12, toy.WIDTH)

    toy.ToyModel = Narrower


def fails_late_on_rank_1(rank: int) -> None:
    """The file of step 4 is still being written three steps later, and then cannot be."""

    def late(folder: Path) -> None:
        time.sleep(5)
        (folder / "random_00001.pt").symlink_to("/dev/full")

    if rank == 1:
        while_writing(4, late)


def damaged_before_going_back(rank: int) -> None:
    """A bit of the newest checkpoint flips before a training goes back to it."""
    newest_sound_checkpoint = checkpointing.newest_sound_checkpoint
    flipped = []

    def flipping(checkpoints, ranks, *arguments):
        there = complete_checkpoints(checkpoints)
        if there and not flipped:
            flipped.append(there[-1])
            if rank == 0:
                path = there[-1] / "rank_00001.safetensors"
                path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
        ranks.barrier()
        return newest_sound_checkpoint(checkpoints, ranks, *arguments)

    checkpointing.newest_sound_checkpoint = flipping
