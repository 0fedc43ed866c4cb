#!/usr/bin/env python3
"""Runs the tests, the sanitizers and the benchmarks of a bundle on the GPU of this machine and writes the record.

    record.py [RECORD]      record.json by default

Ends within six minutes. Exit code 1 when a test failed, a skip included, or a sanitizer found something.
"""

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.join(HERE, "gpu-tests")
CLI = os.path.join(HERE, "moefy")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?)")
RESULTS = {"ok": "passed", "failed": "failed", "ignored": "skipped"}
DEADLINE = time.monotonic() + 350


def run(command, limit, **env):
    """Exit code and output; 124 when it took longer than `limit` seconds or than all may take."""
    left = min(limit, DEADLINE - time.monotonic())
    if left <= 0:
        return 124, "no time was left"
    try:
        done = subprocess.run(command, cwd=HERE, env={**os.environ, **env}, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=left, text=True, errors="replace")
        return done.returncode, done.stdout
    except subprocess.TimeoutExpired as expired:
        return 124, (expired.stdout or b"").decode(errors="replace") + "\nout of time"


def events(output):
    for line in output.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def run_tests(log):
    code, output = run([TESTS, "--format", "json"], 200, MOEFY_REQUIRE_GPU="1")
    log.write(output)
    gpu, tests = {}, []
    for event in events(output):
        if event.get("type") == "gpu":
            gpu = event
        elif event.get("type") == "test" and event.get("event") in RESULTS:
            tests.append({"name": event["name"], "result": RESULTS[event["event"]]})
    if code != 0 and all(test["result"] == "passed" for test in tests):
        tests.append({"name": "gpu-tests as a whole", "result": "failed"})
    return gpu, tests


def run_sanitizer(tool, log):
    """Number of errors; None when it could not be told."""
    program = next(filter(None, map(lambda path: shutil.which("compute-sanitizer", path=path),
                                    (None, *SANITIZER_PLACES))), None)
    if program is None:
        log.write("no compute-sanitizer\n")
        return None
    # Wrong arguments are part of the tests, and the driver's refusals no errors.
    command = [program, "--tool", tool, "--report-api-errors", "no", TESTS]
    code, output = run(command, 90, MOEFY_REQUIRE_GPU="1", MOEFY_TEST_SMALL="1")
    log.write(output)
    found = SUMMARY.findall(output)
    if code not in (0, 1) or not found:
        return None
    errors = int(found[-1][0] or found[-1][1])
    return errors if code == 0 else max(errors, 1)


def run_benches(log):
    """One row per line of JSON; a build without benchmarks has none."""
    if not re.search(r"^ +bench\b", run([CLI, "--help"], 10)[1], re.MULTILINE):
        return []
    output = run([CLI, "bench", "ffn", "--json"], 200)[1]
    log.write(output)
    return list(events(output))


def driver_version(gpu):
    code, output = run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 20)
    return output.split()[0] if code == 0 and output.split() else "CUDA " + gpu.get("cuda_of_driver", "unknown")


def main():
    path = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else "record.json")
    with open(path + ".log", "w", encoding="utf-8") as log:
        gpu, tests = run_tests(log)
        for test in tests:
            print("{result:8} {name}".format(**test), flush=True)
        sanitizers = {}
        for tool in SANITIZERS:
            sanitizers[tool] = run_sanitizer(tool, log)
            print("{}: {} errors".format(tool, sanitizers[tool]), flush=True)
        record = {
            "date": datetime.date.today().isoformat(),
            "device": gpu.get("device", ""),
            "driver": driver_version(gpu),
            "toolkit": gpu.get("toolkit", ""),
            "digest": gpu.get("digest", ""),
            "tests": tests,
            "sanitizers": sanitizers,
            "bench": run_benches(log),
        }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.write("\n")
    bad = [test for test in tests if test["result"] != "passed"]
    print("{} tests, {} failed or skipped; record: {}".format(len(tests), len(bad), path))
    return 1 if bad or not tests or any(errors != 0 for errors in sanitizers.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
