#!/usr/bin/env python3
"""Several GPUs of one machine, in one call: speed against one GPU, exposed communication, gathered bytes, losses against one GPU, faults.

    python3 tests/gpu/multi_gpu.py --json multi_gpu.json [--seconds 1200] [--train shards/code_gpt2 --val shards/code_gpt2]
    python3 tests/gpu/multi_gpu.py --rehearse --train shards/cuda_headers --val shards/cuda_headers    # on the CPU, tiny, in a minute or two
    python3 tests/gpu/multi_gpu.py --list                                                              # rows and their estimated seconds

Rows run in the order of their importance; each is printed as it ends, and --json is written anew after each, so that a call that is cut
off leaves what it had. With --seconds, a row whose estimate does not fit into what is left is skipped, and counted so. --only takes
parts of rows' names.

Speed: tokens/s a GPU against one GPU's of the same call: same tokens a GPU and step, same micro-batch, --shard none. Two steps to warm up, one
traced (CUPTI), then the median of three (of short steps 4 and 8). Bars at 1558M with 524,288 tokens a step of all GPUs: 97 % with --shard optimizer, 93 % with full.
Exposed: of the time of copies between GPUs and of NCCL's kernels, that during which no compute ran on that GPU, the worst rank: 25 % at most with
8,192 tokens a GPU and step. Sums of what arrived are compute. Waiting for another rank before a copy has no record: the share of one GPU's speed has it. Gathered bytes: a block more of the model costs exactly half as many with FP8 as with BF16. Losses: root mean square
difference of the validation losses of N GPUs and one, no larger than that of two seeds. Faults end the job within its time-out, with one line
that names rank and cause, no process and no GPU memory left.
"""
import argparse
import dataclasses
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from multi_gpu_runs import (Failed, Report, Runs, Skipped, as_torchrun, environment, gpu_memory_mib, memory_gib, own_errors, own_line, program,
                            ranks_of, records)
from multi_gpu_torch import Peer, Torchrun

MODELS = {"gpt2-124M": ["--model", "gpt2-124M"], "gpt2-1558M": ["--model", "gpt2-1558M"],
          "gpt2-3B": ["--model", "gpt2-1558M", "--dim", "2560", "--n-layers", "36", "--n-heads", "40"],
          "mini": ["--model", "mini"], "tiny": ["--model", "tiny"]}
MICRO_BATCH = {"gpt2-124M": 64, "gpt2-1558M": 16, "gpt2-3B": 4, "tiny": 4}  # halved until --dry-run says that it fits
STEP_TOKENS = 524288  # of all GPUs
FEW_TOKENS = 8192     # of a GPU and step, the hard case
HUGE_TOKENS = 65536   # the same, of 3B: with more a row takes minutes
MODES = ("none", "optimizer", "gradients", "full")
BARS = {"none": 0.97, "optimizer": 0.97, "full": 0.93}  # share of one GPU's speed, 1558M
MOST_EXPOSED = 0.25
RESERVE_GIB = 3
WARM_UP = 2           # steps
TRACED, MEASURED = 1, 3  # then; where steps are short, TRACED_SHORT and MEASURED_SHORT
TRACED_SHORT, MEASURED_SHORT = 4, 8
NO_GPUS = 77


def needs_gpus(ranks, arguments):
    if not arguments.rehearse and len(gpu_memory_mib()) < ranks:
        raise Skipped(f"needs {ranks} GPUs")


def fits(runs, model, recipe, micro_batch, mode, ranks):
    """Does --dry-run leave RESERVE_GIB of the GPU, for CUDA's context and CUPTI's buffers?"""
    plan = subprocess.run([str(program()), *MODELS[model], "--device", "gpu", "--recipe", recipe, "--micro-batch", str(micro_batch), "--shard", mode, "--dry-run"],
                          env=environment(RANK="0", WORLD_SIZE=str(ranks)), capture_output=True, text=True)
    device = re.search(r"^memory  of .*, ([\d.]+) GiB", plan.stdout, re.M)
    return plan.returncode == 0 and device is not None and memory_gib(plan.stdout) + RESERVE_GIB <= float(device[1])


def fitting_micro_batch(runs, model):
    """MICRO_BATCH, halved until every mode fits in both recipes: all rows of a model have the same."""
    micro_batch = MICRO_BATCH[model]
    while not runs.a.rehearse and micro_batch > 1:
        if all(fits(runs, model, recipe, micro_batch, mode, runs.a.ranks) for recipe in ("bf16", "tensorwise") for mode in BARS):
            break
        micro_batch //= 2
    return micro_batch


