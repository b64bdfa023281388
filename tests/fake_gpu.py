"""A GPU for tests of the benchmarks: CPU tensors, the host's clock, graphs that call what they captured."""

import time
from types import SimpleNamespace

import torch

from benchmarks.device import CudaDevice
from benchmarks.worker import Session


class Event:
    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)


class FakeGpu(CudaDevice):
    name = "cpu"

    def __init__(self, cold=False, free_mib=1e5):
        self.flush = torch.zeros(1000) if cold else None
        self.free_mib, self.flushes, self.captured = free_mib, 0, []

    def empty_cache(self):
        super().empty_cache()
        self.flushes += 1

    def clock(self):
        return Event()

    def synchronize(self):
        pass

    def capture(self, call, inputs):
        self.captured += inputs
        return call

    def kernels(self, call):
        call()
        return [("copy_kernel", 1.0), ("conv_kernel", 2.5), ("conv_kernel", 2.5)]

    def memory_mib(self):
        return 100.0

    def trim(self):
        pass

    def facts(self):
        sizes = {"free_mib": self.free_mib, "total_mib": 1e5, "peak_mib": 500.0, "held_mib": 100.0}
        return {**sizes, "tf32": True}


class LocalWorker:
    """`timing.Worker` without a process. ``free_mib``: by the number of workers that are open, what is left."""

    open = 0
    free_mib = staticmethod(lambda count: 1e5)

    def __init__(self, case, peer, setting, limit=None, process=None):
        self.peer = peer
        LocalWorker.open += 1
        if (free := self.free_mib(LocalWorker.open)) <= 0:
            self.facts = {"failed": "OutOfMemoryError", "out_of_memory": True}
            return
        with torch.no_grad():
            self.session = Session(case, peer, setting, FakeGpu(free_mib=free))
        self.facts = self.session.facts

    def ask(self, seconds=None, kernels=False):
        with torch.no_grad():
            return self.session.kernels() if kernels else {"times_ms": self.session.turn(seconds)}

    def close(self):
        LocalWorker.open -= 1


FACTS = {"gpu": "Fake", "driver": "1", "cuda": "13.0", "cudnn": 9, "l2_mib": 50.0}
gpu_process = SimpleNamespace(facts=FACTS, ask=lambda dtype: {"copy_gbytes": 3000.0, "matrix_gflops": 7e5})
