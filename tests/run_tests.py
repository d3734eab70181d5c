#!/usr/bin/env python3
"""Runs every test that this machine can run and ends with "N passed, N failed, N skipped".

Host tests are GoogleTest programs, one count a test case. Tests of the program are functions of tests/program_tests.py and
tests/survival_tests.py, those of the report tool of tests/report_tests.py, those of the Python tools of tests/tool_tests.py;
tests/readme_tests.py runs the commands that README.md shows.
GPU tests are the dev programs: without a GPU each counts as one skipped test, because it was compiled and not run. Mutants
of the host's code are planted and must be killed; those of kernels need a GPU and are part of `make gpu-report`.
"""
import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile

import data_tests
import fuzz_tests
import distributed_tests
import layers
import program_tests
import readme_tests
import report_tests
import survival_tests
import tool_tests
from program_runs import Skipped

ROOT = pathlib.Path(__file__).resolve().parent.parent
NO_GPU = 77  # exit status of a dev program that found no GPU


class Tally:
    def __init__(self):
        self.passed = self.failed = self.skipped = 0

    def add(self, passed=0, failed=0, skipped=0):
        self.passed += passed
        self.failed += failed
        self.skipped += skipped


def run(command, timeout_s=1200):
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
        return done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as expired:
        return -1, f"{expired.stdout or ''}\ntimed out after {timeout_s} s"


def host_tests(build, tally):
    for program in sorted(p for p in (build / "tests" / "host").iterdir() if p.suffix == ""):
        status, output = run([str(program), "--gtest_brief=1"])
        counts = {word: int(n) for word, n in re.findall(r"\[\s+(PASSED|SKIPPED)\s+\] (\d+) test", output)}
        failed = len(re.findall(r"^\[  FAILED  \] \S+ \(\d+ ms\)", output, re.M))
        if status != 0 and failed == 0:
            failed = 1  # it crashed
        tally.add(counts.get("PASSED", 0), failed, counts.get("SKIPPED", 0))
        print(f"{program.name}: {counts.get('PASSED', 0)} passed, {failed} failed, {counts.get('SKIPPED', 0)} skipped")
        if failed:
            print(output)


def described(error):
    return str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"


def function_tests(tally):
    for what, module in (("program", program_tests), ("survival", survival_tests), ("data", data_tests), ("report", report_tests)):
        for name in sorted(n for n in dir(module) if n.startswith("test_")):
            try:
                getattr(module, name)()
                tally.add(passed=1)
                print(f"{what}: {name}: passed")
            except Skipped as reason:
                tally.add(skipped=1)
                print(f"{what}: {name}: skipped: {reason}")
            except Exception as error:  # one test must not end the others
                tally.add(failed=1)
                print(f"{what}: {name}: FAILED: {described(error)}")


def listed_tests(what, tests, tally):
    """Of a module whose tests() gives pairs of name and function."""
    for name, test in tests:
        try:
            test()
            tally.add(passed=1)
            print(f"{what}: {name}: passed")
        except Skipped as reason:
            tally.add(skipped=1)
            print(f"{what}: {name}: skipped: {reason}")
        except Exception as error:
            tally.add(failed=1)
            print(f"{what}: {name}: FAILED: {described(error)}")


def tiktoken_test(tally):
    status, output = run([sys.executable, str(ROOT / "tests/tokenizer_tiktoken.py"), "--strings", "7000"])
    tally.add(passed=status == 0, failed=status not in (0, 77), skipped=status == 77)
    print(f"tokenizer against tiktoken: {'passed' if status == 0 else output.strip()}")


def host_mutants(build, tally):
    """Planted bugs of the host's code, each to be killed by its test (tests/mutants.py)."""
    with tempfile.TemporaryDirectory() as folder:
        results = pathlib.Path(folder) / "results.json"
        status, output = run([sys.executable, str(ROOT / "tests/mutants.py"), "--build", build, "--host", "--json", str(results)], timeout_s=3600)
        statuses = [test["status"] for test in json.loads(results.read_text())["tests"]] if results.exists() else ["fail"]
    tally.add(statuses.count("pass"), statuses.count("fail"), statuses.count("skip"))
    print(f"host mutants and their unmutated programs: {statuses.count('pass')} passed, {statuses.count('fail')} failed")
    if status != 0:
        print(output)


def gpu_tests(build, tally):
    for source in sorted((ROOT / "dev").glob("*.cu")):
        program = build / "dev" / source.stem
        if "run_dev_program" not in source.read_text():
            continue  # a tool, not a test
        status, output = run([str(program), "check"])
        match = re.search(r"(\d+) passed, (\d+) failed(?:, (\d+) skipped)?$", output, re.M)
        if status == NO_GPU:
            tally.add(skipped=1)
            print(f"{source.stem}: skipped: no GPU")
        elif match:
            tally.add(int(match[1]), int(match[2]) or (status != 0), int(match[3] or 0))
            print(f"{source.stem}: {match[0]}")
        else:
            tally.add(failed=1)
        if status not in (0, NO_GPU):
            print(output)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", default="build/sm_90a")
    parser.add_argument("--fuzz-seconds", type=int, default=0)
    arguments = parser.parse_args()
    build = ROOT / arguments.build
    os.environ["TRAIN_GPT_BUILD"] = str(build)
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored in a shell's background and under nohup, which the tests' programs would inherit
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    tally = Tally()
    status = layers.main()
    tally.add(passed=status == 0, failed=status != 0)
    host_tests(build, tally)
    function_tests(tally)
    listed_tests("tools", tool_tests.tests(), tally)
    listed_tests("README", readme_tests.tests(), tally)
    listed_tests("distributed", distributed_tests.tests(), tally)
    tiktoken_test(tally)
    gpu_tests(build, tally)
    host_mutants(arguments.build, tally)
    tally.add(*fuzz_tests.run(build, arguments.fuzz_seconds))
    if tally.skipped:
        print("skipped: what needs a GPU that this machine lacks (compiled, not run), or a file that is not here")
    print(f"{tally.passed} passed, {tally.failed} failed, {tally.skipped} skipped")
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
