"""What the rooms' tabs of the local web page share: errors that a visitor can read, and files that do not pile up."""

from __future__ import annotations

import functools
import html
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from tenfold.core.console import UserError, warn

P = ParamSpec("P")
R = TypeVar("R")


def readable_errors(handler: Callable[P, R]) -> Callable[P, R]:
    """Wrap an event handler, so that whatever goes wrong reaches the visitor as one sentence.

    A `UserError` is shown as it is, without the server's folders; anything else is named on the terminal only.
    """
    import gradio

    @functools.wraps(handler)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return handler(*args, **kwargs)
        except UserError as error:
            message = str(error)
            for argument in args:
                if isinstance(argument, str):
                    message = message.replace(argument, Path(argument).name or argument)
        except Exception as error:
            warn(f"{type(error).__name__}: {' '.join(str(error).split())}")
            message = "This did not work; the terminal that runs the page names the reason."
        # Gradio shows the message as HTML, and it may hold a file name that a stranger chose.
        raise gradio.Error(html.escape(message), duration=None, title="Not possible", print_exception=False)

    return guarded


def result_file(name: str) -> Path:
    """A path for a file that a visitor may download, in a folder of its own that goes when the server ends."""
    return Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR"))) / name
