#!/usr/bin/env python3
"""GPT-2 124M trains through our attention (--attention hopper, so that no other stands in) as it does through cuDNN's: 200 steps, three seeds of each.

    attention_training.py [--json FILE] [--shards FOLDER] [--steps N] [--recipe NAME]

A seed gives the same initial weights and the same batches to both backends. At every evaluation (the same samples) and for
every tenth of the steps (mean training loss) after the first fifth, where losses still fall fast, our loss may differ from
cuDNN's with the same seed by no more than two of cuDNN's seeds differ at most among those points. And the mean over the seeds of
what we differ at the last point, signed, may not exceed the standard deviation of cuDNN's seeds there: no backend is better on
the whole. Without FOLDER the default corpus is prepared: the CUDA headers as bytes.

Tokens/s of each backend are rows of the `train` report: here four runs at a time share the GPU.
"""
import argparse
import concurrent.futures
import itertools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "dev"))
import run_log  # noqa: E402

BUILD = ROOT / os.environ.get("TRAIN_GPT_BUILD", "build/sm_90a")
SEEDS = (1337, 2718, 31415)
AT_ONCE = 4
TENTHS = 10
NO_GPU = 77


class RunFailed(Exception):
    pass


def prepared_corpus(work):
    shards = ROOT / "shards/cuda_headers"
    if (shards / "meta.json").exists():
        return shards
    headers = os.environ.get("CUDA", "/usr/local/cuda") + "/include"
    subprocess.run([str(BUILD / "data/prepare"), "--out", str(work / "corpus"), "--tokenizer", "bytes", headers], check=True, stdout=subprocess.DEVNULL)
    return work / "corpus"


def train(arguments, work, attention, seed):
    """The log of a run."""
    steps, out = arguments.steps, work / f"{attention}_{seed}"
    command = [BUILD / "train_gpt_fp8", "--train", arguments.shards, "--val", arguments.shards, "--model", "gpt2-124M", "--recipe", arguments.recipe,
               "--attention", attention, "--seed", seed, "--micro-batch", 32, "--global-batch-tokens", 32768, "--steps", steps,
               "--warmup-steps", steps // 10, "--eval-every", max(1, steps // 4), "--eval-tokens", 131072, "--checkpoint-every", 0,
               "--log-every", steps, "--gemm-cache", work / f"{attention}_{seed}.cache", "--out", out]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RunFailed(f"--attention {attention}: {(done.stderr.strip() or done.stdout.strip())[-300:]}")
    for path in out.glob("step_*/*.safetensors"):
        path.unlink()  # 1.5 GB a run
    print(f"  {attention}, seed {seed}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    return out / "log.jsonl"


def loss_points(log, steps):
    """{what: loss}: evaluations, and the mean training loss of every tenth of the steps, after the first fifth."""
    records = run_log.read_records(log)
    training, evaluations = run_log.curve(records, "step", "loss"), run_log.curve(records, "eval", "loss")
    points = {f"evaluation at step {step}": loss for step, loss in evaluations if step > steps // 5}
    tenth = max(1, steps // TENTHS)
    for first in range(2 * tenth, steps, tenth):
        losses = [loss for step, loss in training if first < step <= first + tenth]
        points[f"mean of steps {first + 1}-{first + len(losses)}"] = sum(losses) / len(losses)
    return points


def largest_difference(a, b):
    assert a.keys() == b.keys(), (a, b)
    where = max(a, key=lambda what: abs(a[what] - b[what]) if a[what] == a[what] and b[what] == b[what] else float("inf"))
    return abs(a[where] - b[where]), where


def judge(ours, cudnn):
    """ours, cudnn: {seed: loss points}."""
    spread, spread_at = max(largest_difference(cudnn[a], cudnn[b]) for a, b in itertools.combinations(SEEDS, 2))
    last = list(cudnn[SEEDS[0]])[-1]
    for seed in SEEDS:
        difference, where = largest_difference(ours[seed], cudnn[seed])
        ok = difference <= spread  # false for NaN
        yield {"name": f"attention training: hopper against cudnn, seed {seed}", "status": "pass" if ok else "fail",
               "figure": f"losses differ by at most {difference:.4f} ({where}); two of cudnn's seeds by {spread:.4f} ({spread_at}); "
                         f"{last}: {ours[seed][last]:.4f} and {cudnn[seed][last]:.4f}"}
    mean = statistics.mean(ours[seed][last] - cudnn[seed][last] for seed in SEEDS)
    deviation = statistics.stdev(cudnn[seed][last] for seed in SEEDS)
    yield {"name": "attention training: hopper against cudnn, all seeds", "status": "pass" if abs(mean) <= deviation else "fail",
           "figure": f"{last}: {mean:+.4f} in the mean of {len(SEEDS)} seeds, the standard deviation of cudnn's seeds is {deviation:.4f}"}


def compare(arguments, work):
    runs = [(attention, seed) for attention in ("cudnn", "hopper") for seed in SEEDS]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        logs = dict(zip(runs, pool.map(lambda run: train(arguments, work, *run), runs)))
    points = {run: loss_points(log, arguments.steps) for run, log in logs.items()}
    return list(judge({seed: points["hopper", seed] for seed in SEEDS}, {seed: points["cudnn", seed] for seed in SEEDS}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="results for tests/gpu_report")
    parser.add_argument("--shards", type=pathlib.Path, help="folder with train and val")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--recipe", default="tensorwise")
    arguments = parser.parse_args()
    if not shutil.which("nvidia-smi") or subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode != 0:
        print("attention_training: skipped: no GPU")
        return NO_GPU
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        arguments.shards = arguments.shards or prepared_corpus(work)
        try:
            tests = compare(arguments, work)
        except RunFailed as error:
            absent = "cudnn" in str(error) and "no backend" in str(error)
            tests = [{"name": "attention training: hopper against cudnn", "status": "skip" if absent else "fail", "figure": str(error)}]
    for test in tests:
        print(f"{test['name']} | {test['figure']} | {test['status']}")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps({"tests": tests, "bench": []}, indent=1) + "\n")
    return 1 if any(test["status"] == "fail" for test in tests) else 0


if __name__ == "__main__":
    sys.exit(main())
