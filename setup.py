"""Builds mobilenet_fast._C from csrc/**/*.cpp; everything else about the package is in pyproject.toml.

torch must be installed first, because its headers belong to the build: ``pip install --no-build-isolation .``
"""

import os
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ImportError:
    raise SystemExit("mobilenet_fast: install torch first, then pip install --no-build-isolation .") from None

os.chdir(Path(__file__).parent)
os.environ.setdefault("MAX_JOBS", "2")  # torch's headers take over 1 GB of memory per compiler
# pip's ninja is beside Python, where nobody looks when a virtual environment is used without being activated.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


class Build(BuildExtension):
    """Torch's ninja build, incremental under pip too, which also notes the torch it compiled against."""

    def finalize_options(self):
        super().finalize_options()
        # An editable install would compile in a temporary folder, from scratch each time. Each torch has a folder of
        # its own: its headers come in by -isystem, and ninja doesn't notice when such files change.
        self.build_temp = f"build/objects/{torch.__version__}"

    def run(self):
        super().run()
        for folder in {self.build_lib} | ({"."} if self.inplace else set()):
            target = Path(folder, "mobilenet_fast", "_build_info.py")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(f'"""Written by setup.py."""\n\nTORCH_VERSION = "{torch.__version__}"\n')


extension = CppExtension(
    "mobilenet_fast._C",
    sorted(map(str, Path("csrc").rglob("*.cpp"))),
    extra_compile_args=[
        *("-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"),
        *(f"-isystem{path}" for path in include_paths("cpu")),  # not -I: warnings are for our own code
    ],
    extra_link_args=["-fopenmp"],
    depends=sorted(map(str, Path("csrc").rglob("*.h"))),
)
extension.include_dirs = [os.path.abspath("csrc")]  # ninja runs in another folder

setup(ext_modules=[extension], cmdclass={"build_ext": Build})
