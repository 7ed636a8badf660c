"""The rule of conftest.py: in CI a test may be skipped for a machine's lack, never for a missing package or file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

CASES = {
    "gpu": "import pytest\ndef test_a():\n    pytest.skip('needs CUDA')\n",
    "data": "def test_a(data_root):\n    pass\n",
    "package": "import pytest\nmodule = pytest.importorskip('no_such_package')\ndef test_a():\n    pass\n",
    "program": "import pytest\ndef test_a():\n    pytest.skip('no Chromium')\n",
    "marked": "import pytest\n@pytest.mark.skip(reason='broken')\ndef test_a():\n    pass\n",
}


def refused(folder: Path, in_ci: bool) -> set[str]:
    """The cases that do not pass."""
    shutil.copy(Path(__file__).with_name("conftest.py"), folder / "conftest.py")
    for name, text in CASES.items():
        (folder / f"test_{name}.py").write_text(text)
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "TENFOLD_DATA")}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **({"CI": "true"} if in_ci else {})}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "-rfE",
    ]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    assert done.returncode == int(bool(lines)), done.stdout
    return {name for name in CASES if any(f"test_{name}.py" in line for line in lines)}


def test_any_skip_passes_outside_ci(tmp_path: Path) -> None:
    assert refused(tmp_path, in_ci=False) == set()


def test_only_what_a_machine_lacks_may_be_skipped_in_ci(tmp_path: Path) -> None:
    assert refused(tmp_path, in_ci=True) == {"package", "program", "marked"}
