"""Packages and the C++ kernels. ``kernels/``, ``data_prep/`` and ``launcher/`` install as parts of ``lightbulb``,
because a top-level package named ``kernels`` would collide with the one Hugging Face publishes."""

import os
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MAPPED = {"lightbulb.kernels": "kernels", "lightbulb.data_prep": "data_prep", "lightbulb.launcher": "launcher"}
FLAGS = ("-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")

packages = find_packages(include=["lightbulb", "lightbulb.*"])
for package, folder in MAPPED.items():
    packages += [package, *(f"{package}.{child}" for child in find_packages(folder))]


class BuildKernels(build_ext):
    """Compiles with OpenMP, without it where that fails, and not at all where there is no compiler."""

    def build_extension(self, ext: Extension) -> None:
        extra = os.environ.get("LIGHTBULB_CXXFLAGS", "").split()
        for openmp in (["-fopenmp"], []):
            ext.extra_compile_args = [*FLAGS, *openmp, *extra]
            ext.extra_link_args = [*openmp, *extra]
            try:
                return super().build_extension(ext)
            except Exception as error:
                self.warn(f"C++ kernels did not compile {'with' if openmp else 'without'} OpenMP: {error}")
        self.warn("LightBulb installs without C++ kernels: torch computes instead, slower; a C++ compiler (g++) helps")


setup(
    packages=packages,
    package_dir={"lightbulb": "lightbulb", **MAPPED},
    package_data={
        "lightbulb.kernels": ["**/*.cpp", "**/*.h", "**/*.md"],
        "lightbulb.data_prep": ["**/*.cpp"],
    },
    ext_modules=[
        Extension(
            "lightbulb.kernels._native",
            sorted(glob("kernels/*/native.cpp")),
            depends=glob("kernels/*/*.h"),
            include_dirs=["kernels/native"],
            language="c++",
            optional=True,
        ),
        Extension(
            "lightbulb.data_prep._native",
            sorted(glob("data_prep/native/*.cpp")),
            depends=glob("kernels/native/*.h"),
            include_dirs=["kernels/native"],
            language="c++",
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildKernels},
)
