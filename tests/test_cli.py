"""The front door: what `tenfold` prints, where it prints it, and the status that it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jsonschema
import pytest
from tyro.conf import Positional

import tenfold
from tenfold import cli, inventory
from tenfold.core import console
from tenfold.core.config import ModelEntry
from tenfold.core.console import PartialFailure, UserError
from tenfold.core.files import atomic_write

Main = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Settings:
    rate: float = 0.1
    steps: int = 5

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("steps: must be positive")


def draw(
    images: Positional[tuple[Path, ...]],
    size: int,
    mode: Literal["fast", "exact"] = "fast",
    smooth: bool = False,
    settings: Settings = Settings(),
) -> dict:
    """Draw pictures.

    Every picture is drawn at once.

    Args:
        images: pictures to draw.
        size: side in pixels.
        mode: how to draw.
        smooth: draw smoothly.
        settings: further settings.

    Raises:
        UserError: never.

    Example:
        tenfold demo draw a.png --size 3
        tenfold demo draw b.png --size 4 --mode exact
    """
    console.say("drawing")
    print("a stray print of a library")
    return {"images": images, "size": size, "mode": mode, "smooth": smooth, "rate": settings.rate}


def fail(how: Positional[str], folder: Path = Path()) -> None:
    """Fail in the way that is asked for."""
    errors: dict[str, BaseException] = {
        "user": UserError("a.png: not an image\nsecond line"),
        "partial": PartialFailure("1 of 2 failed: a.png", {"done": 1}),
        "interrupt": KeyboardInterrupt(),
        "disk": PermissionError(13, "Permission denied", "/x/a.png"),
        "bug": ZeroDivisionError("division by zero"),
        "memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        "extra": ModuleNotFoundError("No module named 'gradio'", name="gradio"),
        "module": ModuleNotFoundError("No module named 'nowhere'", name="nowhere"),
    }
    if how == "terminated":
        with atomic_write(folder / "result.png") as temporary:
            temporary.write_bytes(b"half")
            signal.raise_signal(signal.SIGTERM)
    raise errors[how]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """Run the command line in this process, with a room `demo` beside the others: (status, output, errors)."""
    for name, content in (("", {}), (".cli", {"VERBS": {"draw": draw, "fail": fail}}), (".config", {})):
        module = types.ModuleType(f"tenfold.demo{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.ROOMS, "demo", "a room for the tests")

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = cli.main(arguments)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


# --- The top level ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_room_and_house_verb(main: Main, arguments: list[str]) -> None:
    status, out, err = main(*arguments)
    assert (status, err) == (0, "")
    assert all(name in out for name in [*cli.ROOMS, *cli.HOUSE])


def test_version_is_the_package_version(main: Main) -> None:
    assert main("--version") == (0, f"tenfold {tenfold.__version__}\n", "")


def test_the_module_is_the_command(run_tenfold: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_tenfold("--version")
    assert (done.returncode, done.stdout) == (0, f"tenfold {tenfold.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dmo"], "unknown room 'dmo': did you mean demo?"),
        (["modles"], "did you mean models?"),
        (["--jsn"], "unknown option --jsn"),
        (["demo", "drow"], "unknown verb 'drow' in demo: did you mean draw?"),
        (["demo", "zzz"], "known: draw, fail"),
    ],
)
def test_an_unknown_name_is_one_line_with_the_nearest(main: Main, arguments: list[str], words: str) -> None:
    status, out, err = main(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["demo"], ["demo", "--help"]])
def test_a_room_lists_its_verbs_with_their_first_lines(main: Main, arguments: list[str]) -> None:
    status, out, _ = main(*arguments)
    assert status == 0
    assert "draw  Draw pictures." in out
    assert "fail  Fail in the way" in out


# --- Help and arguments of a verb ---------------------------------------------------------------------------------


def test_a_verbs_help_has_its_text_its_example_and_every_argument(main: Main) -> None:
    status, out, err = main("demo", "draw", "--help")
    assert (status, err) == (0, "")
    for text in (
        "Every picture is drawn at once.",
        "tenfold demo draw b.png --size 4 --mode exact",
        "pictures to draw.",
        "side in pixels.",
        "--mode {fast,exact}",
        "--settings.rate",
        "--json",
        "--debug",
    ):
        assert text in out
    assert "UserError" not in out
    assert "--no-smooth" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.png"], "missing: --size INT"),
        (["a.png", "--size"], "missing value for argument '--size'"),
        (["a.png", "--size", "x"], "--size: invalid literal for int() with base 10: 'x'"),
        (["a.png", "--size", "3", "--mode", "slow"], "invalid choice 'slow' for argument '--mode'"),
        (["a.png", "--size", "3", "--smoth"], "--smoth; did you mean --smooth?"),
        (["a.png", "--size", "3", "--settings.steps", "0"], "steps: must be positive"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(main: Main, arguments: list[str], words: str) -> None:
    status, out, err = main("demo", "draw", *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert "tenfold demo draw --help" in err
    assert err.count("\n") == 1


def test_arguments_reach_the_verb(main: Main) -> None:
    status, out, _ = main("demo", "draw", "a.png", "b.png", "--size", "3", "--smooth", "--settings.rate", "2", "--json")
    assert status == 0
    assert json.loads(out) == {"images": ["a.png", "b.png"], "size": 3, "mode": "fast", "smooth": True, "rate": 2.0}


# --- Output and exit status ---------------------------------------------------------------------------------------


def test_without_json_people_read_standard_output(main: Main) -> None:
    status, out, err = main("demo", "draw", "a.png", "--size", "3")
    assert (status, out, err) == (0, "drawing\na stray print of a library\n", "")


def test_under_json_standard_output_is_one_object_and_nothing_else(main: Main) -> None:
    status, out, err = main("demo", "draw", "a.png", "--size", "3", "--json")
    assert status == 0
    assert json.loads(out)["size"] == 3
    assert err == "drawing\na stray print of a library\n"


@pytest.mark.parametrize(
    ("how", "expected_status", "words"),
    [
        ("user", 2, "a.png: not an image second line"),
        ("partial", 1, "1 of 2 failed: a.png"),
        ("interrupt", 130, "interrupted"),
        ("disk", 2, "/x/a.png: Permission denied"),
        ("memory", 2, "not enough memory"),
        ("extra", 2, "gradio is not installed: pip install 'tenfold[app]'"),
        ("bug", 1, "ZeroDivisionError: division by zero (this is a bug in tenfold"),
        ("module", 1, "ModuleNotFoundError: No module named 'nowhere' (this is a bug"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_every_failure_is_one_line_and_a_status(
    main: Main, how: str, expected_status: int, words: str, debug: bool
) -> None:
    status, out, err = main("demo", "fail", how, *(["--debug"] if debug else []))
    assert (status, out) == (expected_status, "")
    *above, last = err.splitlines()
    assert last.startswith("error: ")
    assert words in last
    assert (any("Traceback" in line for line in above)) is debug
    assert debug or not above


def test_under_json_an_error_leaves_standard_output_empty(main: Main) -> None:
    status, out, err = main("demo", "fail", "user", "--json")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")


def test_under_json_a_partial_failure_still_gives_its_result(main: Main) -> None:
    status, out, err = main("demo", "fail", "partial", "--json")
    assert (status, json.loads(out)) == (1, {"done": 1})
    assert err == "error: 1 of 2 failed: a.png\n"


def test_sigterm_leaves_no_half_written_file(main: Main, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    status, _, err = main("demo", "fail", "terminated", "--folder", str(tmp_path))
    assert status == 128 + signal.SIGTERM
    assert err == "error: stopped by SIGTERM\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tenfold", "models", "--json"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert process.returncode == cli.EXIT_BROKEN_PIPE
    assert b"error" not in err
    assert b"Traceback" not in err


def test_a_closed_standard_error_puts_nothing_on_standard_output(tmp_path: Path) -> None:
    done = subprocess.run(f"'{sys.executable}' -m tenfold nowhere 2>&-", shell=True, cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_closed_standard_output_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(f"'{sys.executable}' -m tenfold models >&-", shell=True, cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_complaint_is_one_line_where_the_terminal_has_no_lines(
    run_tenfold: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_tenfold("models", "--jsn", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert done.stderr == (
        "error: unrecognized options: --jsn; did you mean --json? (tenfold models --help lists the arguments)\n"
    )


# --- Models and doctor --------------------------------------------------------------------------------------------


def schema(repository: Path, name: str) -> dict:
    return json.loads((repository / "docs" / "schemas" / f"{name}.json").read_text())


def test_models_json_follows_its_schema(main: Main, repository: Path) -> None:
    status, out, _ = main("models", "--json")
    assert status == 0
    listed = json.loads(out)
    jsonschema.validate(listed, schema(repository, "models"))
    names = [model["name"] for model in listed["models"]]
    assert len(names) == len(set(names))
    assert {model["room"] for model in listed["models"]} <= set(cli.ROOMS)


def test_models_are_listed_for_people_by_room(main: Main) -> None:
    status, out, _ = main("models")
    assert status == 0
    assert all(entry.name in out for room in tenfold_rooms() for entry in inventory.room_models(room))


def tenfold_rooms() -> list[str]:
    return [room for room in cli.ROOMS if room != "demo"]


@pytest.mark.parametrize("room", tenfold_rooms())
def test_every_embedded_model_has_its_file_and_its_size(room: str, repository: Path) -> None:
    for entry in inventory.room_models(room):
        if entry.source == "embedded":
            path = repository / "src" / "tenfold" / room / "weights" / entry.location
            assert path.is_file(), f"{entry.name}: {path} is not there"
            assert entry.bytes in (None, path.stat().st_size)
            assert path.stat().st_size <= 5_000_000
        if entry.card and not entry.card.startswith("http"):
            assert (repository / entry.card.partition("#")[0]).is_file(), f"{entry.name}: no card at {entry.card}"


def test_doctor_json_follows_its_schema(main: Main, repository: Path) -> None:
    status, out, err = main("doctor", "--json")
    report = json.loads(out)
    jsonschema.validate(report, schema(repository, "doctor"))
    assert (status, report["problems"]) == (0, []), err
    assert {part["name"] for part in report["rooms"]} == set(tenfold_rooms()) | {"demo"}
    assert report["packages"]["torch"]
    assert "cpu" in [device["name"] for device in report["devices"] if device["available"]]


def test_doctor_names_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch, main: Main) -> None:
    present = inventory.installed_version
    monkeypatch.setattr(
        inventory, "installed_version", lambda package: None if package in ("gradio", "av") else present(package)
    )
    status, out, err = main("doctor", "--json")
    report = json.loads(out)
    app = next(part for part in report["extras"] if part["name"] == "app")
    assert (app["missing"], app["remedy"]) == (["gradio"], "pip install 'tenfold[app]'")
    assert (status, err) == (1, "".join(line for line in err.splitlines(keepends=True)))
    assert report["problems"] == ["av is not installed"]
    assert err.splitlines()[-1] == "error: av is not installed"


def test_doctor_names_embedded_weights_that_are_not_there(monkeypatch: pytest.MonkeyPatch, main: Main) -> None:
    ghost = ModelEntry("ghost", "superres", "no file", "embedded", "ghost.safetensors", 1, "Apache-2.0")
    monkeypatch.setattr(inventory, "room_models", lambda room: (ghost,) if room == "superres" else ())
    status, out, _ = main("doctor", "--json")
    assert (status, json.loads(out)["problems"]) == (1, ["superres: no weights file for ghost"])


# --- Every verb of every room -------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", tenfold_rooms())
def test_every_verb_of_a_room_explains_itself_with_an_example(room: str, main: Main) -> None:
    for name in cli.room_verbs(room):
        status, out, err = main(room, name, "--help")
        assert (status, err) == (0, "")
        assert f"usage: tenfold {room} {name}" in out
        assert f"tenfold {room} {name}" in out.partition("Example:")[2], (
            f"{room} {name} has no example in its docstring"
        )


@pytest.mark.parametrize("name", list(cli.HOUSE))
def test_every_house_verb_explains_itself_with_an_example(name: str, main: Main) -> None:
    status, out, err = main(name, "--help")
    assert (status, err) == (0, "")
    assert f"tenfold {name}" in out.partition("Example:")[2]


# --- Completion ---------------------------------------------------------------------------------------------------


def complete(script: Path, line: str, folder: Path) -> list[str]:
    """What bash offers at the end of a line, as the user's shell would ask for it."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    ask = (
        f"source '{script}'; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; "
        'function_name=$(complete -p tenfold | sed "s/.*-F \\([^ ]*\\) .*/\\1/"); "$function_name"; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", ask], cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return [candidate.strip() for candidate in done.stdout.splitlines() if candidate.strip()]