def gathered_bytes(out):
    """By a rank; none is written of one GPU."""
    return sum(t["gathered"] for traffic in records(out, "traffic")[-1:] for t in traffic["communicators"])


def communication(out):
    """The rank with the largest exposed share. None: no timeline, or nothing in it."""
    pairs = [pair for profile in records(out, "profile") for pair in zip(profile["communication_ms"], profile["exposed_ms"]) if pair[0] > 0]
    whole, exposed = max(pairs, key=lambda pair: pair[1] / pair[0], default=(None, None))
    return {"communication_ms": whole and round(whole, 3), "exposed_ms": whole and round(exposed, 3), "exposed_share": whole and round(exposed / whole, 4)}


def figure_of(row):
    """A row of the results, as it is printed."""
    figure = f"{row['tokens_per_s'] / row['gpus']:.0f} tokens/s a GPU, {row['ms_per_step']:.1f} ms a step, {row['memory_gib']:.1f} GiB"
    if row["gpus"] == 1:
        return figure
    if row["share_of_one_gpu"] is not None:
        figure += f", {row['share_of_one_gpu']:.1%} of one GPU's"
    elif row["share_of_one_gpu_in_an_earlier_call"] is not None:
        figure += f", {row['share_of_one_gpu_in_an_earlier_call']:.1%} of one GPU's in an earlier call"
    figure += f", {row['gathered_bytes'] / 2**20:.1f} MiB gathered (a captured call counts once)"
    if row["communication_ms"]:
        figure += f", {row['communication_ms']:.1f} ms of communication, {row['exposed_ms']:.1f} ms ({row['exposed_share']:.0%}) exposed"
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Rows


