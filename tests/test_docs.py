"""The documents, held: their figures come from results/, their commands run, their links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import jsonschema
import numpy as np
import pytest
from PIL import Image

from tenfold import cli

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "scripts"))

import fill_docs  # noqa: E402 - a script of the repository, not a part of the package

DOCUMENTS = fill_docs.documents()
NAMES = [str(path.relative_to(REPOSITORY)) for path in DOCUMENTS]


@dataclass(frozen=True)
class Block:
    """A fenced block of a document: the line of its fence, its language, the words after it, its text."""

    line: int
    language: str
    words: tuple[str, ...]
    text: str


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text()
    for match in re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(line, match[1], tuple(match[2].split()), match[3])


def tenfold_commands(block: Block) -> Iterator[list[str]]:
    """The arguments of each `tenfold` command of a shell block, up to a pipe, a redirection or a comment."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["tenfold"]:
            end = next((index for index, word in enumerate(words) if word in ("|", ">", ">>", "&&", ";")), len(words))
            yield words[1:end]


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_a_document_shows_what_results_say(path: Path) -> None:
    assert fill_docs.filled(path) == path.read_text(), "run `make docs`"


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_command_in_a_document_fits_its_verb(path: Path) -> None:
    for block in blocks(path):
        if block.language != "bash":
            continue
        for arguments in tenfold_commands(block):
            where = f"{path.name}:{block.line}: tenfold {' '.join(arguments)}"
            if not arguments or arguments[0] in ("--help", "--version"):
                continue
            if arguments[0] in cli.HOUSE:
                prog, verb, rest = arguments[0], cli.load(cli.HOUSE[arguments[0]][1]), arguments[1:]
            else:
                assert arguments[0] in cli.ROOMS, where
                if arguments[1:] in ([], ["--help"]):
                    continue
                verbs = cli.room_verbs(arguments[0])
                assert arguments[1] in verbs, where
                prog, verb, rest = arguments[1], verbs[arguments[1]], arguments[2:]
            if "--help" not in rest:
                assert cli.parse(f"tenfold {prog}", verb, rest), where


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_link_within_the_repository_leads_to_a_file(path: Path) -> None:
    # Code may hold what looks like a link.
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """The folder that runnable blocks find: `photo.png`, `photos/` with two pictures, and the short film `clip.mp4`."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:32, 0:40]
    pixels = np.stack([rows * 6, columns * 5, (rows + columns) * 3], -1) + random.integers(0, 16, (32, 40, 3))
    picture = Image.fromarray(pixels.astype(np.uint8))
    picture.save(tmp_path / "photo.png")
    (tmp_path / "photos").mkdir()
    for name in ("left.png", "right.jpg"):
        picture.save(tmp_path / "photos" / name)
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode(None))
    return tmp_path


def runnable(path: Path) -> list[Block]:
    return [block for block in blocks(path) if "runnable" in block.words]


@pytest.mark.parametrize(
    "path",
    [path for path in DOCUMENTS if runnable(path)],
    ids=[name for name, path in zip(NAMES, DOCUMENTS, strict=True) if runnable(path)],
)
def test_the_runnable_blocks_of_a_document_run_one_after_the_other(path: Path, desk: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for block in runnable(path):
        command = {
            "bash": ["bash", "-euo", "pipefail", "-c", block.text],
            "python": [sys.executable, "-c", block.text],
        }[block.language]
        done = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (
            f"{path.name}:{block.line} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )


def test_the_readme_has_something_to_run() -> None:
    languages = {block.language for block in runnable(REPOSITORY / "README.md")}
    assert languages == {"bash", "python"}


def test_every_schema_is_a_json_schema() -> None:
    schemas = sorted((REPOSITORY / "docs" / "schemas").glob("*.json"))
    assert schemas
    for path in schemas:
        jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text()))


def test_every_result_file_follows_the_common_layout() -> None:
    for path in sorted((REPOSITORY / "results").rglob("*.json")):
        content = json.loads(path.read_text())
        missing = {"room", "kind", "date", "seconds", "machine", "versions", "seeds", "config", "tables"} - set(content)
        assert not missing, f"{path} lacks {missing}"
        for table in content["tables"]:
            assert all(len(row) == len(table["columns"]) for row in table["rows"]), f"{path}: {table['name']}"
