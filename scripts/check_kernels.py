#!/usr/bin/env python3
"""Compiles every kernel for the GPU generations we know and fails when one keeps registers in memory, or does not wait, or
lets others begin before it has waited where these count on that.

Kernels are launched before the one ahead of them in the stream has ended (programmatic dependent launch), so each has to
wait by itself: kernels/include/dependency.cuh.

    scripts/check_kernels.py NVCC
"""

import concurrent.futures
import glob
import os
import re
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HOPPER = ["-gencode=arch=compute_90a,code=sm_90a"]
PORTABLE = ["-gencode=arch=compute_80,code=[sm_80,sm_100a,sm_120]", *HOPPER]
# What a GPU that knows programmatic dependent launch gets, as text.
PTX = ["-ptx", "-arch=compute_90a"]
WAIT, LAUNCH = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
# Those behind which a kernel may begin with begin_for_many (kernels/include/expert_groups.cuh): they wait before they let it.
WAITS_FIRST = tuple("moefy_experts_many_" + kind + "_" for kind in ("fused", "engine_hidden", "wide_hidden", "sum", "sums"))
# (entry point, architecture) -> why its spills are accepted.
ALLOWED = {}

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
# Name and body of an entry point in PTX.
BODY = re.compile(r"\.entry (\w+)\(.*?^\{(.*?)^\}", re.DOTALL | re.MULTILINE)
REGISTERS = re.compile(r"Used (\d+) registers")


def parse(log):
    """(entry point, architecture) -> (bytes spilled, registers)."""
    found, entry, spilled = {}, None, 0
    for line in log.splitlines():
        if match := ENTRY.search(line):
            entry, spilled = match.groups(), 0
        elif (match := SPILLS.search(line)) and entry:
            spilled = max(spilled, *map(int, match.groups()))
        elif (match := REGISTERS.search(line)) and entry:
            found[entry] = spilled, int(match.group(1))
    return found


def waiting(ptx):
    """Names of the entry points that wait."""
    return {name for name, body in BODY.findall(ptx) if WAIT in body}


def eager(ptx):
    """Names of the entry points that let the next kernel begin before they have waited."""
    return {name for name, body in BODY.findall(ptx) if -1 < body.find(LAUNCH) < body.find(WAIT)}


def nvcc_of(nvcc, source, arguments, out):
    command = [nvcc, "-O3", "-std=c++17", "-Ikernels/include", *arguments, "-o", out, source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit("error: {}:\n{}".format(source, done.stderr))
    return done.stderr


def compile_one(nvcc, source, folder):
    """What the assembler says of each entry point, and those that do not wait, or not in time."""
    hopper = os.path.basename(os.path.dirname(source)) == "sm90"
    out = os.path.join(folder, source.replace(os.sep, "_"))
    found = parse(nvcc_of(nvcc, source, ["-fatbin", "-Xptxas", "-v", *(HOPPER if hopper else PORTABLE)], out))
    nvcc_of(nvcc, source, PTX, out)
    with open(out, encoding="utf-8") as file:
        ptx = file.read()
    return found, {name for name, _ in found} - waiting(ptx), {name for name in eager(ptx) if name.startswith(WAITS_FIRST)}


def complaints(found, allowed):
    spilling = {entry for entry, (spilled, _) in found.items() if spilled > 0}
    lines = ["{} spills {} bytes on {}".format(name, found[name, arch][0], arch)
             for name, arch in sorted(spilling - set(allowed))]
    return lines + ["{} does not spill on {} any more: take it off the list".format(*entry)
                    for entry in sorted(set(allowed) - spilling)]


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sources = sorted(os.path.relpath(path, ROOT) for path in glob.glob(os.path.join(ROOT, "kernels", "**", "*.cu"),
                                                                       recursive=True))
    found, careless, too_eager = {}, [], []
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for part, names, early in pool.map(lambda source: compile_one(sys.argv[1], source, folder), sources):
            found.update(part)
            careless += names
            too_eager += early
    problems = complaints(found, ALLOWED)
    problems += ["{} does not wait for the kernel before it: call begin() or wait_for_dependencies() of dependency.cuh"
                 .format(name) for name in sorted(careless)]
    problems += ["{} lets the next kernel begin before it has waited: see begin_for_many() of expert_groups.cuh".format(name)
                 for name in sorted(too_eager)]
    problems += ["no kernel is called {}..., which has to wait first".format(beginning) for beginning in WAITS_FIRST
                 if not any(name.startswith(beginning) for name, _ in found)]
    if problems:
        sys.exit("error: " + "\nerror: ".join(problems))
    print("{} kernels for {} architectures, at most {} registers, {} spills allowed; all wait".format(
        len({name for name, _ in found}), len({arch for _, arch in found}),
        max((registers for _, registers in found.values()), default=0), len(ALLOWED)))


if __name__ == "__main__":
    main()
