"""What importing says when the compiled part doesn't fit, and that what is built is what is described."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mobilenet_fast
from mobilenet_fast import _build_info

PACKAGE = Path(mobilenet_fast.__file__).parent


def import_error(folder: Path, **environment) -> str:
    """The one line that importing the package in a folder fails with."""
    environment = dict(os.environ, PYTHONPATH=str(folder), **environment)
    # An editable install's finder would lend the copy what it lacks.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; import mobilenet_fast"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "another exception" not in result.stderr and "direct cause" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("ImportError: mobilenet_fast: "), result.stderr
    return line


@pytest.fixture
def copy(tmp_path):
    """A copy of the package without its compiled part."""
    ignore = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "mobilenet_fast", ignore=ignore)
    return tmp_path


def test_import_without_the_compiled_part(copy):
    assert "pip install --no-build-isolation ." in import_error(copy)
    shutil.copy(_build_info.__file__, copy / "mobilenet_fast")
    assert "pip install --no-build-isolation ." in import_error(copy)


def test_import_with_another_torch(copy):
    (copy / "mobilenet_fast" / "_build_info.py").write_text('TORCH_VERSION = "1.9.1+cpu"\n')
    line = import_error(copy)
    assert "built for torch 1.9.1+cpu" in line and "pip install --no-build-isolation ." in line


def test_import_with_a_compiled_part_that_does_not_load(copy):
    shutil.copy(_build_info.__file__, copy / "mobilenet_fast")
    (copy / "mobilenet_fast" / Path(mobilenet_fast._C.__file__).name).write_bytes(b"no library")
    assert "does not load" in import_error(copy)


def test_import_with_an_unknown_instruction_set():
    line = import_error(PACKAGE.parent, MOBILENET_FAST_ISA="sse9")
    assert "MOBILENET_FAST_ISA" in line and "sse9" in line
    assert all(isa in line for isa in mobilenet_fast._C.available_isas())


def test_version_is_the_same_everywhere():
    pyproject = PACKAGE.parent / "pyproject.toml"
    if not pyproject.exists():
        pytest.skip("not in a checkout")
    assert re.search(r'^version = "(.*)"$', pyproject.read_text(), re.M)[1] == mobilenet_fast.__version__


def test_typed():
    assert (PACKAGE / "py.typed").exists()
