"""``accelerate(model)``: capture → graph → passes → plan → engine."""

from .module import AcceleratedModule, accelerate, load
from .plan import Report
from .profile import Profile

__all__ = ["AcceleratedModule", "Profile", "Report", "accelerate", "load"]
