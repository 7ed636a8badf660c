"""The local web page: a tab for every room that has one. It serves this machine only, unless it is told otherwise."""

from __future__ import annotations

import atexit
import importlib.util
import ipaddress
import os
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tenfold.core import console, devices, web
from tenfold.core.console import UserError

if TYPE_CHECKING:
    import gradio

_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")
_CSS = """
.tab-wrapper { width: 0; min-width: 100%; overflow-x: auto; }
.gradio-container { max-width: 72rem !important; margin: 0 auto !important; }
.gradio-container h1 { font-size: 1.9rem; letter-spacing: -0.01em; margin: 0.6rem 0 0.2rem; }
"""


@dataclass(frozen=True)
class AppResult:
    """A page that was served and is closed again: its address, and the rooms it showed."""

    address: str
    rooms: tuple[str, ...]


def run_app(
    host: str = "127.0.0.1", port: int = 7860, max_upload_mb: int = 32, open_browser: bool = False
) -> AppResult:
    """Serve a local web page with a tab for each room, until Ctrl-C.

    Nothing leaves this machine: no telemetry, no sharing, no fonts or scripts from elsewhere. Uploads and results are
    deleted when the server ends.

    Args:
        host: address to listen on; anything but a loopback address opens the page, without a password, to others.
        port: port to listen on.
        max_upload_mb: largest file that may be uploaded, in megabytes.
        open_browser: open the page in the default browser.

    Raises:
        UserError: gradio is not installed, the port is taken, or the host or a number is impossible.

    Example:
        tenfold app --open-browser
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the web page needs gradio: pip install 'tenfold[app]'")
    if max_upload_mb < 1:
        raise UserError(f"--max-upload-mb is {max_upload_mb}: it must be 1 or more")
    _check_free(host, port)

    atexit.register(_leave_what_runs)
    devices.set_threads()
    with tempfile.TemporaryDirectory(prefix="tenfold-app-") as folder:
        _settle_environment(folder)
        page, rooms = build_page()
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        try:
            page.launch(
                server_name=host,
                server_port=port,
                max_file_size=max_upload_mb * 1024 * 1024,
                inbrowser=open_browser,
                prevent_thread_lock=True,
                share=False,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                run_history=False,
                quiet=True,
                footer_links=[],
                theme=_theme(),
                css=_CSS,
            )
        except OSError as error:
            raise UserError(f"cannot serve on {address}: {error}") from error
        console.say(f"{address} is open; Ctrl-C ends it")
        if not _is_loopback(host):
            console.warn(f"{host} is not a loopback address: others can use this page, and there is no password")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            console.say("closed")
        finally:
            page.close(verbose=False)
        return AppResult(address, rooms)


def _leave_what_runs() -> None:
    """End the process at once where a picture is still being computed for a visitor who will not get it.

    The thread cannot be stopped, and the interpreter's own way out would pull it from under torch, which aborts.
    """
    if web.busy():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def build_page() -> tuple[gradio.Blocks, tuple[str, ...]]:
    """The page, not yet served, and the rooms that have a tab on it."""
    import gradio

    from tenfold.cli import ROOMS

    rooms = tuple(room for room in ROOMS if importlib.util.find_spec(f"tenfold.{room}.app") is not None)
    with gradio.Blocks(title="tenfold", analytics_enabled=False) as page:
        gradio.Markdown("# tenfold\nEverything on this page is computed on the machine that serves it.")
        for room in rooms:
            with gradio.Tab(room):
                importlib.import_module(f"tenfold.{room}.app").tab()
    return page, rooms


def _theme() -> gradio.themes.Base:
    """The house's colours, in fonts that the reader has: gradio's own themes fetch theirs."""
    import gradio

    theme = gradio.themes.Base(primary_hue="teal", neutral_hue="stone", font=_FONT, font_mono=_MONO)
    # White words need the darker teals behind them.
    return theme.set(
        color_accent="*primary_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
    )


def _settle_environment(folder: str) -> None:
    """Set what gradio reads from the environment: no telemetry, files in `folder`, this machine without a proxy."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = folder
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1", "localhost", "::1")))


def _check_free(host: str, port: int) -> None:
    """Refuse a port that is taken, or an address that this machine does not have, before anything is built."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port is {port}: it must be between 1 and 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # As servers do: a port whose last connection has just been closed counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot listen on {host} port {port} ({reason}): choose another --port or --host") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
