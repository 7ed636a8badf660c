"""What there is: `tenfold models` lists the models of all rooms, `tenfold doctor` looks at the machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from tenfold import __version__
from tenfold.cli import ROOMS
from tenfold.core import console
from tenfold.core.config import ModelEntry
from tenfold.core.console import PartialFailure
from tenfold.core.devices import memory_bytes, usable_cpus
from tenfold.core.results import installed_version

# Where the name that one imports is not the name that one installs.
_DISTRIBUTIONS = {"skimage": "scikit-image", "yaml": "pyyaml", "cv2": "opencv-python-headless", "PIL": "pillow"}


# --- Models -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelList:
    """Every model that a room can load by name."""

    models: tuple[ModelEntry, ...]


def models() -> ModelList:
    """List every model: where its weights come from, its size and its licence.

    Example:
        tenfold models
        tenfold models --json | jq -r '.models[].name'
    """
    entries = tuple(entry for room in ROOMS for entry in room_models(room))
    for room in dict.fromkeys(entry.room for entry in entries):
        rows = [
            (
                entry.name,
                "built in" if entry.source == "embedded" else f"{entry.source}: {entry.location}",
                f"{entry.parameters / 1e6:.2f} M",
                entry.licence,
            )
            for entry in entries
            if entry.room == room
        ]
        console.table(("model", "weights", "parameters", "licence"), rows, title=ROOMS[room])
    return ModelList(entries)


def room_models(room: str) -> tuple[ModelEntry, ...]:
    """The models of a room; a room without learned models has none."""
    return tuple(getattr(importlib.import_module(f"tenfold.{room}.config"), "MODELS", ()))


# --- Doctor -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A device that `--device` can name."""

    name: str
    available: bool
    description: str


@dataclass(frozen=True)
class Part:
    """A room, or an optional part of the house, and what it still lacks.

    Args:
        name: the room's or the extra's name.
        missing: packages of its extra that are not installed.
        remedy: the command that installs them; empty where nothing is missing.
        weights: models built into the room whose file is there.
        weights_missing: models built into the room whose file is not there.
    """

    name: str
    missing: tuple[str, ...]
    remedy: str
    weights: tuple[str, ...] = ()
    weights_missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """What `tenfold doctor` found. Memory and disk in bytes."""

    tenfold: str
    python: str
    executable: str
    system: str
    packages: dict[str, str | None]
    devices: tuple[Device, ...]
    cpus: int
    threads: int | None
    memory_bytes: int
    memory_available_bytes: int
    disk_free_bytes: int
    rooms: tuple[Part, ...]
    extras: tuple[Part, ...]
    problems: tuple[str, ...]


def doctor() -> Diagnosis:
    """Look at this installation and this machine, and say what is missing and how to get it.

    Example:
        tenfold doctor
        tenfold doctor --json
    """
    diagnosis = diagnose()
    _show(diagnosis)
    if diagnosis.problems:
        raise PartialFailure("; ".join(diagnosis.problems), diagnosis)
    return diagnosis


def diagnose() -> Diagnosis:
    """Collect what `doctor` reports. Imports torch to see the devices; other packages are only looked up."""
    base, extras = requirements()
    packages = {package: installed_version(package) for package in base}
    devices, threads, torch_problem = _look_at_torch()
    rooms = tuple(_room_part(room, extras.get(room, ())) for room in ROOMS)
    problems = [f"{package} is not installed" for package, version in packages.items() if version is None]
    problems += [torch_problem] if torch_problem else []
    problems += [f"{part.name}: no weights file for {name}" for part in rooms for name in part.weights_missing]
    total, available = memory_bytes()
    return Diagnosis(
        tenfold=__version__,
        python=platform.python_version(),
        executable=sys.executable,
        system=platform.platform(),
        packages=packages,
        devices=devices,
        cpus=usable_cpus(),
        threads=threads,
        memory_bytes=total,
        memory_available_bytes=available,
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        rooms=rooms,
        extras=tuple(_part(extra, needs) for extra, needs in extras.items() if extra not in ROOMS),
        problems=tuple(problems),
    )


def _look_at_torch() -> tuple[tuple[Device, ...], int | None, str | None]:
    """Devices, number of threads, and why torch cannot be used (None where it can)."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return (), None, f"torch cannot be imported ({error})"
    cuda = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else []
    npu = hasattr(torch, "npu") and torch.npu.is_available()
    devices = (
        Device("cpu", True, f"{usable_cpus()} cores"),
        Device("cuda", cuda, ", ".join(names) or "none found by torch"),
        Device("mps", torch.backends.mps.is_available(), "Apple GPU"),
        Device("npu", npu, "Ascend; needs the package torch_npu"),
    )
    return devices, torch.get_num_threads(), None


def requirements() -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Packages that tenfold needs, and those of each extra, as its installed metadata states them.

    The extra that gathers the others (`all`) and those for developers are left out.
    """
    base: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("tenfold") or ():
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if name is None or name[0] == "tenfold":
            continue
        if extra is None:
            base.append(name[0])
        elif extra[1] not in ("all", "bench", "dev"):
            extras.setdefault(extra[1], []).append(name[0])
    return tuple(base), {extra: tuple(names) for extra, names in extras.items()}


def extra_that_brings(module: str) -> str | None:
    """The extra of tenfold that installs a module, or None when no extra does."""
    top = module.partition(".")[0]
    wanted = _normal(_DISTRIBUTIONS.get(top, top))
    for extra, names in requirements()[1].items():
        if wanted in map(_normal, names):
            return extra
    return None


def _normal(name: str) -> str:
    # PyPA's rule: runs of `-`, `_` and `.` are the same, and so are the cases.
    return re.sub(r"[-_.]+", "-", name).lower()


def _part(name: str, needs: tuple[str, ...]) -> Part:
    missing = tuple(package for package in needs if installed_version(package) is None)
    return Part(name, missing, f"pip install 'tenfold[{name}]'" if missing else "")


def _room_part(room: str, needs: tuple[str, ...]) -> Part:
    embedded = [entry for entry in room_models(room) if entry.source == "embedded"]
    there = {
        entry.name: (resources.files(f"tenfold.{room}") / "weights" / entry.location).is_file() for entry in embedded
    }
    return dataclasses.replace(
        _part(room, needs),
        weights=tuple(name for name, found in there.items() if found),
        weights_missing=tuple(name for name, found in there.items() if not found),
    )


def _show(diagnosis: Diagnosis) -> None:
    gib = 2**30
    console.say(f"tenfold {diagnosis.tenfold}, Python {diagnosis.python} ({diagnosis.executable})")
    console.say(diagnosis.system)
    console.say(
        f"{diagnosis.cpus} cores, {diagnosis.threads or 'unknown'} torch threads; "
        f"memory {diagnosis.memory_available_bytes / gib:.1f} of {diagnosis.memory_bytes / gib:.1f} GiB available; "
        f"disk here {diagnosis.disk_free_bytes / gib:.1f} GiB free"
    )
    console.table(
        ("package", "version"), [(name, version or "missing") for name, version in diagnosis.packages.items()]
    )
    console.table(
        ("device", "available", "what"),
        [(device.name, "yes" if device.available else "no", device.description) for device in diagnosis.devices],
    )
    parts = (*diagnosis.rooms, *diagnosis.extras)
    console.table(
        ("room or extra", "missing", "remedy"),
        [(part.name, ", ".join(part.missing) or "nothing", part.remedy) for part in parts],
    )
    for variable in ("TENFOLD_THREADS", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_HOME"):
        if variable in os.environ:
            console.say(f"{variable}={os.environ[variable]}")
