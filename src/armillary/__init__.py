"""Armillary: one system for the whole life of a foundation model. A schedule is data.

The rings, from the outside in, are the subpackages; `docs/map.md` has one line for each.
"""

__version__ = "0.1.0"
