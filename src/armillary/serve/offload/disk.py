"""The disk tier: files mapped into memory, gone when the process is."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from armillary.core.errors import CapacityError


def on_disk(size: int, folder: Path) -> Tensor:
    """[size] uint8 zeros in a file in `folder` that has no name any more: nothing is left behind, however the process ends.

    Raises CapacityError when the file cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size)
            mapped = np.memmap(file, np.uint8, "r+", shape=(size,))
    except OSError as error:
        raise CapacityError(
            f"no file of {size:,} bytes can be made in {folder} ({error.strerror})",
            "choose another --offload-folder",
            field="offload_folder",
        ) from error
    return torch.from_numpy(mapped)
