"""A real HTTPS server on loopback that serves byte ranges, counts its requests, and can misbehave."""

import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

Behaviour = Callable[["Handler", bytes], None]  # answers one GET, given the bytes that were asked for


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, certificate: Path, key: Path, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.context, self.certificate, self.files = context, certificate, files
        self.url = f"https://127.0.0.1:{self.server_port}"
        self.gets: list[str] = []  # names asked for
        self.behave: list[Behaviour] = []  # of the next GETs; then as it should be
        self.released = threading.Event()  # what `stall` waits for

    def finish_request(self, request, address):
        # The handshake belongs in the request's thread, not in the one that accepts.
        super().finish_request(self.context.wrap_socket(request, server_side=True), address)

    def handle_error(self, request, address):
        """Clients that distrust the certificate or are killed are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections, as real servers do
    wbufsize = -1  # an answer is one write
    server: Server

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._begin(200, len(self.server.files[self.path[1:]]), {"Accept-Ranges": "bytes"})

    def do_GET(self):
        name = self.path[1:]
        self.server.gets.append(name)
        if name not in self.server.files:
            return refuse(404)(self, b"")
        data = self.server.files[name]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and int(wanted[1]) >= len(data):
            return refuse(416)(self, b"")
        piece = data[int(wanted[1]) : int(wanted[2]) + 1] if wanted else data
        if self.server.behave:
            return self.server.behave.pop(0)(self, piece)
        self._begin(206 if wanted else 200, len(piece))
        self.wfile.write(piece)

    def _begin(self, status: int, length: int, headers: dict[str, str] | None = None):
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()


def refuse(status: int) -> Behaviour:
    return lambda handler, piece: handler._begin(status, 0)


def cut(handler: Handler, piece: bytes) -> None:
    """Half of what was promised, then the connection breaks."""
    handler._begin(206, len(piece))
    handler.wfile.write(piece[: len(piece) // 2])
    handler.close_connection = True


def corrupt(handler: Handler, piece: bytes) -> None:
    handler._begin(206, len(piece))
    handler.wfile.write(bytes(len(piece)))


def ignore_range(handler: Handler, piece: bytes) -> None:
    data = handler.server.files[handler.path[1:]]
    handler._begin(200, len(data))
    handler.wfile.write(data)


def stall(handler: Handler, piece: bytes) -> None:
    """Half, and the rest not before the server's ``released`` is set."""
    handler._begin(206, len(piece))
    handler.wfile.write(piece[: len(piece) // 2])
    handler.wfile.flush()
    handler.server.released.wait(60)
    handler.wfile.write(piece[len(piece) // 2 :])


@contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> Iterator[Server]:
    """Serves ``files``; fsspec in this process and its forks trusts the certificate that is made in ``folder``."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    name = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*new, *name], check=True, capture_output=True, timeout=60)

    import fsspec

    monkeypatch.setitem(fsspec.config.conf, "https", {"ssl": ssl.create_default_context(cafile=certificate)})
    server = Server(certificate, key, files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join(20)
