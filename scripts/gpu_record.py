#!/usr/bin/env python3
"""Runs the tests, the sanitizers and the benchmarks of a bundle on the GPU of this machine and writes the record.

    record.py [RECORD] [--only PART...] [--within SECONDS]

RECORD is record.json by default, in the folder $OUT where that is set. Parts are tests, sanitizers (or one by its name), bench
and models; where RECORD exists, what runs now takes the place of what it has, so that the parts of a record can be made one after
another; it must be of the same code on the same GPU. It is written after each part and each set of benchmarks, what has not ended yet as failed:
where time runs out, the rest can follow.

The bundle's model is checked against the reference and the CPU, and whole models are timed beside PyTorch where this
Python has it. What the programs say goes to RECORD.log. Exit code 1 when a test failed, a skip included, a sanitizer found something,
or a benchmark did not end well.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.join(HERE, "gpu-tests")
CLI = os.path.join(HERE, "moefy")
ENGINE = os.path.join(HERE, "engine")
MODEL = os.path.join(HERE, "model")
# Sentence pairs, where the bundle was given some.
STS = os.path.join(HERE, "sts.csv")
PEERS = os.path.join(HERE, "bert.py")
NAMED = ["--named", "minilm,bert-base"]
# The slowest first.
SANITIZERS = ("racecheck", "memcheck", "initcheck", "synccheck")
SANITIZER_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?)")
RESULTS = {"ok": "passed", "failed": "failed", "ignored": "skipped"}
SETS = ("b4", "few", "many")
PARTS = ("tests", "sanitizers", "bench", "models")
# What a benchmark that did not end well adds to the tests, and the part that it belongs to.
BENCHES = {**{"bench " + name: "bench" for name in SETS}, "bench model": "models"}
# What says whether a record can be gone on with.
IDENTITY = ("device", "driver", "toolkit", "digest")
# What reads the device's free memory has the device to itself; the other tests run in these groups beside each other.
ALONE = "memory_stays_flat"
# racecheck takes seconds for each launch of clusters, so the tests of those are groups of their own.
BEGINNINGS = ("ffn_few::any", "ffn_few::rules", "ffn_few::gates", "ffn_few::padding", "router_select::one_launch",
              "router_select::few", "router_select::many", "plan::", "experts::", "dense::", "transformer::", "body::",
              "layers::", "token_tiles::")
GROUPS = [[beginning, "--skip", ALONE] for beginning in BEGINNINGS]
GROUPS.append([argument for name in (ALONE, *BEGINNINGS) for argument in ("--skip", name)])
# Only this project's kernels: those of cuBLASLt take most of the time. Of them, memcheck sees which addresses they get.
SANITIZER_ARGUMENTS = {tool: [] if tool == "memcheck" else ["--kernel-name", "kns=moefy_"] for tool in SANITIZERS}
# Of a block. Left to itself synccheck (2025.3) makes room for fewer than moefy_experts_many_sums has.
SANITIZER_ARGUMENTS["synccheck"] += ["--num-cuda-barriers", "128"]
# racecheck (2025.3) fails as soon as cuBLASLt's kernels for Hopper run, even when told to check none. Of the kernels in the
# tests that need them, those with shared memory, which is all that racecheck looks at, are in other tests as well, but for the
# two ways in which the first product under masks begins early: they run between a router and cuBLASLt only.
# initcheck does not see what kernels write that it is told to leave out, and a model's memory begins empty.
LEFT_OUT = {"racecheck": ("dense::", "transformer::"), "initcheck": ("transformer::",)}
# Seconds that each run may take.
TESTS_LIMIT, SANITIZERS_LIMIT, SET_LIMIT, MODEL_LIMIT = 300, 560, 200, 90


class Machine:
    """Runs programs, as long as there is time, and keeps what they say."""

    def __init__(self, log, limit):
        self.log, self.deadline, self.lock = log, time.monotonic() + limit, threading.Lock()

    def run(self, command, limit, **env):
        """Exit code and output; 124 when it took longer than `limit` seconds or than all may take."""
        begin = time.monotonic()
        # In a session of its own, so that what a sanitizer has started ends with it.
        process = subprocess.Popen(command, cwd=HERE, env={**os.environ, **env}, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
        try:
            output, _ = process.communicate(timeout=max(0, min(limit, self.deadline - begin)))
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, code = process.communicate()[0] + "\nout of time\n", 124
        name = " ".join([os.path.basename(command[0]), *command[1:]])
        with self.lock:
            self.log.write("== {}: exit code {} after {:.1f} s\n{}".format(name, code, time.monotonic() - begin, output))
            self.log.flush()
        return code, output


def events(output):
    """The lines that are JSON objects."""
    for line in output.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def gpu_of(machine):
    """What the tests say about the GPU before they list themselves."""
    output = machine.run([TESTS, "--list"], 30)[1]
    return next((event for event in events(output) if event.get("type") == "gpu"), {})


def test_results(code, output):
    tests = [{"name": event["name"], "result": RESULTS[event["event"]]} for event in events(output)
             if event.get("type") == "test" and event.get("event") in RESULTS]
    if code != 0 and all(test["result"] == "passed" for test in tests):
        tests.append({"name": "gpu-tests as a whole", "result": "failed"})
    return tests


def run_tests(machine, pool):
    """A function that waits for the results."""
    def results_of(part):
        return test_results(*machine.run([TESTS, "--format", "json", *part], TESTS_LIMIT, MOEFY_REQUIRE_GPU="1"))

    parts = pool.map(results_of, GROUPS)
    return lambda: [test for tests in parts for test in tests]


def run_tests_alone(machine):
    command = [TESTS, "--format", "json", ALONE]
    tests = test_results(*machine.run(command, TESTS_LIMIT, MOEFY_REQUIRE_GPU="1"))
    for name, command in (("moefy check", [CLI, "check"]), ("example engine", [ENGINE])):
        tests.append(test_of(name, machine.run(command, 30)[0] == 0))
    return tests


def test_of(name, passed):
    return {"name": name, "result": "passed" if passed else "failed"}


def model_checks(code, output):
    """What `moefy check MODEL --json` found, one by one."""
    try:
        checks = json.loads(output[output.index("{"):output.rindex("}") + 1])["checks"]
        tests = [test_of("model: {name}, {dtype}".format(**check), check["verdict"] == "passed") for check in checks]
    except (ValueError, KeyError):
        tests = []
    if not tests or code != 0 and all(test["result"] == "passed" for test in tests):
        tests.append(test_of("model: check as a whole", False))
    return tests


def check_model(machine):
    sts = ["--sts", STS] if os.path.exists(STS) else []
    return model_checks(*machine.run([CLI, "check", MODEL, "--json", *sts], MODEL_LIMIT))


def sanitizer_errors(code, output):
    """Number of errors; None when it could not be told."""
    found = SUMMARY.findall(output)
    if code not in (0, 1) or not found:
        return None
    errors = int(found[-1][0] or found[-1][1])
    return errors if code == 0 else max(errors, 1)


def sanitizers_of(parts):
    return SANITIZERS if "sanitizers" in parts else tuple(tool for tool in SANITIZERS if tool in parts)


def run_sanitizers(machine, pool, tools):
    """A function that waits for the number of errors of each tool."""
    program = next(filter(None, map(lambda path: shutil.which("compute-sanitizer", path=path),
                                    (None, *SANITIZER_PLACES))), None)
    if program is None:
        return lambda: dict.fromkeys(tools)

    def errors_of(tool, part):
        # Wrong arguments are part of the tests, and the driver's refusals no errors.
        command = [program, "--tool", tool, "--report-api-errors", "no", *SANITIZER_ARGUMENTS[tool], TESTS, *part]
        return sanitizer_errors(*machine.run(command, SANITIZERS_LIMIT, MOEFY_REQUIRE_GPU="1", MOEFY_TEST_SMALL="1"))

    parts = {tool: [pool.submit(errors_of, tool, part) for part in GROUPS if part[0] not in LEFT_OUT.get(tool, ())]
             for tool in tools}

    def wait():
        errors = {tool: [part.result() for part in parts[tool]] for tool in tools}
        return {tool: None if None in errors[tool] else sum(errors[tool]) for tool in tools}

    return wait


def run_bench(machine, name):
    """Rows, and whether there are all of them."""
    code, output = machine.run([CLI, "bench", "ffn", "--json", "--set", name], SET_LIMIT)
    return [event for event in events(output) if "us" in event], code == 0


def run_model_bench(machine):
    """Rows of whole models, those of PyTorch beside them, and whether all went well."""
    peers_code, output = machine.run([sys.executable, PEERS, *NAMED], MODEL_LIMIT)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for event in events(output) if "torch_tokens_per_s" in event)
        file.flush()
        command = [CLI, "bench", "model", "--json", *NAMED, "--peers", file.name]
        code, output = machine.run(command, SET_LIMIT)
    rows = [event for event in events(output) if "dense_tokens_per_s" in event]
    is_whole = code == peers_code == 0 and all(row["torch_tokens_per_s"] for row in rows)
    return rows, bool(rows) and is_whole


def driver_version(machine, gpu):
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    code, output = machine.run(command, 20) if shutil.which(command[0]) else (1, "")
    return output.split()[0] if code == 0 and output.split() else "CUDA " + gpu.get("cuda_of_driver", "unknown")


def text_of(record):
    """JSON with a line for each test and each row."""
    def text(value):
        if not isinstance(value, list):
            return json.dumps(value)
        return "[\n" + ",\n".join("  " + json.dumps(item) for item in value) + "\n ]"

    return "{\n" + ",\n".join(" {}: {}".format(json.dumps(key), text(value)) for key, value in record.items()) + "\n}\n"


def is_good(record):
    results = [test["result"] for test in record["tests"]] + [errors == 0 for errors in record["sanitizers"].values()]
    return all(result in ("passed", True) for result in results)


def begun(path, identity):
    """The record to go on with: the one at `path`, or an empty one where there is none. One of other code, or of another GPU,
    is refused rather than lost."""
    if not os.path.exists(path):
        return {"date": "", **identity, "tests": [], "sanitizers": {}, "bench": [], "model_bench": []}
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        found = {key: record[key] for key in IDENTITY}
    except (ValueError, KeyError, TypeError) as problem:
        sys.exit("error: {} is no record ({}): name another file".format(path, problem))
    for key in IDENTITY:
        if found[key] != identity[key]:
            sys.exit("error: {}: expected the {} {!r} of this run, got {!r}: name another file, or move it away".format(
                path, key, identity[key], found[key]))
    return record


UNFINISHED = test_of("tests, to their end", False)


def forget(record, parts):
    """What runs now has no results yet: it counts as failed until it has."""
    if "tests" in parts:
        record["tests"] = [test for test in record["tests"] if test["name"] in BENCHES] + [UNFINISHED]
    record["sanitizers"].update(dict.fromkeys(sanitizers_of(parts)))
    if "bench" in parts:
        record["bench"] = []
    if "models" in parts:
        record["model_bench"] = []
    benches = {name for name, part in BENCHES.items() if part in parts}
    record["tests"] = replaced(record["tests"], benches, [test_of(name, False) for name in sorted(benches)])


def write(path, record):
    """A record is whole or as it was."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text_of(record))
    os.replace(path + ".new", path)


