#!/usr/bin/env python3
"""Runs every fuzz program that is built, as many at a time as there are cores: its seeds, then `--seconds` of fuzzing.

A program passes if nothing crashed, hung, leaked or asked for too much memory. What did is kept in BUILD/fuzz/findings; a
finding that is mended goes to tests/fuzz/regressions/TARGET/, whose files every run replays.
"""
import argparse
import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def make_seeds(build, folder):
    config = folder / "run.toml"
    with config.open("w") as file:
        subprocess.run([build / "train_gpt_fp8", "--train", "shards", "--print-config"], stdout=file, check=True, timeout=60)
    subprocess.run([sys.executable, ROOT / "tests/fuzz/make_seeds.py", folder, "--config", config], check=True, timeout=60)
    subprocess.run([build / "fuzz/fuzz_checkpoint", f"--write-seed={folder}/checkpoint/good", "-runs=0"], check=True, timeout=60,
                   capture_output=True)


def fuzz(program, seeds, findings, seconds):
    target = program.name.removeprefix("fuzz_")
    regressions = ROOT / "tests/fuzz/regressions" / target
    with tempfile.TemporaryDirectory(prefix="fuzz_") as corpus:
        # A fixed seed: what a run finds, the next one finds again, and no other commit's luck fails this one.
        command = [program, "-seed=1", "-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1", f"-artifact_prefix={findings}/{target}-",
                   f"-max_total_time={seconds}" if seconds else "-runs=0", corpus, seeds / target]
        command += [regressions] if regressions.exists() else []
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=seconds + 300)
    executed = re.search(r"number_of_executed_units: (\d+)", done.stdout)
    return done.returncode == 0 and executed is not None, int(executed[1]) if executed else 0, done.stdout


def run(build, seconds):
    """(passed, failed, skipped), one a program."""
    sources = sorted((ROOT / "tests/fuzz").glob("fuzz_*.cpp"))
    programs = [build / "fuzz" / source.stem for source in sources]
    if not all(program.exists() for program in programs):
        print(f"fuzz: {len(programs)} programs skipped: no clang with libFuzzer here (Debian: clang, libclang-rt-14-dev)")
        return 0, 0, len(programs)
    findings = build / "fuzz" / "findings"
    findings.mkdir(exist_ok=True)
    passed = failed = 0
    with tempfile.TemporaryDirectory(prefix="fuzz_seeds_") as seeds, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        make_seeds(build, pathlib.Path(seeds))
        for program, (good, executed, output) in zip(programs, pool.map(lambda p: fuzz(p, pathlib.Path(seeds), findings, seconds), programs)):
            print(f"{program.name}: {'passed' if good else 'FAILED'}, {executed} executions" + ("" if seconds else " (seeds only)"))
            passed += good
            failed += not good
            if not good:
                print(output[-6000:])
    return passed, failed, 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", default="build/sm_90a")
    parser.add_argument("--seconds", type=int, default=0)
    arguments = parser.parse_args()
    passed, failed, skipped = run(ROOT / arguments.build, arguments.seconds)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
