"""Turn a finished run of `tenfold llm pretrain --recipe tenfold-tiny` into the embedded weights.

Matrices are rounded to bfloat16, which halves the file; gains of norms stay float32, since steps of a trained gain are
smaller than bfloat16 resolves. The output matrix is the embedding and is left out.

Usage: python scripts/llm_weights.py RUN src/tenfold/llm/weights/tenfold-tiny.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tenfold.core import checkpoint


def main(run: Path, output: Path) -> None:
    """Read RUN/model.safetensors and write OUTPUT."""
    found = checkpoint.load_file(run / "model.safetensors")
    tensors = {
        name: tensor.to(torch.bfloat16) if tensor.dim() > 1 else tensor
        for name, tensor in found.tensors.items()
        if name != "lm_head.weight"
    }
    checkpoint.save(output, tensors, found.metadata)
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB, {sum(t.numel() for t in tensors.values()):,} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
