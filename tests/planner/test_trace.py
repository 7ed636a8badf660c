"""Traces: no overlapping slices, slices that add up to the busy time, and Perfetto's own reader for the protobuf."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from tenfold.core.console import UserError
from tenfold.planner import Cluster, Model, Plan, simulate, simulation, steady
from tenfold.planner.simulation import Slice, StageTimes
from tenfold.planner.trace import check_chrome_trace, chrome_trace, perfetto_trace, write_trace


def bars(schedule: str = "adaptive") -> list[Slice]:
    times = StageTimes([1 / 3] * 8, [2 / 3] * 8, [1 / 3] * 8, send=0.01)
    return simulation.timeline(schedule, 4, 2, 8, times)


@pytest.mark.parametrize("schedule", ["interleaved", "adaptive", "zb-v", "dualpipev", "interleaved-zb"])
def test_slices_never_overlap_and_add_up_to_the_busy_time(schedule: str) -> None:
    times = StageTimes([1 / 3] * 8, [2 / 3] * 8, [1 / 3] * 8, send=0.01)
    check = check_chrome_trace(chrome_trace(bars(schedule)))
    assert check.overlaps == 0
    busy = simulation.busy_seconds(schedule, 4, 2, 8, times)
    assert [check.busy_seconds[rank] for rank in range(4)] == pytest.approx(busy, abs=1e-6)


def test_an_overlap_is_noticed() -> None:
    two = [Slice(0, 0.0, 1.0, (("F", 0, 0),)), Slice(0, 0.5, 1.5, (("F", 0, 1),))]
    assert check_chrome_trace(chrome_trace(two)).overlaps == 1


def read_protobuf(data: bytes) -> list[tuple[int, int | bytes]]:
    """Fields of a message: (number, value). A reader of its own, for the fields that the trace uses."""
    fields, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            fields.append((key >> 3, varint()))
        else:
            assert key & 7 == 2
            size = varint()
            fields.append((key >> 3, data[at : at + size]))
            at += size
    return fields


def spans_of(data: bytes) -> dict[int, list[tuple[int, int]]]:
    open_at: dict[int, list[int]] = {}
    spans: dict[int, list[tuple[int, int]]] = {}
    for number, packet in read_protobuf(data):
        assert number == 1
        fields = dict(read_protobuf(packet))
        if 11 not in fields:
            continue
        event = dict(read_protobuf(fields[11]))
        if event[9] == 1:
            open_at.setdefault(event[11], []).append(fields[8])
        else:
            spans.setdefault(event[11], []).append((open_at[event[11]].pop(), fields[8]))
    assert not any(open_at.values())
    return spans


def test_the_protobuf_holds_every_slice_in_order() -> None:
    spans = spans_of(perfetto_trace(bars()))
    assert sorted(spans) == [100, 101, 102, 103]
    expected = check_chrome_trace(chrome_trace(bars()))
    for track, pieces in spans.items():
        assert all(one[1] <= two[0] for one, two in itertools.pairwise(pieces))
        assert sum(end - start for start, end in pieces) / 1e9 == pytest.approx(
            expected.busy_seconds[track - 100], abs=1e-6
        )


def test_files_are_written_by_suffix(tmp_path: Path) -> None:
    write_trace(tmp_path / "a.json", bars())
    assert json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    write_trace(tmp_path / "a.pftrace", bars())
    assert spans_of((tmp_path / "a.pftrace").read_bytes())
    with pytest.raises(UserError, match=r"use \.json"):
        write_trace(tmp_path / "a.txt", bars())


def test_the_timeline_ends_when_the_pipeline_does() -> None:
    estimate = simulate(
        Model.preset("llama3-8b"), Cluster.preset("h100", 16), Plan(pp=4, vpp=2, gbs=32, seq=8192, recompute="full")
    )
    pipeline = max(bar.end for bar in estimate.timeline())
    assert pipeline < estimate.step_seconds
    assert pipeline == pytest.approx(steady.makespan("interleaved", 4, 2, 8, estimate.times))