def replaced(tests, names, results):
    """The tests but those with such names, then the results of these."""
    return [test for test in tests if test["name"] not in names] + results


def arguments():
    parser = argparse.ArgumentParser(usage=__doc__.split("\n\n")[1].strip())
    parser.add_argument("record", nargs="?", default=os.path.join(os.environ.get("OUT", ""), "record.json"))
    parser.add_argument("--only", nargs="+", choices=(*PARTS, *SANITIZERS), default=PARTS)
    parser.add_argument("--within", type=float, default=3600.0)
    return parser.parse_args()


def main():
    wanted = arguments()
    path = os.path.abspath(wanted.record)
    with open(path + ".log", "a", encoding="utf-8") as log:
        machine = Machine(log, wanted.within)
        gpu = gpu_of(machine)
        identity = {"device": gpu.get("device", ""), "driver": driver_version(machine, gpu),
                    "toolkit": gpu.get("toolkit", ""), "digest": gpu.get("digest", "")}
        record = begun(path, identity)
        record["date"] = datetime.date.today().isoformat()
        forget(record, wanted.only)
        write(path, record)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            tools = sanitizers_of(wanted.only)
            if tools:
                errors = run_sanitizers(machine, pool, tools)
            if "tests" in wanted.only:
                tests = run_tests(machine, pool)
        if "tests" in wanted.only:
            results = tests() + run_tests_alone(machine) + check_model(machine)
            record["tests"] = results + replaced(record["tests"], {UNFINISHED["name"]}, [])
            write(path, record)
            for test in results:
                print("{result:8} {name}".format(**test), flush=True)
        if tools:
            found = errors()
            record["sanitizers"].update(found)
            write(path, record)
            for tool, count in found.items():
                print("{}: {} errors".format(tool, count), flush=True)
        if "bench" in wanted.only:
            for name in SETS:
                rows, is_whole = run_bench(machine, name)
                record["bench"] += rows
                print("bench {}: {} rows{}".format(name, len(rows), "" if is_whole else ", not all"), flush=True)
                failed = [] if is_whole else [test_of("bench " + name, False)]
                record["tests"] = replaced(record["tests"], {"bench " + name}, failed)
                write(path, record)
        if "models" in wanted.only:
            rows, is_whole = run_model_bench(machine)
            record["model_bench"] = rows
            print("bench model: {} rows{}".format(len(rows), "" if is_whole else ", not all, or PyTorch's are missing"))
            failed = [] if is_whole else [test_of("bench model", False)]
            record["tests"] = replaced(record["tests"], {"bench model"}, failed)
            write(path, record)
    rows = len(record["bench"]) + len(record["model_bench"])
    print("{} tests, {} rows; record: {}".format(len(record["tests"]), rows, path))
    return 0 if is_good(record) else 1


if __name__ == "__main__":
    sys.exit(main())
