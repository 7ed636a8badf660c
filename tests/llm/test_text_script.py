"""`scripts/llm_text.py` against a server on this machine that answers as GitHub does."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "llm_text.py"


def book(title: str, paragraphs: int = 50) -> str:
    body = "\r\n\r\n".join(f"{title}, paragraph {n},\r\nwhich goes on in a second line." for n in range(paragraphs))
    return (
        f"The Project Gutenberg EBook of {title}\r\n\r\n*** START OF THIS PROJECT GUTENBERG EBOOK {title} ***\r\n\r\n"
        f"Produced by someone\r\n\r\n{body}\r\n\r\n*** END OF THIS PROJECT GUTENBERG EBOOK {title} ***\r\n\r\nLicence"
    )


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    described = importlib.util.spec_from_file_location("llm_text", SCRIPT)
    module = importlib.util.module_from_spec(described)
    monkeypatch.setitem(sys.modules, "llm_text", module)  # dataclasses look the module up
    described.loader.exec_module(module)
    return module


@pytest.fixture
def served(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes | int]]:
    """What the server answers by path: content, or a status; 404 for the rest."""
    answers: dict[str, bytes | int] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path, 404)
            self.send_response(found if isinstance(found, int) else 200)
            content = b"" if isinstance(found, int) else found
            # A transfer that breaks off: less than was announced.
            self.send_header("Content-Length", str(len(content) + 1000 * content.endswith(b"<broken off>")))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(script, "SOURCE", f"http://127.0.0.1:{server.server_port}")
        yield answers
        server.shutdown()


def serve_all(script: ModuleType, answers: dict[str, bytes | int]) -> None:
    for number, one in enumerate((*script.TRAINING_BOOKS, script.TEST_BOOK)):
        # Each book lies under another of its names, so that the names before it are answered with 404.
        name = one.files[min(number, len(one.files) - 1)]
        encoding = "latin-1" if number == 1 else "utf-8-sig"
        answers[f"/{one.repository}/master/{name}"] = book(f"Café {number}").encode(encoding)


def test_books_are_found_under_any_of_their_names_and_become_three_texts(script, served, tmp_path, monkeypatch, capsys):
    serve_all(script, served)
    monkeypatch.setattr(sys, "argv", ["llm_text.py", str(tmp_path / "out")])
    script.main()
    texts = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir()}
    assert texts.keys() == script.TRAINED_ON.keys()
    for text in texts.values():
        assert "Gutenberg" not in text and "Produced by" not in text and "Licence" not in text and "\r" not in text
    assert "Café 0, paragraph 0, which goes on in a second line.\n\nCafé 0, paragraph 1," in texts["novels.train.txt"]
    assert texts["novels.train.txt"].count("paragraph") == 4 * 48 and texts["novels.valid.txt"].count("paragraph") == 8
    assert texts["novels.test.txt"].startswith("Café 4, paragraph 0,") and texts["novels.test.txt"].count("Café") == 50
    assert capsys.readouterr().out.count("not the very text of the embedded weights") == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (404, "has none of 2600-0.txt, 2600-8.txt, 2600.txt"),
        (503, "War-and-Peace_2600: GitHub answered with status 503"),
        (b"Half a book <broken off>", "War-and-Peace_2600: cannot be downloaded"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line(script, served, tmp_path, monkeypatch, answer, message):
    serve_all(script, served)
    for name in script.TRAINING_BOOKS[0].files:
        served[f"/War-and-Peace_2600/master/{name}"] = answer
    monkeypatch.setattr(sys, "argv", ["llm_text.py", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert message in str(caught.value.code) and "\n" not in str(caught.value.code)
    assert not (tmp_path / "out").exists()


def test_without_a_server_the_message_names_the_way_around(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SOURCE", "http://127.0.0.1:9")
    monkeypatch.setattr(sys, "argv", ["llm_text.py", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="give a folder with --books"):
        script.main()
