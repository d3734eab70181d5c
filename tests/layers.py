#!/usr/bin/env python3
"""Proves the dependency directions from the includes, and a few rules that a grep can prove.

    train_gpt_fp8.cu -> trainer/run -> trainer -> kernels -> kernels/common        trainer/run -> data -> kernels/common/check.h
    operations never include each other, and what is in kernels/NAME/ is that operation's own; dev/ and tests/ may include everything and nothing includes them;
    trainer/reference never touches a kernel; trainer/distributed knows bytes and ranks, never layers; format constants stand in kernels/common/dtype.h alone.
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SUFFIXES = {".h", ".cuh", ".cu", ".cpp"}
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)

# Layer of a file -> what it may include, as path prefixes. The first matching row decides.
RULES = [
    ("kernels/common/", ["kernels/common/"]),
    ("kernels/", ["kernels/common/", "SELF"]),  # SELF: the operation's own NAME.h, and NAME/ if it has several backends
    ("data/", ["data/", "kernels/common/check.h"]),
    ("trainer/distributed/", ["trainer/distributed/", "kernels/common/"]),
    ("trainer/reference/", ["trainer/", "kernels/common/check.h", "kernels/common/dtype.h", "kernels/common/mark.h", "kernels/common/step_state.h"]),
    ("trainer/run/", ["trainer/", "data/", "kernels/"]),
    ("trainer/", ["trainer/", "kernels/", "NOT trainer/run/"]),
    ("train_gpt_fp8.cu", ["trainer/", "data/", "kernels/common/"]),
]
FORMAT_CONSTANTS = re.compile(r"\b(448|57344)(\.0?f?)?\b")


def sources():
    for path in sorted(ROOT.rglob("*")):
        relative = path.relative_to(ROOT).as_posix()
        if path.suffix in SUFFIXES and not relative.startswith(("build/", "deps/", "runs/", "downloads/")):
            yield relative, path.read_text()


def operation(name):
    """kernels/NAME of kernels/NAME.h, kernels/NAME.cu and kernels/NAME/*."""
    return "/".join(re.sub(r"\.(cu|cuh|cpp|h)$", "", name).split("/")[:2])


def allowed(include, own, rule):
    if any(include.startswith(prefix[len("NOT "):]) for prefix in rule if prefix.startswith("NOT ")):
        return False
    if re.match(r"kernels/(?!common/)[^/]+/", include) and operation(include) != own:
        return False
    return any(operation(include) == own if prefix == "SELF" else include.startswith(prefix) for prefix in rule)


def violations():
    for name, text in sources():
        rule = next((allowed for prefix, allowed in RULES if name.startswith(prefix)), None)
        if rule is None:  # dev/ and tests/: everything
            continue
        own = operation(name)
        for include in INCLUDE.findall(text):
            if not (ROOT / include).exists():
                yield f"{name}: \"{include}\" is not a path from the repository's root"
            elif not allowed(include, own, rule):
                yield f"{name}: must not include {include}"
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
        if name != "kernels/common/dtype.h" and FORMAT_CONSTANTS.search(code):
            yield f"{name}: an FP8 format's limit outside kernels/common/dtype.h"


def main():
    found = list(violations())
    for line in found:
        print(line)
    print(f"layers: {'ok' if not found else f'{len(found)} violations'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
