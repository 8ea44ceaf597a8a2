"""Builds the compiled twins of the data plane's loops where that is possible; all else is in pyproject.toml.

Without a C compiler or without Cython the package installs all the same and uses the Python version.
"""

from __future__ import annotations

from setuptools import Extension, setup

try:
    from Cython.Build import cythonize
except ImportError:
    twins = []
else:
    twins = cythonize(
        [
            Extension(f"tandem.{name.replace('/', '.')}", [f"{name}.pyx"], depends=["repl/_slots.pxi"])
            for name in ("repl/_batches", "repl/edge/_calls", "nbd/_batches", "nbd/_waiting")
        ],
        build_dir="build",
    )
    for twin in twins:  # cythonize makes extensions of its own, which forget that
        twin.optional = True

setup(ext_modules=twins)
