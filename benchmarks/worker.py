"""One peer on one case in a process of its own: ``python -m benchmarks.worker suite case peer threads batch``.

Sets up, checks the outputs, prints a line of JSON; then for each line {"seconds": …} on stdin times calls for that long
and prints their times. The parent decides whose turn it is.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.cases import find_case
from benchmarks.peers import PEERS, Unsupported


def time_calls(run, inputs, seconds):
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        x = next(inputs)
        start = time.perf_counter()
        run(x)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def resident_mib() -> float:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main():
    suite, case_name, peer_name, threads, batch = sys.argv[1:]
    # Whatever a peer prints goes to stderr; the parent reads the real stdout.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields):
        print(json.dumps(fields), file=answers)

    torch.set_num_threads(int(threads))
    case, peer = find_case(suite, case_name), PEERS[peer_name]
    start = time.perf_counter()
    try:
        # no_grad, not inference_mode: freezing asks for the former, and all are to run under the same.
        with torch.no_grad():
            problem = case.problem(int(batch))
            inputs = [peer.given(x) for x in problem.inputs]
            conversion = peer.conversion(case, int(batch))
            memory = [resident_mib()]
            run = peer.prepare(problem, int(threads), *([conversion] if conversion else []))
            memory.append(resident_mib())
            run(inputs[0])
            memory.append(resident_mib())
            error = None
            if peer.is_model:
                # All outputs before any is looked at: a runtime may hand out the memory of its last one again.
                outputs = [torch.as_tensor(run(x)).clone() for x in inputs]
                error, allowed = problem.error_of(outputs), problem.allowed(peer.tolerance)
                if not error <= allowed:
                    raise AssertionError(f"wrong output: error {error:.2e} of the largest value, allowed {allowed:.2e}")
            turns = itertools.cycle(inputs)
            time_calls(run, turns, 0.2)
    except Unsupported as reason:
        return answer(absent=str(reason))
    except Exception as failure:
        answer(failed=f"{type(failure).__name__}: {failure}".splitlines()[0])
        raise
    setup_seconds = round(time.perf_counter() - start, 1)
    growth = {"prepare_mib": memory[1] - memory[0], "first_call_mib": memory[2] - memory[1]}
    answer(error=error, macs=problem.macs, bytes=problem.bytes, setup_seconds=setup_seconds, **growth)
    with torch.no_grad():
        for line in sys.stdin:
            answer(times_ms=time_calls(run, turns, json.loads(line)["seconds"]))


if __name__ == "__main__":
    main()
