from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.core.config import from_mapping, load_yaml, named_or_yaml, near, replaced, save_yaml, to_yaml
from tenfold.core.console import UserError


@dataclass(frozen=True)
class Inner:
    widths: tuple[int, ...] = (8, 16)
    window: tuple[int, int] = (4, 4)
    kind: Literal["fast", "exact", 1] = "fast"


@dataclass(frozen=True)
class Outer:
    name: str
    rate: float = 1e-4
    steps: int = 10
    averaged: bool = False
    folder: Path | None = None
    size: int | str = "auto"
    inner: Inner = Inner()
    stages: list[Inner] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: {self.steps} is not positive")


# PyYAML does not give back control characters and exotic line ends in keys, which no configuration has.
texts = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]))
inners = st.builds(
    Inner,
    st.lists(st.integers(), max_size=3).map(tuple),
    st.tuples(st.integers(), st.integers()),
    st.sampled_from(["fast", "exact", 1]),
)
outers = st.builds(
    Outer,
    name=texts,
    rate=st.floats(allow_nan=False),
    steps=st.integers(min_value=1),
    averaged=st.booleans(),
    folder=st.none() | st.text(st.characters(categories=["L", "N"]), min_size=1).map(Path),
    size=st.integers() | texts,
    inner=inners,
    stages=st.lists(inners, max_size=2),
    weights=st.dictionaries(texts, st.floats(allow_nan=False), max_size=3),
)


@settings(deadline=None, max_examples=60)
@given(config=outers)
def test_yaml_gives_back_the_configuration_that_was_written(config: Outer) -> None:
    assert from_mapping(Outer, yaml.safe_load(to_yaml(config))) == config


@dataclass(frozen=True)
class Limits:
    low: int
    high: int

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low is above high")


def test_not_a_number_survives_yaml(tmp_path: Path) -> None:
    save_yaml(tmp_path / "c.yaml", Outer("a", rate=math.nan))
    assert math.isnan(load_yaml(Outer, tmp_path / "c.yaml").rate)


def test_a_field_that_is_left_out_keeps_its_default() -> None:
    assert from_mapping(Outer, {"name": "a", "inner": {"kind": "exact"}}) == Outer("a", inner=Inner(kind="exact"))


def test_an_exponent_without_a_dot_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: a\nrate: 3e-4\n")
    assert load_yaml(Outer, path).rate == 3e-4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nam": "a"}, ["unknown field nam", "did you mean name"]),
        ({"name": "a", "inner": {"width": [1]}}, ["unknown field inner.width", "widths"]),
        ({}, ["field name is missing"]),
        ({"name": 3}, ["name should be text", "found 3"]),
        ({"name": "a", "steps": 1.5}, ["steps should be a whole number", "1.5"]),
        ({"name": "a", "steps": True}, ["steps should be a whole number", "True"]),
        ({"name": "a", "rate": "fast"}, ["rate should be a number", "'fast'"]),
        ({"name": "a", "averaged": 1}, ["averaged should be true or false"]),
        ({"name": "a", "averaged": "no"}, ["averaged should be true or false"]),
        ({"name": "a", "folder": 3}, ["folder should be a path"]),
        ({"name": "a", "size": None}, ["size should be a whole number or text", "found nothing"]),
        ({"name": "a", "inner": 3}, ["inner should be a group of fields"]),
        ({"name": "a", "inner": {"widths": [1, "x"]}}, ["inner.widths[1] should be a whole number", "'x'"]),
        ({"name": "a", "inner": {"widths": 3}}, ["inner.widths should be a list"]),
        ({"name": "a", "inner": {"window": [1]}}, ["inner.window has 1 values", "expected 2"]),
        ({"name": "a", "inner": {"kind": "slow"}}, ["inner.kind is 'slow'", "fast, exact, 1"]),
        ({"name": "a", "inner": {"kind": True}}, ["inner.kind is True"]),
        ({"name": "a", "stages": [{}, {"kind": 2}]}, ["stages[1].kind is 2"]),
        ({"name": "a", "weights": {"x": "y"}}, ["weights.x should be a number"]),
        ({"name": "a", "steps": 0}, ["steps: 0 is not positive"]),
    ],
)
def test_what_does_not_fit_is_named(values: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        from_mapping(Outer, values)
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name: [", ["not valid YAML"]),
        (b"- a\n- b\n", ["expected `field: value` lines", "found a list"]),
        (b"\xff\xfe\x00", ["cannot be read"]),
        (b"name: a\nsteps: many\n", ["steps should be a whole number"]),
        (b"", ["field name is missing"]),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, content: bytes, words: list[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_yaml(Outer, path)
    message = str(raised.value)
    assert str(path) in message
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_yaml(Outer, tmp_path / "none.yaml")


def test_yaml_keeps_the_order_of_the_fields() -> None:
    lines = to_yaml(Outer("a")).splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == ["name", "rate", "steps"]


def test_near_names_the_closest_and_else_all() -> None:
    assert near("uspcale", ["upscale", "train"]) == "did you mean upscale?"
    assert near("qqq", ["upscale", "train"]) == "known: upscale, train"


def test_options_that_were_left_out_change_nothing() -> None:
    start = Limits(1, 3)
    assert replaced(start, low=None, high=None) == start
    assert replaced(start, low=2, high=None) == Limits(2, 3)
    with pytest.raises(UserError, match="cannot be used: low is above high"):
        replaced(start, low=4)


def test_a_configuration_is_one_of_the_known_or_a_yaml_file(tmp_path: Path) -> None:
    known = {"narrow": Limits(1, 2)}
    assert named_or_yaml(Limits, "narrow", known) == Limits(1, 2)
    file = tmp_path / "mine.yaml"
    save_yaml(file, Limits(0, 9))
    assert named_or_yaml(Limits, str(file), known) == Limits(0, 9)
    with pytest.raises(UserError, match="--recipe narow: neither a YAML file nor a known recipe; did you mean narrow"):
        named_or_yaml(Limits, "narow", known)
