"""Who runs a case. A peer turns a problem into a call of one input, in the runtime's own layout, to one output.

A peer of another runtime is one more function in runtimes.py: ``needs`` names the packages it can't do without, and
``convert`` makes its model file, in a process of its own. Its thread count is ``threads``, as is OMP_NUM_THREADS.
"""

# They register their peers, whose order is that of the tables' rows.
from benchmarks.peers import pytorch, runtimes, this_package  # noqa: F401
from benchmarks.peers.registry import PEERS, Peer, Unsupported

__all__ = ["PEERS", "Peer", "Unsupported"]
