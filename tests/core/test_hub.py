"""Weights from the Hub: against a local server that answers as the Hub does, against the cache, against no network."""

import hashlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants

from tenfold.core import checkpoint, hub
from tenfold.core.config import ModelEntry
from tenfold.core.console import UserError

COMMIT = "c0ffee" * 6 + "c0ff"


class Hub(ThreadingHTTPServer):
    """The two requests of a download, HEAD and GET of /OWNER/NAME/resolve/REVISION/FILE, with the Hub's headers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failure: tuple[int, str] | None = None
        self.pinned = ""
        self.url = f"http://127.0.0.1:{self.server_port}"

    def put(self, repo_id: str, name: str, content: bytes, revision: str = "main") -> None:
        self.files[f"/{repo_id}/resolve/{revision}/{name}"] = content

    @property
    def commit(self) -> str:
        return self.pinned or hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.path.startswith("/api/models/"):
            return self._describe()
        content = self.server.files.get(self.path, b"")
        if self.server.failure or self.path not in self.server.files:
            owner_and_name = "/".join(self.path.split("/")[:3])
            known = any(path.startswith(owner_and_name + "/") for path in self.server.files)
            status, code = self.server.failure or (404, "EntryNotFound" if known else "RepoNotFound")
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            content = b""
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _describe(self) -> None:
        """What a whole repository's download asks first: the commit, then the list of files."""
        owner, name, kind = self.path.split("?")[0].split("/")[3:6]
        files = {path.split("/", 5)[5]: data for path, data in self.server.files.items() if f"/{owner}/{name}/" in path}
        tree = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]
        about = {"id": f"{owner}/{name}", "sha": self.server.commit, "siblings": []}
        content = json.dumps(tree if kind == "tree" else about).encode()
        self.send_response(self.server.failure[0] if self.server.failure else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    hub_server = Hub()
    threading.Thread(target=hub_server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    point_to(monkeypatch, hub_server.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub_server
    hub_server.shutdown()
    hub_server.server_close()


def point_to(monkeypatch, url: str, at_import: str | None = None) -> None:
    """Set the environment as a user would, and what huggingface_hub took from it when it was imported."""
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "ENDPOINT", at_import or url)
    template = (at_import or url) + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def weights(tmp_path) -> bytes:
    checkpoint.save(tmp_path / "w.safetensors", {"a": torch.ones(3)})
    return (tmp_path / "w.safetensors").read_bytes()


@pytest.fixture
def pickled(tmp_path) -> bytes:
    torch.save({"params": {"a": torch.ones(3)}}, tmp_path / "w.pth")
    return (tmp_path / "w.pth").read_bytes()


def test_a_hub_id_gives_weights_and_config_and_then_works_offline(server, weights, monkeypatch):
    server.put("owner/net", "model.safetensors", weights)
    server.put("owner/net", "config.json", b'{"upscale": 2}')
    online = checkpoint.load("owner/net")
    assert torch.equal(online.tensors["a"], torch.ones(3))
    assert online.config == {"upscale": 2}
    assert online.origin == "Hub model owner/net"
    count = len(server.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = checkpoint.load("owner/net")
    assert torch.equal(offline.tensors["a"], online.tensors["a"])
    assert offline.config == online.config
    assert len(server.requests) == count


def test_a_second_load_downloads_nothing_and_a_new_upload_is_seen(server, weights, pickled, tmp_path):
    server.put("owner/net", "model.safetensors", weights)
    checkpoint.load("owner/net")
    server.requests.clear()
    checkpoint.load("owner/net")
    assert not any(request.startswith("GET /owner") for request in server.requests)
    server.put("owner/net", "model.safetensors", pickled)
    path = hub.fetch("owner/net", "model.safetensors")
    assert path.read_bytes() == pickled
    assert path.is_relative_to(tmp_path / "cache")


def test_a_repository_with_only_a_pickle_is_read_safely(server, pickled, monkeypatch):
    server.put("owner/old", "pytorch_model.bin", pickled)
    assert torch.equal(checkpoint.load("owner/old").tensors["a"], torch.ones(3))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the cache also remembers that there is no model.safetensors
    assert torch.equal(checkpoint.load("owner/old").tensors["a"], torch.ones(3))


def test_a_file_and_a_revision_can_be_named(server, weights, pickled):
    server.put("owner/many", "nets/a.pth", pickled, revision="v2")
    found = checkpoint.load("owner/many/nets/a.pth@v2")
    assert torch.equal(found.tensors["a"], torch.ones(3))
    with pytest.raises(UserError, match=r"has no model\.safetensors or pytorch_model\.bin: name a file"):
        checkpoint.load("owner/many")


def test_a_known_name_leads_to_its_repository_and_revision(server, weights):
    server.put("owner/net", "model.safetensors", weights, revision="v1")
    entry = ModelEntry(
        name="net-x2",
        room="r",
        summary="",
        source="hub",
        location="owner/net",
        parameters=3,
        licence="MIT",
        revision="v1",
    )
    found = checkpoint.load("net-x2", (entry,))
    assert found.entry is entry
    assert "GET /owner/net/resolve/v1/model.safetensors" in server.requests


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ((404, "RepoNotFound"), "does not exist or is private"),
        ((403, "GatedRepo"), "licence to be accepted"),
        ((404, "RevisionNotFound"), "has no revision 'v9'"),
        ((500, ""), "the Hub answered with status 500"),
    ],
)
def test_what_the_hub_refuses_is_one_line(server, failure, expected):
    server.failure = failure
    with pytest.raises(UserError, match=expected) as error:
        checkpoint.load("owner/net@v9")
    assert "\n" not in str(error.value)


def test_a_broken_hub_leaves_the_cached_weights_usable(server, weights):
    server.put("owner/net", "model.safetensors", weights)
    checkpoint.load("owner/net")
    server.failure = (503, "")
    assert "a" in checkpoint.load("owner/net").tensors


def test_an_answer_that_is_not_the_hubs_is_one_line(server, monkeypatch):
    monkeypatch.setattr(_Handler, "send_header", lambda self, name, value: None)
    server.put("owner/net", "model.safetensors", b"<html>log in to this network</html>")
    with pytest.raises(UserError, match="owner/net") as error:
        checkpoint.load("owner/net")
    assert "\n" not in str(error.value)


def test_a_refused_connection_fails_within_seconds_and_says_how_to_get_the_model(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    point_to(monkeypatch, f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(UserError, match="hf download owner/net") as error:
        checkpoint.load("owner/net")
    assert "refused" in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 5


def test_a_host_that_never_answers_fails_within_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        point_to(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}", at_import="http://127.0.0.1:9")
        start = time.monotonic()
        with pytest.raises(UserError, match="hf download owner/net"):
            checkpoint.load("owner/net")
        assert time.monotonic() - start < 5


def test_a_whole_folder_comes_without_pickles_and_then_works_offline(server, weights, pickled, monkeypatch):
    server.pinned = COMMIT
    for revision in ("main", COMMIT):
        server.put("owner/sam", "config.json", b'{"model_type": "sam"}', revision)
        server.put("owner/sam", "model.safetensors", weights, revision)
        server.put("owner/sam", "pytorch_model.bin", pickled, revision)
    folder = hub.fetch_folder("owner/sam")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    server.failure = (503, "")
    assert hub.fetch_folder("owner/sam") == folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.fetch_folder("owner/sam") == folder
    with pytest.raises(UserError, match="hf download owner/other"):
        hub.fetch_folder("owner/other")


def test_a_repository_without_config_is_no_model_folder(server, weights):
    server.put("owner/net", "model.safetensors", weights)
    with pytest.raises(UserError, match=r"no config\.json"):
        hub.fetch_folder("owner/net")
