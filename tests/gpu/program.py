#!/usr/bin/env python3
"""The program itself on a GPU, GPT-2 124M: time to the first finished step, and equal bits where they are promised.

    program.py [--json FILE] [--shards FOLDER]

Start: from the process's start to the line of step 1, 524,288 tokens a step, without and with the cache of tuned GEMMs.
Bits: under --deterministic, the same run twice, a run resumed from its checkpoint, and eager launches instead of graphs
all end in the same checkpoint, byte for byte; both recipes.
Modes: --verify passes with every line of it, --profile's ten rows agree with each other and no operation is above its ceiling,
--micro-batch auto takes the fastest of the sizes that it tried, and trains with it.
"""
import argparse
import json
import os
import pathlib
import re
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


def finished(*arguments):
    done = subprocess.run(command(*arguments), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{arguments}: {done.stderr.strip()[-500:]}")
    return done


def run(*arguments):
    """What it wrote to stderr."""
    return finished(*arguments).stderr


def output_of(*arguments):
    return finished(*arguments).stdout


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


# ----------------------------------------------------------------------------------------------------------------------
# What --verify, --profile and --micro-batch auto print. What is wrong with a text is a list of lines, empty when nothing is.


def faults_of_verify(printed, recipe):
    faults = []
    linears = 48 if recipe == "tensorwise" else 0  # of GPT-2 124M: all but the head
    for line in (f"linears {linears} of 49 in FP8", *(f"gemm    {kind} " for kind in ("output", "grad_input", "grad_weight", "head")),
                 "replayed graphs and single launches give equal bits", "verify: ok after"):
        if printed.count(line) != 1:
            faults.append(f"{line!r} is there {printed.count(line)} times")
    return faults + [f"on {line[8:]}" for line in printed.splitlines() if line.startswith("device") and not line.startswith("device  NVIDIA")]


PROFILE_ROW = re.compile(r"^ *([\d.]+) +([\d.]+) % +[\d.]+ +(?:(\d+) %|n/a)  \S.*", re.M)
PROFILE_HEAD = re.compile(r"^profile of \d+ steps on .*: ([\d.]+) ms a step while traced, ([\d.]+) ms of them in ", re.M)


def faults_of_profile(printed):
    """Ten rows, most expensive first, whose shares are of the time that was summed, which is the step's; no operation above its ceiling."""
    head = PROFILE_HEAD.search(printed)
    if not head:
        return ["there is no profile"]
    rows = [(float(ms), float(share), ceiling and float(ceiling)) for ms, share, ceiling in PROFILE_ROW.findall(printed)]
    step_ms, summed_ms = map(float, head.groups())
    shares, ceilings = [share for _, share, _ in rows], [ceiling for *_, ceiling in rows if ceiling]
    wrong = {
        f"{len(rows)} rows, must be 10": len(rows) != 10,
        f"shares {shares} are not in order": shares != sorted(shares, reverse=True),
        f"ten shares sum to {sum(shares):.1f} %": not 40 < sum(shares) < 100.5,
        "shares are not those of the times": any(abs(share - 100 * ms / summed_ms) > 0.06 for ms, share, _ in rows),
        f"{summed_ms} ms of work in steps of {step_ms} ms": not 0.5 * step_ms < summed_ms < 1.1 * step_ms,  # one stream: little runs beside other work
        f"{len(ceilings)} rows have a ceiling": len(ceilings) < 5,
        f"ceilings {ceilings}": any(ceiling > 105 for ceiling in ceilings) or max(ceilings, default=0) < 20,
    }
    return [text for text, is_so in wrong.items() if is_so]


def faults_of_micro_batch(printed, sequences, steps):
    """Of a batch of so many sequences. The fastest of several divisors is taken, and trains to the end."""
    units = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
    tried = {int(size): float(rate) * units[unit] for size, rate, unit in re.findall(r"^micro-batch auto: (\d+) sequences: ([\d.]+)([kMG]?) tok/s", printed, re.M)}
    chosen = [int(size) for size in re.findall(r"^micro-batch auto: (\d+)$", printed, re.M)]
    losses = [float(loss) for loss in re.findall(rf"^step \d+/{steps} \| loss ([\d.]+) ", printed, re.M)]
    wrong = {
        f"{len(tried)} sizes were tried": len(tried) < 2,
        f"of {sorted(tried)} not all divide {sequences}": any(sequences % size for size in tried),
        f"chose {chosen} of {tried}": len(chosen) != 1 or tried.get(chosen[0]) != max(tried.values(), default=0),
        f"{chosen} is not what the run was configured with": not chosen or f"\n  micro-batch = {chosen[0]}\n" not in printed,
        f"losses {losses} of {steps} steps": len(losses) != steps,
    }
    return [text for text, is_so in wrong.items() if is_so]


def judged(name, faults, figure):
    return {"name": f"program: {name}", "status": "fail" if faults else "pass", "figure": "; ".join(faults)[:500] or figure}


def mode_tests(shards, work):
    batch = ["--recipe", "tensorwise", "--global-batch-tokens", "131072", "--checkpoint-every", "0", "--gemm-cache", str(work / "cache")]
    tests = []
    for recipe in ("bf16", "tensorwise"):
        printed = output_of(shards, work / "none", "--verify", "--recipe", recipe)
        tests.append(judged(f"--verify, {recipe}", faults_of_verify(printed, recipe), printed.splitlines()[-1] if printed else ""))
    printed = output_of(shards, work / "profile", *batch, "--steps", "4", "--profile", "2")
    first = PROFILE_ROW.search(printed)
    tests.append(judged("--profile", faults_of_profile(printed), "ten rows; the first: " + " ".join(first[0].split()) if first else ""))
    printed = output_of(shards, work / "auto", *batch, "--micro-batch", "auto", "--steps", "2")
    tests.append(judged("--micro-batch auto", faults_of_micro_batch(printed, 128, 2),
                        "; ".join(line.removeprefix("micro-batch auto: ") for line in printed.splitlines() if line.startswith("micro-batch auto"))))
    return tests


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--shards", default=str(ROOT / "shards/cuda_headers"))
    arguments = parser.parse_args()
    if not shutil.which("nvidia-smi") or subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode != 0:
        print("program: skipped: no GPU")
        return 77
    tests = []
    for name, part in {"start": start_tests, "bf16": lambda *a: bit_tests(*a, "bf16"), "tensorwise": lambda *a: bit_tests(*a, "tensorwise"), "pinned": pin_tests,
                       "modes": mode_tests}.items():
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
