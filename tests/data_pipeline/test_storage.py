import gc
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from https_server import Server, cut, ignore_range, refuse, serving, stall

from data_pipeline import storage
from data_pipeline.errors import UsageError, UserError
from data_pipeline.storage import check, child, expand, read_range, read_text, scheme, size
from tests.processes import bounded

DATA = random.Random(0).randbytes(100_000)


@pytest.fixture
def server(tmp_path, monkeypatch) -> Server:
    monkeypatch.setattr(storage, "_PAUSE_S", 0.01)
    with serving(tmp_path, monkeypatch, {"set/a.tar": DATA, "set/manifest.json": b'{"n": "\xc3\xa9"}'}) as server:
        yield server


def test_braces_name_several_locations():
    assert expand("s3://b/part-{0..2}/{x,y}")[:3] == ["s3://b/part-0/x", "s3://b/part-0/y", "s3://b/part-1/x"]
    assert expand(Path("/data/set")) == ["/data/set"]
    assert child("s3://b/part-{0..2}/", "train") == "s3://b/part-{0..2}/train"


@pytest.mark.parametrize(
    "location",
    [
        "pipe:touch ran",
        "pipe://touch ran",
        "touch ran |",
        "s3://b/a|touch ran",
        "http://127.0.0.1/set",
        "ftp://h/set",
        "ssh://h/set",
        "sftp://h/set",
        "memory://set",
        "shell:touch ran",
        "simplecache::s3://b/set",
        "s3://b/set::pipe:touch ran",
        "zip://a::https://h/b.zip",
        "github://a:b@/set",
        "S3://b/set",
        "s3:b/set",
        "file://host/set",
    ],
)
def test_other_schemes_are_refused_by_every_reader_and_nothing_runs(location, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for read in (check, read_text, size, lambda text: read_range(text, 0, 1)):
        with pytest.raises(UsageError, match=r"file://, s3://, gs://, https://") as caught:
            read(location)
        assert str(caught.value).startswith(f"{location}: ")
        assert "\n" not in str(caught.value)
    assert not Path("ran").exists()


def test_local_names_may_hold_a_colon_where_they_exist_or_begin_as_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run:1").mkdir()
    (tmp_path / "run:1" / "x").write_text("here")
    for location in ("run:1/x", "./run:1/x", f"{tmp_path}/run:1/x", f"file://{tmp_path}/run:1/x", Path("run:1/x")):
        assert read_text(location) == "here"
        assert (read_range(location, 1, 2), read_range(location, 3, 9), size(location)) == (b"er", b"e", 4)
    for location in ("run:1/y", "./run:2/y", "/run:2/y"):  # a path, with nothing there
        with pytest.raises(FileNotFoundError):
            read_text(location)
    assert [scheme(text) for text in ("run:1/x", "run:2/x", "a/b:c", "s3://b/c", "https://[::1]:80/x")] == [
        *("", "run", "", "s3", "https")
    ]
    check("https://[::1]:80/x")


def test_a_local_file_that_cannot_be_read_is_one_line_with_its_name(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match=f"^{tmp_path}/set: cannot be read: Is a directory; check disk and permission"):
        read_range(tmp_path / "set", 0, 1)
    with pytest.raises(UserError, match=f"^{tmp_path}/set: cannot be read: Is a directory; check disk and permission"):
        read_text(tmp_path / "set")
    with pytest.raises(FileNotFoundError):
        read_range(tmp_path / "nothing", 0, 1)
    (tmp_path / "noise").write_bytes(b"{\xff")
    with pytest.raises(UserError, match=f"^{tmp_path}/noise: is not text .invalid start byte at byte 1.; make it agai"):
        read_text(tmp_path / "noise")


def test_https_gives_the_same_bytes_as_the_disk(server):
    tar = f"{server.url}/set/a.tar"
    for offset, count in [(0, 10), (512, 40_000), (99_990, 10), (99_990, 99), (100_000, 5), (7, 0)]:
        assert read_range(tar, offset, count) == DATA[offset : offset + count]
    assert size(tar) == len(DATA)
    assert read_text(child(f"{server.url}/set/", "manifest.json")) == '{"n": "é"}'


def test_a_missing_file_is_no_network_error(server):
    for read in (read_text, size, lambda text: read_range(text, 0, 1)):
        with pytest.raises(FileNotFoundError, match=r"nothing\.tar: no such file"):
            read(f"{server.url}/nothing.tar")
    assert server.gets.count("nothing.tar") == 4  # none was tried again: one each, and one more for the size


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_one_line_with_the_location_and_is_not_tried_again(server, status):
    server.behave = [refuse(status)]
    with pytest.raises(UserError, match=rf"^{server.url}/set/a.tar: cannot be read: {status}.*permissions$"):
        read_range(f"{server.url}/set/a.tar", 0, 10)
    assert len(server.gets) == 1


def test_what_passes_is_tried_again(server):
    server.behave = [refuse(503), cut, refuse(429)]
    assert read_range(f"{server.url}/set/a.tar", 10, 50_000) == DATA[10:50_010]
    assert len(server.gets) == 4


def test_what_does_not_pass_ends_in_one_line(server):
    server.behave = [cut] * 99
    with pytest.raises(UserError, match=rf"^{server.url}/set/a.tar: cannot be read: [^\n]*$"):
        read_range(f"{server.url}/set/a.tar", 10, 50_000)
    assert len(server.gets) == 4


def test_a_silent_server_does_not_hold_a_reader_for_ever(server, monkeypatch):
    monkeypatch.setattr(storage, "_SILENCE_S", 0.3)
    storage._https_options.cache_clear()
    server.behave = [stall] * 99
    began = time.monotonic()
    with pytest.raises(UserError, match="cannot be read"):
        read_range(f"{server.url}/set/a.tar", 0, 1000)
    assert time.monotonic() - began < 30
    storage._https_options.cache_clear()


def test_no_server_at_all_is_one_line(server):
    with pytest.raises(UserError, match=r"^https://127.0.0.1:1/a.tar: cannot be read: [^\n]*$"):
        read_range("https://127.0.0.1:1/a.tar", 0, 10)
    with pytest.raises(UserError, match=r"^https://127.0.0.1:1/a.tar: cannot be read"):  # not "no such file"
        size("https://127.0.0.1:1/a.tar")


def test_a_server_without_ranges_is_told_from_a_right_answer(server):
    server.behave = [ignore_range]
    with pytest.raises(UserError, match="whole file"):
        read_range(f"{server.url}/set/a.tar", 10, 20)


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments]
    return bounded(command, timeout_s=60, env=os.environ | environment)


