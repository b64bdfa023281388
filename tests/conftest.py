"""Each test that asks for ``isa`` runs once for every instruction set that this machine has."""

import os

import pytest
import torch

from mobilenet_fast import _C


def pytest_configure():
    """Triton's interpreter looks through all of Triton's language again at each call of a device function, half of its
    time, for what the kernel that calls it has found before.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime.interpreter import InterpretedFunction

        InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


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
