"""The `tenfold` command: `tenfold ROOM VERB`, and a few verbs of the house itself.

The top level is a plain table, because importing tyro alone takes longer than printing it. A room is imported when it
is entered, a parser is built for the one verb that was asked for, and torch is imported by a verb that computes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import os
import re
import signal
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold import __version__
from tenfold.core import console
from tenfold.core.config import near
from tenfold.core.console import PartialFailure, UserError
from tenfold.core.devices import wait_asleep

Verb = Callable[..., object]

# Every room that exists, in the order in which people see them. A new room is one line here.
ROOMS: dict[str, str] = {
    "superres": "HiT-SR: enlarge images and video (hierarchical transformer super-resolution)",
    "depth": "UniDepth: metric depth, 3D points and the camera from one picture",
    "tracking": "MASA: track anything that a detector can see (appearance learned from stills)",
    "llm": "Pangu Ultra: pre-train and run deep dense language models (depth-scaled sandwich norm)",
    "planner": "Pangu Ultra MoE: simulate and search training layouts of large models",
    "agent": "DeepDiver: an agent that searches, doubts, verifies and cites, over local documents or the web",
}

# Verbs of the house: name -> (one line about it, where its function is).
HOUSE: dict[str, tuple[str, str]] = {
    "tour": ("run every system on its built-in input and write one HTML page", "tenfold.tour:run_tour"),
    "models": ("list every model: where its weights come from, size, licence", "tenfold.inventory:models"),
    "doctor": ("say what is installed, which devices there are, what each room lacks", "tenfold.inventory:doctor"),
    "app": ("open a local web page with a tab for each room", "tenfold.app:run_app"),
    "completion": ("print the completion script for a shell", "tenfold.completion:completion"),
}

USAGE = "usage: tenfold ROOM VERB [ARGUMENTS] [OPTIONS]"

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
# What a shell reports for a process that a signal ended: 128 + the signal's number.
EXIT_TERMINATED, EXIT_BROKEN_PIPE = 128 + 15, 128 + 13


@dataclass(frozen=True)
class Call:
    """A verb with its arguments, parsed and not yet run."""

    run: Callable[[], object]
    json: bool
    debug: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: arguments without the program's name; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # What the shell closed (`>&-`, `2>&-`) is None here; a message for one stream must not appear on the other.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # File names may hold bytes that are no text; they must not stop a message from being printed.
            stream.reconfigure(errors="backslashreplace")
    wait_asleep()
    with _terminate_as_exception():
        return _run_safely(arguments)


def _run_safely(arguments: list[str]) -> int:
    """Run the command and turn every way to fail into one line and an exit status."""
    debug = "--debug" in arguments
    if not debug:
        # Users get our own messages; those of libraries are for those who debug.
        warnings.simplefilter("ignore")
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader (`| head`) has gone: what Python flushes at exit must not raise again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED, debug)
    except UserError as error:
        return _fail(str(error), error.exit_status, debug)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", EXIT_USAGE, debug)
    except ModuleNotFoundError as error:
        from tenfold.inventory import extra_that_brings

        extra = extra_that_brings(error.name or "")
        if extra is None:
            return _fail_as_bug(error, debug)
        return _fail(f"{error.name} is not installed: pip install 'tenfold[{extra}]'", EXIT_USAGE, debug)
    except Exception as error:
        if _is_out_of_memory(error):
            return _fail("not enough memory: choose a smaller input, tile, batch or model", EXIT_USAGE, debug)
        return _fail_as_bug(error, debug)


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return status


def _fail_as_bug(error: Exception, debug: bool) -> int:
    advice = "this is a bug in tenfold" + ("" if debug else "; the same command with --debug shows where")
    return _fail(f"{type(error).__name__}: {error} ({advice})", EXIT_FAILED, debug)


def _is_out_of_memory(error: Exception) -> bool:
    # torch raises RuntimeError (its CUDA error is a subclass) with these words.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error)) is not None
    )


@contextlib.contextmanager
def _terminate_as_exception() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that half-written files are removed. Training puts its own handler in place."""

    def leave(number: int, frame: object) -> None:
        print("error: stopped by SIGTERM", file=sys.stderr)
        sys.exit(EXIT_TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not in the main thread, where Python allows no handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(arguments: list[str]) -> int:
    first, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if first in ("--help", "-h"):
        print(house_help())
        return EXIT_OK
    if first in ("--version", "-V"):
        print(f"tenfold {__version__}")
        return EXIT_OK
    if first in HOUSE:
        return _enter(f"tenfold {first}", load(HOUSE[first][1]), rest)
    if first in ROOMS:
        return _enter_room(first, rest)
    if first.startswith("-"):
        raise UserError(f"unknown option {first}: a room or a verb comes first (tenfold --help lists them)")
    raise UserError(f"unknown room {first!r}: {near(first, [*ROOMS, *HOUSE])} (tenfold --help lists them)")


def _enter_room(room: str, arguments: list[str]) -> int:
    verbs = room_verbs(room)
    if not arguments or arguments[0] in ("--help", "-h"):
        print(room_help(room, verbs))
        return EXIT_OK
    name = arguments[0]
    if name not in verbs:
        raise UserError(f"unknown verb {name!r} in {room}: {near(name, list(verbs))} (tenfold {room} lists them)")
    return _enter(f"tenfold {room} {name}", verbs[name], arguments[1:])


def _enter(prog: str, verb: Verb, arguments: list[str]) -> int:
    """Parse a verb's arguments and run it."""
    call = parse(prog, verb, arguments)
    if not call.json:
        call.run()
        return EXIT_OK
    console.set_json_mode(True)
    try:
        # A stray print of a library must not get between the reader and the one JSON object.
        with contextlib.redirect_stdout(sys.stderr):
            result = call.run()
    except PartialFailure as failure:
        console.print_json(failure.result)
        raise
    finally:
        console.set_json_mode(False)
    console.print_json(result)
    return EXIT_OK


def load(where: str) -> Verb:
    """The function at `package.module:name`."""
    module, name = where.split(":")
    return getattr(importlib.import_module(module), name)


def room_verbs(room: str) -> dict[str, Verb]:
    """The verbs of a room. Imports the room's command line, and nothing that computes."""
    return importlib.import_module(f"tenfold.{room}.cli").VERBS


# --- Help ---------------------------------------------------------------------------------------------------------


def house_help() -> str:
    """The page that `tenfold --help` prints."""
    return "\n".join(
        [
            f"tenfold {__version__}: published research systems, each to run, train, evaluate, export and reproduce",
            "",
            USAGE,
            "",
            "rooms (tenfold ROOM lists its verbs)",
            *_columns(ROOMS),
            "",
            "the house",
            *_columns({name: summary for name, (summary, _) in HOUSE.items()}),
            "",
            "every verb",
            *_columns(
                {
                    "--help": "its arguments and an example",
                    "--json": "print one JSON object on standard output, everything else on standard error",
                    "--debug": "show the traceback of an error",
                }
            ),
            "",
            "exit status: 0 done, 1 some items failed, 2 wrong input, 130 interrupted",
        ]
    )


def room_help(room: str, verbs: dict[str, Verb]) -> str:
    """The page that `tenfold ROOM` prints: its verbs, each with the first line of its docstring."""
    summaries = {name: (inspect.getdoc(verb) or "").partition("\n")[0] for name, verb in verbs.items()}
    footer = f"`tenfold {room} VERB --help` shows a verb's arguments and an example."
    usage = f"usage: tenfold {room} VERB [ARGUMENTS] [OPTIONS]"
    return "\n".join([ROOMS[room], "", usage, "", *_columns(summaries), "", footer])


def _columns(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in rows.items()]


_SECTION = re.compile(r"(Args|Arguments|Returns|Raises|Yields|Examples?|Notes?|Sources?|References?):{1,2}")


def verb_description(verb: Verb) -> str:
    """What `--help` says above the arguments: a docstring's text and its example, without the sections between them."""
    kept: list[str] = []
    section = ""
    for line in (inspect.getdoc(verb) or "").splitlines():
        if match := _SECTION.fullmatch(line):
            section = match[1]
            if section.startswith("Example"):
                kept += ["", "Example:"]
        elif not section or (section.startswith("Example") and line.strip()):
            kept.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


# --- Parsing ------------------------------------------------------------------------------------------------------


def deferred(verb: Verb) -> Callable[..., Call]:
    """A function with a verb's signature plus `--json` and `--debug`, which returns the call instead of making it."""
    import tyro

    def collect(*, json: bool, debug: bool, **arguments: Any) -> Call:
        return Call(functools.partial(verb, **arguments), json, debug)

    hints = typing.get_type_hints(verb, include_extras=True)
    house_options = {
        "json": "print the result as one JSON object; everything else goes to standard error.",
        "debug": "show the traceback of an error.",
    }
    for name, text in house_options.items():
        hints[name] = typing.Annotated[bool, tyro.conf.arg(help=text)]
    hints["return"] = Call
    without_none: Any = tyro.conf.DisallowNone
    parameters = []
    for parameter in inspect.signature(verb).parameters.values():
        if isinstance(hints[parameter.name], types.UnionType):
            # tyro knows typing.Union by itself; for `X | Y` it imports typeguard, a sixth of the time to start.
            hints[parameter.name] = typing.Union[typing.get_args(hints[parameter.name])]  # noqa: UP007
        if parameter.default is None:
            # To leave the option out says None; that its type allows it need not be on the help page.
            hints[parameter.name] = without_none[hints[parameter.name]]
        parameters.append(parameter.replace(annotation=hints[parameter.name]))
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hints[name])
        for name in house_options
    ]
    collect.__name__ = collect.__qualname__ = getattr(verb, "__name__", "verb")
    collect.__doc__ = verb.__doc__
    collect.__annotations__ = hints
    collect.__signature__ = inspect.Signature(parameters, return_annotation=Call)  # type: ignore[attr-defined]
    return collect


