"""One peer on one case in a process of its own: ``python -m benchmarks.worker suite case peer threads batch``.

Sets up, checks the outputs, prints a line of JSON; then for each line {"seconds": …} on stdin times calls for that long
and prints their times. The parent decides whose turn it is.
"""

import copy
import json
import os
import sys
import time

import torch

from benchmarks.cases import CASES
from benchmarks.peers import PEERS


def error_of(output, problem):
    """(largest error as a share of the largest output, what is allowed), both against float64."""
    exact = copy.deepcopy(problem.module).double()(*(x.double() for x in problem.inputs))
    eager = problem.module(*problem.inputs)
    scale = exact.abs().max().item()
    error, eager_error = ((y.double() - exact).abs().max().item() / scale for y in (output, eager))
    return error, max(1e-5, 4 * eager_error)


def time_calls(call, seconds):
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def main():
    suite, case_name, peer_name, threads, batch = sys.argv[1:]
    # Whatever a peer prints goes to stderr; the parent reads the real stdout.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields):
        print(json.dumps(fields), file=answers)

    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    case, peer = CASES[suite, case_name], PEERS[peer_name]
    start = time.perf_counter()
    try:
        # no_grad, not inference_mode: freezing asks for the former, and all are to run under the same.
        with torch.no_grad():
            problem = case.make(int(batch))
            call = peer.prepare(problem, int(threads))
            error = None
            if peer.is_model:
                error, allowed = error_of(call(), problem)
                if not error <= allowed:
                    raise AssertionError(f"wrong output: error {error:.2e} of the largest value, allowed {allowed:.2e}")
            macs = problem.macs()
            time_calls(call, 0.2)
    except Exception as failure:
        answer(failed=f"{type(failure).__name__}: {failure}".splitlines()[0])
        raise
    answer(error=error, macs=macs, setup_seconds=round(time.perf_counter() - start, 1), torch=torch.__version__)
    with torch.no_grad():
        for line in sys.stdin:
            answer(times_ms=time_calls(call, json.loads(line)["seconds"]))


if __name__ == "__main__":
    main()
