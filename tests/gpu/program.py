#!/usr/bin/env python3
"""The program itself on a GPU, GPT-2 124M: time to the first finished step, and equal bits where they are promised.

    program.py [--json FILE] [--shards FOLDER]

Start: from the process's start to the line of step 1, 524,288 tokens a step, without and with the cache of tuned GEMMs.
Bits: under --deterministic, the same run twice, a run resumed from its checkpoint, and eager launches instead of graphs
all end in the same checkpoint, byte for byte; both recipes.
"""
import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / os.environ.get("TRAIN_GPT_BUILD", "build/sm_90a")
LIMIT_S = {"without the GEMM cache": 20, "with the GEMM cache": 5}


def command(shards, out, *options):
    return [str(BUILD / "train_gpt_fp8"), "--train", str(shards), "--model", "gpt2-124M", "--micro-batch", "64", "--eval-every", "0",
            "--out", str(out), *options]


def run(*arguments):
    """What it wrote to stderr."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{arguments}: {done.stderr.strip()[-500:]}")
    return done.stderr


def seconds_to_first_step(shards, out, cache):
    """Also the seconds until the program was ready to train, as it says itself."""
    start = time.monotonic()
    process = subprocess.Popen(["stdbuf", "-oL", *command(shards, out, "--steps", "2", "--checkpoint-every", "0", "--gemm-cache", str(cache))],
                               stdout=subprocess.PIPE, text=True)
    first, ready = float("nan"), ""
    for line in process.stdout:
        if line.startswith("ready"):
            ready = line.strip()
        if line.startswith("step 1/"):
            first = time.monotonic() - start
    process.wait()
    return first, ready


def start_tests(shards, work):
    tests = []
    for what, limit_s in LIMIT_S.items():
        seconds, ready = seconds_to_first_step(shards, work / what.replace(" ", "_"), work / "gemm.cache")
        tests.append({"name": f"program: start to first finished step, {what}", "status": "pass" if seconds <= limit_s else "fail",
                      "figure": f"{seconds:.2f} s ({ready}), at most {limit_s} s"})
    return tests


def weights(folder, step):
    return [(folder / f"step_{step:06d}" / name).read_bytes() for name in ("params.safetensors", "adam.safetensors")]


def bit_tests(shards, work, recipe):
    common = ["--recipe", recipe, "--deterministic", "--global-batch-tokens", "131072", "--steps", "4", "--checkpoint-every", "2", "--keep", "0"]
    run(shards, work / "a", *common)
    expected = weights(work / "a", 4)
    variants = {"the same run twice": ["b"], "eager instead of graphs": ["c", "--no-graph"],
                "resumed from step 2": ["d", "--resume", str(work / "a" / "step_000002")]}
    tests = []
    for what, (folder, *options) in variants.items():
        run(shards, work / folder, *common, *options)
        equal = weights(work / folder, 4) == expected
        tests.append({"name": f"program: {recipe}: {what}", "status": "pass" if equal else "fail",
                      "figure": "weights and moments after 4 steps bit-equal" if equal else "checkpoints differ"})
    return tests


def gemm_choices(folder):
    return json.loads((folder / "checkpoint.json").read_text())["gemm_choices"]


def pin_tests(shards, work):
    """A deterministic run that is resumed takes the recorded GEMM algorithms, and says so when they are another machine's."""
    common = ["--recipe", "tensorwise", "--global-batch-tokens", "131072", "--steps", "2", "--checkpoint-every", "1", "--keep", "0"]
    run(shards, work / "tuned", *common, "--gemm-cache", str(work / "cache"))
    first = work / "tuned" / "step_000001"
    silent = run(shards, work / "pinned", *common, "--deterministic", "--resume", str(first))
    pinned = work / "pinned" / "step_000002"
    same = gemm_choices(pinned) == gemm_choices(first) != "" and weights(work / "pinned", 2) == weights(work / "tuned", 2) and "note:" not in silent
    info = {key: value for key, value in json.loads((first / "checkpoint.json").read_text()).items() if not key.startswith("checksum")}  # else it is damaged
    info["gemm_choices"] = "\n".join("Another GPU" + line[line.find("\t"):] for line in info["gemm_choices"].splitlines())
    (first / "checkpoint.json").write_text(json.dumps(info))
    noted = run(shards, work / "elsewhere", *common, "--deterministic", "--resume", str(first))
    said = "note: --deterministic: " in noted and "Another GPU" in noted
    return [{"name": "program: a tuned run resumed with --deterministic", "status": "pass" if same else "fail",
             "figure": "same algorithms, same bits" if same else "algorithms or bits differ: " + silent[-300:]},
            {"name": "program: recorded GEMM algorithms of another GPU", "status": "pass" if said else "fail", "figure": noted.strip()[-300:] or "nothing is said"}]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--shards", default=str(ROOT / "shards/cuda_headers"))
    arguments = parser.parse_args()
    if not shutil.which("nvidia-smi") or subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode != 0:
        print("program: skipped: no GPU")
        return 77
    tests = []
    for name, part in {"start": start_tests, "bf16": lambda *a: bit_tests(*a, "bf16"), "tensorwise": lambda *a: bit_tests(*a, "tensorwise"), "pinned": pin_tests}.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = part(arguments.shards, pathlib.Path(folder))
            except RuntimeError as error:  # the other parts count all the same
                found = [{"name": f"program: {name}", "status": "fail", "figure": str(error)}]
        tests += found
        for test in found:
            print(f"{test['name']} | {test['figure']} | {test['status']}", flush=True)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps({"tests": tests, "bench": []}, indent=1) + "\n")
    return 1 if any(test["status"] == "fail" for test in tests) else 0


if __name__ == "__main__":
    sys.exit(main())
