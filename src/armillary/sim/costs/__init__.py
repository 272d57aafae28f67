"""What an iteration costs on some device: one model of it a file, one interface."""

from armillary.sim.costs.fitted import Fitted
from armillary.sim.costs.linear import Decoding, Linear
from armillary.sim.costs.model import CostModel

__all__ = ["CostModel", "Decoding", "Fitted", "Linear"]
