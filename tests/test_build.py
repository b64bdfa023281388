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
ROOT = Path(__file__).parents[1]


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


def test_import_from_the_source_folder_after_an_install_elsewhere(copy):
    (copy / "csrc").mkdir()
    line = import_error(copy)
    assert f"pip install --no-build-isolation -e .` in {copy}" in line and "or leave that folder" in line


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


def test_every_torch_has_its_own_objects():
    code = """
import setuptools, torch
from distutils.core import run_setup
torch.__version__ = "2.99.1+other"
build = run_setup("setup.py", stop_after="init").get_command_obj("build_ext")
build.ensure_finalized()
print(build.build_temp)
"""
    pytest.importorskip("setuptools")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "build/objects/2.99.1+other"


def test_make_passes_on_what_torch_is_asked_for(tmp_path):
    if not shutil.which("make"):
        pytest.skip("needs make")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "build", f"VENV={tmp_path}", "TORCH=torch>=2.11 --pre"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "install --quiet --disable-pip-version-check 'torch>=2.11' '--pre'\n" in result.stdout


def test_version_is_the_same_everywhere():
    assert (
        re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1] == mobilenet_fast.__version__
    )


def test_typed():
    assert (PACKAGE / "py.typed").exists()
