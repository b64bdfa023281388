"""Each test that asks for ``isa`` runs once for every instruction set that this machine has."""

import pytest
import torch

from mobilenet_fast import _C


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
