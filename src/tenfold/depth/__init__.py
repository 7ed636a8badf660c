"""UniDepth: metric depth, 3D points and the camera from one picture.

The names below are imported when they are first used, so that `tenfold depth --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenfold.depth.camera_input import Camera
    from tenfold.depth.model import UniDepthV2
    from tenfold.depth.model_v1 import UniDepthV1
    from tenfold.depth.predictor import Depth, DepthEstimator

__all__ = ["Camera", "Depth", "DepthEstimator", "UniDepthV1", "UniDepthV2"]

_MODULE_OF = {
    "Camera": "camera_input",
    "Depth": "predictor",
    "DepthEstimator": "predictor",
    "UniDepthV1": "model_v1",
    "UniDepthV2": "model",
}


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(import_module(f"tenfold.depth.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
