"""A bridge to CMake, and nothing else: no network, no GPU probing, no torch.

CMakeLists.txt decides what is built (CUDA kernels when nvcc is on PATH). HULUKERN_CMAKE_ARGS passes
more options on, e.g. HULUKERN_CMAKE_ARGS="-DHULUKERN_CUDA=OFF". A build in place, which is what tests run
on, also gets the CUDA simulator.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def run(self) -> None:
        # In place of setuptools' own run, which builds elsewhere and copies the module alone: CMake installs
        # the module, the library beside it and the header together.
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"py{sys.version_info.major}{sys.version_info.minor}"
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
        if not (build / "CMakeCache.txt").exists() and shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        configure.append(f"-DHULUKERN_SIM={'ON' if self.inplace else 'OFF'}")
        configure += shlex.split(os.environ.get("HULUKERN_CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count())], check=True)
        for component in ("hulukern", "simulator") if self.inplace else ("hulukern",):
            install = ["cmake", "--install", str(build), "--prefix", str(prefix), "--component", component]
            subprocess.run(install, check=True, stdout=subprocess.DEVNULL)


setup(ext_modules=[Extension("hulukern._C", [])], cmdclass={"build_ext": CMakeBuild})
