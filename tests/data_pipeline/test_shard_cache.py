import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock
from https_server import Server, corrupt, cut, refuse, serving, stall

from data_pipeline import shard_cache, storage
from data_pipeline.config import CacheConfig
from data_pipeline.errors import UsageError, UserError
from data_pipeline.manifest import Shard
from data_pipeline.shard_cache import ShardCache, ShardFiles

SIZE = 50_000
DATA = [random.Random(number).randbytes(SIZE) for number in range(5)]
fork = multiprocessing.get_context("fork")


def shard_of(data: bytes, name: str) -> Shard:
    return Shard(
        name=name,
        samples=1,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        window_bytes=[len(data)],
        window_samples=[1],
    )


SHARDS = [shard_of(data, f"shard-{number:06d}") for number, data in enumerate(DATA)]


@pytest.fixture
def server(tmp_path, monkeypatch) -> Server:
    monkeypatch.setattr(storage, "_PAUSE_S", 0.01)
    files = {f"set/{shard.name}.tar": data for shard, data in zip(SHARDS, DATA, strict=True)}
    with serving(tmp_path, monkeypatch, files) as server:
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


def location(server: Server, number: int) -> str:
    return f"{server.url}/set/{SHARDS[number].name}.tar"


def held(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read_all(url: str, cache: CacheConfig | None, numbers: list[int]) -> bool:
    files = ShardFiles([f"{url}/set"] * len(SHARDS), SHARDS, cache)
    return all(files.read(number, 100, 900) == DATA[number][100:1000] for number in numbers)


def test_shard_files_read_the_same_from_disk_from_the_net_and_through_the_cache(server, folder, tmp_path):
    (tmp_path / f"{SHARDS[0].name}.tar").write_bytes(DATA[0])
    folders, shards = [str(tmp_path), f"{server.url}/set/"], [SHARDS[0], SHARDS[1]]
    for cache in (None, CacheConfig(folder=folder)):
        files = ShardFiles(folders, shards, cache)
        assert files.name(1) == location(server, 1)
        for number in range(2):
            for offset, size in [(0, 10), (40_000, 10_000), (49_990, 99)]:
                assert files.read(number, offset, size) == DATA[number][offset : offset + size]
    assert held(folder) == {f"{SHARDS[1].sha256}.tar": SIZE}  # local shards are not copied
    with pytest.raises(UsageError, match="pipe: is not read"):
        ShardFiles(["pipe:ls"], SHARDS[:1], None)


def test_a_shard_is_fetched_in_pieces_and_once(server, folder, monkeypatch):
    monkeypatch.setattr(shard_cache, "_CHUNK", 7_000)
    cache = ShardCache(CacheConfig(folder=folder))
    server.behave = [cut]
    for _ in range(3):
        assert cache.path(location(server, 0), SHARDS[0]).read_bytes() == DATA[0]
    assert len(server.gets) == 8 + 1  # a broken connection costs a piece


def test_processes_that_ask_at_once_fetch_it_once(server, folder):
    server.behave = [stall]
    cache = CacheConfig(folder=folder)
    with fork.Pool(6) as pool:
        answers = pool.starmap_async(read_all, [(server.url, cache, [2])] * 6, chunksize=1)
        until(lambda: server.gets)
        time.sleep(0.5)  # all of them have asked by now
        assert not answers.ready()
        server.released.set()
        assert answers.get(timeout=30) == [True] * 6
    assert len(server.gets) == 1


def test_equal_names_of_two_sets_do_not_meet(server, folder):
    server.files["other/shard-000000.tar"] = DATA[1]
    cache = ShardCache(CacheConfig(folder=folder))
    other = shard_of(DATA[1], "shard-000000")
    assert cache.path(location(server, 0), SHARDS[0]).read_bytes() == DATA[0]
    assert cache.path(f"{server.url}/other/shard-000000.tar", other).read_bytes() == DATA[1]


def test_the_least_recently_read_shards_go_and_nothing_else(server, folder):
    folder.mkdir()
    (folder / "thesis.tex").write_bytes(bytes(10 * SIZE))
    cache = ShardCache(CacheConfig(folder=folder, bytes=2 * SIZE + 1))
    first = cache.path(location(server, 0), SHARDS[0])
    with first.open("rb") as file:
        for number in (1, 0, 2):
            cache.path(location(server, number), SHARDS[number])
        assert set(held(folder)) == {f"{SHARDS[number].sha256}.tar" for number in (0, 2)} | {"thesis.tex"}
        cache.path(location(server, 3), SHARDS[3])
        assert not first.exists()
        assert file.read() == DATA[0]  # who had it open has it still


def test_downloads_under_way_count_and_are_waited_for(server, folder):
    cache = CacheConfig(folder=folder, bytes=SIZE * 3 // 2)
    server.behave = [stall]
    with fork.Pool(2) as pool:
        one = pool.apply_async(read_all, (server.url, cache, [0]))
        until(lambda: server.gets)
        two = pool.apply_async(read_all, (server.url, cache, [1]))
        time.sleep(0.6)
        assert len(server.gets) == 1  # the second has no room yet, and has dropped nothing
        assert list(held(folder).values()) == [SIZE]
        server.released.set()
        assert one.get(timeout=30)
        assert two.get(timeout=30)
    assert sum(held(folder).values()) == SIZE


def test_many_processes_in_a_small_cache_read_right_and_never_exceed_it(server, folder):
    cache, most, done = CacheConfig(folder=folder, bytes=3 * SIZE), 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.001):
            sizes = []
            for path in [*folder.glob("*.tar"), *folder.glob(".*.tmp")]:
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            most = max(most, sum(sizes))

    folder.mkdir()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with fork.Pool(4) as pool:
        orders = [random.Random(seed).choices(range(5), k=12) for seed in range(4)]
        assert (
            pool.starmap_async(read_all, [(server.url, cache, order) for order in orders]).get(timeout=60) == [True] * 4
        )
    done.set()
    watcher.join()
    assert SIZE <= most <= 3 * SIZE
    assert all(name.endswith(".tar") for name in held(folder))


def test_room_is_made_by_one_process_at_a_time(server, folder):
    cache = CacheConfig(folder=folder)
    (folder / "locks").mkdir(parents=True)
    with fork.Pool(1) as pool:
        with FileLock(folder / "locks" / "room"):
            answer = pool.apply_async(read_all, (server.url, cache, [0]))
            time.sleep(0.5)
            assert held(folder) == {}
        assert answer.get(timeout=30)


def test_a_shard_that_others_drop_before_it_is_opened_is_fetched_again(server, folder, monkeypatch):
    found = ShardCache.path

    def found_and_dropped(cache, *arguments):
        path = found(cache, *arguments)
        if len(server.gets) < 3:
            path.unlink()
        return path

    monkeypatch.setattr(ShardCache, "path", found_and_dropped)
    assert read_all(server.url, CacheConfig(folder=folder), [0])
    assert len(server.gets) == 3


def test_wrong_bytes_are_thrown_away_and_fetched_again_once(server, folder):
    cache = ShardCache(CacheConfig(folder=folder))
    server.behave = [corrupt]
    assert cache.path(location(server, 0), SHARDS[0]).read_bytes() == DATA[0]
    server.behave = [corrupt, corrupt]
    with pytest.raises(UserError, match=rf"^{location(server, 1)}: its sha256 differs from the manifest's, twice: .*$"):
        cache.path(location(server, 1), SHARDS[1])
    assert len(server.gets) == 4
    assert set(held(folder)) == {f"{SHARDS[0].sha256}.tar"}


def test_a_shorter_file_than_the_manifests_is_refused(server, folder):
    cache = ShardCache(CacheConfig(folder=folder))
    server.files[f"set/{SHARDS[0].name}.tar"] = DATA[0][:-1]
    with pytest.raises(UserError, match="ends after 49999 bytes, 50000 expected"):
        cache.path(location(server, 0), SHARDS[0])
    assert held(folder) == {}


def test_missing_forbidden_and_oversized_shards_are_named(server, folder):
    cache = ShardCache(CacheConfig(folder=folder, bytes=SIZE))
    with pytest.raises(FileNotFoundError, match="nothing"):
        cache.path(f"{server.url}/nothing.tar", SHARDS[0])
    server.behave = [refuse(403)]
    with pytest.raises(UserError, match=f"{location(server, 0)}: cannot be read: 403"):
        cache.path(location(server, 0), SHARDS[0])
    with pytest.raises(UsageError, match=f"50000 bytes, and the cache {folder} may hold 49999; give it more"):
        ShardCache(CacheConfig(folder=folder, bytes=SIZE - 1)).path(location(server, 0), SHARDS[0])
    assert held(folder) == {}


def test_a_damaged_size_is_noticed_on_use(server, folder):
    cache = ShardCache(CacheConfig(folder=folder))
    cache.path(location(server, 0), SHARDS[0]).write_bytes(b"torn")
    assert cache.path(location(server, 0), SHARDS[0]).read_bytes() == DATA[0]


def test_a_forged_hash_names_no_file_outside(server, folder, tmp_path):
    (tmp_path / "mine.tar").write_bytes(b"mine")
    forged = SHARDS[0].model_copy(update={"sha256": "../mine"})
    with pytest.raises(UserError, match="the manifest's sha256 of it is none"):
        ShardCache(CacheConfig(folder=folder)).path(location(server, 0), forged)
    assert (tmp_path / "mine.tar").read_bytes() == b"mine"
    assert server.gets == []


def test_a_folder_that_cannot_be_written_is_one_line(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot keep shards here: Not a directory$"):
        ShardCache(CacheConfig(folder=tmp_path / "file" / "cache")).path(location(server, 0), SHARDS[0])


@pytest.mark.parametrize("next_one", [0, 1], ids=["same", "another"])
def test_a_killed_download_is_tidied_by_the_next_whichever_it_fetches(server, folder, next_one):
    cache = CacheConfig(folder=folder, bytes=SIZE * 3 // 2)
    server.behave = [stall]
    process = fork.Process(target=read_all, args=(server.url, cache, [0]))
    process.start()
    until(lambda: server.gets)
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    assert [size for name, size in held(folder).items() if name.endswith(".tmp")] == [SIZE]
    began = time.monotonic()
    assert read_all(server.url, cache, [next_one])
    assert time.monotonic() - began < 5
    assert held(folder) == {f"{SHARDS[next_one].sha256}.tar": SIZE}
