"""Fixtures that all rooms' tests share, and the rule that nothing is skipped unnoticed in CI."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

# Tests reach no network and open no window, in this process and in those that they start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("MPLBACKEND", "Agg")

REPOSITORY = Path(__file__).parents[1]

# Reasons for which a test may be skipped in CI as well: what a test machine cannot be expected to have.
ALLOWED_SKIPS = (
    "needs CUDA",
    "needs MPS",
    "needs NPU",
    "TENFOLD_DATA is not set",
    "TENFOLD_DOCS is not set",
    "needs torchtitan",
)


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip for any other reason into a failure: a missing optional part must not hide a broken test."""
    if not (_in_ci() and report.skipped) or hasattr(report, "wasxfail"):
        return
    reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not any(allowed in reason for allowed in ALLOWED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, which CI does not allow for this reason: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Look at the outcome of each test."""
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Look at the outcome of importing each test file (`pytest.importorskip` skips there)."""
    report = yield
    _refuse_skip(report)
    return report


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of test data that is too large or too restricted to be committed (it holds `superres/`, ...)."""
    folder = os.environ.get("TENFOLD_DATA")
    if not folder:
        pytest.skip("TENFOLD_DATA is not set: it should name the folder of the larger test data")
    path = Path(folder)
    assert path.is_dir(), f"TENFOLD_DATA is {folder}, which is not a folder"
    return path


@pytest.fixture
def run_tenfold(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `tenfold` in a process of its own: `run_tenfold("models", "--json")`; its working folder is `tmp_path`."""

    def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tenfold", *map(str, arguments)]
        settings: dict = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120, **options}
        return subprocess.run(command, **settings)

    return run
