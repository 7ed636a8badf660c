"""Configurations: frozen dataclasses that go to YAML and come back, checked field by field. Imports no torch.

A room writes its configuration as plain dataclasses in `config.py`. From them the command line makes options (tyro
does), and this module makes YAML files and reads them. A message about a wrong file names the field by its full path
(`model.depths[2]`).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

from tenfold.core.console import UserError
from tenfold.core.files import write_bytes

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config")
Instance = TypeVar("Instance", bound="DataclassInstance")


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """One model that a room can load by name: a row of `tenfold models`.

    Args:
        name: what the user types.
        room: the room that loads it.
        summary: one line about it.
        source: `embedded` (ships inside the package), `hub` (downloaded from the Hugging Face Hub at first use) or
            `package` (carried by another installed package).
        location: a file name in the room's `weights/`, a hub repository id, or that package's import name.
        parameters: number of trainable parameters.
        licence: licence of the weights, as their owner states it.
        bytes: size of the weights file, where it is known.
        revision: commit of the hub repository that the tests were made with.
        card: where its model card is (a path in this repository, or a hub page).
    """

    name: str
    room: str
    summary: str
    source: Literal["embedded", "hub", "package"]
    location: str
    parameters: int
    licence: str
    bytes: int | None = None
    revision: str | None = None
    card: str | None = None


def near(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known names, else all of them.

    Example:
        >>> near("uspcale", ["upscale", "train"])
        'did you mean upscale?'
    """
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def to_yaml(config: Any) -> str:
    """A dataclass as YAML text, fields in the order of their definition; `from_mapping` reads it back unchanged."""
    import yaml

    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def _plain(value: Any) -> Any:
    """`value` in the types that YAML knows."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def save_yaml(path: Path | str, config: Any) -> None:
    """Write a dataclass as a YAML file, atomically."""
    write_bytes(path, to_yaml(config).encode())


def load_yaml(cls: type[Config], path: Path | str) -> Config:
    """Read a YAML file into a dataclass; a field that the file leaves out keeps its default.

    Raises:
        UserError: no such file, not YAML, or a field that does not fit (see `from_mapping`).
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `field: value` lines, found {_kind(content)}")
    try:
        return from_mapping(cls, content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def named_or_yaml(cls: type[Config], name: str, known: Mapping[str, Config], option: str = "--recipe") -> Config:
    """The configuration that an option names: one of `known`, or the content of a YAML file.

    Raises:
        UserError: neither a known name nor a .yaml or .yml file, or one that does not fit (see `load_yaml`).
    """
    if name in known:
        return known[name]
    if Path(name).suffix in (".yaml", ".yml"):
        return load_yaml(cls, name)
    raise UserError(f"{option} {name}: neither a YAML file nor a known recipe; {near(name, list(known))}")


def replaced(config: Instance, **changes: object) -> Instance:
    """`config` with those changes that are not None: what options that were left out do not touch.

    Raises:
        UserError: the changed fields do not fit together.
    """
    try:
        return dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})
    except ValueError as error:
        raise UserError(f"these settings cannot be used: {error}") from None


def from_mapping(cls: type[Config], mapping: Mapping[str, Any], where: str = "") -> Config:
    """Build a dataclass from plain values (what YAML or JSON gives), checking names and types all the way down.

    Field types may be bool, int, float, str, Path, Literal, tuples, lists, dicts, unions, None and further dataclasses.

    Args:
        cls: the dataclass.
        mapping: field names to values.
        where: path of this mapping inside a larger one, for messages.

    Raises:
        UserError: an unknown or missing field, a value of the wrong type, or one that the dataclass itself refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in mapping:
        if key not in fields:
            raise UserError(f"unknown field {prefix}{key}: {near(str(key), list(fields))}")
    values = {key: _convert(hints[key], value, prefix + key) for key, value in mapping.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"field {prefix}{name} is missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as an instance of the annotated type `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _convert(arguments[0], value, where)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        # `True == 1`, so the type is compared as well.
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise UserError(f"{where} is {value!r}: choose one of {', '.join(map(str, arguments))}")
        return value
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise _mismatch(where, "a group of fields", value)
        return from_mapping(typing.cast(type, kind), value, where)
    if origin in (tuple, list):
        return _convert_sequence(origin, arguments, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _mismatch(where, "a mapping", value)
        return {
            _convert(arguments[0], key, where): _convert(arguments[1], item, f"{where}.{key}")
            for key, item in value.items()
        }
    return _convert_scalar(kind, value, where)


def _convert_union(choices: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    refusals = []
    for choice in choices:
        if choice is not type(None):
            try:
                return _convert(choice, value, where)
            except UserError as refusal:
                refusals.append(refusal)
    raise refusals[0] if len(refusals) == 1 else _mismatch(where, " or ".join(map(_name, choices)), value)


def _convert_sequence(origin: type, arguments: Sequence[Any], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _mismatch(where, "a list", value)
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise UserError(f"{where} has {len(value)} values: expected {len(arguments)}")
        kinds = list(arguments)
    else:
        kinds = [arguments[0]] * len(value)
    return origin(
        _convert(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _convert_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        # YAML 1.1, which PyYAML reads, takes `1e-4` for a string: a number needs a dot there. People write it without.
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif kind is Path:
        if isinstance(value, str | Path):
            return Path(value)
    elif isinstance(kind, type) and isinstance(value, kind):
        return value
    raise _mismatch(where, _name(kind), value)


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "nothing",
}


def _name(kind: Any) -> str:
    return _NAMES.get(kind) or str(getattr(kind, "__name__", kind))


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "a group of fields", list: "a list", type(None): "nothing"}
    return names.get(type(value), repr(value))


def _mismatch(where: str, expected: str, value: Any) -> UserError:
    return UserError(f"{where} should be {expected}, found {_kind(value)}")
