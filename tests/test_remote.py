"""A download is what was published, whole, or it is not there; what was there before stays."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from pyro_genmodels.datasets import download, pictures, remote
from pyro_genmodels.datasets.remote import SOURCES, Source, fetch

PAYLOAD = bytes(range(256)) * 5000
SUM = hashlib.sha256(PAYLOAD).hexdigest()
SHORT = len(PAYLOAD) // 2


class Server(http.server.BaseHTTPRequestHandler):
    """/whole, /short and /cut, which promises more than it sends; else what was published."""

    published: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        known = {"/whole": PAYLOAD, "/short": PAYLOAD[:SHORT], "/cut": PAYLOAD[:SHORT], **self.published}
        if self.path not in known:
            self.send_error(404)
            return
        data = known[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAYLOAD) if self.path == "/cut" else len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYRO_GENMODELS_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_what_was_published_arrives(address: str, tmp_path: Path) -> None:
    path = fetch(Source(f"{address}/whole", SUM), tmp_path / "new" / "file")
    assert path.read_bytes() == PAYLOAD and [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize(
    ("kind", "checksum", "error", "sentence"),
    [
        ("whole", "0" * 64, ValueError, f"is not what was published: its SHA-256 is not {'0' * 64}. Nothing was kept"),
        ("short", SUM, ValueError, "is not what was published"),
        ("cut", SUM, OSError, "Cannot download .*IncompleteRead"),
        ("missing", SUM, OSError, "Cannot download .*404.*Try again, or put the data into"),
    ],
)
def test_what_was_not_published_leaves_what_was_there(
    address: str, tmp_path: Path, kind: str, checksum: str, error: type[Exception], sentence: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"from before")
    with pytest.raises(error, match=sentence) as caught:
        fetch(Source(f"{address}/{kind}", checksum), path)
    assert f"{address}/{kind}" in str(caught.value)
    assert path.read_bytes() == b"from before" and [*tmp_path.iterdir()] == [path]


def test_without_a_network_the_message_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file"
        with pytest.raises(OSError, match=rf"Cannot download {url} \(.*refused.*Try again, or put the data into"):
            fetch(Source(url, SUM), tmp_path / "file")
    assert not [*tmp_path.iterdir()]


def published(address: str, name: str, data: bytes) -> Source:
    Server.published[f"/{name}"] = data
    return Source(f"{address}/{name}", hashlib.sha256(data).hexdigest())


def idx(array: np.ndarray) -> bytes:
    """LeCun's format: two zeros, the type (8: bytes), the number of dimensions, the sizes, the values."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, 256, shape, dtype=np.uint8)


def test_four_files_become_one(address: str, folder: Path) -> None:
    arrays = {"x_train": pixels(5, 28, 28), "y_train": pixels(5), "x_test": pixels(3, 28, 28), "y_test": pixels(3)}
    parts = {name: published(address, name, gzip.compress(idx(array))) for name, array in arrays.items()}
    path = download("fashion_mnist", {"fashion_mnist": parts})
    assert path == folder / "fashion_mnist.npz" and [*folder.iterdir()] == [path]
    with np.load(path) as held:
        assert {name: held[name].tolist() for name in held.files} == {name: a.tolist() for name, a in arrays.items()}
    found = pictures("fashion_mnist")
    assert found.test is not None and found.train.shape == (5, 28, 28) and found.test.shape == (3, 28, 28)
    before = path.stat().st_mtime_ns
    del Server.published["/x_train"]
    assert download("fashion_mnist", {"fashion_mnist": parts}) == path and path.stat().st_mtime_ns == before


def test_one_file_of_four_that_is_another_leaves_none(address: str, folder: Path) -> None:
    data = gzip.compress(idx(np.zeros((2, 28, 28), np.uint8)))
    parts = {"x_train": published(address, "a", data), "x_test": published(address, "b", data)._replace(sha256=SUM)}
    with pytest.raises(ValueError, match="is not what was published"):
        download("fashion_mnist", {"fashion_mnist": parts})
    assert not [*folder.iterdir()]


def test_what_is_published_has_a_checksum() -> None:
    for parts in SOURCES.values():
        for source in parts.values():
            assert len(bytes.fromhex(source.sha256)) == 32
    with pytest.raises(ValueError, match="nothing to download for 'cats'; there are mnist, fashion_mnist"):
        download("cats")


def test_without_the_variable_data_go_to_the_cache_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYRO_GENMODELS_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remote.folder() == tmp_path / "pyro-genmodels"


def test_without_pooch_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"Downloads need Pooch: pip install \"pyro-genmodels\[data\]\"\."):
        fetch(Source("http://127.0.0.1/file", SUM), tmp_path / "file")
