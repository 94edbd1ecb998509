"""Builds the compiled CPU kernels. The project's metadata is in pyproject.toml.

The extension is optional: without a C compiler the installation goes on, and ``kernels.load`` says so once and answers
the plain torch kernels. ``python setup.py build_ext --inplace`` builds it in a checkout. It is a plain shared library
loaded with ctypes, not a Python module; instruction sets are chosen at run time, so no machine flags are passed.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("kernels/cpu/src")

setup(
    ext_modules=[
        Extension(
            "kernels.cpu._native",
            sources=sorted(str(path) for path in SOURCES.glob("*.c")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            extra_compile_args=["-O3", "-std=gnu11", "-fvisibility=hidden", "-fno-math-errno", "-pthread"],
            extra_link_args=["-pthread"],
            libraries=["m"],
            optional=True,
        )
    ],
)
