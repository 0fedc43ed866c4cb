#!/usr/bin/env python3
"""Fails when a crate that moefy may link has a licence that its users have not been promised.

Reads the licence expression (SPDX) of every package in Cargo.lock, for every platform and feature.
"""

import json
import re
import subprocess
import sys

# Permissive licences: all they ask for is that their text or a notice is kept.
ALLOWED = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC",
    "MIT", "MIT-0", "Unicode-3.0", "Unlicense", "Zlib",
}
TOKEN = re.compile(r"\(|\)|/|[A-Za-z0-9.+:-]+")


def is_allowed(expression):
    """Evaluates an SPDX expression: WITH binds before AND, AND before OR; the old `/` means OR."""
    tokens = ["OR" if token == "/" else token for token in TOKEN.findall(expression)]

    def take(*expected):
        return tokens.pop(0) if tokens and tokens[0] in expected else None

    def any_of():
        value = all_of()
        while take("OR"):
            value = all_of() or value
        return value

    def all_of():
        value = term()
        while take("AND"):
            value = term() and value
        return value

    def term():
        if take("("):
            value = any_of()
            if not take(")"):
                raise ValueError("unclosed parenthesis")
            return value
        if not tokens or tokens[0] in {")", "AND", "OR", "WITH"}:
            raise ValueError("a licence is missing")
        licence = tokens.pop(0)
        if take("WITH"):
            if not tokens:
                raise ValueError("an exception is missing")
            licence += " WITH " + tokens.pop(0)
        return licence in ALLOWED

    value = any_of()
    if tokens:
        raise ValueError("unexpected " + tokens[0])
    return value


def complaint(package):
    """What is wrong with a package's licence, or None."""
    name = "{} {}".format(package["name"], package["version"])
    licence = package["license"]
    if not licence:
        return "{} states no licence expression".format(name)
    try:
        return None if is_allowed(licence) else "{} has the licence {}, which is not allowed".format(name, licence)
    except ValueError as error:
        return "{} has the licence {}, which is not an SPDX expression: {}".format(name, licence, error)


def main():
    command = ["cargo", "metadata", "--locked", "--format-version", "1"]
    try:
        metadata = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit("error: the list of packages could not be read: {}".format(error))
    complaints = list(filter(None, map(complaint, metadata["packages"])))
    if complaints:
        sys.exit("error: " + "\nerror: ".join(complaints))
    print("the licences of {} packages are allowed".format(len(metadata["packages"])))


if __name__ == "__main__":
    main()
