#!/usr/bin/env python3
"""Checkpoints in the background, on a GPU: the step pays at most 5 % for a save, no single step a fifth, and what is saved is one
step's state.

    saving.py [--json FILE] [--shards FOLDER] [--work FOLDER]

Time: one run a model that saves every few steps. Steps are compared with the steps of the same run that met no save; a step
meets one when it starts between the snapshot and the end of the write, so both the copy off the device and the writer's
work beside later steps count: their mean, and the worst of them. The worst of the early steps, from the second up to the first
snapshot, is a row of its own: beside those the host's memory is touched. The 1558M run, which writes 18.7 GB a checkpoint, ends with its first save.
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
MEAN_BOUND = 1.05
# A single step: measured ones differ by 1 % where nothing disturbs them, and pinning 18.7 GB, which kept a 1558M step's launches waiting, made it
# 1.5 and 1.6 times as long. A stall that anybody would notice fails, the noise of one step does not.
WORST_BOUND = 1.1
LARGE = "gpt2-1558M"  # one save, from the snapshot to the published folder, is enough
RUNS = [  # model, micro-batch, tokens of a step, steps, save every, seconds at most
    ("gpt2-124M", 64, 524288, 13, 5, 15),
    (LARGE, 16, 131072, 40, 20, 110),  # 18.7 GB: a save takes up to 20 steps
]


def command(shards, out, *options):
    return ["stdbuf", "-oL", str(BUILD / "train_gpt_fp8"), "--train", str(shards), "--eval-every", "0", "--vocab-size", "50257",
            "--out", str(out), *map(str, options)]


def run_for_records(shards, work, model, micro_batch, tokens, steps, every, limit_s):
    """(records of its log, what it printed)."""
    process = subprocess.Popen(command(shards, work, "--model", model, "--micro-batch", micro_batch, "--global-batch-tokens", tokens, "--steps", steps,
                                       "--checkpoint-every", every, "--keep", 1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    start, printed = time.monotonic(), []
    for line in process.stdout:
        printed.append(line)
        print(f"    {time.monotonic() - start:6.2f} {line}", end="")
        last = line.startswith(f"step {steps - 1}/") or (model == LARGE and line.startswith("saved "))
        if last or time.monotonic() - start > limit_s:
            break
    process.kill()  # the last save is none of this test's business
    process.wait()
    log = work / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else [], "".join(printed)


def seconds_of_steps(records, every):
    """{step: seconds} of all steps, of those that met a save, and what each save took; records in the order in which they were written."""
    seconds, saving, save_s, last_snapshot = {}, {}, [], None
    for record in records:
        if record["kind"] == "step":
            step = record["step"]
            seconds[step] = record["seconds"]
            if last_snapshot is not None:
                saving[step] = record["seconds"]
            if step % every == 0:
                last_snapshot = step
        if record["kind"] == "checkpoint":
            save_s.append(record["seconds"])
            last_snapshot = None
    return seconds, saving, save_s


def judge(model, every, records, printed=""):
    """The rows of one run."""
    seconds, saving, save_s = seconds_of_steps(records, every)
    free = [s for step, s in seconds.items() if step > 1 and step not in saving]
    early = {step: s for step, s in seconds.items() if 1 < step <= every}  # the first one also captures the graphs
    if len(free) < 2 or not saving or len(early) < every - 1:
        return [{"name": f"saving: {model}", "status": "fail", "figure": f"too few steps: {seconds}, saves {save_s}; {printed[-300:]}"}]
    base = statistics.median(free)

    def row(what, ratio, bound, text):
        return {"name": f"saving: {model}, {what}", "status": "pass" if ratio <= bound else "fail",
                "figure": f"{ratio:.3f} x a step without ({1e3 * base:.0f} ms, {len(free)} steps); {text}; at most {bound}"}
    slowest, slowest_early = max(saving, key=saving.get), max(early, key=early.get)
    if not save_s:
        return [{"name": f"saving: {model}", "status": "fail", "figure": f"no save ended in time; {printed[-300:]}"}]
    saves = f"a save took {max(save_s):.1f} s"
    return [row("step time while saving", statistics.mean(saving.values()) / base, MEAN_BOUND, f"mean of {len(saving)} steps; {saves}"),
            row("worst step while saving", saving[slowest] / base, WORST_BOUND, f"step {slowest}"),
            row("worst early step, beside the first touch of memory", early[slowest_early] / base, WORST_BOUND, f"step {slowest_early} of 2 to {every}")]


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
            model, every = row[0], row[4]
            found = judge(model, every, *run_for_records(arguments.shards, pathlib.Path(folder) / "run", *row))
        tests += found
        for test in found:
            print(f"{test['name']} | {test['figure']} | {test['status']}", flush=True)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps({"tests": tests, "bench": []}, indent=1) + "\n")
    return 1 if any(test["status"] == "fail" for test in tests) else 0


if __name__ == "__main__":
    sys.exit(main())
