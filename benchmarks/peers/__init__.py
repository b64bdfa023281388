"""Who runs a case. A peer turns a problem into a call of one input, in the runtime's own layout, to one output.

A peer of another runtime is one more function in runtimes.py: ``needs`` names the packages it can't do without, and
``convert`` makes its model file, in a process of its own. Its thread count is ``threads``, as is OMP_NUM_THREADS. A
GPU's peers, in cuda.py and jax_peer.py, get a `cases.placed.PlacedProblem`.
"""

# They register their peers, whose order is that of the tables' rows.
from benchmarks.peers import pytorch, runtimes, this_package, cuda, jax_peer  # noqa: F401, I001
from benchmarks.peers.registry import CUDA_PEERS, PEERS, Peer, Unsupported, peers_of

__all__ = ["CUDA_PEERS", "PEERS", "Peer", "Unsupported", "peers_of"]
