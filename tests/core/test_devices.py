from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tenfold.core import devices


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str | None
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    devices.wait_asleep()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


FAULTS = """
import resource
from tenfold.core.devices import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        bytearray(b"a") * 50_000_000  # 12,000 pages, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

outside = faults()
with keep_freed_memory():
    faults()
    inside, held = faults(), resident()
print(outside, inside, held, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_memory_that_is_freed_is_kept_inside_and_handed_back_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, timeout=60)
    outside, inside, held, after = map(int, done.stdout.split())
    assert outside > 5 * 10_000 and inside < 1000
    assert held - after > 10_000
