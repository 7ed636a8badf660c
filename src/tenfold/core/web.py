"""What the rooms' tabs of the local web page share: errors that a visitor can read, and files that do not pile up."""

from __future__ import annotations

import functools
import html
import inspect
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from tenfold.core.console import UserError, warn

P = ParamSpec("P")
R = TypeVar("R")

_running = 0
_running_lock = threading.Lock()


def busy() -> bool:
    """Whether an event handler is running now."""
    return _running > 0


@contextmanager
def _counted() -> Iterator[None]:
    global _running
    with _running_lock:
        _running += 1
    try:
        yield
    finally:
        with _running_lock:
            _running -= 1


def readable_errors(handler: Callable[P, R]) -> Callable[P, R]:
    """Wrap an event handler, so that whatever goes wrong reaches the visitor as one sentence.

    A `UserError` is shown as it is, without the server's folders; anything else is named on the terminal only.
    """
    import gradio

    def as_gradio_error(error: Exception, args: tuple[object, ...]) -> Exception:
        if isinstance(error, UserError):
            message = str(error)
            for argument in args:
                if isinstance(argument, str):
                    message = message.replace(argument, Path(argument).name or argument)
        else:
            warn(f"{type(error).__name__}: {' '.join(str(error).split())}")
            message = "This did not work; the terminal that runs the page names the reason."
        # Gradio shows the message as HTML, and it may hold a file name that a stranger chose.
        return gradio.Error(html.escape(message), duration=None, title="Not possible", print_exception=False)

    if inspect.isgeneratorfunction(handler):  # one that shows results as they come

        @functools.wraps(handler)
        def guarded_stream(*args: P.args, **kwargs: P.kwargs) -> Any:
            try:
                with _counted():
                    yield from handler(*args, **kwargs)
            except Exception as error:
                raise as_gradio_error(error, args) from None

        return guarded_stream

    @functools.wraps(handler)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with _counted():
                return handler(*args, **kwargs)
        except Exception as error:
            raise as_gradio_error(error, args) from None

    return guarded


def result_file(name: str) -> Path:
    """A path for a file that a visitor may download, in a folder of its own that goes when the server ends."""
    return Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR"))) / name


def asset_copy(package: str, name: str) -> str:
    """The path of a copy of a room's asset, as if a visitor had uploaded it.

    Args:
        package: the room's, such as `tenfold.superres`.
        name: of the file in its assets.
    """
    copy = result_file(name)
    copy.write_bytes((resources.files(package) / "assets" / name).read_bytes())
    return str(copy)
