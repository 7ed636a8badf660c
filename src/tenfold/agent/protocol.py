"""What a turn of the model means, and how results are put before it.

Three protocols, one interface: the paper's text form (`deepdiver`), that of Search-R1 (`search-r1`) and tool calls as
endpoints know them (`native`). Arguments are read as data, by JSON or `ast.literal_eval`, and never run. What pages say
stands between delimiters that are drawn anew for each run, with every piece of protocol syntax in it made harmless.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from typing import Protocol as Interface

from tenfold.agent.extract import clean
from tenfold.agent.instructions import Wording, wording
from tenfold.core.console import UserError

SEARCH, OPEN = "web_search", "open_page"
QUERIES, PAGES = "search_queries", "pages"
# Longer arguments are no queries; the limit also bounds what the parser of literals has to bear.
_LONGEST_ARGUMENTS, _LONGEST_QUERY = 8_000, 500

Message = dict[str, Any]


@dataclass(frozen=True)
class ToolCall:
    """A tool call as an endpoint gives it: `arguments` is JSON text. `id` is empty for one found in the text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Turn:
    """One turn of the model, read.

    Args:
        action: what it does; `invalid` where it follows no rule.
        thinking: its reasoning.
        queries: what it searches for, at most as many as are allowed.
        pages: what it opens: addresses, or numbers of results.
        answer: the final answer.
        format_ok: whether the turn keeps to the form, by the letter.
        dropped: queries above the limit.
        problem: what is wrong with an invalid turn, said to the model.
        calls: ids and names of native tool calls, to which results must be given back.
    """

    action: Literal["search", "open", "answer", "invalid"]
    thinking: str = ""
    queries: tuple[str, ...] = ()
    pages: tuple[str, ...] = ()
    answer: str = ""
    format_ok: bool = True
    dropped: int = 0
    problem: str = ""
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Shown:
    """One result as it is put before the model: its number, title, address, date and the text to show."""

    number: int
    title: str
    url: str
    date: str | None
    text: str


@dataclass(frozen=True)
class Found:
    """What came of one query or page: results, or a note (nothing found, asked before, an error)."""

    query: str
    results: tuple[Shown, ...] = ()
    note: str = ""


class Protocol(Interface):
    """What the environment needs to know of a protocol."""

    name: str

    def first(self, question: str, limits: Limits) -> list[Message]:
        """The messages that begin a conversation."""
        ...

    def tools(self, limits: Limits) -> list[dict[str, Any]]:
        """Tool descriptions for the endpoint or the chat template; empty where the text says it all."""
        ...

    def parse(self, text: str, reasoning: str, calls: Sequence[ToolCall], limits: Limits) -> Turn:
        """What a turn means."""
        ...

    def results(self, turn: Turn, found: Sequence[Found], note: str, words: Wording, delimiter: str) -> list[Message]:
        """What came of a turn's searches, as messages. `note` is the environment's own remark."""
        ...


@dataclass(frozen=True)
class Limits:
    """What the model is told of its limits: rounds, queries of a round, results of a query, and whether it may open
    pages."""

    rounds: int
    queries: int
    results: int
    pages: bool


def new_delimiter() -> str:
    """A delimiter that no page can know: 64 random bits as hexadecimal digits."""
    return secrets.token_hex(8)


# --- Text of pages ------------------------------------------------------------------------------------------------

_TAGS = (
    "thinking|think|search|information|answer|result|results|tool_call|tool_calls|tool_response|tool_result|tools|tool|"
    "function_call|function|invoke|parameter|question|data|end|system|user|assistant|human|developer|start_of_turn|"
    "end_of_turn|im_start|im_end|begin_of_text|end_of_text|eot_id|bos|eos|pad|unk|mask|sep|cls|s|inst|sys"
)
_HARMFUL = re.compile(
    rf"<(?=\s*/?\s*(?:{_TAGS})\b)"  # tags of protocols and chat templates
    r"|<(?=\s*[|｜])"  # <|im_start|> and its like
    r"|(?<=[|｜])\s*>"
    r"|<(?=<)|>(?=>)"  # delimiters of ours
    r"|\[(?=\s*/?\s*(?:INST|SYS|TOOL|AVAILABLE_TOOLS|end of)\b)",
    re.IGNORECASE,
)
_CALL = re.compile(rf"\b({SEARCH}|{OPEN})(\s*)[|｜∣ǀ]", re.IGNORECASE)
_NUMBERED = re.compile(r"^(\s*)\[(\d{1,3})\](?=\s*page title)", re.MULTILINE | re.IGNORECASE)
_SOFTER = {"<": "‹", ">": "›", "[": "⁅"}


