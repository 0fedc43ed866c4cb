#!/usr/bin/env python3
"""Converts a real sentence encoder into its MoEfied form, runs both on text that the conversion never saw, and says
what was skipped and what it cost. `make demo` fetches the inputs and builds the command first.

Writes target/demo/moe (the converted model) and target/demo/report.json.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MOEFY = os.path.join(os.environ.get("CARGO_TARGET_DIR", "target"), "release", "moefy")
DENSE = "inputs/all-MiniLM-L6-v2"
CALIBRATION = "inputs/wikipedia/calibration.txt"
HELD_OUT = "inputs/wikipedia/held-out.txt"
MOE = "target/demo/moe"
REPORT = "target/demo/report.json"
NUM_EXPERTS = 48
DENSITY = 0.27

CONVERT = [
    "convert", DENSE, MOE, "--experts", str(NUM_EXPERTS), "--partition", "kmeans", "--router", "d2dmoe",
    "--density", str(DENSITY), "--calibration", CALIBRATION, "--seed", "0",
]
EVAL = ["eval", MOE, "--reference", DENSE, "--text", HELD_OUT, "--json"]
WIDTH = 78


def moefy(arguments, **options):
    """Runs the command from the project's root; its progress and its errors go to the terminal."""
    print("$ moefy " + " ".join(arguments), file=sys.stderr, flush=True)
    try:
        return subprocess.run([MOEFY, *arguments], check=True, **options).stdout
    except OSError as error:
        sys.exit("error: {} could not be run ({}): `make demo` builds it".format(MOEFY, error.strerror))
    except subprocess.CalledProcessError as error:
        sys.exit("error: `moefy {}` ended with exit code {}".format(arguments[0], error.returncode))


def peak_rss_bytes():
    """The most memory that any one of the commands held."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def show(number, form):
    return "-" if number is None else form.format(number)


def rows(report):
    """Title, values for (dense, MoEfied, no FFN), and a sentence that says what the row means."""
    saved, speed, zero = report["flops_saved"], report["tokens_per_s"], report["zero_ffn"]
    decimals, percent, whole = "{:.3f}", "{:.1%}", "{:,.0f}"
    return (
        ("embedding cosine", decimals, (1, report["embedding_cosine"], zero["embedding_cosine"]),
         "How alike the text embeddings are to the dense model's: 1 is the same."),
        ("hidden error", decimals, (0, report["hidden_error"], zero["hidden_error"]),
         "How far the last hidden states are from the dense model's, relative to them."),
        ("FFN neurons executed", percent, (1, report["density"], 0),
         "The density: the share of the FFN neurons that the router picks for a token."),
        ("FLOPs saved, FFNs", percent, (0, saved["ffn"], 1),
         "Arithmetic that the FFNs no longer do; what the router costs is taken off."),
        ("FLOPs saved, model", percent, (0, saved["model"], None),
         "The same for the whole model, where attention stays as it was."),
        ("tokens/s, FFNs", whole, (speed["dense_ffn"], speed["ffn"], None),
         "Measured speed of the FFNs alone on this machine, router included."),
        ("tokens/s, model", whole, (speed["dense_model"], speed["model"], None),
         "Measured speed of the whole model on this machine."),
    )


def table(report):
    """The report as text."""
    lines = [
        "",
        "{}: each FFN cut into {} experts, of which a router picks".format(os.path.basename(DENSE), NUM_EXPERTS),
        "a few per token. Measured on text that the conversion never saw.",
        "",
        "{:<24}{:>18}{:>18}{:>18}".format("", "dense", "MoEfied", "no FFN at all"),
        "-" * WIDTH,
    ]
    for title, form, values, meaning in rows(report):
        lines.append(("{:<24}" + "{:>18}" * 3).format(title, *(show(value, form) for value in values)))
        lines.append("  " + meaning)
    columns = "{:<8}{:>16}{:>16}{:>19}{:>19}"
    lines += [
        "",
        columns.format("layer", "density", "hidden error", "experts per token", "most for a token"),
        "-" * WIDTH,
    ]
    for layer in report["layers"]:
        lines.append(columns.format(
            layer["layer"], show(layer["density"], "{:.1%}"), show(layer["hidden_error"], "{:.3f}"),
            "{} of {}".format(show(layer["mean_k"], "{:.1f}"), NUM_EXPERTS), show(layer["max_k"], "{}")))
    lines += [
        "  Each layer lets every token have as many experts as it needs; the thresholds",
        "  that decide were calibrated for a density of {:.0%}.".format(DENSITY),
        "",
        "Conversion and evaluation took {:.0f} s and at most {:.2f} GB of memory.".format(
            report["seconds"], report["peak_rss_bytes"] / 1e9),
        "All figures: " + REPORT,
    ]
    return "\n".join(lines)


def main():
    os.chdir(ROOT)
    shutil.rmtree(os.path.dirname(REPORT), ignore_errors=True)  # what an earlier run left
    os.makedirs(os.path.dirname(REPORT))

    start = time.monotonic()
    moefy(CONVERT)
    evaluation = moefy(EVAL, stdout=subprocess.PIPE)
    seconds = time.monotonic() - start

    try:
        report = json.loads(evaluation)
        report.update(
            dense_model=DENSE, moe_model=MOE, text=HELD_OUT, seconds=round(seconds, 3), peak_rss_bytes=peak_rss_bytes())
        text = table(report)
    except (ValueError, KeyError, TypeError) as error:
        sys.exit("error: `moefy eval --json` did not print the report that was expected: {!r}".format(error))
    with open(REPORT, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=2)
        file.write("\n")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except OSError as error:
        sys.exit("error: {}".format(error))
