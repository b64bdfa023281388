"""Each test that asks for ``isa`` runs once for every instruction set that this machine has."""

import os

import pytest
import torch

from mobilenet_fast import _C


def pytest_configure():
    """Triton's interpreter patches all of Triton's language again at each call of a device function, half of its time:
    in vain where the function is ours, as the kernel that calls it uses the same.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime.interpreter import InterpretedFunction

        call = InterpretedFunction.__call__

        def quick_call(self, *args, **kwargs):
            if self.fn.__module__.startswith("mobilenet_fast."):
                return self.rewrite()(*args, **kwargs)
            return call(self, *args, **kwargs)

        InterpretedFunction.__call__ = quick_call


def pytest_addoption(parser):
    parser.addoption("--isa", action="append", help="run only this instruction set (repeatable)")


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", metafunc.config.getoption("--isa") or _C.available_isas())


@pytest.fixture
def threads():
    """`torch.set_num_threads` for the time of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