def escape(text: str) -> str:
    """Text of a page without anything that a protocol or a chat template would take for syntax.

    The characters that make the syntax are replaced by look-alikes, so that a reader still sees what was there; what
    is not seen at all (zero-width and direction marks) goes.
    """
    text = _HARMFUL.sub(lambda found: _SOFTER[found[0].strip()[0]], clean(text))
    text = _CALL.sub(r"\1\2¦", text)
    return _NUMBERED.sub(r"\1(\2)", text)


def framed(text: str, delimiter: str) -> str:
    """A text of a page as the model sees it: between delimiters, within which everything is data."""
    return f"<<data {delimiter}>>\n{text}\n<<end {delimiter}>>"


def render(found: Sequence[Found], note: str, words: Wording, delimiter: str) -> str:
    """Results as one text: the rule about data, then a delimited block per query, then the environment's remark.

    Each result begins with `[number] page title:`, as in the paper's case study; answers cite these numbers.
    """
    parts = []
    if any(item.results for item in found):
        parts.append(words.data_rule.format(delimiter=delimiter))
    for item in found:
        lines = [f"{words.results_for}: {escape(item.query)}"]
        if item.note:
            lines.append(f"({item.note})")
        for shown in item.results:
            date = f" ({shown.date})" if shown.date else ""
            heading = escape(" ".join(shown.title.split())[:200] or shown.url[:200])
            title = f"[{shown.number}] {words.page_title}: {heading}{date}"
            lines.append(framed(f"{title}\n{escape(shown.url[:300])}\n{escape(shown.text)}", delimiter))
        parts.append("\n".join(lines))
    if note:
        parts.append(note)
    return "\n\n".join(parts)


# --- The paper's text form ----------------------------------------------------------------------------------------

_THINKING = re.compile(r"<thinking>(.*?)</thinking>(.*)", re.DOTALL)
_TEXT_CALL = re.compile(rf"({SEARCH}|{OPEN})\s*\|(.*)", re.DOTALL)
_ANY_CALL = re.compile(rf"\b(?:{SEARCH}|{OPEN})\s*\|\s*\{{")


class DeepDiver:
    """The paper's form (section 2.1): `<thinking>...</thinking>`, then `web_search|{'search_queries': [...]}` or the
    answer, and nothing else. Pages are opened by `open_page|{'pages': [3]}`, which is ours."""

    name = "deepdiver"

    def first(self, question: str, limits: Limits) -> list[Message]:
        """One message: the rules, and the question between its marks."""
        words = wording(question)
        form = words.deepdiver_form.format(search=SEARCH, queries_key=QUERIES, queries=limits.queries)
        if limits.pages:
            form += "\n" + words.deepdiver_open.format(open=OPEN, pages_key=PAGES)
        return [{"role": "user", "content": words.instruction(form, question, limits)}]

    def tools(self, limits: Limits) -> list[dict[str, Any]]:
        """None: the form is in the instruction."""
        return []

    def parse(self, text: str, reasoning: str, calls: Sequence[ToolCall], limits: Limits) -> Turn:
        """Read a turn. Reasoning that an endpoint gives apart stands for the first part."""
        text = text.strip()
        if reasoning and "<thinking>" not in text and "</thinking>" not in text:
            thinking, rest = reasoning.strip(), text
        else:
            found = _THINKING.fullmatch(text)
            if found is None:
                return _invalid("a turn begins with <thinking> and closes it with </thinking>")
            thinking, rest = found[1].strip(), found[2].strip()
        if any(tag in part for tag in ("<thinking>", "</thinking>") for part in (thinking, rest)):
            return _invalid("there is more than one thinking part")
        if not rest:
            return _invalid("after the thinking part there is neither a tool call nor an answer", thinking)
        call = _TEXT_CALL.fullmatch(rest)
        if call is None:
            if _ANY_CALL.search(rest):
                return _invalid("a tool call stands alone, without other text beside it", thinking)
            return Turn("answer", thinking, answer=rest)
        return _tool_turn([(call[1], _read_arguments(call[2]))], thinking, limits, ())

    def results(self, turn: Turn, found: Sequence[Found], note: str, words: Wording, delimiter: str) -> list[Message]:
        """The next user turn (section E.6)."""
        return [{"role": "user", "content": render(found, note, words, delimiter)}]


