"""Timing of this package against others. Start with ``python -m benchmarks --help``.

cases.py holds what is run, peers.py who runs it, worker.py one peer in one process, timing.py the interleaved rounds,
and report.py the tables. To add a model or a peer, add a function to the first two.
"""
