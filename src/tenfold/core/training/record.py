"""The configuration of a run, kept in its folder and compared when the run goes on. Imports no torch."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from tenfold.core.console import UserError, to_jsonable
from tenfold.core.files import write_bytes
from tenfold.core.training.config import FREE_ON_RESUME, FitConfig


def check(run_dir: Path, config: FitConfig, recipe: object, resume: bool) -> None:
    """Record the configuration of a new run; of one that has left checkpoints, see that it is the same.

    Raises:
        UserError: a field differs that shapes the weights, or there is a run and `resume` is False.
    """
    path = run_dir / "config.yaml"
    wanted = _plain({"fit": config, "recipe": recipe})
    if path.exists() and any((run_dir / "checkpoints").glob("step-*")):
        if not resume:
            raise UserError(f"{run_dir} already holds a run: resume it, or choose another folder")
        try:
            recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path}: not a readable configuration ({' '.join(str(error).split())})") from error
        # A run that was started before a field existed ran as the field's default says.
        defaults = {field.name: field.default for field in fields(FitConfig) if field.default is not MISSING}
        if isinstance(recorded, dict) and isinstance(recorded.get("fit"), dict):
            recorded["fit"] = _plain(defaults) | recorded["fit"]
        differences = _differences(recorded, wanted)
        if differences:
            raise UserError(
                f"{run_dir} was started with another configuration: {'; '.join(differences)}: "
                "use the recorded values, or another folder"
            )
    write_bytes(path, yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True).encode())


def _plain(value: object) -> Any:
    """What the value is after a round trip through YAML."""
    return yaml.safe_load(yaml.safe_dump(to_jsonable(value), sort_keys=False))


def _differences(recorded: Any, wanted: Any, where: str = "") -> list[str]:
    """`FIELD is A there and B here` for each field that differs and is not free to change."""
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        found = []
        for name in dict.fromkeys([*recorded, *wanted]):
            if where == "fit" and name in FREE_ON_RESUME:
                continue
            found += _differences(recorded.get(name), wanted.get(name), f"{where}.{name}" if where else name)
        return found
    return [] if recorded == wanted else [f"{where} is {recorded} there and {wanted} here"]
