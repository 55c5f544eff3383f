"""Builds pbkfs._native, the C core and its binding, and the program pbkfs/pbkfs-keeper. Everything
else is in pyproject.toml.

PBKFS_WERROR=1 turns warnings into errors (CI). PBKFS_ZLIB=1 leaves libdeflate aside where it is
installed.
"""

import os
import subprocess
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wvla"]


KEEPER = "pbkfs/pbkfs-keeper"


def strict() -> list[str]:
    """The compiler's options where a warning is an error."""
    return ["-Werror"] if os.environ.get("PBKFS_WERROR") == "1" else []


class Build(build_ext):
    """Also builds the keeper: a program, because the interpreter would be too large for it."""

    def run(self) -> None:
        super().run()
        objects = self.compiler.compile(
            ["native/keeper/keeper.c"],
            output_dir=self.build_temp,
            extra_postargs=["-std=c11", "-O2", *WARNINGS, *strict()],
        )
        target = KEEPER if self.inplace else os.path.join(self.build_lib, KEEPER)
        self.compiler.link_executable(objects, target)

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), os.path.join(self.build_lib, KEEPER)]


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
            *strict(),
        ],
        extra_link_args=["-pthread"],
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
