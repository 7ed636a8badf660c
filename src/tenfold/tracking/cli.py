"""The verbs of the room: each a thin function that reads its input, calls the room, and shows what came out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.core.devices import DeviceName

if TYPE_CHECKING:
    from tenfold.tracking.detection import Detect

OutputFile = Annotated[Path, arg(aliases=["-o"])]
OutputFolder = Annotated[Path, arg(aliases=["-o"])]
MatcherName = Literal["video", "tao", "bdd", "demo"]


def track(
    video: Positional[Path],
    method: Literal["masa"] = "masa",
    model: str = "masa-tiny",
    boxes: Path | None = None,
    detector: str | None = None,
    text: str | None = None,
    segments: str | None = None,
    masks: str | None = None,
    matcher: MatcherName = "video",
    min_score: float | None = None,
    save: Path | None = None,
    mot: Path | None = None,
    jsonl: Path | None = None,
    fps: float | None = None,
    device: DeviceName = "auto",
) -> object:
    """Track everything in a video that a detector, a phrase or given boxes point at.

    Boxes come from one place: --boxes, --segments, or --detector (with or without --text). Without any, the built-in
    detector of COCO's 80 classes is used. Nothing but the tracks is kept in memory, however long the video is.

    Args:
        video: a video file, a MOTChallenge or DanceTrack sequence, or a folder of pictures.
        method: how appearance was learned.
        model: appearance network: masa-tiny (built in), masa-r50, masa-sam-b ..., or a file.
        boxes: given observations: MOTChallenge, KITTI, BDD100K or COCO-video.
        detector: nanodet (built in), rt-detr, d-fine, yolos, grounding-dino, owlv2, a folder or hub id; motion, for a
            still camera; proposals, for the head of an official network that finds anything.
        text: what to look for, parts separated by full stops.
        segments: track every segment that this generator finds: sam, sam2, or regions (classical stand-in).
        masks: cut a mask for every tracked box: sam, sam2, or grabcut (classical stand-in).
        matcher: rules: video, or the published tao, bdd, demo.
        min_score: boxes below it are left out.
        save: annotated video to write (.mp4, .mkv, .webm ...).
        mot: tracks as MOTChallenge text.
        jsonl: tracks as a line of json for each frame.
        fps: frames a second of a plain folder of pictures.
        device: where to compute.

    Example:
        tenfold tracking track street.mp4 --save tracked.mp4 --mot tracks.txt
        tenfold tracking track zoo.mp4 --detector owlv2 --text "zebra . red car" --save tracked.mp4
        tenfold tracking track MOT17-02 --boxes MOT17-02/det/det.txt --mot MOT17-02.txt
    """
    given = [name for name, value in (("--boxes", boxes), ("--segments", segments), ("--detector", detector)) if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: boxes come from one place only")
    if text is not None and (boxes or segments):
        raise UserError(f"--text: needs a detector, and {given[0]} is none")
    if min_score is not None and not 0 <= min_score <= 1:
        raise UserError(f"--min-score {min_score}: expected a number from 0 to 1")

    from tenfold.core import foundation
    from tenfold.core.devices import resolve_device, set_threads
    from tenfold.tracking import checkpoint, streaming
    from tenfold.tracking.data import reading
    from tenfold.tracking.detection import EMBEDDED, load_detector, parse_prompts
    from tenfold.tracking.predictor import PROPOSALS, Embedder, Tracker, find_matcher

    set_threads()
    source = streaming.open_source(video, fps)
    observed = None
    if boxes is not None:
        observed = streaming.boxes_from(reading.read(boxes), 0.0 if min_score is None else min_score)
    prompts = parse_prompts(text) if text is not None else None
    detect: Detect | Literal["proposals"] | None = None
    if segments is not None:
        detect = streaming.segments_as_detector(foundation.load_mask_generator(segments, device))
    elif detector == PROPOSALS:
        detect = PROPOSALS
    elif boxes is None:
        detect = load_detector(detector or EMBEDDED, prompts, device, min_score)
    loaded = checkpoint.load(model, proposals=detect == PROPOSALS)
    tracker = Tracker(Embedder(loaded, resolve_device(device)), find_matcher(matcher), detect)
    segmenter = foundation.load_segmenter(masks, device) if masks is not None else None
    result = streaming.track_video(
        source, tracker, boxes=observed, segmenter=segmenter, save=save, mot=mot, jsonl=jsonl
    )
    console.table(
        ("what", "value"),
        [
            ("frames", result.frames),
            *([("frames that could not be read", result.gaps)] if result.gaps else []),
            ("tracks", result.tracks),
            ("boxes", result.boxes),
            ("frames a second", f"{result.frames_per_second:.1f}"),
            *((name, path) for name, path in (("video", save), ("MOT text", mot), ("json lines", jsonl)) if path),
        ],
        title=f"{video}: {loaded.origin}, rules {matcher}",
    )
    return result


def embed(
    video: Positional[Path],
    boxes: Path,
    output: OutputFile,
    model: str = "masa-tiny",
    fps: float | None = None,
    device: DeviceName = "auto",
) -> object:
    """Write the embedding of every given box: an .npz with frames, ids, boxes_xyxy, embeddings.

    Args:
        video: a video file, a MOTChallenge or DanceTrack sequence, or a folder of pictures.
        boxes: MOTChallenge, KITTI, BDD100K or COCO-video.
        output: the .npz file.
        model: appearance network.
        fps: frames a second of a plain folder of pictures.
        device: where to compute.

    Example:
        tenfold tracking embed street.mp4 --boxes det.txt -o embeddings.npz
    """
    if output.suffix != ".npz":
        raise UserError(f"-o {output}: name a file that ends in .npz")

    import numpy as np

    from tenfold.core.devices import resolve_device, set_threads
    from tenfold.core.files import atomic_write
    from tenfold.tracking import checkpoint, streaming
    from tenfold.tracking.data import reading
    from tenfold.tracking.predictor import Embedder

    set_threads()
    source = streaming.open_source(video, fps)
    table = reading.read(boxes)
    embedder = Embedder(checkpoint.load(model), resolve_device(device))
    chosen, embeddings = streaming.embed_video(source, table, embedder)
    with atomic_write(output) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            frames=table.frames[chosen],
            ids=table.ids[chosen],
            boxes_xyxy=table.boxes_xyxy[chosen],
            embeddings=embeddings,
        )
    console.say(f"{output}: {len(chosen)} embeddings of length {embedder.length}, of {len(table)} boxes")
    return {"path": str(output), "embeddings": len(chosen), "boxes": len(table), "length": embedder.length}


def evaluate(
    truth: Positional[list[Path]],
    results: list[Path],
    benchmark: Literal["plain", "mot17", "mot20", "kitti"] = "plain",
    teta: bool = False,
) -> object:
    """Score tracks: HOTA, CLEAR and IDF1 by the reference library, or TETA. Several sequences are taken together.

    Args:
        truth: ground truth, one file a sequence: MOTChallenge, KITTI, BDD100K or COCO-video.
        results: tracks, in the same order.
        benchmark: what is left out first: plain (MOT15, DanceTrack, SportsMOT, TAO), mot17, mot20, kitti.
        teta: score by TETA, for open vocabularies; class names of both must be the same.

    Example:
        tenfold tracking evaluate gt.txt --results tracks.txt
        tenfold tracking evaluate MOT17-02/gt/gt.txt MOT17-04/gt/gt.txt --results 02.txt 04.txt --benchmark mot17
    """
    if len(truth) != len(results) or not truth:
        raise UserError(f"{len(truth)} files of ground truth and {len(results)} of results: give one for each")

    import dataclasses

    from tenfold.tracking import evaluation
    from tenfold.tracking.data import reading

    pairs = [(reading.read(path, truth=True), reading.read(other)) for path, other in zip(truth, results, strict=True)]
    if teta:
        found = evaluation.teta(pairs)
        console.table(
            ("TETA", "LocA", "AssocA", "ClsA"),
            [[f"{100 * value:.2f}" for value in (found.teta, found.loc_a, found.assoc_a, found.cls_a)]],
        )
        return found
    named = {str(path): pair for path, pair in zip(truth, pairs, strict=True)}
    each, combined = evaluation.evaluate_each(named, benchmark)
    rows = [*each.items(), *([("all", combined)] if len(named) > 1 else [])]
    shares = ("hota", "det_a", "ass_a", "idf1", "mota")
    console.table(
        ("sequence", "HOTA", "DetA", "AssA", "IDF1", "MOTA", "IDSW", "Frag"),
        [
            (name, *(f"{100 * getattr(scores, share):.2f}" for share in shares), scores.id_switches, scores.fragments)
            for name, scores in rows
        ],
    )
    return {"combined": dataclasses.asdict(combined), "sequences": {k: dataclasses.asdict(v) for k, v in rows}}


def masks(
    images: Positional[Path],
    output: OutputFile,
    generator: str = "regions",
    share: tuple[int, int] = (0, 1),
    rle: bool = False,
    device: DeviceName = "auto",
) -> object:
    """Find every segment of every picture of a folder: the training data of the appearance network, as COCO json.

    A job that was stopped goes on where it was. Several processes or machines can split the folder.

    Args:
        images: folder of pictures.
        output: the .json file.
        generator: sam, sam2, a folder or hub id, or regions (classical stand-in).
        share: this process's number from 0, and the number of processes.
        rle: keep the masks as well as the boxes.
        device: where to compute.

    Example:
        tenfold tracking masks photos/ -o photos.json --generator sam
    """
    if output.suffix != ".json":
        raise UserError(f"-o {output}: name a file that ends in .json")
    if not 0 <= share[0] < share[1]:
        raise UserError(f"--share {share[0]} {share[1]}: the number should be from 0 to one less than the processes")

    from tenfold.core import foundation
    from tenfold.core.devices import set_threads
    from tenfold.tracking.masks import segment_folder

    set_threads()
    result = segment_folder(images, output, foundation.load_mask_generator(generator, device), share, rle)
    if result.instances:
        console.say(f"{output}: {result.instances} segments of {result.pictures} pictures, by {result.generator}")
    else:
        console.say(f"this share is done; {output} is written when the others are")
    return result


def train(
    images: Positional[Path],
    masks: Path,
    output: OutputFolder,
    recipe: str = "masa-tiny",
    validation: Path | None = None,
    validation_masks: Path | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    workers: int | None = None,
    device: DeviceName = "auto",
) -> object:
    """Learn appearance from still images with segments; the same command again resumes a run that was stopped.

    OUTPUT/masa.safetensors is the result. On several GPUs or machines start it through `torchrun -m tenfold` or
    `accelerate launch -m tenfold`.

    Args:
        images: folder of pictures.
        masks: their segments as COCO json, see the verb masks.
        output: folder of the run.
        recipe: masa-tiny (the built-in network), masa-r50, or a YAML file with `model` and `train`.
        validation: folder of held-out pictures to score during training.
        validation_masks: their segments.
        iterations: optimiser steps.
        batch_size: images a step, two views of each.
        learning_rate: at its highest.
        seed: of weights, order and views.
        workers: processes that prepare views.
        device: where to train.

    Example:
        tenfold tracking train photos/ --masks photos.json -o runs/tiny
    """
    import dataclasses

    from tenfold.core.config import named_or_yaml, replaced
    from tenfold.tracking.config import RECIPES, Recipe

    if (validation is None) != (validation_masks is None):
        raise UserError("--validation and --validation-masks belong together: give both or none")
    chosen = named_or_yaml(Recipe, recipe, RECIPES)
    settings = replaced(
        chosen.train,
        iterations=iterations,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        workers=workers,
    )

    from tenfold.tracking import training
    from tenfold.tracking.data.stills import read_coco

    held_out = read_coco(validation_masks, validation) if validation and validation_masks else None
    result = training.train(
        read_coco(masks, images), output, chosen.model, settings, validation=held_out, device=device
    )
    return dataclasses.asdict(result)


def export(
    model: Positional[str],
    output: OutputFile,
    width: int = 512,
    height: int = 384,
) -> object:
    """Write an appearance network as an ONNX file, checked against PyTorch.

    Input `image`: 1 x 3 x height x width, float32, RGB less mean over standard deviation; `rois`: N x 5, a zero and the
    box. Output `embeddings`: N x E.

    Args:
        model: masa-tiny, masa-r50, a hub id or a file.
        output: the .onnx file.
        width: of the picture, a multiple of 32.
        height: of the picture, a multiple of 32.

    Example:
        tenfold tracking export masa-tiny -o masa-tiny.onnx
    """
    if output.suffix.lower() != ".onnx":
        raise UserError(f"-o {output}: name a file that ends in .onnx")

    from tenfold.core.devices import set_threads
    from tenfold.tracking import checkpoint, onnx_file

    set_threads()
    loaded = checkpoint.load(model)
    result = onnx_file.write(loaded.model, output, (height, width), {"licence": loaded.licence})
    console.say(
        f"{output}: {result.bytes / 1e6:.2f} MB; ONNX Runtime differs from PyTorch by {result.max_abs_difference:.1e}"
    )
    return result


def inspect(checkpoint: Positional[str]) -> object:
    """Say what a checkpoint is: variant, sizes, licence. Everything is told from its keys and shapes.

    Args:
        checkpoint: built-in or official name, hub id, or a .safetensors or .pth file.

    Example:
        tenfold tracking inspect masa_r50.pth
    """
    import dataclasses

    from tenfold.tracking import checkpoint as files

    loaded = files.load(checkpoint, proposals=True)
    config = loaded.model.config
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    console.table(
        ("what", "value"),
        [
            ("backbone", config.backbone),
            ("pyramid, fusion", f"{config.pyramid}, {config.fusion} x {config.fusion_blocks}"),
            ("strides", " ".join(map(str, config.strides))),
            ("width, embedding", f"{config.width}, {config.embedding}"),
            ("proposes boxes", "yes" if config.rcnn_layers else "no"),
            ("parameters, without a foundation model", f"{parameters:,}"),
            ("tensors of a foundation model in the file", len(loaded.foundation)),
            ("licence", loaded.licence),
        ],
        title=loaded.origin,
    )
    return {
        "origin": loaded.origin,
        "parameters": parameters,
        "foundation_tensors": len(loaded.foundation),
        "licence": loaded.licence,
        "model": dataclasses.asdict(config),
    }


VERBS: dict[str, Callable[..., object]] = {
    "track": track,
    "embed": embed,
    "evaluate": evaluate,
    "train": train,
    "masks": masks,
    "export": export,
    "inspect": inspect,
}
