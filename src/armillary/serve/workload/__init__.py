"""Requests to serve, real or virtual: when they come, how long they are, which begin alike."""

from armillary.serve.workload.arrivals import bursty, poisson, steady
from armillary.serve.workload.lengths import Lengths, fixed, published
from armillary.serve.workload.requests import Arrival, requests

__all__ = ["Arrival", "Lengths", "bursty", "fixed", "poisson", "published", "requests", "steady"]
