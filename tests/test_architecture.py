"""The floor plan, held: which way imports go, the names and the manners of a room's files, what start-up costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tenfold.cli import ROOMS

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "src" / "tenfold"

# The doors of a room: the same in every room; a room leaves out what it does not need.
DOORS = {
    "__init__.py": "the room's public names",
    "app.py": "the room's tab of the local web page",
    "checkpoint.py": "names to weights",
    "cli.py": "one thin typed function per verb",
    "config.py": "frozen dataclasses",
    "data.py": "readers, transforms, generators",
    "evaluation.py": "the official protocol",
    "model.py": "modules only",
    "predictor.py": "the user-level object",
    "reproduce.py": "the paper's headline claim at small scale",
    "tour.py": "the room's station",
    "training.py": "the recipe",
}
# Further modules of a room, and why each is not behind a door.
FURTHER = {
    "superres": {
        "resize.py": "MATLAB's bicubic, which data, evaluation and the start of training share",
        "pixels.py": "between files, Pillow, NumPy and torch on one side and float planes on the other",
        "strips.py": "the whole network strip by strip: the result of the plain run in little memory",
        "maps.py": "feature maps, channels last: windows, padding, rows; shared by model and strips",
        "tiling.py": "how an image that is too large is cut and put together again",
        "batch.py": "many files: which of them a run takes, what each becomes",
        "upscaling.py": "one file of a batch: which network, which size, pictures and films",
        "onnx_file.py": "a network as an ONNX file: what is free in it and what is checked",
        "cost.py": "what a layer costs as its window grows: the first half of reproduce",
    },
    "planner": {
        "shapes.py": "parameters, FLOPs and conventions of a model",
        "operators.py": "what an operator costs on a device",
        "collectives.py": "what moves between devices, and how long it takes",
        "schedules.py": "the order of a pipeline's work, by generator",
        "adaptive.py": "the order of a pipeline's work, by list scheduling",
        "simulation.py": "events: a schedule played through",
        "steady.py": "long steps from short ones: what repeats is played once",
        "pipeline.py": "a plan as pipeline work: stages, chunks, times",
        "memory.py": "what each stage holds, and what to recompute or swap",
        "scoring.py": "many layouts at once: what is combined, and the closed form that ranks them",
        "layout_search.py": "layouts sorted and simulated (`search` would shadow the public function)",
        "shape_search.py": "model shapes of equal size, each with its best layout",
        "coefficients.py": "constants of the model: meaning, prior, limits",
        "calibration.py": "constants of the model from measured rows",
        "placement.py": "experts onto devices",
        "trace.py": "timelines for Perfetto and Chrome",
        "plots.py": "pictures of timelines and memory",
        "export.py": "launch flags of training frameworks",
        "validity.py": "which plans can be, and the nearest that can",
        "profiling.py": "operators measured on this device",
        "verb_inputs.py": "what the verbs take: allowed words, model, cluster, plan",
        "search_verbs.py": "the verbs that search",
        "measured_verbs.py": "the verbs that read measurements or other people's files",
        "answers.py": "how answers look in the terminal",
    },
    "agent": {
        "index.py": "a folder of documents made searchable",
        "store.py": "the documents of an index in one SQLite file",
        "lexical.py": "words to passages: BM25",
        "dense.py": "meaning to passages: vectors",
        "mcp_server.py": "the agent as tools of the Model Context Protocol",
        "judges.py": "language models that judge answers, and how they agree with rules",
        "judging.py": "judges over a whole evaluation",
        "team.py": "a planner and researchers: findings are shared, contexts are not",
        "team_oracle.py": "the script that follows a known path, as a team",
        "report.py": "long answers: an outline, sections that are searched for",
        "parts.py": "an answer that is put together from several runs",
        "webpuzzle.py": "questions with known answers from a pool of pages, stage by stage",
        "passages.py": "a text in passages, their length in tokens, the best of them",
        "extract.py": "a page to readable text, without what is hidden in it",
        "hidden.py": "what a page keeps from its reader's eye",
        "zim.py": "articles of a ZIM archive",
        "addresses.py": "which addresses may be opened",
        "fetch.py": "pages of the web, read with care",
        "search.py": "one question to several engines",
        "engines.py": "one class per search service",
        "cache.py": "what was searched and read before",
        "citations.py": "sentences of an answer to spans of its sources",
        "protocol.py": "what a turn of the model means, and how results are shown to it",
        "environment.py": "the loop of turns and searches, its budgets, its token masks",
        "outcome.py": "what a run leaves: answer, cost, numbered sources, their events",
        "policies.py": "who writes the turns: the interface, and a script",
        "instructions.py": "what the model is told, in its question's language",
        "endpoint.py": "an OpenAI-compatible endpoint, spoken to with care",
        "local_model.py": "a model of transformers in this process",
        "agent.py": "the user-level object (`predictor` would say less)",
        "oracle.py": "a script that follows the known path of a question",
        "rewards.py": "what a rollout is worth",
        "grpo.py": "the loss of reinforcement learning",
        "trace.py": "what happened in a run, as events in a file",
        "viewer.py": "a trace as a page, or as lines",
        "serve.py": "the agent behind an OpenAI-compatible endpoint",
        "world.py": "a closed world in which search can be counted, and the small policy for it",
        "rollouts.py": "many runs of the environment at once with one local model",
        "collapse.py": "signs that reinforcement goes wrong, and what is done about them",
        "stages.py": "one stage of training from names and files: what the verb train does",
        "trl_rollouts.py": "the environment inside TRL's trainer",
        "seeker.py": "the small trained policy that comes with tenfold",
        "verb_inputs.py": "what several verbs take: model, engines, protocol, and the agent of them",
        "training_verbs.py": "the verbs that train and measure",
    },
}
FURTHER["llm"] = {
    "attention.py": "which keys a query sees, and the kernels: documents, windows, caches",
    "cache.py": "keys and values of the past",
    "shards.py": "token files on disk, Megatron's and our own, and text that becomes them",
    "tokenizer.py": "text to ids and back; training a vocabulary by domain",
    "transformers_model.py": "the decoder as transformers' Auto classes want it",
    "key_tables.py": "foreign checkpoint layouts as tables of patterns",
    "families.py": "what a foreign config.json says, family by family",
    "gguf_file.py": "GGUF files, converted once into a cache",
    "onnx_file.py": "a decoder as an ONNX file, checked",
    "generation.py": "the user-level object: LanguageModel (llm's predictor)",
    "kernels.py": "RMSNorm and cross-entropy with their gradients written out",
    "decoding.py": "one more token for each row, in few and large operations",
    "harness.py": "our language models inside lm-evaluation-harness",
    "context.py": "longer contexts: the needle sweep that chooses a rotary base",
    "stability.py": "spikes, gradients, gains and activations: what a run's report shows",
    "post_training.py": "SFT and GRPO on TRL",
    "parallel.py": "FSDP2 and tensor parallelism, applied from outside the model; a layout for pretrain",
    "context_parallel.py": "documents shared out over devices, and attention over what others hold",
    "torchtitan_spec.py": "the decoder as torchtitan's trainer wants it",
    "pipeline.py": "a decoder cut into pieces, on torch's 1F1B schedules",
    "scale.py": "parameters, FLOPs, memory per rank, MFU and their conventions",
    "phases.py": "the pre-training schedule by tokens: length, rotary base, batch, rate",
    "windows.py": "windows of one text: random ones to train on, side by side to score",
    "inspection.py": "the report on a run or a model: stability's quantities, drawn",
    "experiments.py": "one small run of reproduce and what came of it",
    "training_verbs.py": "the verbs that train",
    "model_verbs.py": "the verbs that use a trained model",
    "verb_inputs.py": "what several verbs take",
    "vllm_plugin.py": "what vLLM asks when it starts",
}
FURTHER["depth"] = {
    "blocks.py": "attention, embeddings and resizing that both networks share",
    "cameras.py": "camera models: pixels to rays and back",
    "camera_input.py": "the camera that a user gives: files, fields of view, EXIF",
    "encoders.py": "DINOv2's transformer and ConvNeXt",
    "model_v1.py": "the first version's network",
    "preprocessing.py": "which size a network sees, and the way there and back",
    "pictures.py": "picture files that the room takes: those of core, and HEIC",
    "outputs.py": "what a result becomes on disk",
    "view.py": "results to look at: a turnable cloud, a page, viser",
    "batch.py": "many files: names, failures, reports",
    "onnx_file.py": "a network as an ONNX file, checked",
    "losses.py": "the terms of both training recipes",
    "metrics.py": "depth, clouds, cameras, uncertainty: arrays of one image to numbers",
    "simulate.py": "rooms and how they look through any camera",
    "rooms.py": "rendered rooms as files",
    "readers.py": "datasets with depth pictures, as they lie on the disk",
    "driving.py": "datasets whose depth is projected from a lidar",
    "ablation.py": "the networks that reproduce compares",
    "training_verbs.py": "the verbs that train, make data and measure",
}
FURTHER["tracking"] = {
    "association.py": "boxes with embeddings to identities, frame by frame",
    "augment.py": "two views of a still image, and where its boxes went",
    "boxes.py": "overlap, validity and suppression of boxes, for all of the room",
    "detection.py": "detectors as functions to supervision's detections; the built-in one",
    "foundation_backbones.py": "SAM's and Swin's encoders out of the official files",
    "losses.py": "which boxes of two views are the same thing",
    "masks.py": "the job that turns a folder of pictures into training data",
    "matching.py": "how well boxes and tracks go together, and who gets whom",
    "memory.py": "what is remembered of tracks, in arrays",
    "motion.py": "the Kalman filter of all tracks at once",
    "onnx_file.py": "the appearance network as an ONNX file, checked",
    "streaming.py": "a whole video through a tracker in constant memory",
    "zero_shot.py": "finding things again by appearance alone, and the histogram to beat",
}
DATA_FOLDERS = {"weights", "assets"}
# Rooms that may use another room: pruning prunes the models of llm.
MAY_USE = {"pruning": {"llm"}}


def rooms() -> list[str]:
    return sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "core")


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, at any depth, as (line, absolute name); `from a import b` gives a.b."""
    package = ["tenfold", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def part_of(module: str) -> str | None:
    """`core`, or the room that a module belongs to; None for the top level and for other packages."""
    names = module.split(".")
    return names[1] if names[0] == "tenfold" and len(names) > 1 and names[1] in ["core", *rooms()] else None


def test_every_room_is_mounted_and_every_mounted_room_exists() -> None:
    assert sorted(ROOMS) == rooms()


def test_core_never_imports_a_room_or_the_front_door() -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {module}"
        for path in python_files(PACKAGE / "core")
        for line, module in imported(path)
        if module.startswith("tenfold.") and part_of(module) != "core" and module != "tenfold.__version__"
    ]
    assert wrong == []


