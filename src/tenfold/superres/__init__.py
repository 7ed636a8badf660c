"""HiT-SR: upscale photographs, artwork and video frames 2, 3 or 4 times.

The names below are imported when they are first used, so that `tenfold superres --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenfold.superres.evaluation import evaluate_pairs, psnr_y, ssim_y
    from tenfold.superres.model import HiT
    from tenfold.superres.predictor import Upscaler, UpscaleResult
    from tenfold.superres.resize import imresize_matlab

__all__ = ["HiT", "UpscaleResult", "Upscaler", "evaluate_pairs", "imresize_matlab", "psnr_y", "ssim_y"]

_MODULE_OF = {
    "HiT": "model",
    "UpscaleResult": "predictor",
    "Upscaler": "predictor",
    "evaluate_pairs": "evaluation",
    "imresize_matlab": "resize",
    "psnr_y": "evaluation",
    "ssim_y": "evaluation",
}


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(import_module(f"tenfold.superres.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
