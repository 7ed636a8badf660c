"""The room's tab on the local web page: a question goes to an endpoint of the visitor's, and what it does is shown."""

from __future__ import annotations

import html
import queue
import threading
from collections.abc import Iterator
from typing import Any

from tenfold.agent.addresses import is_web
from tenfold.agent.agent import Agent
from tenfold.agent.config import Budget
from tenfold.agent.serve import answer_text, progress
from tenfold.agent.viewer import render_html
from tenfold.core.console import UserError
from tenfold.core.web import readable_errors

MAX_QUESTION_CHARACTERS = 2_000
# What a visitor may choose; engines with keys take them from the server's environment.
ENGINES = ("local:builtin", "ddgs", "brave", "serper", "langsearch")
_TICK_S = 0.5


def tab() -> None:
    """Build the tab; to be called inside a `gradio.Blocks`."""
    import gradio

    with gradio.Row():
        with gradio.Column(scale=1, min_width=260):
            question = gradio.Textbox(
                "On what date was the director of The Quitter (1929 film) born?",
                label="Question",
                lines=3,
                max_length=MAX_QUESTION_CHARACTERS,
            )
            llm = gradio.Textbox("http://localhost:8000/v1", label="Endpoint of a language model")
            model = gradio.Textbox("", label="Model", info="Empty: the first one of the endpoint")
            engine = gradio.Dropdown(
                list(ENGINES),
                value="local:builtin",
                label="Search in",
                info="An index of yours: local:FOLDER",
                allow_custom_value=True,
            )
            mode = gradio.Radio(["answer", "team", "report"], value="answer", label="Mode")
            rounds = gradio.Slider(1, 20, value=7, step=1, label="Rounds of search")
            start = gradio.Button("Ask", variant="primary")
        with gradio.Column(scale=3, min_width=300):
            answer = gradio.Textbox(label="Answer", lines=6, interactive=False, buttons=["copy"])
            happened = gradio.Textbox(label="What it does", lines=10, interactive=False)
            trace = gradio.HTML(label="Trace")
    start.click(
        readable_errors(ask),
        inputs=[question, llm, model, engine, mode, rounds],
        outputs=[answer, happened, trace],
        api_name="agent",
    )


def ask(question: str, llm: str, model: str, engine: str, mode: Any, rounds: float) -> Iterator[tuple[str, str, str]]:
    """Yield answer, progress and trace page, ever more of them.

    Raises:
        UserError: an empty question, a model or an engine that does not answer.
    """
    if not question.strip():
        raise UserError("Type a question first.")
    if not is_web(llm):
        raise UserError("The endpoint is an address such as http://localhost:8000/v1.")
    agent = Agent.from_pretrained(llm, [engine], model=model, budget=Budget(rounds=int(rounds)))
    told: queue.Queue[str] = queue.Queue()
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(agent.ask(question, on_event=progress(told.put), mode=mode))
        except Exception as error:  # raised again for the visitor below
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    said = ""
    while thread.is_alive() or not told.empty():
        try:
            said += told.get(timeout=_TICK_S)
        except queue.Empty:
            continue
        yield "", said, ""
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    page = html.escape(render_html(outcome[0].trace), quote=True)
    # In a frame without rights: what stands in the page was written by a model and by strangers.
    frame = f'<iframe sandbox srcdoc="{page}" title="Trace" style="width:100%;height:40rem;border:0"></iframe>'
    yield answer_text(outcome[0]), said, frame
