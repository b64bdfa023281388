"""Makes what a case's peers start from: ``python -m benchmarks.convert suite case batch peer``.

In a process of its own: converters leave threads and memory behind that a timed process should not have.
"""

import errno
import os
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.cases import find_case
from benchmarks.peers import CUDA_PEERS, PEERS


@torch.no_grad()
def main():
    suite, case_name, batch, peer_name = sys.argv[1:]
    case, peer = find_case(suite, case_name), (PEERS | CUDA_PEERS)[peer_name]
    problem = case.problem(int(batch))
    target = peer.conversion(case, int(batch))
    if target and not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="part-") as part:
            # Converters write scraps into the working directory.
            os.chdir(part)
            result = Path(part, "model")
            result.mkdir()
            peer.convert(problem, result)
            os.chdir(target.parent)
            try:
                result.rename(target)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:  # that is: another run was faster
                    raise


if __name__ == "__main__":
    main()