def parser_settings() -> tuple[Any, ...]:
    """tyro's markers for all verbs: `--flag` without `--no-flag`, positional arguments called by their names."""
    import tyro

    return tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName


def parse(prog: str, verb: Verb, arguments: Sequence[str]) -> Call:
    """Parse a verb's arguments.

    Raises:
        UserError: arguments that do not fit, in one line.
        SystemExit: after `--help` was printed.
    """
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                deferred(verb),
                prog=prog,
                description=verb_description(verb),
                args=list(arguments),
                config=parser_settings(),
            )
    except SystemExit as end:
        if not end.code:
            raise
    raise UserError(f"{_one_line(complaint.getvalue())} ({prog} --help lists the arguments)")


def _choices(listed: re.Match[str]) -> str:
    return ", ".join(sorted(set(re.findall(r"'([^']*)'", listed[0])) - {"None"}))


def _one_line(complaint: str) -> str:
    """The essence of tyro's framed, many-line complaint: its first part, and the options that it thinks were meant."""
    parts: list[list[str]] = [[]]
    for line in complaint.splitlines()[1:-1]:
        inside = line[2:-1].rstrip()  # the frame is a line, or spaces where the output cannot show lines
        if inside.strip("─- "):
            parts[-1].append(inside)
        elif parts[-1]:
            parts.append([])
    # Arguments that tyro lists stand four spaces in, their help texts eight.
    listed = [[line.strip() for line in part if re.match(r" {4}\S", line)] for part in parts]
    if parts[0] and parts[0][0].startswith("Missing from"):
        return f"missing: {', '.join(listed[0])}"
    message = " ".join(line.strip() for line in parts[0] or [complaint]).rstrip(".")
    # tyro names the choices in any order, and None, which nobody types, among them.
    message = re.sub(r"\((?:'[^']*',? ?)+\)", _choices, message)
    meant = [
        name.split()[0].rstrip(",")
        for part, names in zip(parts[1:], listed[1:], strict=True)
        if part and part[0].startswith(("Perhaps you meant", "Arguments similar"))
        for name in names
    ]
    return message[:1].lower() + message[1:] + (f"; did you mean {' or '.join(meant[:3])}?" if meant else "")
