"""Builds pbkfs._native: the C core and its binding. Everything else is in pyproject.toml.

PBKFS_WERROR=1 turns warnings into errors (CI). PBKFS_ZLIB=1 leaves libdeflate aside where it is
installed.
"""

import os
import subprocess
from glob import glob

from setuptools import Extension, setup

WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wvla"]


def has_libdeflate() -> bool:
    """Whether the compiler finds libdeflate.h."""
    probe = subprocess.run(
        [*os.environ.get("CC", "cc").split(), "-E", "-x", "c", "-", "-o", os.devnull],
        input=b"#include <libdeflate.h>\n",
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return probe.returncode == 0


def extension() -> Extension:
    use_libdeflate = os.environ.get("PBKFS_ZLIB") != "1" and has_libdeflate()
    return Extension(
        "pbkfs._native",
        sources=sorted(glob("native/src/*.c") + glob("native/binding/*.c")),
        depends=sorted(
            glob("native/include/pbk/*.h") + glob("native/src/*.h") + glob("native/binding/*.h")
        ),
        include_dirs=["native/include", "native/src", "native/binding"],
        define_macros=[("PBK_HAVE_LIBDEFLATE", "1")] if use_libdeflate else [],
        libraries=["deflate"] if use_libdeflate else ["z"],
        extra_compile_args=[
            "-std=c11",
            "-O2",
            "-pthread",
            "-fvisibility=hidden",
            *WARNINGS,
            *(["-Werror"] if os.environ.get("PBKFS_WERROR") == "1" else []),
        ],
        extra_link_args=["-pthread"],
    )


setup(ext_modules=[extension()])
