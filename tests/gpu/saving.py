#!/usr/bin/env python3
"""Checkpoints in the background, on a GPU: the step pays at most 5 % for a save, and what is saved is one step's state.

    saving.py [--json FILE] [--shards FOLDER] [--work FOLDER]

Time: one run a model that saves every few steps. Steps are compared with the steps of the same run that met no save; a step
meets one when it starts between the snapshot and the end of the write, so both the copy off the device and the writer's
work beside later steps count. A run is killed when its time is up: the 1558M run writes 18.7 GB a checkpoint.
Bits: a checkpoint of step 4 that was copied and written while steps 5 to 8 ran equals the last one of a run of 4 steps.
"""
import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / os.environ.get("TRAIN_GPT_BUILD", "build/sm_90a")
BOUND = 1.05
RUNS = [  # model, micro-batch, tokens of a step, steps, save every, seconds at most
    ("gpt2-124M", 64, 524288, 13, 5, 15),
    ("gpt2-1558M", 16, 131072, 10, 5, 45),  # five steps: the memory of the first snapshot is pinned by then
]


def command(shards, out, *options):
    return ["stdbuf", "-oL", str(BUILD / "train_gpt_fp8"), "--train", str(shards), "--eval-every", "0", "--vocab-size", "50257",
            "--out", str(out), *map(str, options)]


def time_test(shards, work, model, micro_batch, tokens, steps, every, limit_s):
    process = subprocess.Popen(command(shards, work, "--model", model, "--micro-batch", micro_batch, "--global-batch-tokens", tokens, "--steps", steps,
                                       "--checkpoint-every", every, "--keep", 1), stdout=subprocess.PIPE, text=True)
    start = time.monotonic()
    for line in process.stdout:
        print(f"    {time.monotonic() - start:6.2f} {line}", end="")
        if line.startswith(f"step {steps - 1}/") or time.monotonic() - start > limit_s:
            break
    process.kill()  # the last save is none of this test's business
    process.wait()
    records = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    seconds, saving, save_s = {}, set(), []
    last_snapshot = None
    for record in records:  # in the order in which they were written
        if record["kind"] == "step":
            seconds[record["step"]] = record["seconds"]
            if last_snapshot is not None:
                saving.add(record["step"])
            if record["step"] % every == 0:
                last_snapshot = record["step"]
        if record["kind"] == "checkpoint":
            save_s.append(record["seconds"])
            last_snapshot = None
    free = [s for step, s in seconds.items() if step > 1 and step not in saving]
    with_save = [seconds[step] for step in sorted(saving)]
    if len(free) < 2 or not with_save:
        return {"name": f"saving: {model}", "status": "fail", "figure": f"too few steps: {seconds}, saves {save_s}"}
    base, ratio = statistics.median(free), statistics.mean(with_save) / statistics.median(free)
    return {"name": f"saving: {model}, step time while saving", "status": "pass" if ratio <= BOUND else "fail",
            "figure": f"{ratio:.3f} x a step without ({1e3 * base:.0f} ms, {len(free)} steps; {len(with_save)} while saving, worst "
                      f"{max(with_save) / base:.3f}); {f'a save took {max(save_s):.1f} s' if save_s else 'no save ended in time'}; at most {BOUND}"}


def bit_test(shards, work):
    def run(name, *options):
        subprocess.run(command(shards, work / name, "--model", "gpt2-124M", "--n-layers", 4, "--micro-batch", 16, "--global-batch-tokens", 32768, "--deterministic",
                               "--schedule", "constant", "--warmup-steps", 1, "--keep", 0, *options), check=True, stdout=subprocess.DEVNULL)
        return [(work / name / "step_000004" / f).read_bytes() for f in ("params.safetensors", "adam.safetensors")]
    beside = run("beside", "--steps", 8, "--checkpoint-every", 4)
    alone = run("alone", "--steps", 4, "--checkpoint-every", 0)
    return {"name": "saving: a checkpoint written beside later steps", "status": "pass" if beside == alone else "fail",
            "figure": "bit-equal to the last one of a run that ends there" if beside == alone else "differs from a run that ends there"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--shards", default=str(ROOT / "shards/cuda_headers"))
    parser.add_argument("--models", nargs="*", default=[row[0] for row in RUNS], help="whose step time is measured")
    parser.add_argument("--work", help="folder for the checkpoints, 40 GB; default: the system's temporary folder")
    arguments = parser.parse_args()
    if not shutil.which("nvidia-smi") or subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode != 0:
        print("saving: skipped: no GPU")
        return 77
    tests = []
    if "gpt2-124M" in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            tests.append(bit_test(arguments.shards, pathlib.Path(folder)))
        print(f"{tests[-1]['name']} | {tests[-1]['figure']} | {tests[-1]['status']}", flush=True)
    for row in [row for row in RUNS if row[0] in arguments.models]:
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            tests.append(time_test(arguments.shards, pathlib.Path(folder) / "run", *row))
        print(f"{tests[-1]['name']} | {tests[-1]['figure']} | {tests[-1]['status']}", flush=True)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps({"tests": tests, "bench": []}, indent=1) + "\n")
    return 1 if any(test["status"] == "fail" for test in tests) else 0


if __name__ == "__main__":
    sys.exit(main())