def test_a_room_imports_core_and_itself_only() -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {module}"
        for room in rooms()
        for path in python_files(PACKAGE / room)
        for line, module in imported(path)
        if module.startswith("tenfold.")
        and part_of(module) not in {"core", room} | MAY_USE.get(room, set())
        and module != "tenfold.__version__"
    ]
    assert wrong == []


def test_the_top_level_enters_rooms_only_through_names_at_run_time() -> None:
    wrong = [
        f"{path.name}:{line} imports {module}"
        for path in sorted(PACKAGE.glob("*.py"))
        for line, module in imported(path)
        if part_of(module) in rooms()
    ]
    assert wrong == []


@pytest.mark.parametrize("room", rooms())
def test_a_room_has_the_floor_plans_doors_and_no_others(room: str) -> None:
    folder = PACKAGE / room
    modules = {path.name for path in folder.glob("*.py")}
    packages = {path.parent.name + ".py" for path in folder.glob("*/__init__.py")}
    unknown = (modules | packages) - set(DOORS) - set(FURTHER.get(room, {}))
    assert unknown == set(), f"give these a door's name, or name them in FURTHER with a reason: {sorted(unknown)}"
    assert {"__init__.py", "cli.py", "config.py", "tour.py"} <= modules
    folders = {path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - DATA_FOLDERS <= {name.removesuffix(".py") for name in packages}


@pytest.mark.parametrize("room", rooms())
def test_a_room_explains_itself(room: str) -> None:
    readme = (PACKAGE / room / "README.md").read_text()
    assert len(readme.split()) > 200
    for path in (PACKAGE / room).glob("*.py"):
        if path.name not in ("__init__.py", "app.py", "cli.py", "tour.py"):
            assert path.name in readme, f"{room}/README.md does not say what {path.name} is for"


@pytest.mark.parametrize("room", rooms())
def test_a_room_has_between_one_and_ten_public_names(room: str) -> None:
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
    public = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    ]
    assert len(public) == 1
    assert 1 <= len(public[0]) <= 10


