"""CPU tensors in the place of CUDA's, for tests of the Triton kernels in Triton's interpreter."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from helpers import OPERATIONS
from torch.autograd import forward_ad

from mobilenet_fast import cuda, functional, ops
from mobilenet_fast.nn import dispatch, steps


@contextmanager
def triton_on_cpu():
    """The Triton kernels where the C++ kernels were, with CUDA's dtypes, gradients, fakes and autocast."""

    def serves(input):
        is_derived = torch.compiler.is_exporting() or forward_ad._current_level >= 0
        return cuda.why_not(input) is None and not is_derived

    with torch.library._scoped_library("mobilenet_fast", "IMPL") as library, pytest.MonkeyPatch.context() as patch:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is overridden, as asked
            for name in OPERATIONS:
                for operator in (name, f"{name}_backward"):
                    library.impl(operator, getattr(cuda, operator), "CPU", allow_override=True)
            ops.register_autocast(library, "cpu")
        patch.setattr(ops, "uses_triton", lambda input: True)
        patch.setattr(functional, "_cpp_serves", lambda input: False)
        patch.setattr(functional, "_triton_serves", serves)
        patch.setattr(steps, "_C", cuda)
        patch.setattr(dispatch, "_KERNEL_DTYPES", cuda.DTYPES)
        yield
