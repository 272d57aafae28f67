"""What an iteration costs on some device: one model of it a file, one interface."""

from armillary.sim.costs.model import CostModel
from armillary.sim.costs.linear import Linear

__all__ = ["CostModel", "Linear"]
