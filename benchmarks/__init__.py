"""Timing of this package against others. Start with ``python -m benchmarks --help``.

cases/ holds what is run, peers/ who runs it, convert.py makes their model files, worker.py is one peer in one process,
device.py the clock and memory of what it runs on, timing.py the interleaved rounds, gauges.py what the machine allows,
report.py and plots.py what is shown. To add a model or a peer, add an entry to cases/networks.py or a function to
peers/runtimes.py, or for a GPU to peers/cuda.py. gpu_session.py is what a few minutes on a GPU can tell.
"""
