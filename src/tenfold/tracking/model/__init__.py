"""The networks of MASA: backbone, pyramid, dynamic fusion, heads. Modules only."""

from tenfold.tracking.model.masa import Masa

__all__ = ["Masa"]
