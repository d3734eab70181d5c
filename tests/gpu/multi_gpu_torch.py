"""Rows of multi_gpu.py for which PyTorch is needed: its launcher, and what it reaches itself."""
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

from multi_gpu_runs import Failed, Skipped, environment, own_line, program, records


def needs(module):
    if subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode != 0:
        raise Skipped(f"needs {module}")


def run_group(command, variables, limit_s=300):
    """(status, stderr). Nothing that it started is left."""
    process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        errors = process.communicate(timeout=limit_s)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, errors


def torchrun(ranks):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


@dataclasses.dataclass(frozen=True)
class Torchrun:
    """PyTorch's own launcher starts what mpirun starts: the same ranks, over TCP instead of MPI, and so the same losses."""
    name = "torchrun instead of mpirun"

    def seconds(self):
        return 40

    def run(self, report, runs):
        needs("torch")
        model = ["--model", "tiny" if runs.a.rehearse else "mini", "--micro-batch", 4, "--global-batch-tokens", (64 if runs.a.rehearse else 256) * 4 * runs.a.ranks]
        options = [*model, "--steps", 20, "--eval-every", 0, "--checkpoint-every", 0, "--deterministic", "--shard", "full"]
        losses = []
        for launcher in ([*torchrun(runs.a.ranks), "--no-python"], None):
            out, command = runs.command(runs.a.ranks, *options)
            if launcher:
                command = [*launcher, *command[command.index(str(program())):]]
            status, errors = run_group(command, environment(NCCL_NVLS_ENABLE="0"))
            if status != 0:
                raise Failed(own_line(errors))
            losses.append([r["loss"] for r in records(out, "step")])
        same = losses[0] == losses[1] and len(losses[0]) == 20
        report.test(self.name, "pass" if same else "fail", f"{len(losses[0])} losses of {runs.a.ranks} ranks, the last {losses[0][-1]:.6f} and {losses[1][-1]:.6f}: " +
                    ("equal bits" if same else "they differ"))


@dataclasses.dataclass(frozen=True)
class Peer:
    """GPT-2 1558M in PyTorch, FSDP2 and torch.compile, with torchao's float8 and its FP8 all-gather: beside the rows of --shard full with as many tokens."""
    recipe: str
    tokens: tuple

    @property
    def name(self):
        return f"peer PyTorch FSDP2 gpt2-1558M {self.recipe}"

    def seconds(self):
        return 75

    def run(self, report, runs):
        needs("torch")
        if self.recipe == "tensorwise":
            needs("torchao")
        results, script = runs.folder / "peer.json", pathlib.Path(__file__).with_name("fsdp_peer.py")
        results.unlink(missing_ok=True)
        own = environment(NCCL_NVLS_ENABLE="0", TORCHAO_FORCE_SKIP_LOADING_SO_FILES="1")
        size = ["--model", "tiny", "--device", "cpu", "--tokens", "64"] if runs.a.rehearse else ["--tokens", *map(str, self.tokens)]
        if not runs.a.rehearse:
            size += ["--micro-batch", str(runs.micro_batch("gpt2-1558M"))]
        status, errors = run_group([*torchrun(runs.a.ranks), str(script), "--recipe", self.recipe, *size, "--json", str(results)], own)
        if status != 0 or not results.exists():
            raise Failed(errors.strip()[-400:])
        figures = []
        for row in json.loads(results.read_text()):
            tokens = row["tokens_per_step"] // row["gpus"]
            row_of_ours = f"speed gpt2-1558M {self.recipe} full, {tokens} tokens a GPU and step"
            ours, when = report.rate_of(row_of_ours), "" if row_of_ours in report.own else " in an earlier call"
            figures.append(f"{tokens} tokens a GPU and step: {row['tokens_per_s'] / row['gpus']:.0f} tokens/s a GPU, {row['ms_per_step']:.1f} ms a step, {row['memory_gib']:.1f} GiB allocated" +
                           (f", ours (--shard full{when}) is {ours / row['tokens_per_s']:.2f} times as fast" if ours else ""))
            report.row(f"{self.name}, {tokens} tokens a GPU and step", row)
        report.test(self.name, "pass", "; ".join(figures))
