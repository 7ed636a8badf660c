"""Timelines as files: Chrome JSON and Perfetto's protobuf, and the check that a trace is sound."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.core.console import UserError
from tenfold.core.files import write_bytes
from tenfold.planner.simulation import Slice

_KIND = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


def category(bar: Slice) -> str:
    """forward, backward, input gradient, weight gradient, or a joined pair."""
    return "joined forward and backward" if len(bar.actions) > 1 else _KIND[bar.actions[0][0]]


def _nanoseconds(bars: list[Slice]) -> list[tuple[Slice, int, int]]:
    """Whole nanoseconds, so that neighbours that touch never overlap by rounding."""
    return [(bar, round(bar.start * 1e9), max(round(bar.end * 1e9), round(bar.start * 1e9))) for bar in bars]


def chrome_trace(bars: list[Slice], name: str = "pipeline") -> dict[str, Any]:
    """The timeline as a Chrome trace object (chrome://tracing, ui.perfetto.dev): one thread per pipeline rank,
    microseconds."""
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": name}}]
    for rank in sorted({bar.rank for bar in bars}):
        events.append(
            {"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"pipeline rank {rank}"}}
        )
        events.append({"ph": "M", "pid": 0, "tid": rank, "name": "thread_sort_index", "args": {"sort_index": rank}})
    for bar, start, end in _nanoseconds(bars):
        arguments = {"stage": [a[1] for a in bar.actions], "microbatch": [a[2] for a in bar.actions]}
        events.append(
            {
                "ph": "X",
                "pid": 0,
                "tid": bar.rank,
                "ts": start / 1e3,
                "dur": (end - start) / 1e3,
                "name": bar.name,
                "cat": category(bar),
                "args": arguments,
            }
        )
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _varint(value: int) -> bytes:
    out = bytearray()
    while True:
        byte = value & 0x7F
        value >>= 7
        out.append(byte | (0x80 if value else 0))
        if not value:
            return bytes(out)


def _field(number: int, value: int | bytes | str) -> bytes:
    """One protobuf field: a varint for int, length-delimited otherwise."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def perfetto_trace(bars: list[Slice], name: str = "pipeline") -> bytes:
    """The timeline in Perfetto's own format: a Trace message of TracePackets, one track per rank.

    Field numbers are those of perfetto_trace.proto: Trace.packet 1; TracePacket timestamp 8,
    trusted_packet_sequence_id 10, track_event 11,
    track_descriptor 60; TrackEvent type 9, track_uuid 11, categories 22, name 23; TrackDescriptor uuid 1, name 2,
    process 3, parent_uuid 5.
    """
    packets = []
    root = 1
    process = _field(1, 1) + _field(6, name)
    packets.append(_field(10, 1) + _field(60, _field(1, root) + _field(2, name) + _field(3, process)))
    for rank in sorted({bar.rank for bar in bars}):
        packets.append(
            _field(10, 1) + _field(60, _field(1, 100 + rank) + _field(2, f"pipeline rank {rank}") + _field(5, root))
        )
    events: list[tuple[int, int, bytes]] = []
    for bar, start, end in _nanoseconds(bars):
        track = 100 + bar.rank
        events.append(
            (
                start,
                1,
                _field(8, start)
                + _field(10, 1)
                + _field(11, _field(9, 1) + _field(11, track) + _field(22, category(bar)) + _field(23, bar.name)),
            )
        )
        events.append((end, 0, _field(8, end) + _field(10, 1) + _field(11, _field(9, 2) + _field(11, track))))
    # At equal times ends come before beginnings, so that neighbours do not nest.
    packets += [packet for _, _, packet in sorted(events, key=lambda event: (event[0], event[1]))]
    return b"".join(_field(1, packet) for packet in packets)


def write_trace(path: str | Path, bars: list[Slice], name: str = "pipeline") -> None:
    """Write `.json` (Chrome) or `.pftrace`/`.perfetto-trace` (Perfetto protobuf). Raises UserError for another
    suffix."""
    path = Path(path)
    if path.suffix == ".json":
        write_bytes(path, json.dumps(chrome_trace(bars, name), separators=(",", ":")).encode())
    elif path.suffix in (".pftrace", ".perfetto-trace", ".pb"):
        write_bytes(path, perfetto_trace(bars, name))
    else:
        raise UserError(f"{path}: unknown trace format {path.suffix!r}: use .json (Chrome) or .pftrace (Perfetto)")


@dataclass(frozen=True)
class TraceCheck:
    """What a check of a trace found.

    Attributes:
        slices: bars in the trace.
        tracks: tracks (pipeline ranks).
        overlaps: pairs of bars on one track that overlap.
        busy_seconds: sum of bars per track.
    """

    slices: int
    tracks: int
    overlaps: int
    busy_seconds: dict[int, float]


def check_chrome_trace(trace: dict[str, Any]) -> TraceCheck:
    """Check a Chrome trace object: every bar inside its track without overlap, and the busy time of every track."""
    tracks: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            tracks[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    overlaps = 0
    busy = {}
    for track, bars in tracks.items():
        bars.sort()
        overlaps += sum(1 for one, two in itertools.pairwise(bars) if two[0] < one[1] - 5e-4)
        busy[track] = sum(end - start for start, end in bars) / 1e6
    return TraceCheck(sum(len(bars) for bars in tracks.values()), len(tracks), overlaps, busy)
