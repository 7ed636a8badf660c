"""The local web page: it listens where it should, asks nobody else for anything, and is polite about bad uploads."""

from __future__ import annotations

import importlib.util
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

from browser import chromium, console_errors, requested_urls, set_viewport
from tenfold import app
from tenfold.core import web
from tenfold.core.console import UserError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def heed_interrupts() -> None:
    """A shell ignores Ctrl-C for what it runs in the background, and tests that run there hand that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def running_app(*options: str) -> Iterator[str]:
    """A running `tenfold app`, as its address; it must end well on Ctrl-C."""
    command = [sys.executable, "-m", "tenfold", "app", "--port", str(free_port()), *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "is open" in line, line + process.communicate(timeout=60)[1]
        yield line.split()[0]
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert output.endswith("closed\n")
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_app("--max-upload-mb", "1") as address:
        yield address


# --- Starting -----------------------------------------------------------------------------------------------------


def test_missing_gradio_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tenfold\[app\]'"):
        app.run_app()


def test_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}"):
            app.run_app(port=port)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_impossible_port_is_refused(port: int) -> None:
    with pytest.raises(UserError, match="--port"):
        app.run_app(port=port)


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(UserError, match=r"192\.0\.2\.1"):
        app.run_app(host="192.0.2.1", port=free_port())


def test_page_has_a_tab_for_every_room_with_one() -> None:
    page, rooms = app.build_page()
    labels = [block.label for block in page.blocks.values() if type(block).__name__ == "Tab"]
    assert labels == list(rooms)
    assert "superres" in rooms


# --- Errors that a visitor sees -----------------------------------------------------------------------------------


def message_of(handler: Any, *arguments: Any) -> str:
    import gradio

    with pytest.raises(gradio.Error) as caught:
        web.readable_errors(handler)(*arguments)
    return caught.value.message


def test_error_shows_neither_folders_nor_markup() -> None:
    def handler(path: str) -> None:
        raise UserError(f"{path}: not a picture")

    message = message_of(handler, "/secret/place/<img src=x onerror=alert(1)>.png")
    assert message == "&lt;img src=x onerror=alert(1)&gt;.png: not a picture"


def test_unexpected_error_is_told_to_the_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    def handler() -> None:
        raise RuntimeError("/secret/place is broken")

    assert "secret" not in message_of(handler)
    assert "RuntimeError: /secret/place is broken" in capsys.readouterr().err


# --- The served page ----------------------------------------------------------------------------------------------


def test_server_listens_on_loopback_only(server: str) -> None:
    assert server.startswith("http://127.0.0.1:")
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    port = int(server.rstrip("/").rpartition(":")[2])
    for address in others - {"127.0.0.1", "127.0.1.1"}:
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=2)


def test_upload_beyond_the_limit_is_refused(server: str) -> None:
    body = (
        b'--edge\r\nContent-Disposition: form-data; name="files"; filename="big.png"\r\n\r\n'
        + bytes(1_200_000)
        + b"\r\n--edge--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=edge"}
    request = urllib.request.Request(f"{server}gradio_api/upload", body, headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 413


def upload(browser: webdriver.Chrome, path: Path) -> None:
    """Give the page a file, once it is there, and wait until the upload is done."""
    wait = WebDriverWait(browser, 120)
    field = wait.until(lambda page: page.find_element("css selector", "input[type=file]"))
    field.send_keys(str(path))
    wait.until(lambda page: page.find_elements("css selector", f"a[download='{path.name}']"))


def press(browser: webdriver.Chrome, label: str) -> None:
    browser.find_element("xpath", f"//button[normalize-space()='{label}']").click()


@pytest.mark.browser
def test_uploaded_picture_comes_back_enlarged(server: str, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "small.png")
    with chromium(tmp_path) as browser:
        set_viewport(browser, 1280, 900)
        browser.get(server)
        upload(browser, tmp_path / "small.png")
        press(browser, "Enlarge")

        wait = WebDriverWait(browser, 120)
        wait.until(lambda page: "80 x 48" in page.find_element("tag name", "body").text)
        shown = "return [...document.images].filter(image => image.naturalWidth === 80).length"
        wait.until(lambda page: page.execute_script(shown) == 2)
        press(browser, "Download as PNG")
        file = tmp_path / "downloads" / "small-x2.png"
        wait.until(lambda _: file.exists())
        result = Image.open(file)
        assert (result.format, result.size) == ("PNG", (80, 48))

        assert console_errors(browser) == []
        assert [url for url in requested_urls(browser) if not url.startswith(server)] == []
        set_viewport(browser, 360, 800)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360


@pytest.mark.browser
def test_interrupt_in_the_middle_of_a_picture_ends_the_server_well(tmp_path: Path) -> None:
    Image.new("RGB", (1200, 900), "teal").save(tmp_path / "large.png")
    with chromium(tmp_path) as browser, running_app() as address:
        set_viewport(browser, 1280, 900)
        browser.get(address)
        upload(browser, tmp_path / "large.png")
        press(browser, "Enlarge")
        wait = WebDriverWait(browser, 120)
        wait.until(lambda page: "processing" in page.find_element("tag name", "body").text)


def header_bomb() -> bytes:
    """A PNG of a few bytes that claims 20 000 x 20 000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (20_000).to_bytes(4, "big") * 2 + bytes((8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))


@pytest.mark.browser
@pytest.mark.parametrize(
    ("content", "words"),
    [(b"just words", "not a picture"), (header_bomb(), "20000"), (None, "Choose a picture")],
    ids=["text", "bomb", "nothing"],
)
def test_bad_upload_gets_a_sentence_and_no_traceback(
    server: str, tmp_path: Path, content: bytes | None, words: str
) -> None:
    with chromium(tmp_path) as browser:
        set_viewport(browser, 1280, 900)
        browser.get(server)
        if content is not None:
            (tmp_path / "odd.png").write_bytes(content)
            upload(browser, tmp_path / "odd.png")
        wait = WebDriverWait(browser, 120)
        wait.until(lambda page: page.find_elements("xpath", "//button[normalize-space()='Enlarge']"))
        press(browser, "Enlarge")
        wait.until(lambda page: words in page.find_element("tag name", "body").text)
        text = browser.find_element("tag name", "body").text
        assert "Traceback" not in text
        assert str(tmp_path) not in text