class Brief(DeepDiver):
    """The paper's form between bare texts: the question without instructions, results without frames. For policies that
    were trained on it and need not be told; `found`, `nothing`, `form` (the last turn kept to none) and `stop` (no more
    searches) are all that the environment says."""

    name = "brief"

    def first(self, question: str, limits: Limits) -> list[Message]:
        """One message: the question as it is."""
        return [{"role": "user", "content": escape(question)}]

    def results(self, turn: Turn, found: Sequence[Found], note: str, words: Wording, delimiter: str) -> list[Message]:
        """Titles and texts, one result to a line; the numbers are those that answers cite."""
        lines = []
        for item in found:
            for shown in item.results:
                title = f"[{shown.number}] {escape(' '.join(shown.title.split()))}: " if shown.title else ""
                lines.append(f"found {title}{escape(' '.join(shown.text.split()))}")
            if not item.results:
                lines.append("nothing")
        if not found and turn.action == "invalid":
            lines.append("form")
        if words.final in note:
            lines.append("stop")
        return [{"role": "user", "content": "\n".join(lines)}]


# --- Search-R1 ----------------------------------------------------------------------------------------------------

_R1_TURN = re.compile(r"(?:<think>(.*?)</think>)?\s*<(search|answer)>(.*?)</\2>\s*", re.DOTALL)


class SearchR1:
    """The form of Search-R1 (Jin et al., 2025): `<think>`, `<search>` with one query, `<answer>`; what was found stands
    between `<information>` tags. There it goes on in the same turn; here it is the next turn of the user."""

    name = "search-r1"

    def first(self, question: str, limits: Limits) -> list[Message]:
        """One message with the rules and the question."""
        words = wording(question)
        return [{"role": "user", "content": words.instruction(words.search_r1_form, question, limits)}]

    def tools(self, limits: Limits) -> list[dict[str, Any]]:
        """None: the form is in the instruction."""
        return []

    def parse(self, text: str, reasoning: str, calls: Sequence[ToolCall], limits: Limits) -> Turn:
        """Read a turn. A turn that was stopped at `</search>` is whole."""
        text = text.strip()
        if text.endswith("</search") or ("<search>" in text and "</search>" not in text and "<answer>" not in text):
            text = text.removesuffix("</search") + "</search>"
        found = _R1_TURN.fullmatch(text)
        if found is None or (found[1] is None and not reasoning):
            return _invalid("a turn is <think>...</think> and then <search>...</search> or <answer>...</answer>")
        thinking, body = (found[1] or reasoning).strip(), found[3].strip()
        if re.search(r"</?(?:think|search|answer|information)>", thinking + body):
            return _invalid("a turn holds one search or one answer", thinking)
        if not body:
            return _invalid("the tags are empty", thinking)
        if found[2] == "answer":
            return Turn("answer", thinking, answer=body)
        return Turn("search", thinking, queries=(" ".join(body.split())[:_LONGEST_QUERY],))

    def results(self, turn: Turn, found: Sequence[Found], note: str, words: Wording, delimiter: str) -> list[Message]:
        """The next user turn, between `<information>` tags."""
        body = render(found, "", words, delimiter)
        content = f"<information>\n{body}\n</information>" if found else ""
        return [{"role": "user", "content": "\n\n".join(part for part in (content, note) if part)}]


# --- Tool calls of endpoints --------------------------------------------------------------------------------------

_HERMES = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