def test_bash_completes_rooms_verbs_options_and_choices(main: Main, tmp_path: Path) -> None:
    status, out, _ = main("completion", "bash")
    assert status == 0
    script = tmp_path / "tenfold.bash"
    script.write_text(out)
    (tmp_path / "picture.png").write_bytes(b"")
    assert complete(script, "tenfold dem", tmp_path) == ["demo"]
    assert complete(script, "tenfold mo", tmp_path) == ["models"]
    assert set(complete(script, "tenfold ", tmp_path)) == {*cli.ROOMS, *cli.HOUSE}
    assert complete(script, "tenfold demo dr", tmp_path) == ["draw"]
    assert complete(script, "tenfold demo draw --si", tmp_path) == ["--size"]
    assert complete(script, "tenfold demo draw --js", tmp_path) == ["--json"]
    assert set(complete(script, "tenfold demo draw --mode ", tmp_path)) == {"fast", "exact"}
    assert complete(script, "tenfold demo fail --folder pic", tmp_path) == ["picture.png"]
    for words in ("tenfold demo draw ", "tenfold demo draw pic", "tenfold demo draw --smooth pic"):
        assert complete(script, words, tmp_path) == []  # bash then completes file names by itself


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_every_shell_knows_every_room_and_verb(shell: str, main: Main) -> None:
    status, out, _ = main("completion", shell, "--json")
    script = json.loads(out)["script"]
    assert status == 0
    for room in cli.ROOMS:
        assert room in script
        assert all(verb in script for verb in cli.room_verbs(room))