def test_certificates_are_checked_against_those_of_the_environment(server):
    code = "import sys; from data_pipeline.storage import *; print(len(read_range(sys.argv[1], 0, 77)))"
    tar = f"{server.url}/set/a.tar"
    assert python(code, tar, SSL_CERT_FILE=str(server.certificate)).stdout == "77\n"
    gets = len(server.gets)
    stranger = python(code, tar, SSL_CERT_FILE="")
    assert f"UserError: {tar}: cannot be read: " in stranger.stderr
    assert "certificate verify failed" in stranger.stderr
    assert len(server.gets) == gets


def test_a_driver_that_is_not_installed_is_named(monkeypatch):
    for kind, package in {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp"}.items():
        storage._https_options.cache_clear()
        monkeypatch.setitem(sys.modules, package, None)  # makes Python's import raise ImportError
        with pytest.raises(UsageError, match=rf"{kind}://h/x: .* pip install {package}"):
            read_range(f"{kind}://h/x", 0, 1)


def test_importing_storage_imports_no_driver():
    code = "import sys, data_pipeline.shard_cache; print({'torch', 'fsspec', 'aiohttp', 'asyncio'} & set(sys.modules))"
    assert python(code).stdout == "set()\n"


def _read(tar: str, offsets: list[int]) -> bool:
    right = all(read_range(tar, offset, 1000) == DATA[offset : offset + 1000] for offset in offsets)
    gc.collect()  # what was inherited and is of no use here is finalized now
    return right


def test_forked_processes_and_their_parent_go_on_reading(server):
    """As the workers of a DataLoader do, whose main process has read the manifests before and reads on after."""
    tar, context = f"{server.url}/set/a.tar", multiprocessing.get_context("fork")
    assert _read(tar, [0, 1])
    for _ in range(2):
        with context.Pool(2) as pool:
            assert pool.starmap_async(_read, [(tar, [number]) for number in range(8)]).get(timeout=30) == [True] * 8
            began = time.monotonic()
            assert _read(tar, [5, 6])  # with the connection it has, which they have left alone
            answers = pool.starmap_async(_read, [(tar, list(range(20)))] * 4)
            assert _read(tar, list(range(20)))  # at the same time as they do
            assert answers.get(timeout=30) == [True] * 4
            assert time.monotonic() - began < 30
    assert len(server.gets) == 2 + 2 * (8 + 2 + 4 * 20 + 20)  # no request was made twice


def test_a_fork_while_another_thread_is_reading_harms_neither(server):
    tar, context = f"{server.url}/set/a.tar", multiprocessing.get_context("fork")
    server.behave = [stall]
    result = []
    thread = threading.Thread(daemon=True, target=lambda: result.append(_read(tar, [3])))
    thread.start()
    while not server.gets:
        time.sleep(0.01)
    with context.Pool(1) as pool:
        assert pool.apply_async(_read, (tar, [0, 1, 2])).get(timeout=30)
    server.released.set()
    thread.join(30)
    assert result == [True]


READ_AND_FORK = """
import os, sys
from data_pipeline.storage import read_range
at_the_end = [read_range(sys.argv[1], offset, 10) for offset in (99_998, 100_000)]
print(len(read_range(sys.argv[1], 0, 10)), *map(len, at_the_end), flush=True)
child = os.fork()
assert len(read_range(sys.argv[1], 5, 10)) == 10
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert len(read_range(sys.argv[1], 5, 10)) == 10
"""


def test_processes_that_have_read_urls_end_by_themselves(server):
    began = time.monotonic()
    done = python(READ_AND_FORK, f"{server.url}/set/a.tar", SSL_CERT_FILE=str(server.certificate))
    assert (done.returncode, done.stdout, done.stderr) == (0, "10 2 0\n", "")
    assert time.monotonic() - began < 20


def test_gs_is_read_with_gcsfs_before_and_after_a_fork(server):
    """From a server that answers the one request of Google's JSON API that reading takes."""
    pytest.importorskip("gcsfs", reason="needs gcsfs")
    server.files["download/storage/v1/b/bucket/o/set%2Fa.tar?alt=media"] = DATA
    where = {"STORAGE_EMULATOR_HOST": server.url, "FSSPEC_GS_TOKEN": "anon", "SSL_CERT_FILE": str(server.certificate)}
    began = time.monotonic()
    done = python(READ_AND_FORK, "gs://bucket/set/a.tar", **where)
    assert (done.returncode, done.stdout) == (0, "10 2 0\n"), done.stderr
    assert time.monotonic() - began < 20


@pytest.fixture
def bucket(monkeypatch) -> str:
    """A bucket of moto's S3 server on loopback, with the same tar in it."""
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs and moto[server]")
    moto = pytest.importorskip("moto.server", reason="needs s3fs and moto[server]")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.mkdir("bucket")
    files.pipe("bucket/set/a.tar", DATA)
    yield "s3://bucket"
    files.rm("bucket", recursive=True)  # moto keeps its buckets for the next server of this process
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_s3_gives_the_same_bytes_as_the_disk_and_the_same_errors(bucket, tmp_path):
    tar = f"{bucket}/set/a.tar"
    for offset, count in [(0, 10), (512, 40_000), (99_990, 99), (100_000, 5), (7, 0)]:
        assert read_range(tar, offset, count) == DATA[offset : offset + count]
    assert size(tar) == len(DATA)
    for missing in (f"{bucket}/nothing", "s3://nobucket/nothing"):
        for read in (read_text, size, lambda text: read_range(text, 0, 1)):
            with pytest.raises(FileNotFoundError, match=f"{missing}: no such file"):
                read(missing)


def test_s3_without_credentials_is_one_line(bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"^s3://bucket/set/a.tar: cannot be read: Unable to locate credentials"):
        read_range(f"{bucket}/set/a.tar", 0, 10)


def test_s3_is_read_on_in_forked_processes_and_their_parent(bucket):
    tar = f"{bucket}/set/a.tar"
    assert _read(tar, [0, 1])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap_async(_read, [(tar, [number]) for number in range(8)]).get(timeout=30) == [True] * 8
        began = time.monotonic()
        assert _read(tar, [5, 6])
        assert time.monotonic() - began < 30
