"""A real documentation set: TENFOLD_DOCS names a folder of HTML pages, such as Debian's python3.11-doc puts in
/usr/share/doc/python3.11/html."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import pytest
from endpoints import follows, seeker, served

from tenfold.agent.agent import Agent
from tenfold.agent.index import LocalIndex


@pytest.fixture(scope="module")
def documentation() -> Path:
    folder = os.environ.get("TENFOLD_DOCS")
    if not folder:
        pytest.skip("TENFOLD_DOCS is not set: it names a folder of HTML pages")
    return Path(folder)


def test_a_documentation_set_is_indexed_within_a_minute_and_asked_over_http(
    documentation: Path, tmp_path: Path
) -> None:
    started, processor = time.perf_counter(), time.process_time()
    report = LocalIndex.build([documentation], tmp_path / "index")
    assert report.documents >= 500 and not report.problems
    # On a busy machine the time of the processor tells more than that of the wall.
    assert min(time.perf_counter() - started, time.process_time() - processor) < 60
    index = LocalIndex.load(tmp_path / "index")
    seconds = []
    for query in ("open a file for writing", "gather return exceptions", "named group", "frozen dataclass") * 5:
        processor = time.process_time()
        assert index.search(query, 2)
        seconds.append(time.process_time() - processor)
    assert statistics.median(seconds) < 0.020
    with served(follows(seeker("subprocess timeout expires", "TimeoutExpired is raised [1]."))) as (base, _):
        answer = Agent.from_pretrained(base, [f"local:{tmp_path / 'index'}"]).ask("What happens when time is up?")
    assert answer.complete and answer.rounds == 1 and answer.sources[0].url.startswith("file:")