class NativeTools:
    """Tool calls as OpenAI-compatible endpoints and chat templates know them. Calls that a server leaves in the text as
    `<tool_call>{...}</tool_call>` are read as well."""

    name = "native"

    def first(self, question: str, limits: Limits) -> list[Message]:
        """One message with the rules and the question."""
        words = wording(question)
        return [{"role": "user", "content": words.instruction(words.native_form, question, limits)}]

    def tools(self, limits: Limits) -> list[dict[str, Any]]:
        """`web_search`, and `open_page` where pages may be opened."""
        many = {"type": "array", "items": {"type": "string"}, "minItems": 1}
        tools = [_tool(SEARCH, "Search for pages.", QUERIES, {**many, "maxItems": limits.queries})]
        if limits.pages:
            tools.append(_tool(OPEN, "Read whole pages, by number or address of a result.", PAGES, many))
        return tools

    def parse(self, text: str, reasoning: str, calls: Sequence[ToolCall], limits: Limits) -> Turn:
        """Read a turn: its calls if it has any, else its text is the answer."""
        if not calls:
            calls = [_hermes_call(body) for body in _HERMES.findall(text)]
            text = _HERMES.sub("", text)
        if calls:
            wanted = [(call.name, _read_arguments(call.arguments)) for call in calls]
            return _tool_turn(wanted, reasoning or text.strip(), limits, tuple(calls))
        if not text.strip() or "<tool_call>" in text:
            return _invalid("there is neither a tool call nor an answer", reasoning)
        return Turn("answer", reasoning, answer=text.strip())

    def results(self, turn: Turn, found: Sequence[Found], note: str, words: Wording, delimiter: str) -> list[Message]:
        """One message per call; the first one carries what was found, the others point to it."""
        body = render(found, note, words, delimiter)
        ids = [call.id for call in turn.calls if call.id]
        if not ids:
            return [{"role": "user", "content": body}]
        return [
            {"role": "tool", "tool_call_id": name, "content": body if position == 0 else words.see_first}
            for position, name in enumerate(ids)
        ]


def _tool(name: str, description: str, key: str, value: Mapping[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {key: dict(value)}, "required": [key]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _hermes_call(body: str) -> ToolCall:
    value = _read_arguments(body)
    arguments = value.get("arguments")
    return ToolCall("", str(value.get("name", "")), arguments if isinstance(arguments, str) else json.dumps(arguments))


# --- Shared reading -----------------------------------------------------------------------------------------------


def _invalid(problem: str, thinking: str = "") -> Turn:
    return Turn("invalid", thinking, format_ok=False, problem=problem)


def _read_arguments(text: str) -> dict[str, Any]:
    """A dictionary written as JSON or as a Python literal; an empty one where it is neither. Nothing is evaluated."""
    text = text.strip()
    if len(text) > _LONGEST_ARGUMENTS:
        return {}
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd escapes in what a model has written
                value = read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, dict):
            return value
    return {}


def _strings(value: object) -> list[str] | None:
    """A list of strings, or one string, without empty entries and repetitions; numbers count as strings."""
    if isinstance(value, str | int) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list | tuple):
        return None
    if not all(isinstance(item, str | int) and not isinstance(item, bool) for item in value):
        return None
    strings = [" ".join(str(item).split())[:_LONGEST_QUERY] for item in value]
    return list(dict.fromkeys(item for item in strings if item))


def _tool_turn(
    wanted: Sequence[tuple[str, dict[str, Any]]], thinking: str, limits: Limits, calls: tuple[ToolCall, ...]
) -> Turn:
    """A turn that calls tools; invalid if one of its calls is."""
    queries: list[str] = []
    pages: list[str] = []
    for name, arguments in wanted:
        key, kept = (QUERIES, queries) if name == SEARCH else (PAGES, pages)
        if name not in (SEARCH, OPEN):
            problem = f"there is no tool {name[:40]!r}"
        elif name == OPEN and not limits.pages:
            problem = f"there is no tool {OPEN!r}"
        elif set(arguments) != {key} or not (found := _strings(arguments[key])):
            problem = f"{name} takes a dictionary with one key, {key!r}, and a list of strings that is not empty"
        else:
            kept += [item for item in found if item not in kept]
            continue
        return Turn("invalid", thinking, format_ok=False, problem=problem, calls=calls)
    return Turn(
        "search" if queries else "open",
        thinking,
        queries=tuple(queries[: limits.queries]),
        pages=tuple(pages[: limits.queries]),
        dropped=max(0, len(queries) - limits.queries) + max(0, len(pages) - limits.queries),
        calls=calls,
    )


PROTOCOLS: dict[str, type[DeepDiver] | type[SearchR1] | type[NativeTools]] = {
    "deepdiver": DeepDiver,
    "brief": Brief,
    "search-r1": SearchR1,
    "native": NativeTools,
}


def protocol(name: str) -> Protocol:
    """The protocol of a name. Raises UserError for an unknown one."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}: choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]()
