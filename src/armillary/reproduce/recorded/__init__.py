"""What the authors of published systems recorded and gave away: requests, and what they felt. Provenance in `SOURCE.md`."""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from armillary.serve.workload.lengths import Lengths, fitted


@cache
def columns(name: str) -> dict[str, NDArray[np.float64]]:
    """The columns of a packaged file by their names. [rows] each."""
    rows = list(csv.reader(resources.files(__name__).joinpath(f"{name}.csv").read_text("utf-8").splitlines()))
    return dict(zip(rows[0], np.array(rows[1:], dtype=np.float64).T, strict=True))


def lengths(name: str) -> Lengths:
    """The distribution that a file's prompts and answers come from."""
    found = columns(name)
    return fitted(name, found["prompt"].astype(np.int64), found["answer"].astype(np.int64), "SOURCE.md")