def files_named(door: str) -> list[Path]:
    paths = [*PACKAGE.glob(f"*/{door}.py"), *PACKAGE.glob(f"*/{door}/*.py")]
    return sorted(path for path in paths if path.parts[len(PACKAGE.parts)] in rooms())


def test_config_needs_nothing_that_computes() -> None:
    heavy = {"torch", "torchvision", "numpy", "cv2", "PIL", "accelerate", "transformers", "matplotlib", "safetensors"}
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {module}"
        for path in files_named("config")
        for line, module in imported(path)
        if module.split(".")[0] in heavy
    ]
    assert wrong == []


def test_model_knows_nothing_of_files_network_screen_or_device() -> None:
    modules = {"os", "pathlib", "io", "json", "sys", "socket", "urllib", "requests", "huggingface_hub", "PIL", "cv2"}
    core_allowed = {"tenfold.core.config"}
    wrong = []
    for path in files_named("model"):
        where = path.relative_to(REPOSITORY)
        for line, module in imported(path):
            if module.split(".")[0] in modules or (
                module.startswith("tenfold.core.") and not any(module.startswith(name) for name in core_allowed)
            ):
                wrong.append(f"{where}:{line} imports {module}")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in ("print", "open", "torch.load", "torch.save") or name.endswith((".cuda", ".is_available")):
                    wrong.append(f"{where}:{node.lineno} calls {name}")
    assert wrong == []


