"""One peer on one case in a process of its own: ``python -m benchmarks.worker suite case peer setting``.

The setting is in JSON. Sets up, checks the outputs, prints a line of JSON; then for each line {"seconds": …} on stdin
times calls for that long and prints their times, and for {"kernels": true} what ran on a GPU. The parent decides whose
turn it is.
"""

import itertools
import json
import os
import sys
import time
from collections import Counter

import torch

from benchmarks.cases import Case, Setting, find_case
from benchmarks.device import CpuDevice, CudaDevice, device_for
from benchmarks.peers import Peer, Unsupported, peers_of


class Session:
    """A peer that is set up for a case. Raises `Unsupported` where it has nothing that runs it."""

    def __init__(self, case: Case, peer: Peer, setting: Setting, device: CpuDevice | CudaDevice):
        start = time.perf_counter()
        self.peer, self.device = peer, device
        on_gpu = setting.device == "cuda"
        problem = device.problem(case, setting)
        inputs = [peer.given(x) for x in problem.inputs]
        if on_gpu and isinstance(inputs[0], torch.Tensor):
            inputs = problem.leaves(inputs)
            if problem.grad_output is not None:
                problem.grad_output = peer.given(problem.grad_output)
        conversion = peer.conversion(case, setting.batch)
        memory = [device.memory_mib()]
        prepared = peer.prepare(problem, setting.threads, *([conversion] if conversion else []))
        self.run = prepared
        if on_gpu and peer.is_model and setting.direction != "forward":
            self.run = lambda x: problem.call(prepared, x)
        self.direct = self.run
        memory.append(device.memory_mib())
        self.run(inputs[0])
        memory.append(device.memory_mib())
        if peer.graph:
            self.run = device.capture(self.run, inputs)
        error = None
        if peer.is_model:
            # All outputs before any is looked at: a runtime may hand out the memory of its last one again.
            checked = inputs[:2] if on_gpu else inputs
            outputs = [cloned(peer.returned(self.run(x))) for x in checked]
            error, allowed = problem.error_of(outputs), problem.allowed(peer.tolerance)
            if not error <= allowed:
                raise AssertionError(f"wrong output: error {error:.2e} of the largest value, allowed {allowed:.2e}")
            del outputs
        if on_gpu:
            problem.release()
            device.trim()
        self.inputs = itertools.cycle(inputs)
        self.turn(0.2)
        self.facts = {
            "error": error,
            "macs": problem.macs,
            "bytes": problem.bytes,
            "setup_seconds": round(time.perf_counter() - start, 1),
            "prepare_mib": memory[1] - memory[0],
            "first_call_mib": memory[2] - memory[1],
            **device.facts(),
        }

    def turn(self, seconds: float) -> list[float]:
        """Times of calls in milliseconds."""
        if self.peer.wait:
            return self.device.time_from_host(self.run, self.peer.wait, self.inputs, seconds)
        return self.device.time_calls(self.run, self.inputs, seconds)

    def kernels(self) -> dict:
        """The kernel that took longest of all with its name, how many kernels a call has, and their time together."""
        x = next(self.inputs)
        # Of graphs captured before, a profiler may see nothing.
        found = self.device.kernels(lambda: self.run(x)) or self.device.kernels(lambda: self.direct(x))
        if not found:
            return {}
        times = Counter()
        for name, us in found:
            times[name] += us
        kernel, us = times.most_common(1)[0]
        return {"kernel": kernel, "kernel_us": us, "kernels": len(found), "kernels_us": sum(times.values())}


def cloned(output):
    return tuple(t.clone() for t in output) if isinstance(output, tuple) else output.clone()


def first_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0]


def main():
    suite, case_name, peer_name, setting = sys.argv[1:]
    setting = Setting(**json.loads(setting))
    # Whatever a peer prints goes to stderr; the parent reads the real stdout.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields):
        print(json.dumps(fields), file=answers)

    torch.set_num_threads(setting.threads)
    case, peer = find_case(suite, case_name), peers_of(setting.device)[peer_name]
    # no_grad, not inference_mode: freezing asks for the former, and all are to run under the same.
    with torch.no_grad():
        if not sys.stdin.readline():  # the word to begin
            return None
        try:
            session = Session(case, peer, setting, device_for(setting, suite))
        except Unsupported as reason:
            return answer(absent=str(reason))
        except Exception as failure:
            answer(failed=first_line(failure), out_of_memory=isinstance(failure, torch.OutOfMemoryError))
            raise
        answer(**session.facts)
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                answer(**(session.kernels() if "kernels" in asked else {"times_ms": session.turn(asked["seconds"])}))
            except Exception as failure:
                answer(failed=first_line(failure))
                raise


if __name__ == "__main__":
    main()
