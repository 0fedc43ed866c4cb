#!/usr/bin/env python3
"""Installs nvcc 13.0 and libclang, pinned, into the ignored folder `.toolchain/`.

    .toolchain/nvidia/cu13/bin/nvcc     compiles the kernels; 13.0 because newer compilers write PTX that driver 580 refuses
    .toolchain/clang/native/            libclang, for `make abi`

A second run does nothing.
"""

import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOOLCHAIN = os.path.join(ROOT, ".toolchain")
REQUIREMENTS = os.path.join(ROOT, "scripts", "requirements-toolchain.txt")
STAMP = "requirements.txt"


def read(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


def install():
    partial = "{}.partial-{}".format(TOOLCHAIN, os.getpid())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--require-hashes",
               "--only-binary=:all:", "--target", partial, "-r", REQUIREMENTS]
    try:
        if subprocess.call(command, stdout=sys.stderr) != 0:
            sys.exit(
                "error: pip could not install the packages of scripts/requirements-toolchain.txt (its message is above): "
                "check that the package index can be reached, or go on without kernels by WITHOUT_NVCC=1")
        shutil.copy(REQUIREMENTS, os.path.join(partial, STAMP))
        shutil.rmtree(TOOLCHAIN, ignore_errors=True)
        os.replace(partial, TOOLCHAIN)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main():
    if read(os.path.join(TOOLCHAIN, STAMP)) != read(REQUIREMENTS):
        install()
    print("nvcc is in .toolchain")


if __name__ == "__main__":
    main()