def test_the_house_has_no_junk_drawer() -> None:
    names = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py", "tools.py"}
    assert [str(path) for path in python_files(PACKAGE) if path.name in names] == []


HEAVY = ["torch", "torchvision", "numpy", "tyro", "rich", "PIL", "cv2", "av", "matplotlib", "transformers", "gradio"]


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import tenfold", []),
        ("from tenfold.cli import main; main(['--help'])", []),
        ("from tenfold.cli import main; main(['--version'])", []),
        ("from tenfold.cli import main; main(['models'])", ["rich", "tyro"]),
        *((f"from tenfold.cli import main; main(['{room}'])", ["tyro"]) for room in ROOMS),
        *((f"import tenfold.{room}", []) for room in ROOMS),
    ],
)
def test_starting_up_imports_nothing_heavy(statement: str, allowed: list[str]) -> None:
    script = f"{statement}\nimport sys\nprint('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    loaded = ast.literal_eval(done.stdout.splitlines()[-1].removeprefix("HEAVY "))
    assert set(loaded) <= set(allowed)


@pytest.mark.parametrize("room", ROOMS)
def test_help_of_a_verb_does_not_wait_for_torch(room: str) -> None:
    script = (
        "import contextlib, io, sys\n"
        "from tenfold.cli import main, room_verbs\n"
        f"for verb in room_verbs({room!r}):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        f"        main([{room!r}, verb, '--help'])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    return [path for name in listed.decode().split("\0") if name and (path := REPOSITORY / name).is_file()]


def test_tracked_files_name_no_machine_of_their_makers() -> None:
    # Written in two parts, so that this file does not find itself.
    words = ["/wo" + "rk/", "/tmp/bash" + "_jobs", "/fa" + "rm/", ".lib" + "rary/", "/home" + "/", "/ro" + "ot/"]
    wrong = []
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        wrong += [f"{path.relative_to(REPOSITORY)} mentions {word}" for word in words if word in text]
    assert wrong == []


def test_nothing_large_is_tracked() -> None:
    large = [f"{path.name}: {path.stat().st_size}" for path in tracked_files() if path.stat().st_size > 5_000_000]
    assert large == []
