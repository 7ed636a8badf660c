"""The room's tab on the local web page: a prompt goes in, and what a small model writes on comes out as it is made."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from tenfold.core.console import UserError
from tenfold.core.web import readable_errors
from tenfold.llm.config import MODELS
from tenfold.llm.generation import LanguageModel
from tenfold.llm.tour import PROMPTS

MAX_PROMPT_CHARACTERS = 4000
MAX_NEW_TOKENS = 400


def tab() -> None:
    """Build the tab; to be called inside a `gradio.Blocks`."""
    import gradio

    embedded = [entry.name for entry in MODELS if entry.source == "embedded"]
    with gradio.Row():
        with gradio.Column(scale=1, min_width=260):
            prompt = gradio.Textbox(PROMPTS[0], label="Prompt", lines=4, max_length=MAX_PROMPT_CHARACTERS)
            model = gradio.Radio(embedded, value=embedded[0], label="Model")
            length = gradio.Slider(16, MAX_NEW_TOKENS, value=120, step=8, label="New tokens")
            temperature = gradio.Slider(0, 1.5, value=0.7, step=0.05, label="Temperature", info="0 takes the likeliest")
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
            start = gradio.Button("Write on", variant="primary")
        with gradio.Column(scale=3, min_width=300):
            text = gradio.Textbox(label="Text", lines=14, interactive=False, buttons=["copy"])
    start.click(
        readable_errors(write_on), inputs=[prompt, model, length, temperature, seed], outputs=text, api_name="llm"
    )


@functools.lru_cache(maxsize=2)
def language_model(name: str) -> LanguageModel:
    """The model of a name, kept for the next visitor."""
    return LanguageModel.from_pretrained(name)


def write_on(prompt: str, model: str, length: float, temperature: float, seed: float) -> Iterator[str]:
    """Yield the prompt with ever more of its continuation.

    Raises:
        UserError: the prompt is empty or too long.
    """
    if not prompt.strip():
        raise UserError("Type a prompt first.")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(f"The prompt is longer than {MAX_PROMPT_CHARACTERS} characters.")
    text = prompt
    for piece in language_model(model).stream(
        prompt, max_new_tokens=int(length), temperature=temperature, seed=int(seed)
    ):
        text += piece
        yield text
