"""Hot operations on a GPU, in Triton: one file each, checked on a CPU by Triton's interpreter and compiled for GPUs that are not here.

Their references are the plain loops beside the torch versions. How fast they are on a card is for `bench/gpu` to say there.
"""

from armillary.core.errors import MissingDependencyError

try:
    import triton as _triton
except ImportError as missing:
    raise MissingDependencyError(
        "the GPU kernels are written in Triton, which is not installed", "pip install 'armillary[gpu]' (Linux)"
    ) from missing

__all__: list[str] = []
VERSION: str = _triton.__version__
