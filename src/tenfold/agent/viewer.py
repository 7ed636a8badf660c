"""A trace for people: one HTML page that needs no other file, or lines for a terminal.

What stands in a trace was written by a model and by strangers' pages: all of it is shown as text.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from typing import Any

from tenfold.agent.addresses import is_web
from tenfold.agent.trace import Trace

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_LONGEST_SHOWN = 20_000
_STYLE = """

:root{--ink:#1c2326;--soft:#5b676b;--line:#d9dfe1;--card:#fff;--page:#f5f7f7;--good:#0b6b62;--bad:#a8321f;
--mark:#fdf0c4}
@media(prefers-color-scheme:dark){:root{--ink:#e6ebec;--soft:#9aa7ab;--line:#344044;--card:#1d2527;--page:#141a1b;
--good:#5cc7ba;--bad:#f08d79;--mark:#5a4a12}
}*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1.5rem;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,sans-serif}
h1{font-size:1.35rem;margin:0 0 .8rem}h2{font-size:1.05rem;margin:2rem 0 .6rem}
section,details,.answer{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem;
margin:.6rem 0;overflow-wrap:anywhere}
summary{cursor:pointer}pre{white-space:pre-wrap;font:13px/1.5 ui-monospace,monospace;margin:.6rem 0 0}
.soft{color:var(--soft);font-size:.88rem}.meters{display:flex;flex-wrap:wrap;gap:.6rem;padding:0;list-style:none}
.meters li{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.4rem .8rem}
.meters b{display:block;font-size:1.15rem}
.bar{height:.4rem;background:var(--line);border-radius:4px;margin-top:.3rem}
.bar i{display:block;height:100%;background:var(--good);border-radius:4px}mark{background:var(--mark);color:inherit}
.good{color:var(--good)}.bad{color:var(--bad)}ul{margin:.4rem 0;padding-left:1.2rem}
blockquote{margin:.3rem 0;padding-left:.8rem;border-left:3px solid var(--line)}a{color:var(--good)}
.answer{font-size:1.1rem;white-space:pre-wrap}
"""


def render_html(trace: Trace) -> str:
    """A whole page: question, answer, meters, which sentence rests on what, every turn, every source."""
    start, final = trace.first("run_start"), trace.first("final")
    question = str(start.get("question", ""))
    body = "\n".join(
        [
            f"<h1>{_escape(question)}</h1>",
            f'<p class="soft">{_escape(start.get("policy"))} · protocol {_escape(start.get("protocol"))}</p>',
            f'<div class="answer">{_escape(final.get("answer") or "no answer")}</div>',
            _status(final),
            _meters(trace),
            _citations(trace),
            "<h2>What happened</h2>",
            *_timeline(trace),
            _sources(trace),
        ]
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_escape(question[:80])}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def _escape(value: object) -> str:
    return html.escape("" if value is None else str(value)[:_LONGEST_SHOWN])


def _status(final: dict[str, Any]) -> str:
    stopped = f", stopped by: {_escape(final['stopped_by'])}" if final.get("stopped_by") else ""
    return f'<p class="soft">{_escape(final.get("status", "the run did not end"))}{stopped}</p>'


def _meters(trace: Trace) -> str:
    usage, budget = trace.first("usage"), trace.first("run_start").get("budget", {})
    cells = []
    for name in ("rounds", "queries", "opened", "tokens", "seconds"):
        value = usage.get(name)
        if not isinstance(value, int | float):
            continue
        of = budget.get(name) if name != "queries" else None  # the budget is one of each round
        shown = f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
        bar = ""
        if isinstance(of, int | float) and of > 0:
            bar = f'<div class="bar"><i style="width:{min(100.0, 100 * value / of):.0f}%"></i></div>'
            shown += f" <small>of {of:,.0f}</small>"
        label = {"opened": "pages opened"}.get(name, name)
        cells.append(f"<li><b>{shown}</b>{label}{bar}</li>")
    for name, label in (("prompt_tokens", "tokens read"), ("completion_tokens", "tokens written")):
        if isinstance(usage.get(name), int):
            cells.append(f"<li><b>{usage[name]:,}</b>{label}</li>")
    return f'<ul class="meters">{"".join(cells)}</ul>'


def _citations(trace: Trace) -> str:
    rows = []
    for citation in trace.first("citations").get("citations", []):
        good = citation["supported"]
        tone, words = ("good", "supported") if good else ("bad", citation["reason"])
        verdict = f'<span class="{tone}">{_escape(words)}</span>'
        quote = f"<blockquote>{_escape(citation['quote'])}</blockquote>" if citation["quote"] else ""
        number = int(citation["mark"])
        rows.append(
            f'<section>{_escape(citation["sentence"])} <a href="#source-{number}">[{number}]</a> '
            f"{verdict}{quote}</section>"
        )
    return "<h2>Which sentence rests on what</h2>" + "".join(rows) if rows else ""


def _timeline(trace: Trace) -> Iterator[str]:
    turns = 0
    for event in trace.events:
        kind = event["kind"]
        when = f'<span class="soft">{event.get("t", 0):.1f} s</span>'
        if kind == "turn":
            turns += 1
            wanted = "".join(f"<li>{_escape(item)}</li>" for item in [*event["queries"], *event.get("pages", [])])
            problem = f'<p class="bad">{_escape(event["problem"])}</p>' if event.get("problem") else ""
            raw = json.dumps(event["reply"], ensure_ascii=False, indent=1)
            yield (
                f"<section><b>Turn {turns}: {_escape(event['action'])}</b> {when}"
                f"<p>{_escape(event['thinking'])}</p>{f'<ul>{wanted}</ul>' if wanted else ''}{problem}"
                f'<details><summary class="soft">as it was written</summary><pre>{_escape(raw)}</pre></details>'
                "</section>"
            )
        elif kind == "engine":
            said = f": {event['message']}" if event.get("message") else ""
            text = f"{event['engine']}: {event['query']} ({event['outcome']}, {event['results']} results){said}"
            yield f'<p class="soft">{_escape(text)}</p>'
        elif kind == "finding":
            yield f"<section><b>{_escape(event['task'])}</b><p>{_escape(event['finding'])}</p></section>"
        elif kind == "fetch":
            what = event.get("blocked") or f"{event.get('bytes', 0):,} bytes"
            yield f'<p class="soft">page {_escape(event["url"])}: {_escape(what)}</p>'
        elif kind == "inject":
            titles = "".join(
                f'<li><a href="#source-{number}">[{number}] {_escape(title)}</a></li>'
                for found in event["found"]
                for number, title in ((int(shown["number"]), shown["title"]) for shown in found["results"])
            )
            notes = "".join(f"<p>{_escape(found['note'])}</p>" for found in event["found"] if found["note"])
            note = f"<p>{_escape(event['note'])}</p>" if event["note"] else ""
            yield (
                f"<details><summary>shown to the model: {event['tokens']:,} tokens {when}</summary>"
                f"<ul>{titles}</ul>{notes}{note}</details>"
            )
        elif kind == "error":
            yield f'<section class="bad">{_escape(event["message"])} {when}</section>'


def _sources(trace: Trace) -> str:
    quotes: dict[int, list[tuple[int, int]]] = {}
    for citation in trace.first("citations").get("citations", []):
        if citation["span"]:
            quotes.setdefault(citation["mark"], []).append(tuple(citation["span"]))
    rows = []
    for number, source in enumerate(trace.sources(), start=1):
        date = f" · {source.date}" if source.date else ""
        address = _escape(source.url)
        link = f'<a href="{address}" rel="noreferrer noopener">{address}</a>' if is_web(source.url) else address
        rows.append(
            f'<details id="source-{number}"><summary>[{number}] {_escape(source.title)} '
            f'<span class="soft">{_escape(source.engine)}{_escape(date)}</span></summary><p class="soft">{link}<br>'
            f"sha256 {_escape(source.sha256)} · read {_escape(source.fetched_at)}</p>"
            f"<pre>{_marked(source.text, quotes.get(number, []))}</pre></details>"
        )
    return "<h2>Sources</h2>" + "".join(rows) if rows else ""


def _marked(text: str, spans: list[tuple[int, int]]) -> str:
    """Text with spans marked; where it is long, what lies around them."""
    parts = []
    position = 0
    for start, end in sorted(spans):
        start, end = max(start, position), min(end, len(text))
        if start < end:
            parts.append(_around(text[position:start], first=position == 0))
            parts.append(f"<mark>{_escape(text[start:end])}</mark>")
            position = end
    parts.append(_escape(text[position : position + 3_000]) + ("…" if len(text) > position + 3_000 else ""))
    return "".join(parts)


def _around(text: str, first: bool) -> str:
    if len(text) <= 3_000:
        return _escape(text)
    return f"{'' if first else _escape(text[:600])} … {_escape(text[-1_500:])}"


def lines(trace: Trace) -> Iterator[str]:
    """The same for a terminal, line by line, without control characters."""
    start, final, usage = trace.first("run_start"), trace.first("final"), trace.first("usage")
    yield _plain(f"question: {start.get('question')}")
    yield _plain(f"policy:   {start.get('policy')} ({start.get('protocol')})")
    number = 0
    for event in trace.events:
        if event["kind"] == "turn":
            number += 1
            yield _plain(f"[{event.get('t', 0):6.1f} s] turn {number}: {event['action']}  {event.get('problem', '')}")
            if event["thinking"]:
                yield _plain(f"             {event['thinking'][:300]}")
            for wanted in [*event["queries"], *event.get("pages", [])]:
                yield _plain(f"             ? {wanted}")
        elif event["kind"] == "inject":
            for found in event["found"]:
                for shown in found["results"]:
                    yield _plain(f"             [{shown['number']}] {shown['title']}")
                if found["note"]:
                    yield _plain(f"             {found['note']}")
        elif event["kind"] == "error":
            yield _plain(f"             failed: {event['message']}")
    yield _plain(f"answer:   {final.get('answer') or '-'}")
    stopped = f", stopped by: {final['stopped_by']}" if final.get("stopped_by") else ""
    yield _plain(f"status:   {final.get('status', 'the run did not end')}{stopped}")
    for citation in trace.first("citations").get("citations", []):
        verdict = "supported" if citation["supported"] else citation["reason"]
        yield _plain(f"  [{citation['mark']}] {citation['sentence'][:100]}: {verdict}")
    if usage:
        yield _plain(
            f"used:     {usage['rounds']} rounds, {usage['queries']} queries, {usage['tokens']:,} tokens, "
            f"{usage['seconds']:.1f} s"
        )


def _plain(text: str) -> str:
    """One line without what would move a terminal's cursor."""
    return "".join(character if character.isprintable() else " " for character in text).rstrip()
