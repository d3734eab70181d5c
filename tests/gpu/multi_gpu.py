#!/usr/bin/env python3
"""Several GPUs of one machine, in one call: NCCL's collectives, speed against one GPU, losses against one GPU, faults.

    python3 tests/gpu/multi_gpu.py --ranks 2 --train shards/code_gpt2 --val shards/code_gpt2 --json multi_gpu.json
    python3 tests/gpu/multi_gpu.py --rehearse --train shards/cuda_headers --val shards/cuda_headers    # on the CPU, tiny, in a minute

Bars (a mode that the GPU engine refuses is reported as skipped): at least 97 % of one GPU's tokens/s a GPU at 1558M with 524,288
tokens a step; losses of 300 steps on N GPUs within the spread of two seeds on one; every fault ends the job within its time-out.
"""
import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from distributed_tests import environment, mpirun, own_errors, program, ranks_of, records  # noqa: E402

MODELS = {"gpt2-124M": ["--model", "gpt2-124M", "--micro-batch", "32"],
          "gpt2-1558M": ["--model", "gpt2-1558M", "--micro-batch", "8"],
          "gpt2-3B": ["--model", "gpt2-1558M", "--dim", "2560", "--n-layers", "36", "--n-heads", "40", "--micro-batch", "4"]}
REHEARSAL = {"tiny": ["--model", "tiny", "--micro-batch", "4"]}
MODES = ("none", "optimizer", "gradients", "full")


class Report:
    def __init__(self):
        self.tests, self.bench = [], []

    def test(self, name, status, figure):
        self.tests.append({"name": name, "status": status, "figure": figure})
        print(f"{status:5} {name}: {figure}", flush=True)


class Runs:
    def __init__(self, arguments, folder):
        self.a, self.folder, self.count = arguments, folder, 0

    def command(self, ranks, *options):
        self.count += 1
        out = self.folder / f"run{self.count}"
        device = "cpu" if self.a.rehearse else "gpu"
        return out, [*mpirun(ranks), str(program()), "--device", device, "--train", self.a.train, "--val", self.a.val, "--timeout", str(self.a.timeout),
                     "--out", str(out), *options]

    def train(self, ranks, *options):
        """The folder and stderr of a run; the folder is None when the program refused or failed."""
        out, command = self.command(ranks, *options)
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1800)
        return (out if done.returncode == 0 else None), done.stderr