@dataclasses.dataclass(frozen=True)
class Speed:
    model: str
    recipe: str
    mode: str           # of --shard; "alone": one GPU
    tokens: int         # a GPU and step
    ranks: int = 0      # 0: those of --ranks
    replicate: int = 1

    @property
    def name(self):
        mode = self.mode if self.replicate == 1 else f"{self.mode} of {self.replicate} replicas"
        return f"speed {self.model} {self.recipe} {mode}, {self.tokens} tokens a GPU and step" + (f", {self.ranks} GPUs" if self.ranks else "")

    def seconds(self):
        rate = {"gpt2-124M": 600e3, "gpt2-1558M": 60e3, "gpt2-3B": 30e3}.get(self.model, 1e6)
        start = {"gpt2-124M": 10, "gpt2-1558M": 18, "gpt2-3B": 28}.get(self.model, 5)
        return start + (WARM_UP + sum(self.steps())) * self.tokens / rate

    def steps(self):
        return (TRACED_SHORT, MEASURED_SHORT) if self.tokens == FEW_TOKENS else (TRACED, MEASURED)

    def run(self, report, runs):
        tokens = self.tokens if not runs.a.rehearse else 512 if self.tokens == FEW_TOKENS else 1024
        ranks, context, (traced, measured) = 1 if self.mode == "alone" else self.ranks or runs.a.ranks, 64 if runs.a.rehearse else 1024, self.steps()
        micro_batch = min(runs.micro_batch(self.model), tokens // context)
        options = [*MODELS[self.model], "--recipe", self.recipe, "--micro-batch", micro_batch, "--global-batch-tokens", tokens * ranks, "--steps", WARM_UP + traced + measured,
                   "--eval-every", 0, "--checkpoint-every", 0, "--shard", self.shard, "--replicate", self.replicate]
        needs_gpus(ranks, runs.a)
        try:
            out, text, used = runs.until_last_step(ranks, *options, "--profile", traced)
        except Failed as failure:
            if "CUPTI" not in str(failure):
                raise
            out, text, used = runs.until_last_step(ranks, *options)  # speeds at least; failures() counts the want of a timeline
        step_s = statistics.median(r["seconds"] for r in records(out, "step")[-measured:])
        if self.mode == "alone":
            runs.alone[self.model, self.recipe, self.tokens] = tokens / step_s
        alone = runs.alone.get((self.model, self.recipe, self.tokens))
        earlier = None if alone else report.rate_of(Speed(self.model, self.recipe, "alone", self.tokens).name)
        row = {"kind": "train", "model": self.model, "recipe": self.recipe, "gpus": ranks, "shard": self.shard, "replicate": self.replicate, "seq_len": context, "micro_batch": micro_batch,
               "tokens_per_step": tokens * ranks, "tokens_per_s": round(tokens * ranks / step_s), "ms_per_step": round(step_s * 1e3, 3),
               "share_of_one_gpu": round(tokens / step_s / alone, 4) if alone else None,
               "share_of_one_gpu_in_an_earlier_call": round(tokens / step_s / earlier, 4) if earlier else None, "memory_gib": round(memory_gib(text), 3), "gpu_memory_used_mib": max(used.values(), default=0),
               "gathered_bytes": gathered_bytes(out), **communication(out), "command": records(out, "run")[0]["command"].replace(f"{runs.folder}/", "")}
        failed = self.failures(row, runs.a.rehearse)
        report.test(self.name, "fail" if failed else "pass", "; ".join([figure_of(row), *failed]), row)

    @property
    def shard(self):
        return "none" if self.mode == "alone" else self.mode

    def failures(self, row, rehearsed):
        """What of the row is not as it must be. Speeds of a rehearsal, of other models and of more GPUs have no bars."""
        if rehearsed or self.mode == "alone":
            return []
        failed = [] if row["communication_ms"] else ["the timeline shows no communication"]
        if self.model != "gpt2-1558M" or self.ranks:
            return failed
        bar = BARS.get(self.mode) if self.tokens != FEW_TOKENS else None
        if bar and not (row["share_of_one_gpu"] or 0) >= bar:
            failed.append(f"at least {bar:.0%}")
        if row["communication_ms"] and self.tokens == FEW_TOKENS and self.mode in ("optimizer", "full") and row["exposed_share"] > MOST_EXPOSED:
            failed.append(f"at most {MOST_EXPOSED:.0%} exposed")
        return failed


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Bytes that a model of one block more gathers more: with FP8 exactly half of BF16's."""
    mode: str

    @property
    def name(self):
        return f"gathered bytes of a block, {self.mode}"

    def seconds(self):
        return 40

    def run(self, report, runs):
        model = ["--model", "tiny"] if runs.a.rehearse else ["--model", "gpt2-124M"]
        bytes_of = {}
        for recipe in ("bf16", "tensorwise"):
            gathered = []
            for layers in (6, 7):  # so many that what is still there from the pass before is the same of both
                out, _, _ = runs.until_last_step(runs.a.ranks, *model, "--n-layers", layers, "--recipe", recipe, "--micro-batch", 4, "--global-batch-tokens",
                                                 8 * (64 if runs.a.rehearse else 1024) * runs.a.ranks, "--steps", 2, "--eval-every", 0, "--checkpoint-every", 0, "--shard", self.mode)
                gathered.append(gathered_bytes(out))
            bytes_of[recipe] = gathered[1] - gathered[0]
        half = 2 * bytes_of["tensorwise"] == bytes_of["bf16"] > 0
        report.test(self.name, "pass" if half else "fail", f"{bytes_of['tensorwise']} with FP8, {bytes_of['bf16']} with BF16: ratio {bytes_of['tensorwise'] / max(1, bytes_of['bf16']):.4f}")


@dataclasses.dataclass(frozen=True)
class Losses:
    recipe: str
    mode: str

    @property
    def name(self):
        return f"losses of 300 steps, {self.recipe}, {self.mode}"

    def seconds(self):
        return 60

    def run(self, report, runs):
        steps = 30 if runs.a.rehearse else 300
        common = [*MODELS["tiny" if runs.a.rehearse else "gpt2-124M"], "--recipe", self.recipe, "--val", runs.a.val, "--micro-batch", 4 if runs.a.rehearse else 16,
                  "--global-batch-tokens", 1024 if runs.a.rehearse else 65536, "--steps", steps, "--eval-every", steps // 6,
                  *(["--eval-tokens", 2048] if runs.a.rehearse else []), "--checkpoint-every", 0]
        if self.recipe not in runs.curves:
            runs.curves[self.recipe] = [losses_of(out) for out in runs.whole([[*common, "--seed", 1337], [*common, "--seed", 1338]])]
        one, other = runs.curves[self.recipe]
        out, process = runs.start(runs.a.ranks, *common, "--seed", 1337, "--shard", self.mode)
        _, errors = process.communicate(timeout=1800)
        if process.returncode != 0:
            raise Failed(own_line(errors))
        several = losses_of(out)
        spread, difference = (statistics.fmean((x - y) ** 2 for x, y in zip(one, curve)) ** 0.5 for curve in (other, several))
        report.test(self.name, "pass" if difference <= spread and len(one) == len(several) == 6 else "fail",
                    f"{runs.a.ranks} GPUs end at {several[-1]:.4f}, one at {one[-1]:.4f}, another seed at {other[-1]:.4f}; "
                    f"differences over {len(one)} evaluations {difference:.5f} and {spread:.5f}")


def losses_of(out):
    """Of its evaluations but that at the start; the folder, with its checkpoints, is gone."""
    losses = [r["loss"] for r in records(out, "eval")[1:]]
    shutil.rmtree(out)
    return losses


# ----------------------------------------------------------------------------------------------------------------------
# Faults


@dataclasses.dataclass(frozen=True)
class Fault:
    kind: str

    @property
    def name(self):
        return f"fault: {self.kind}"

    def seconds(self):
        return {"kill of a rank": 12, "stop of a rank": 32, "stop of rank 0": 32, "another option": 10, "missing rank": 30}[self.kind]

    def run(self, report, runs):
        seconds, status, errors, words, outs = getattr(self, self.kind.replace(" ", "_"))(runs)
        lines = own_errors(errors)
        left = [pid for out in outs for pid in ranks_of(out).values()]
        kept = runs.kept_mib(within_s=10)
        good = status != 0 and len(lines) == 1 and all(w in lines[0] for w in words) and seconds <= self.within_s(runs) and not left and not kept
        report.test(self.name, "pass" if good else "fail", f"ended after {seconds:.1f} s (time-out {runs.a.timeout} s, at most {self.within_s(runs):g}): {lines}" + (f"; processes left {left}" if left else "") +
                    (f"; MiB of GPU memory left {kept}" if kept else ""))

    def within_s(self, runs):
        """The time-out; where ranks do not meet, it counts from the first one's start, and the program takes a few seconds to begin and to end."""
        return runs.a.timeout + 5 * (self.kind == "missing rank")

    def endless(self, runs):
        out, process = runs.start(runs.a.ranks, *self.model(runs), "--steps", 1000000, "--eval-every", 0, "--checkpoint-every", 50)
        for line in process.stdout:
            if "saved " in line and "/step_" in line:
                break
        return out, process

    @staticmethod
    def model(runs):
        return [*MODELS["tiny" if runs.a.rehearse else "mini"], "--micro-batch", 4, "--global-batch-tokens", (64 if runs.a.rehearse else 256) * 4 * runs.a.ranks,
                "--timeout", runs.a.timeout]

    def signalled(self, runs, victim, number, *words):
        out, process = self.endless(runs)
        try:
            os.kill(ranks_of(out)[victim], number)
            start = time.monotonic()
            _, errors = process.communicate(timeout=runs.a.timeout + 60)
            seconds = time.monotonic() - start
            time.sleep(0.5)
            return seconds, process.returncode, errors, (f"rank {victim} (", *words), [out]
        finally:
            if process.poll() is None:
                runs.end(out, process)

    def kill_of_a_rank(self, runs):
        return self.signalled(runs, 1, signal.SIGKILL, "died")

    def stop_of_a_rank(self, runs):
        return self.signalled(runs, 1, signal.SIGSTOP, "no sign of life")

    def stop_of_rank_0(self, runs):  # which names all others
        return self.signalled(runs, 0, signal.SIGSTOP, "no sign of life")

    def another_option(self, runs):
        out, command = runs.command(1, *self.model(runs), "--steps", 2)
        start = time.monotonic()
        done = subprocess.run([*command, ":", "-np", "1", *command[command.index(str(program())):], "--seed", "5"], env=environment(), capture_output=True, text=True,
                              timeout=runs.a.timeout + 60)
        return time.monotonic() - start, done.returncode, done.stderr, ("rank 1 has --seed 5",), [out]

    def missing_rank(self, runs):
        out, command = runs.command(1, *self.model(runs), "--steps", 2)
        start = time.monotonic()
        with as_torchrun(2, (0,), command[command.index(str(program())):]) as processes:
            errors = "".join(p.communicate(timeout=runs.a.timeout + 60)[1] for p in processes)
        return time.monotonic() - start, max(p.returncode for p in processes), errors, ("rank 1 of 2 has not joined",), [out]


# ----------------------------------------------------------------------------------------------------------------------
# All


def rows(rehearse, ranks):
    large, small, huge, many = "gpt2-1558M", "gpt2-124M", "gpt2-3B", STEP_TOKENS // ranks

    def speeds(model, recipe, tokens, *modes):
        return [Speed(model, recipe, mode, tokens) for mode in modes]

    def of_four(tokens):
        return [Speed(large, "tensorwise", mode, tokens, ranks=4, replicate=replicate) for mode, replicate in (("optimizer", 1), ("full", 1), ("full", 2))]
    faults = [Fault(kind) for kind in ("kill of a rank", "stop of a rank", "stop of rank 0", "another option", "missing rank")]
    losses = [Losses(recipe, mode) for recipe in ("tensorwise", "bf16") for mode in ("full", "none")]
    if rehearse:
        return [*speeds("tiny", "tensorwise", many, "alone", *MODES), *speeds("tiny", "bf16", FEW_TOKENS, "alone", "full"),
                Gathered("full"), Gathered("gradients"), *faults, *losses, Torchrun(), Peer("bf16", ())]
    peers = {recipe: Peer(recipe, (FEW_TOKENS, many)) for recipe in ("tensorwise", "bf16")}
    wanted = [*speeds(large, "tensorwise", FEW_TOKENS, "alone", "optimizer", "full"), *speeds(large, "tensorwise", many, "alone", "optimizer", "full"), peers["tensorwise"],
              *losses, *[Gathered(mode) for mode in ("full", "gradients")], *faults]
    for recipe in ("tensorwise", "bf16"):
        wanted += [*speeds(large, recipe, FEW_TOKENS, "alone", *MODES), *speeds(large, recipe, many, "alone", *MODES), peers[recipe]]
    for recipe in ("tensorwise", "bf16"):
        wanted += [*speeds(small, recipe, many, "alone", *MODES), *speeds(huge, recipe, FEW_TOKENS, "alone", *MODES)]
    wanted += [*speeds(huge, "tensorwise", HUGE_TOKENS, "alone", *MODES), Torchrun(), *of_four(FEW_TOKENS), *of_four(many)]
    return list(dict.fromkeys(wanted))


def run_row(row, report, runs, left_s):
    if row.seconds() > left_s:
        return report.test(row.name, "skip", f"about {row.seconds():.0f} s, {left_s:.0f} s are left")
    start = time.monotonic()
    try:
        row.run(report, runs)
    except Skipped as skipped:
        report.test(row.name, "skip", str(skipped))
    except Failed as failed:
        report.test(row.name, "fail", str(failed))
    except (subprocess.TimeoutExpired, KeyError, IndexError, FileNotFoundError, statistics.StatisticsError) as error:
        report.test(row.name, "fail", f"{type(error).__name__}: {error}")
    return print(f"      ({time.monotonic() - start:.0f} s)", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--train", default="shards/code_gpt2")
    parser.add_argument("--val", default="shards/code_gpt2")
    parser.add_argument("--timeout", type=int, help="of the ranks, where faults are made, seconds (20; in a rehearsal 5)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time for all rows")
    parser.add_argument("--only", nargs="+", metavar="PART", help="rows whose name has one of these in it")
    parser.add_argument("--rehearse", action="store_true", help="on the reference device, to try this script")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--earlier", type=pathlib.Path, metavar="FILE", help="results of an earlier call, to which this one's are added")
    parser.add_argument("--missing", action="store_true", help="only rows of which --earlier has no result")
    a = parser.parse_args()
    a.timeout = a.timeout or (5 if a.rehearse else 20)
    start, report = time.monotonic(), Report(a.json, a.earlier)
    chosen = [row for row in rows(a.rehearse, a.ranks) if (not a.only or any(part in row.name for part in a.only)) and not (a.missing and report.has(row.name))]
    if a.list:
        print("\n".join(f"{row.seconds():5.0f} s  {row.name}" for row in chosen))
        return 0
    if not a.rehearse and len(gpu_memory_mib()) < a.ranks:
        print(f"multi_gpu: skipped: needs {a.ranks} GPUs")
        return NO_GPUS
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(a, pathlib.Path(folder), fitting_micro_batch)
        for row in chosen:
            run_row(row, report, runs, a.seconds - (time.monotonic() - start))
    print(f"{report.count('pass')} passed, {report.count('fail')} failed, {report.count('skip')} skipped in {time.monotonic() - start:.0f} s")
    return 1 if report.count("fail") else 0


if __name__ == "__main__":
    sys.exit(main())
