from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.core import console


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Point:
    x: float
    name: Path


@pytest.fixture
def json_mode() -> Iterator[None]:
    console.set_json_mode(True)
    yield
    console.set_json_mode(False)


def test_what_people_read_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("hello")
    console.table(("a", "b"), [("x", 1)])
    captured = capsys.readouterr()
    assert "hello" in captured.out
    assert "x" in captured.out
    assert captured.err == ""


@pytest.mark.usefixtures("json_mode")
def test_under_json_it_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("hello")
    console.table(("a", "b"), [("x", 1)])
    console.print_json(Point(1.0, Path("a")))
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"x": 1.0, "name": "a"}
    assert "hello" in captured.err
    assert "x" in captured.err


def test_a_warning_never_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    console.warn("careful")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "warning: careful\n"


def test_progress_is_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("work", total=3, start=1) as bar:
        bar.advance(note="half")
        bar.advance()
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_values_of_all_kinds_become_json() -> None:
    value = {
        1: Point(math.inf, Path("a/b")),
        "colour": Colour.RED,
        "set": {3},
        "array": np.array([[1, 2]], dtype=np.uint8),
        "scalar": np.float32(0.5),
        "tensor": torch.tensor([1.5, math.nan]),
        "none": None,
        "flag": np.bool_(True),
    }
    assert console.to_jsonable(value) == {
        "1": {"x": None, "name": "a/b"},
        "colour": "red",
        "set": [3],
        "array": [[1, 2]],
        "scalar": 0.5,
        "tensor": [1.5, None],
        "none": None,
        "flag": True,
    }


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)


@settings(deadline=None, max_examples=50)
@given(value=plain)
def test_what_is_json_already_is_left_as_it_is(value: object) -> None:
    assert console.to_jsonable(value) == value


def test_errors_carry_their_exit_status() -> None:
    failure = console.PartialFailure("two of three", {"done": 1})
    assert (console.UserError.exit_status, failure.exit_status, failure.result) == (2, 1, {"done": 1})


def test_names_with_brackets_and_colons_are_shown_as_they_are(capsys):
    console.table(("image [bold]",), [("br[a]ck[red]et :smile:.png",), ("[/closed].png",)], title="in [/x]/")
    shown = capsys.readouterr().out
    for text in ("image [bold]", "br[a]ck[red]et :smile:.png", "[/closed].png", "in [/x]/"):
        assert text in shown


def test_a_warning_is_one_line_whatever_the_file_is_called(capsys):
    console.warn("new\nline.png: damaged")
    assert capsys.readouterr().err == "warning: new line.png: damaged\n"
