"""``accelerate(model)``: capture → graph → passes → plan → engine."""

from .module import AcceleratedModule, accelerate, load
from .plan import Report

__all__ = ["AcceleratedModule", "Report", "accelerate", "load"]
