"""hulukern: fused kernels for medical vision-language models.

``import hulukern`` registers the ops with torch and builds nothing; kernels load on first use.
"""

from hulukern._version import __version__
from hulukern.backends import BackendUnavailable
from hulukern.ops import *  # noqa: F403
from hulukern.ops import __all__ as _ops
from hulukern.packing import grid_cu_seqlens, grid_positions
from hulukern.registry import OPS

__all__ = ["OPS", "BackendUnavailable", "__version__", "grid_cu_seqlens", "grid_positions", *_ops]
