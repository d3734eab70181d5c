"""What multi_gpu.py stands on: jobs of the program under mpirun, and the results of its rows."""
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from distributed_tests import Skipped, as_torchrun, environment, mpirun, own_errors, program, ranks_of, records  # noqa: E402, F401


def gpu_memory_mib():
    """Used memory of every GPU that CUDA_VISIBLE_DEVICES leaves, by its number; {} where there is none."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True)
    except FileNotFoundError:
        return {}
    used = dict(map(int, line.split(",")) for line in done.stdout.splitlines()) if done.returncode == 0 else {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return used if visible is None else {gpu: used[gpu] for gpu in map(int, visible.split(",")) if gpu in used}


class Report:
    """Results of all rows, written after each. `earlier`: a file of an earlier call, whose results stay where no row of this call replaces them."""

    def __init__(self, path, earlier=None):
        old = json.loads(earlier.read_text()) if earlier else {"tests": [], "bench": []}
        self.path, self.tests, self.bench, self.own = path, old["tests"], old["bench"], set()  # own: names of this call's rows

    def test(self, name, status, figure, row=None):
        if status == "skip" and self.has(name):
            return print(f"keeps {name}", flush=True)
        self.tests = [test for test in self.tests if test["name"] != name] + [{"name": name, "status": status, "figure": figure}]
        if row:
            self.row(name, row)
        print(f"{status:5} {name}: {figure}", flush=True)
        if self.path:
            self.path.write_text(json.dumps({"tests": self.tests, "bench": self.bench}, indent=1) + "\n")
        return None

    def row(self, name, row):
        self.own.add(name)
        self.bench = [other for other in self.bench if other["name"] != name] + [{"name": name, **row}]

    def has(self, name):
        return any(test["name"] == name and test["status"] != "skip" for test in self.tests)

    def rate_of(self, name):
        return next((row["tokens_per_s"] for row in self.bench if row["name"] == name), None)

    def count(self, status):
        return sum(test["status"] == status for test in self.tests)


class Failed(Exception):
    """A run ended as it should not; the text is its own line, if it printed one."""


def own_line(errors):
    """The program's own line, or what there is."""
    return (own_errors(errors) or [errors.strip()[-300:] or "it ended without a word"])[0]


class Runs:
    def __init__(self, arguments, folder, fitting_micro_batch):
        self.a, self.folder, self.made, self.fitting_micro_batch = arguments, folder, 0, fitting_micro_batch
        self.alone = {}          # (model, recipe, tokens) -> tokens/s of one GPU
        self.micro_batches = {}  # model -> what fits
        self.curves = {}         # recipe -> validation losses of two seeds on one GPU
        self.idle_mib = gpu_memory_mib()

    def micro_batch(self, model):
        if model not in self.micro_batches:
            self.micro_batches[model] = self.fitting_micro_batch(self, model)
        return self.micro_batches[model]

    def command(self, ranks, *options):
        self.made += 1
        out = self.folder / f"run{self.made}"
        cache = self.folder / "gemm.cache"  # GEMMs are tuned once for all rows
        return out, [*mpirun(ranks), str(program()), "--device", "cpu" if self.a.rehearse else "gpu", "--train", self.a.train, "--gemm-cache", str(cache),
                     "--out", str(out), *map(str, options)]

    def start(self, ranks, *options, **variables):
        out, command = self.command(ranks, *options)
        threads = 1 if self.a.rehearse else max(1, os.cpu_count() // self.a.ranks)
        own = environment(NCCL_NVLS_ENABLE="0", OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="passive", **variables)
        return out, subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def end(self, out, process):
        """Kills what is left of a job, and returns what it still said on stderr. The next one finds the GPUs empty."""
        for pid in ranks_of(out).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            errors = process.communicate(timeout=30)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            errors = process.communicate()[1]
        self.kept_mib(within_s=20)
        return errors

    def kept_mib(self, within_s):
        """GPU memory above what was used before the first row, by GPU; waits until there is none."""
        deadline = time.monotonic() + within_s
        while True:
            kept = [now - self.idle_mib[gpu] for gpu, now in gpu_memory_mib().items() if now > self.idle_mib[gpu] + 64]
            if not kept or time.monotonic() > deadline:
                return kept
            time.sleep(0.5)

    def until_last_step(self, ranks, *options):
        """Runs a job and kills it after the last step's line, before it saves: at 1558M a checkpoint is 18.7 GB. Returns its folder and stdout."""
        out, process = self.start(ranks, *options, "--timeout", 120)
        last = "traffic" if ranks > 1 else f"step {options[options.index('--steps') + 1]}/"
        lines = []
        for line in process.stdout:
            lines.append(line.replace("\033[K", ""))  # mpirun gives its ranks a terminal, which has progress
            if lines[-1].startswith(last):
                break
        used = gpu_memory_mib()
        errors = self.end(out, process)
        if not lines or not lines[-1].startswith(last):
            raise Failed(own_line(errors))
        return out, "".join(lines), used

    def whole(self, jobs):
        """Runs jobs of one rank each side by side, one a GPU; returns their folders."""
        started = [self.start(1, *options, CUDA_VISIBLE_DEVICES=gpu) for gpu, options in zip([*map(str, self.idle_mib), *map(str, range(len(jobs)))], jobs)]
        for out, process in started:
            _, errors = process.communicate(timeout=1800)
            if process.returncode != 0:
                raise Failed(own_line(errors))
        return [out for out, _ in started]


def memory_gib(text):
    """Of the memory table that a run prints."""
    total = re.search(r"^  total +([\d.]+) (B|KiB|MiB|GiB)$", text, re.M)
    return float(total[1]) / {"B": 2**30, "KiB": 2**20, "MiB": 2**10, "GiB": 1}[total[2]] if total else float("nan")