def speeds(report, runs, a):
    steps = 6 if a.rehearse else 12
    for name, model in (REHEARSAL if a.rehearse else MODELS).items():
        tokens = 4096 if a.rehearse else 524288
        for load in (tokens, tokens // 64):  # and the hard case: few tokens a GPU and step
            alone = None
            for ranks, mode in [(1, "none")] + [(a.ranks, m) for m in MODES]:
                options = [*model, "--global-batch-tokens", str(load * ranks), "--steps", str(steps), "--eval-every", "0", "--checkpoint-every", "0", "--shard", mode]
                if load < tokens:
                    options += ["--micro-batch", "1" if a.rehearse else str(load // 1024)]
                case = f"speed {name}, {load} tokens a GPU and step, {ranks} ranks, {mode}"
                out, errors = runs.train(ranks, *options)
                if out is None:
                    line = (own_errors(errors) or [errors[-200:]])[0]
                    report.test(case, "skip" if "only none is implemented" in line else "fail", line)
                    continue
                step_s = statistics.median(r["tokens"] / r["tokens_per_s"] if "tokens_per_s" in r else r["ms"] * 1e-3 for r in records(out, "step")[2:])
                rate = load / step_s  # of one GPU
                alone = alone or rate
                share = rate / alone
                bar = {"none": 0.97, "optimizer": 0.97, "full": 0.93}.get(mode) if name == "gpt2-1558M" and load == tokens and ranks > 1 else None
                report.bench.append({"kind": "train", "model": name, "gpus": ranks, "shard": mode, "tokens_per_step": load * ranks, "tokens_per_s": rate * ranks,
                                     "ms_per_step": step_s * 1e3, "share_of_one_gpu": share})
                report.test(case, "fail" if bar and share < bar else "pass", f"{rate:.0f} tokens/s a GPU, {share:.1%} of one GPU's, {step_s * 1e3:.1f} ms a step")


def losses(report, runs, a):
    steps = 30 if a.rehearse else 300
    model = REHEARSAL["tiny"] if a.rehearse else MODELS["gpt2-124M"]
    for recipe in ("bf16", "tensorwise"):
        final = {}
        for case, ranks, seed in (("one", 1, 1337), ("other seed", 1, 1338), ("several", a.ranks, 1337)):
            out, errors = runs.train(ranks, *model, "--recipe", recipe, "--seed", str(seed), "--global-batch-tokens", "4096" if a.rehearse else "65536", "--steps", str(steps),
                                     "--eval-every", str(steps), "--checkpoint-every", "0")
            if out is None:
                report.test(f"losses {recipe}, {case}", "fail", (own_errors(errors) or [errors[-200:]])[0])
                return
            final[case] = records(out, "eval")[-1]["loss"]
        spread = abs(final["one"] - final["other seed"])
        difference = abs(final["several"] - final["one"])
        report.test(f"losses {recipe} after {steps} steps", "pass" if difference <= spread else "fail",
                    f"{a.ranks} GPUs {final['several']:.4f}, one {final['one']:.4f}, another seed {final['other seed']:.4f}")


def faults(report, runs, a):
    model = REHEARSAL["tiny"] if a.rehearse else MODELS["gpt2-124M"]
    for name, number in (("kill -9", signal.SIGKILL), ("SIGSTOP", signal.SIGSTOP)):
        out, command = runs.command(a.ranks, *model, "--global-batch-tokens", "4096" if a.rehearse else "131072", "--steps", "1000000", "--eval-every", "0",
                                    "--checkpoint-every", "5")
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if "saved " in line and "/step_" in line:
                break
        os.kill(ranks_of(out)[1], number)
        start = time.monotonic()
        _, errors = process.communicate(timeout=a.timeout + 60)
        seconds, lines = time.monotonic() - start, own_errors(errors)
        time.sleep(1)
        good = process.returncode != 0 and len(lines) == 1 and "rank 1 (" in lines[0] and seconds < a.timeout + 10 and not ranks_of(out)
        report.test(f"fault {name}", "pass" if good else "fail", f"{seconds:.1f} s, {lines}")
    out, command = runs.command(1, *model, "--steps", "2")
    position = command.index(str(program()))
    both = [*command, ":", "-np", "1", *command[position:], "--seed", "5"]
    done = subprocess.run(both, env=environment(), capture_output=True, text=True, timeout=120)
    lines = own_errors(done.stderr)
    report.test("fault other option", "pass" if done.returncode != 0 and len(lines) == 1 and "rank 1 has --seed 5" in lines[0] else "fail", str(lines))


def collectives(report, a):
    for part in ("check", "bench"):
        done = subprocess.run([*mpirun(a.ranks), str(program().parent / "dev" / "collectives"), part], env=environment(NCCL_NVLS_ENABLE="0"), capture_output=True, text=True, timeout=600)
        print(done.stdout)
        report.test(f"collectives {part}", "pass" if done.returncode == 0 else "skip" if done.returncode == 77 else "fail", done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--timeout", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=["collectives", "speeds", "losses", "faults"])
    parser.add_argument("--rehearse", action="store_true", help="on the reference device, to try this script")
    parser.add_argument("--json")
    a = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(a, pathlib.Path(folder))
        if "collectives" in a.only:
            collectives(report, a)
        for name, part in (("speeds", speeds), ("losses", losses), ("faults", faults)):
            if name in a.only:
                part(report, runs, a)
    if a.json:
        pathlib.Path(a.json).write_text(json.dumps({"name": "multi_gpu", "tests": report.tests, "bench": report.bench}, indent=1))
    counts = {s: sum(t["status"] == s for t in report.tests) for s in ("pass", "fail", "skip")}
    print(f"{counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped")
    return 1 if counts["fail"] else 0


if __name__ == "__main__":
    sys.exit(main())
