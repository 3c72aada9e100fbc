"""The download engine against a server in this process that misbehaves in every way it can be told to."""

import contextlib
import gzip
import hashlib
import http.server
import io
import multiprocessing
import socket
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.errors import UserError
from models.weights import downloads
from models.weights.downloads import RemoteFile, cache_folder, cached, fetch

ROOT = Path(__file__).parents[3]
DEAD = "http://127.0.0.1:9"  # a proxy that is not there
PACKED = gzip.compress(bytes(5_000_000))
BODY = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
SHA1 = hashlib.sha1(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Each first path component is a behaviour; requests are counted by path and their ranges noted."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.close_connection = True
        server = self.server
        with server.lock:
            server.count[self.path] += 1
            self.nth = server.count[self.path]
            server.ranges.append(self.headers.get("Range"))
        behaviour = self.path.split("/")[1].replace("-", "_")
        try:
            getattr(self, f"serve_{behaviour}")()
        except (BrokenPipeError, ConnectionResetError):
            pass

    def start(self) -> int:
        asked = self.headers.get("Range")
        return int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0

    def answer(self, status, body=b"", length=None, **headers):
        self.send_response(status)
        if length is not False:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def serve_good(self, upto=None, body=BODY):
        start = self.start()
        if start >= len(body):
            return self.answer(416, Content_Range=f"bytes */{len(body)}")
        part = body[start:upto]
        if start == 0:
            return self.answer(200, part, len(body))
        rest = len(body) - start
        return self.answer(206, part, rest, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")

    def serve_short_ranges(self):
        """Gives 100 kB at a time to those who ask for a range."""
        start = self.start()
        end = min(start + 100_000, len(BODY))
        if start:
            self.answer(206, BODY[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(BODY)}")
        else:
            self.serve_good()

    def serve_no_length(self):
        self.answer(200, BODY, length=False)

    def serve_ignores_range(self):
        self.answer(200, BODY)

    def serve_truncates(self):
        """Closes after 100 kB more, each time."""
        self.serve_good(upto=self.start() + 100_000)

    def serve_truncates_and_ignores_range(self):
        self.answer(200, BODY[:100_000], len(BODY))

    def serve_one_byte_each(self):
        self.serve_good(upto=self.start() + 1)

    def serve_stalls_once(self):
        if self.nth == 1:
            self.serve_good(upto=100_000)
            self.server.released.wait(5)
        else:
            self.serve_good()

    def serve_stalls(self):
        self.server.released.wait(5)

    def serve_trickles(self):
        start = self.start()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(BODY) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        self.end_headers()
        for i in range(start, start + 500):
            self.wfile.write(BODY[i : i + 1])
            self.wfile.flush()
            if self.server.released.wait(0.02):
                break

    def serve_wrong_range(self):
        start = self.start()
        if start:
            self.answer(206, BODY, Content_Range=f"bytes 0-{len(BODY) - 1}/{len(BODY)}")
        else:
            self.serve_good()

    def serve_missing(self):
        self.answer(404, b"<html>not here</html>")

    def serve_forbidden(self):
        self.answer(403)

    def serve_fails_twice(self):
        self.answer(500) if self.nth <= 2 else self.serve_good()

    def serve_fails(self):
        self.answer(503)

    def serve_lies(self):
        self.serve_good(body=BODY[:-1] + bytes([BODY[-1] ^ 1]))

    def serve_page(self):
        self.answer(200, b"<html>please log in</html>", Content_Type="text/html")

    def serve_drops(self):
        self.connection.close()

    def serve_endless(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(10_000):
            self.wfile.write(bytes(100_000))

    def serve_endless_chunks(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(10_000):
            self.wfile.write(b"186a0\r\n" + bytes(100_000) + b"\r\n")

    def drip(self, start: bytes, piece: bytes):
        self.wfile.write(start)
        while not self.server.released.wait(0.02):
            self.wfile.write(piece)
            self.wfile.flush()

    def serve_drips_a_status(self):
        self.drip(b"HTTP/1.1 20", b"0")

    def serve_drips_headers(self):
        self.drip(b"HTTP/1.1 200 OK\r\nX: ", b"x")

    def serve_interim_answers(self):
        self.drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n")

    def serve_drips_a_chunk_size(self):
        self.drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0")

    def serve_drips_trailers(self):
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.drip(head + b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n", b"X: x\r\n")

    def serve_drips_redirects(self):
        self.server.released.wait(0.1)
        self.answer(302, Location=f"/drips-redirects/{self.nth}")

    def serve_long_number(self):
        self.answer(200, BODY, length="9" * 5000)

    def serve_long_range(self):
        if self.start():
            self.answer(206, BODY, Content_Range=f"bytes {'9' * 5000}-{'9' * 5000}/{'9' * 5000}")
        else:
            self.serve_good()

    def serve_many_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 1000 + b"\r\n")

    def serve_a_long_header(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000 + b"\r\n\r\n")

    def serve_no_http(self):
        self.wfile.write(b"\x16\x03\x01 SSH-2.0\r\n\r\n")

    def serve_two_lengths(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd")

    def serve_packed(self):
        """A body that would be larger once unpacked."""
        self.answer(200, PACKED, Content_Encoding="gzip")

    def serve_to_file(self):
        self.answer(302, Location="file:///etc/hostname")

    def serve_to_ftp(self):
        self.answer(301, Location="ftp://127.0.0.1/f.bin")

    def serve_to_data(self):
        self.answer(307, Location="data:,x")

    def serve_to_script(self):
        self.answer(308, Location="javascript:alert(1)")

    def serve_to_nowhere(self):
        self.answer(302, Location="")

    def serve_to_long_host(self):
        self.answer(302, Location=f"http://{'a' * 300}.example/f.bin")

    def serve_there(self):
        self.answer(302, Location="/back/f.bin")

    def serve_back(self):
        self.answer(302, Location="/there/f.bin")

    def serve_to_good(self):
        self.answer(302, Location="/good/elsewhere")

    def serve_to_nonsense(self):
        self.answer(302, Location="http://[")

    def serve_round_and_round(self):
        self.answer(302, Location=self.path)


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        httpd.lock, httpd.released = threading.Lock(), threading.Event()
        httpd.count, httpd.ranges = Counter(), []
        httpd.base = f"http://127.0.0.1:{httpd.server_port}"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield httpd
        httpd.released.set()
        httpd.shutdown()
        thread.join()


def remote(server, *behaviours, **changes) -> RemoteFile:
    urls = tuple(f"{server.base}/{behaviour}/f.bin" for behaviour in behaviours)
    return replace(RemoteFile("f.bin", urls, "none", size=len(BODY), sha256=SHA256, sha1=SHA1), **changes)


def get(file, cache, **options):
    return fetch(file, cache, **({"retries": 3, "timeout": 0.3, "pause": 0.001} | options))


def refusal(file, cache, **options) -> str:
    with pytest.raises(UserError) as caught:
        get(file, cache, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert not (cache / file.name).exists()
    return message


def test_downloads_once_and_reports_progress(server, tmp_path):
    seen = []
    cache = tmp_path / "new" / "folder"
    path = get(remote(server, "good"), cache, progress=lambda done, total: seen.append((done, total)))
    assert path == cache / "f.bin" and path.read_bytes() == BODY
    assert seen[-1] == (len(BODY), len(BODY)) and [s[0] for s in seen] == sorted(s[0] for s in seen)
    assert get(remote(server, "good"), cache) == path
    assert server.count.total() == 1
    assert not path.with_name("f.bin.part").exists()


def test_whole_file_in_the_cache_needs_no_network(tmp_path):
    (tmp_path / "f.bin").write_bytes(BODY)
    file = RemoteFile("f.bin", ("http://127.0.0.1:9/f.bin",), "none", sha256=SHA256[:8])
    assert get(file, tmp_path).read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["f.bin"]  # not even a lock: the cache may be read-only
    assert cached(file, tmp_path)
    assert not cached(replace(file, sha256="00000000"), tmp_path)
    assert not cached(replace(file, size=5), tmp_path)


def test_damaged_file_in_the_cache_is_replaced(server, tmp_path):
    (tmp_path / "f.bin").write_bytes(BODY[:-1])
    assert get(remote(server, "good"), tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("known", [{}, {"size": None}, {"size": None, "sha256": SHA256[:8], "sha1": None}])
@pytest.mark.parametrize("behaviour", ["good", "ignores-range", "no-length", "wrong-range"])
def test_partial_file_is_taken_up(server, tmp_path, behaviour, known):
    (tmp_path / "f.bin.part").write_bytes(BODY[:123_456])
    assert get(remote(server, behaviour, **known), tmp_path).read_bytes() == BODY
    assert server.ranges[0] == "bytes=123456-"
    assert server.count.total() == (2 if behaviour == "wrong-range" else 1)


@pytest.mark.parametrize("known", [{}, {"size": None}])
def test_server_that_sends_less_than_the_range_asked_for(server, tmp_path, known):
    (tmp_path / "f.bin.part").write_bytes(BODY[:50_000])
    assert get(remote(server, "short-ranges", **known), tmp_path).read_bytes() == BODY
    assert server.ranges == ["bytes=50000-", "bytes=150000-", "bytes=250000-"]


def test_older_urllib3(server, tmp_path, monkeypatch):
    import urllib3

    monkeypatch.delattr(urllib3.response.HTTPResponse, "read1", raising=False)
    monkeypatch.delattr(urllib3.response.BaseHTTPResponse, "read1", raising=False)
    assert get(remote(server, "stalls-once"), tmp_path).read_bytes() == BODY
    assert server.count.total() == 2 and server.ranges[1].startswith("bytes=9")  # whole pieces before 100,000
    (tmp_path / "f.bin").unlink()
    assert get(remote(server, "truncates", size=None), tmp_path).read_bytes() == BODY
    assert "more than 300000 bytes" in refusal(remote(server, "endless"), tmp_path / "other")


@pytest.mark.parametrize("known", [{}, {"size": None}])
def test_partial_file_that_is_whole_already(server, tmp_path, known):
    (tmp_path / "f.bin.part").write_bytes(BODY)
    assert get(remote(server, "good", **known), tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("known", [{}, {"size": None}])
@pytest.mark.parametrize("part", [b"x" * 1000, b"x" * len(BODY), b"x" * (len(BODY) + 5)])
def test_partial_file_of_other_content_does_not_spoil_the_only_mirror(server, tmp_path, part, known):
    (tmp_path / "f.bin.part").write_bytes(part)
    assert get(remote(server, "good", **known), tmp_path).read_bytes() == BODY


def test_truncated_bodies_are_continued_where_they_broke(server, tmp_path):
    assert get(remote(server, "truncates"), tmp_path).read_bytes() == BODY
    assert server.ranges == [None, "bytes=100000-", "bytes=200000-"]


def test_stall_is_cut_and_continued(server, tmp_path):
    began = time.monotonic()
    assert get(remote(server, "stalls-once"), tmp_path, timeout=0.2).read_bytes() == BODY
    assert server.ranges == [None, "bytes=100000-"]
    assert time.monotonic() - began < 3


def test_server_errors_are_retried(server, tmp_path):
    assert get(remote(server, "fails-twice"), tmp_path).read_bytes() == BODY
    assert server.count.total() == 3


@pytest.mark.parametrize(
    ("behaviour", "requests", "reason"),
    [
        ("missing", 1, "it answered 404"),
        ("forbidden", 1, "it answered 403"),
        ("fails", 3, "it answered 503"),
        ("lies", 1, "has another sha256"),
        ("page", 1, "26 bytes instead of 300000"),
        ("stalls", 3, "it timed out"),
        ("drops", 3, "it broke off"),
        ("endless", 1, "more than 300000 bytes"),
        ("to-file", 1, "it redirects to file:"),
        ("to-ftp", 1, "it redirects to ftp:"),
        ("to-data", 1, "it redirects to data:"),
        ("to-script", 1, "it redirects to javascript:"),
        ("to-nonsense", 1, "no valid address"),
        ("to-long-host", 1, "no "),
        ("to-nowhere", downloads.MAX_REDIRECTS + 1, "it redirects without end"),
        ("there", downloads.MAX_REDIRECTS + 1, "it redirects without end"),
        ("endless-chunks", 1, "more than 300000 bytes"),
        ("many-headers", 3, "it broke off"),
        ("a-long-header", 3, "it broke off"),
        ("no-http", 3, "it broke off"),
        ("two-lengths", 1, "no usable answer"),
        ("packed", 1, "bytes instead of 300000"),
        ("round-and-round", downloads.MAX_REDIRECTS + 1, "it redirects without end"),
        ("truncates-and-ignores-range", 3, "it broke off"),
    ],
)
def test_useless_mirror_is_named_and_the_next_one_used(server, tmp_path, behaviour, requests, reason):
    message = refusal(remote(server, behaviour), tmp_path, retries=2, timeout=0.15)
    host = server.base.removeprefix("http://")
    assert f"{host}: " in message and reason in message
    assert "f.bin" in message and "--weights FILE" in message and str(tmp_path / "f.bin") in message
    assert server.count.total() == requests
    assert get(remote(server, behaviour, "good"), tmp_path, retries=2, timeout=0.15).read_bytes() == BODY


@pytest.mark.parametrize("behaviour", ["lies", "page", "endless"])
def test_wrong_content_leaves_nothing_behind(server, tmp_path, monkeypatch, behaviour):
    monkeypatch.setattr(downloads, "CEILING", 1_000_000)
    for known in ({}, {"size": None, "sha256": SHA256[:8], "sha1": None}):
        refusal(remote(server, behaviour, **known), tmp_path)
        assert not (tmp_path / "f.bin.part").exists()


@pytest.mark.parametrize(
    ("behaviour", "requests"),
    [
        ("drips-a-status", 2),
        ("drips-headers", 2),
        ("interim-answers", 2),
        ("drips-a-chunk-size", 2),
        ("drips-redirects", None),
    ],
)
def test_what_is_dragged_out_is_left(server, tmp_path, monkeypatch, behaviour, requests):
    """The socket's own limit never passes: there is always another byte within it."""
    monkeypatch.setattr(downloads, "HEAD_PATIENCE", 0.3)
    monkeypatch.setattr(downloads, "PATIENCE", 0.3)
    began = time.monotonic()
    message = refusal(remote(server, behaviour), tmp_path, timeout=5)
    assert "it timed out" in message or "it broke off" in message or "it redirects without end" in message
    assert "f.bin" in message and "127.0.0.1" in message and "--weights FILE" in message
    assert time.monotonic() - began < 10
    assert requests is None or server.count.total() == requests
    assert get(remote(server, behaviour, "good"), tmp_path, timeout=5).read_bytes() == BODY


def test_whole_body_with_a_dragged_out_end_is_taken(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "PATIENCE", 0.5)
    assert get(remote(server, "drips-trailers"), tmp_path, timeout=5).read_bytes() == BODY
    assert server.count.total() == 1


@pytest.mark.parametrize("behaviour", ["long-number", "long-range"])
def test_numbers_too_long_to_be_read(server, tmp_path, behaviour):
    (tmp_path / "f.bin.part").write_bytes(BODY[:1000])
    assert get(remote(server, behaviour, size=None), tmp_path).read_bytes() == BODY


def test_host_that_takes_no_connection(tmp_path):
    """Its queue is full: packets are dropped, as behind a firewall."""
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        port = full.getsockname()[1]
        file = RemoteFile("f.bin", (f"http://127.0.0.1:{port}/f.bin",), "none", sha256=SHA256)
        began = time.monotonic()
        assert f"127.0.0.1:{port}: no connection" in refusal(file, tmp_path, timeout=0.2)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "failure", [socket.gaierror(-3, "Temporary failure in name resolution"), OSError(101, "Network is unreachable")]
)
def test_no_network_at_all(tmp_path, monkeypatch, failure):
    def fail(*arguments, **options):
        raise failure

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    urls = ("https://one.example/f.bin", "http://two.example/f.bin")
    began = time.monotonic()
    message = refusal(RemoteFile("f.bin", urls, "none", sha256=SHA256), tmp_path)
    assert "one.example: no connection" in message and "two.example: no connection" in message
    assert "--weights FILE" in message and str(tmp_path / "f.bin") in message
    assert time.monotonic() - began < 5


def test_address_that_is_never_found(tmp_path, monkeypatch):
    """Looking up a name has no time limit of its own."""
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: released.wait(20))
    monkeypatch.setattr(downloads, "HEAD_PATIENCE", 0.2)
    file = RemoteFile("f.bin", ("https://one.example/f.bin",), "none", sha256=SHA256)
    began = time.monotonic()
    assert "one.example: it timed out" in refusal(file, tmp_path)
    assert time.monotonic() - began < 5
    released.set()


def test_command_without_network(tmp_path, monkeypatch, capsys):
    """A whole stage: one line and exit code 2."""
    import saliency  # here, as the processes below import this module and need no torch
    from models.weights import find
    from pipeline import program

    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.setenv(name, "" if name == "no_proxy" else DEAD)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(find, "_from_package", lambda architecture: None)
    monkeypatch.setattr(program, "code_version", lambda: "tested")
    Image.new("RGB", (70, 70)).save(tmp_path / "photo.png")
    vlm = ROOT / "models" / "pretrained" / "alexnet.safetensors"
    options = [tmp_path / "photo.png", "--vlm", vlm, "--layer", "conv5", "--out", tmp_path / "out"]
    argv = [*map(str, options), "--device", "cpu", "--cache", str(tmp_path / "cache")]
    code, lines = program.run(lambda: saliency.main(argv)), capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1, lines
    assert "alexnet-owt-7be5be79.pth could not be downloaded (download.pytorch.org: no connection" in lines[0]
    assert "--weights FILE" in lines[0]


def test_announced_size_above_the_ceiling_is_not_read(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "CEILING", 1000)
    seen = []
    message = refusal(remote(server, "good", size=None), tmp_path, progress=lambda done, total: seen.append(done))
    assert "300000 bytes" in message and not seen


def test_every_host_has_its_reason(server, tmp_path):
    file = remote(server, "missing", "fails")
    file = replace(file, urls=(*file.urls, "http://127.0.0.1:9/f.bin"))
    message = refusal(file, tmp_path)
    assert "404" in message and "503" in message and "127.0.0.1:9: no connection" in message
    assert refusal(file, tmp_path, option="--mean-image").count("--mean-image FILE") == 1


def test_dead_host_costs_two_attempts(tmp_path):
    file = RemoteFile("f.bin", ("http://127.0.0.1:9/f.bin",), "none", sha256=SHA256)
    began = time.monotonic()
    assert "no connection" in refusal(file, tmp_path, retries=9, pause=0.1)
    assert time.monotonic() - began < 0.5  # one pause of 0.1 s, not nine that double


def test_redirects_to_another_mirror_are_followed(server, tmp_path):
    assert get(remote(server, "to-good"), tmp_path).read_bytes() == BODY
    assert server.count["/good/elsewhere"] == 1


def test_redirect_from_https_to_http_is_refused(monkeypatch, tmp_path):
    import requests

    def redirect(url, **options):
        assert options["allow_redirects"] is False
        response = requests.Response()
        response.raw = io.BytesIO()
        response.status_code, response.headers["Location"] = 302, "http://127.0.0.1:9/f.bin"
        return response

    monkeypatch.setattr(requests, "get", redirect)
    file = RemoteFile("f.bin", ("https://example.org/f.bin",), "none", sha256=SHA256)
    assert "it redirects to http:" in refusal(file, tmp_path)


def test_progress_in_drops_is_bounded(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "MAX_ATTEMPTS", 12)
    assert "it broke off 12 times" in refusal(remote(server, "one-byte-each"), tmp_path)
    assert server.count.total() == 12


def test_trickle_is_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "PATIENCE", 0.1)
    began = time.monotonic()
    assert "it stalls" in refusal(remote(server, "trickles"), tmp_path, retries=1, timeout=5)
    assert server.count.total() == 2
    assert time.monotonic() - began < 3


def _fetch_in_process(url, cache, ready, results):
    file = RemoteFile("f.bin", (url,), "none", size=len(BODY), sha256=SHA256)
    ready.wait()
    results.put(hashlib.sha256(fetch(file, Path(cache), timeout=5.0).read_bytes()).hexdigest())


def test_two_processes_download_once(server, tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(2), context.Queue()
    arguments = (f"{server.base}/truncates/f.bin", str(tmp_path), ready, results)
    processes = [context.Process(target=_fetch_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [SHA256, SHA256]
    for process in processes:
        process.join()
    assert server.count.total() == 3  # the three pieces, once


def test_full_disk_and_unusable_cache(server, tmp_path):
    if Path("/dev/full").exists():
        (tmp_path / "f.bin.part").symlink_to("/dev/full")
        message = refusal(remote(server, "good"), tmp_path)
        assert "No space left" in message and "--cache FOLDER" in message
    (tmp_path / "file").write_text("")
    message = refusal(remote(server, "good"), tmp_path / "file" / "cache")
    assert "cannot write" in message and "--cache FOLDER" in message


def test_cache_folder_by_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("CNN_VLM_CACHE", raising=False)
    assert cache_folder() == Path("/h/.cache/cnn-vlm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/cnn-vlm")
    monkeypatch.setenv("CNN_VLM_CACHE", "/c")
    assert cache_folder() == Path("/c")
    monkeypatch.setenv("CNN_VLM_CACHE", "~/c")
    assert cache_folder() == Path("/h/c")


def test_cache_folder_without_a_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("CNN_VLM_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match="--cache FOLDER"):
        cache_folder()
