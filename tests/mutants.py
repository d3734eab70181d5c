#!/usr/bin/env python3
"""Plants the bugs that were found by reading llmq and llm.c, one line each, and demands that a named test kills each.

    mutants.py                     build and run all here; without a GPU those of the kernels are built and skipped
    mutants.py --build-only DIR    build the programs of the kernels' mutants into DIR (stripped, xz)
    mutants.py --run-built DIR     run those, on a machine with a GPU that needs no compiler
    mutants.py --host              build and run those that need no GPU
    mutants.py --list              what is planted, and which bugs do not apply here

A mutant is killed when its program exits with an error and the named test is among the failures. The unmutated programs
run first and must pass. Nothing is changed in the repository: mutants are built in a copy of it. `--json FILE` writes
the results, `--only NAME...` restricts them.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import lzma
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
NO_GPU = 77  # exit status of a dev program that found no GPU
ORIGINAL = "original"
RUNS_AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    bug: str      # the peer's
    file: str
    old: str      # occurs exactly once
    new: str
    program: str  # as below the build folder
    test: str     # of GoogleTest: its full name; of a dev program: how the failing line begins
    small: bool = True  # small shapes are enough (dev programs)

    @property
    def on_gpu(self):
        return self.program.startswith("dev/")

    @property
    def arguments(self):
        return (["check"] + ["--small"] * self.small) if self.on_gpu else []


MUTANTS = [
    # ------------------------------------------------------------------------------------------------------------------
    # Host
    Mutant("schedule_starts_at_zero", "llmq schedule.h: the first warm-up step has learning rate 0",
           "trainer/schedule.cpp", "double(step + 1)", "double(step)",
           "tests/host/test_schedule", "Schedule.FirstWarmupStepIsNotZero"),
    Mutant("schedule_divides_by_all_steps", "llmq schedule.h: cosine divides by the total steps, not those after warm-up",
           "trainer/schedule.cpp", "/ double(last - start)", "/ double(s.total_steps)",
           "tests/host/test_schedule", "Schedule.CosineRunsFromThePeakToTheFloorExactly"),
    Mutant("resume_reads_from_the_start", "llmq dataloader.cpp: a resumed loader reads the first file and epoch again",
           "data/loader.cpp", "int64_t next = step * options_.samples_per_step + first_sample;",
           "static const DataLoader* last = nullptr; static int64_t calls = 0; if (last != this) last = this, calls = 0; "
           "int64_t next = calls++ * options_.samples_per_step + first_sample;",
           "tests/host/test_data", "DataLoader.ResumesAtAnyStep"),
    Mutant("epoch_forgotten", "llmq dataloader.cpp: the shuffles are not rebuilt for the epoch",
           "data/loader.cpp", "static_cast<uint64_t>(epoch))", "static_cast<uint64_t>(epoch * 0))",
           "tests/host/test_data", "DataLoader.EveryEpochHasEverySampleOnceInItsOwnOrder"),
    Mutant("token_count_of_32_bits", "llmq: at most 2^31 tokens a file",
           "data/token_file.cpp", "const int64_t count = header[kCountHigh] * kCountLimit + header[kCountLow];",
           "const int64_t count = static_cast<int32_t>(header[kCountHigh] * kCountLimit + header[kCountLow]);",
           "tests/host/test_data", "TokenFile.HoldsMoreThan2To31Tokens"),
    Mutant("token_offset_of_32_bits", "llmq: at most 2^31 tokens a file",
           "data/token_file.cpp", "sizeof(Header) + first * bytes_per_token_;",
           "sizeof(Header) + static_cast<uint32_t>(first * bytes_per_token_);",
           "tests/host/test_data", "TokenFile.HoldsMoreThan2To31Tokens"),
    Mutant("h200_peak_is_sparse", "llmq sol.cpp: the H200 entry holds the peaks with sparsity",
           "kernels/common/peak.h", '{"H200", 989.4, 1978.9, 4.8}', '{"H200", 1978.9, 3957.8, 4.8}',
           "tests/host/test_metrics", "Utilization.DensePeaksOfBothGpus"),
    Mutant("h200_peak_not_registered", "llmq sol.cpp: the H200 entry is never found",
           "kernels/common/peak.h", '{"H200", 989.4', '{"H200 SXM", 989.4',
           "tests/host/test_metrics", "Utilization.DensePeaksOfBothGpus"),
    Mutant("reference_clips_by_squared_norm", "llmq global_norm.cu: the clip scale divides by the squared norm",
           "trainer/reference/adamw.cpp", "config.max_grad_norm / (grad_norm + 1e-6f)",
           "config.max_grad_norm / (grad_norm * grad_norm + 1e-6f)",
           "tests/host/test_reference", "ReferenceAgainstTorch.FiveSteps"),
    Mutant("reference_scales_bias_gradient", "llmq llama_model.cpp: an FP8 layer's bias gradient is scaled once too often",
           "trainer/reference/linear.cpp", "add_column_sums(p.dy, p.dbias, p.rows, out_);",
           "add_column_sums(p.dy, p.dbias, p.rows, out_); for (int i = 0; i < out_; ++i) p.dbias[i] *= weight_.inv_scale;",
           "tests/host/test_reference", "Reference/RoundingRecipe.RoundsWhereTheGpuStores/tensorwise"),
    Mutant("reference_loss_of_probability", "llm.c: the loss is -log(probability), infinite where that underflows",
           "trainer/reference/ops.cpp", "p.losses[row] = lse - logits[target];",
           "p.losses[row] = -std::log(std::exp(logits[target] - lse));",
           "tests/host/test_reference", "ReferenceClassifier.LossOfAnUnlikelyTargetIsFinite"),
    Mutant("reference_gradients_in_e4m3", "class of llmq's quant.cu: gradients in another format than the recipe says",
           "trainer/recipe.cpp", ".grad_input = {kE5m2, kE4m3, false}", ".grad_input = {kE4m3, kE4m3, false}",
           "tests/host/test_reference", "Reference/RoundingRecipe.RoundsWhereTheGpuStores/tensorwise"),
    Mutant("reference_e5m2_scaled_to_448", "llmq quant.cu: E5M2 is scaled to E4M3's limit",
           "trainer/reference/quantizer.cpp", "double(fp8_max(format)) / clamped", "double(std::min(kE4M3Max, fp8_max(format))) / clamped",
           "tests/host/test_quantizer", "QuantizerAgainstTorch.TensorwiseScalesAndCodes"),
    Mutant("skipped_steps_recorded", "llm.c: the outlier detector records skipped steps",
           "trainer/run/training_loop.cpp", "if (!result.skip_update) outliers_.add(", "outliers_.add(",
           "tests/host/test_training_loop", "TrainingLoop.SkippedStepsAreNoneThatLaterOnesAreComparedWith"),
    Mutant("checkpoint_written_in_place", "class of a checkpoint under its real name from the first byte on: a save that fails halfway spoils the one before",
           "trainer/checkpoint.cpp", "        fs::create_directory(temporary);\n        write_folder(temporary, info, list, state);\n        publish_folder(out_dir, name);",
           "        fs::create_directory(path);\n        write_folder(path, info, list, state);",
           "tests/host/test_checkpoint", "Checkpoint.ASaveThatFailsHalfwayLeavesTheOldOne"),
    Mutant("gather_does_not_wait_for_the_update", "llm.c train_gpt2.cu: ZeRO-1 all-gather without an event after AdamW",
           "trainer/two_streams.cpp", "CUDA_CHECK(cudaStreamWaitEvent(communication_, forked_));", "CUDA_CHECK(cudaStreamWaitEvent(communication_, joined_));",
           "tests/host/test_gpu_parameters", "GpuParameters.EveryModeAndNumberOfRanks"),
    Mutant("sum_does_not_wait_for_the_reduction", "llmq llama_model.cpp: reduce_lse_stats on a side stream without a wait",
           "trainer/sharding_schedule.cpp", "add(Task::sum, layer, reduced_[size_t(layer)])", "add(Task::sum, layer)",
           "tests/host/test_sharding_schedule", "ShardingSchedule.NothingIsOverwrittenWhileItIsUsed"),
    Mutant("reduction_counts_bytes", "llm.c zero.cuh: an all-reduce of one float is given its bytes, 4, as the count",
           "trainer/distributed/host_communicator.cpp", "reduce(buffer_.data(), count, size(), element, data);",
           "reduce(buffer_.data(), bytes, size(), element, data);",
           "tests/host/test_world", "World.CollectivesAddInTheOrderOfRanks"),
    # ------------------------------------------------------------------------------------------------------------------
    # GPU
    Mutant("clips_by_squared_norm", "llmq global_norm.cu: the clip scale divides by the squared norm",
           "kernels/adamw.cu", "limit / (norm + 1e-6f)", "limit / (norm * norm + 1e-6f)", "dev/adamw", "clip by the norm"),
    Mutant("bias_gradient_scaled", "llmq llama_model.cpp: an FP8 layer's bias gradient is multiplied by a scale",
           "kernels/quantize.cu", "sums[j] += value[j], sums[j + 1] += value[j + 1];",
           "sums[j] += value[j] * scale, sums[j + 1] += value[j + 1] * scale;", "dev/quantize", "random dbias 17x33"),
    Mutant("bias_gradient_of_codes", "llmq llama_model.cpp: an FP8 layer's bias gradient is made of the codes (4 significant bits)",
           "kernels/quantize.cu", "sums[j] += value[j], sums[j + 1] += value[j + 1];",
           "sums[j] += low_bf16(word & 0xfff0fff0u), sums[j + 1] += high_bf16(word & 0xfff0fff0u);", "dev/quantize", "random dbias 17x33"),
    Mutant("bias_gradient_overwritten", "llm.c: the single-pass branch of the bias gradient overwrites (False is true)",
           "kernels/quantize.cu", "dbias[n] += total;", "dbias[n] = total;", "dev/quantize", "random dbias 17x33"),
    Mutant("e5m2_scaled_to_448", "llmq quant.cu: E5M2 is scaled to E4M3's limit",
           "kernels/common/device.cuh", "float(double(fp8_max(F)) / clamped)", "float(double(kE4M3Max) / clamped)",
           "dev/quantize", "random q 17x33 e5m2"),
    Mutant("quantize_index_of_32_bits", "llmq quant.cu: loops over elements count in int",
           "kernels/quantize/tile.cuh", "uint8_t* out = q + row * cols + col;", "uint8_t* out = q + int(row * cols + col);",
           "dev/quantize", "beyond 2^31 elements", small=False),
    Mutant("amax_guard_off_by_one", "class of llm.c's tail loop: one element too many",
           "kernels/quantize/amax.cu", "if (tail < n)", "if (tail <= n)", "dev/quantize", "amax_bf16 n=8 "),
    Mutant("gelu_guard_off_by_one", "class of llm.c's tail loop: one vector too many",
           "kernels/activation.cu", "if (v >= vectors) break;\n            Bf16Pairs y;\n            for (int i = 0; i < 4; ++i) {\n                y[i] = gelu_of_pair",
           "if (v > vectors) break;\n            Bf16Pairs y;\n            for (int i = 0; i < 4; ++i) {\n                y[i] = gelu_of_pair",
           "dev/activation", "gelu.guards"),
    Mutant("embedding_guard_off_by_one", "class of llm.c's tail loop: one vector too many",
           "kernels/embedding.cu", "if (i >= row_size) return;", "if (i > row_size) return;", "dev/embedding", "backward again, guards"),
    Mutant("evaluation_writes_gradients", "llm.c cuda_common.h: False is true, so validation writes dlogits",
           "kernels/classifier.cu", "            if (p.gradient_scale) {\n                const float factor",
           "            {\n                const float factor", "dev/classifier", "classifier.logits_untouched 17x257"),
    Mutant("odd_last_column_ignored", "llm.c fused_classifier.cuh: the tail of a row is wrong unless V is a lucky number",
           "kernels/classifier.cu", "if (column >= V)\n            x[i] = fill_pair;", "if (column + 1 >= V)\n            x[i] = fill_pair;",
           "dev/classifier", "classifier.gradient 17x257"),
    Mutant("padding_takes_part", "llm.c fused_classifier.cuh: the tail of a row is wrong unless V is a lucky number",
           "kernels/classifier.cu", "else if (column + 1 >= V)", "else if (column + 1 > V)", "dev/classifier", "classifier.losses 17x257"),
    Mutant("loss_of_probability", "llm.c: the loss is -log(probability), infinite where that underflows",
           "kernels/classifier.cu", "p.losses[row] = logf(softmax.sum) - (logit - softmax.max);",
           "p.losses[row] = -logf(exp_difference(logit, softmax.max) / softmax.sum);",
           "dev/classifier", "classifier.losses 7x257 of 384, std 10000"),
    Mutant("gradients_in_e4m3", "class of llmq's quant.cu: gradients in another format than the recipe says",
           "trainer/recipe.cpp", ".grad_input = {kE5m2, kE4m3, false}", ".grad_input = {kE4m3, kE4m3, false}",
           "dev/linear", "linear.dx tensorwise"),
    Mutant("weight_gradient_with_weight_scale", "class of llmq's bias gradient: a GEMM gets another operand's scale",
           "trainer/linear.cpp", ".b_scale = &input_slot->inv_scale}", ".b_scale = &weight_slot->inv_scale}",
           "dev/linear", "linear.dW written tensorwise"),
    Mutant("micro_batches_overwrite", "class of llm.c's False that is true: gradients overwritten, not accumulated",
           "trainer/linear.cpp", "!starts_gradients(position)", "!starts_gradients(position) && false",
           "dev/linear", "linear.dW accumulated bf16"),
    Mutant("gradients_never_start_anew", "class of llm.c's False that is true: the step before stays in the gradients",
           "trainer/linear.cpp", "!starts_gradients(position)", "!starts_gradients(position) || true",
           "dev/linear", "linear.dW written"),
    Mutant("head_gradient_overwritten", "class of llm.c's False that is true: the tied gradient keeps the last micro-batch's head only",
           "trainer/gpu_model.cpp", "const bool accumulate = first > 0 || !starts_gradients(parameters_.unit_position(*position));", "const bool accumulate = first > 0;",
           "dev/engines", "gradients bf16 L2 C64"),
    Mutant("attention_forward_ignores_the_diagonal", "class of a causal mask off by one: a query does not see its own key",
           "kernels/attention/hopper_forward.cu", "- (i / 4 * 8 + i % 2) < 0) s[i] = -INFINITY;", "- (i / 4 * 8 + i % 2) <= 0) s[i] = -INFINITY;",
           "dev/attention", "attention.out [hopper] D64 normal"),
    Mutant("attention_forward_of_another_group", "class of grouped heads: query head h reads key head h % KV",
           "kernels/attention/hopper_forward.cu", "work.h / (a.H / a.KV)", "work.h % a.KV", "dev/attention", "attention.out [hopper] D128 normal"),
    Mutant("attention_backward_sees_the_next_key", "class of a causal mask off by one: the gradient of a query takes in the next key",
           "kernels/attention/hopper_backward.cu", "difference > 0 : difference < 0) s[i]", "difference > 0 : difference < -1) s[i]",
           "dev/attention", "attention.dq [hopper] D64 normal"),
]

NOT_APPLICABLE = [
    ("llmq adamw.cu: constant seed of the momentum's stochastic rounding", "nothing is rounded stochastically: moments are FP32"),
    ("llmq encoder.cu: stochastic rounding of the embedding gradient disabled", "the embedding gradient is accumulated in FP32"),
    ("llmq kernel_utils.cuh: 8 global atomicMax a block", "costs time, changes no result: no test can fail; block_amax_to_slot does one"),
]

# ----------------------------------------------------------------------------------------------------------------------
# Building, in a copy of the repository


class Workspace:
    """A copy of the sources and of the objects that the repository's build has already, with their times."""

    def __init__(self, folder, build):
        self.root, self.build = folder / "repository", build
        self.objects, self.pristine = self.root / build, folder / "pristine"
        for name in ("kernels", "trainer", "data", "dev", "tests"):
            shutil.copytree(ROOT / name, self.root / name, ignore=lambda where, names: [
                n for n in names if n == "__pycache__" or os.path.islink(os.path.join(where, n))])
        for name in ("Makefile", "train_gpt_fp8.cu"):
            shutil.copy2(ROOT / name, self.root / name)
        if (ROOT / "deps").exists():
            (self.root / "deps").symlink_to(ROOT / "deps")
        shutil.copytree(ROOT / build, self.objects, ignore=lambda where, names: [
            n for n in names if os.path.isfile(os.path.join(where, n)) and not n.endswith((".o", ".d", "commit.txt"))])

    def make(self, program):
        commit = (self.objects / "commit.txt").read_text().strip()
        # Without the folder's name in the hash, ccache knows what another copy compiled.
        environment = dict(os.environ, CCACHE_NOHASHDIR="1", MAKEFLAGS="")  # those of `make test` are not for it
        done = subprocess.run(["make", "-s", "-j1", f"BUILD={self.build}", f"COMMIT={commit}", f"{self.build}/{program}"], cwd=self.root,
                              env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"does not build:\n{done.stdout}{done.stderr}")
        return self.objects / program

    def remember(self):
        shutil.copytree(self.objects, self.pristine)

    @contextlib.contextmanager
    def planted(self, mutant):
        path = self.root / mutant.file
        text, status = path.read_text(), path.stat()
        path.write_text(mutated(mutant, text))
        try:
            yield
        finally:
            path.write_text(text)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            self.restore_objects()

    def restore_objects(self):
        for path in self.objects.rglob("*"):
            before = self.pristine / path.relative_to(self.objects)
            if not path.is_file():
                continue
            if not before.exists():
                path.unlink()
            elif before.stat().st_mtime_ns != path.stat().st_mtime_ns:
                shutil.copy2(before, path)


def mutated(mutant, text):
    found = text.count(mutant.old)
    if found != 1:
        raise RuntimeError(f"{mutant.file}: the line to change occurs {found} times, must be once: {mutant.old}")
    return text.replace(mutant.old, mutant.new)


def packed(folder, variant, program):
    return folder / f"{variant}.{pathlib.Path(program).name}.xz"


def pack(binary, target):
    with tempfile.TemporaryDirectory() as temporary:
        stripped = pathlib.Path(temporary) / "stripped"
        subprocess.run(["strip", "-o", stripped, binary], check=True)
        target.write_bytes(lzma.compress(stripped.read_bytes()))


def unpack(source, folder):
    target = folder / source.stem
    target.write_bytes(lzma.decompress(source.read_bytes()))
    target.chmod(0o755)
    return target


# ----------------------------------------------------------------------------------------------------------------------
# Running


def failed_tests(output):
    """Names of GoogleTest, also of a test that crashed; of dev programs what stands before the figure."""
    failed = re.findall(r"^\[  FAILED  \] ([A-Za-z][^\s,]+)", output, re.M)
    failed += [line.split(" | ")[0] + " " for line in output.splitlines() if line.endswith("| FAIL")]
    ran = re.findall(r"^\[ RUN      \] (\S+)", output, re.M)
    if ran and not re.search(r"^\[==========\] .* ran\.", output, re.M):
        failed.append(ran[-1])
    return failed


def run(binary, arguments, root):
    try:
        done = subprocess.run([str(binary), *arguments], cwd=root, capture_output=True, text=True, errors="replace", timeout=600,
                              env=dict(os.environ, OMP_WAIT_POLICY="passive"))
        return done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as expired:
        return -1, (expired.stdout or b"").decode(errors="replace") + "\ntimed out"


def verdict(mutant, status, output):
    """(status, figure)"""
    if status == NO_GPU and mutant.on_gpu:
        return "skip", "built; no GPU to run it"
    if status == 0:
        return "fail", f"survives: {mutant.program} passes"
    failed = failed_tests(output)
    matches = [name for name in failed if name == mutant.test or (mutant.on_gpu and name.startswith(mutant.test))]
    if not matches:
        return "fail", f"not killed by {mutant.test}, but by {failed[:3] or output[-300:]}"
    return "pass", f"killed by {matches[0].strip()}" + (f" and {len(set(failed)) - 1} more" if len(set(failed)) > 1 else "")


class Results:
    WORDS = {"pass": "ok", "fail": "FAIL", "skip": "skipped"}

    def __init__(self):
        self.tests = []

    def add(self, name, status, figure):
        self.tests.append({"name": name, "status": status, "figure": figure})
        print(f"{name}: {self.WORDS[status]}: {figure}", flush=True)

    def original(self, program, arguments, status, output):
        skipped = status == NO_GPU
        text = "no GPU" if skipped else "passes" if status == 0 else "fails without a mutant: " + (str(failed_tests(output)[:3]) + output[-500:])
        self.add(" ".join(["unmutated", program, *arguments]), "skip" if skipped else "pass" if status == 0 else "fail", text)

    def mutant(self, mutant, status, figure):
        self.add(f"{mutant.name} ({mutant.bug})", status, figure)

    def close(self, json_file):
        if json_file:
            pathlib.Path(json_file).write_text(json.dumps({"tests": self.tests, "bench": []}, indent=1) + "\n")
        count = collections.Counter(test["status"] for test in self.tests)
        print(f"{count['pass']} passed, {count['fail']} failed, {count['skip']} skipped")
        return 1 if count["fail"] else 0


def runs_of(mutants):
    """Distinct (program, arguments), in order."""
    return list(dict.fromkeys((m.program, tuple(m.arguments)) for m in mutants))


def build_and_run(mutants, build, results):
    with tempfile.TemporaryDirectory(prefix="mutants_") as temporary:
        work = Workspace(pathlib.Path(temporary), build)
        for program, arguments in runs_of(mutants):
            results.original(program, arguments, *run(work.make(program), arguments, work.root))
        work.remember()
        for mutant in mutants:
            try:
                with work.planted(mutant):
                    results.mutant(mutant, *verdict(mutant, *run(work.make(mutant.program), mutant.arguments, work.root)))
            except RuntimeError as error:
                results.mutant(mutant, "fail", str(error))


def build_only(mutants, build, folder, results):
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutants_") as temporary:
        work = Workspace(pathlib.Path(temporary), build)
        for program in dict.fromkeys(m.program for m in mutants):
            pack(work.make(program), packed(folder, ORIGINAL, program))
        work.remember()
        for mutant in mutants:
            try:
                with work.planted(mutant):
                    pack(work.make(mutant.program), packed(folder, mutant.name, mutant.program))
                results.mutant(mutant, "skip", f"built, {packed(folder, mutant.name, mutant.program).stat().st_size / 1e6:.1f} MB")
            except RuntimeError as error:
                results.mutant(mutant, "fail", str(error))


def run_built(mutants, folder, results):
    """Several at a time: most of a run is the start of CUDA and the host's references."""
    with tempfile.TemporaryDirectory(prefix="mutants_") as temporary, concurrent.futures.ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        def start(variant, program, arguments):
            def unpack_and_run():
                own = pathlib.Path(temporary) / f"{variant}.{'_'.join(arguments)}"
                own.mkdir(parents=True, exist_ok=True)
                binary = unpack(packed(folder, variant, program), own)
                try:
                    return run(binary, arguments, ROOT)
                finally:
                    binary.unlink()
            return pool.submit(unpack_and_run)

        originals = [(program, arguments, start(ORIGINAL, program, arguments)) for program, arguments in runs_of(mutants)]
        runs = [(mutant, start(mutant.name, mutant.program, mutant.arguments)) for mutant in mutants]
        for program, arguments, done in originals:
            results.original(program, arguments, *done.result())
        for mutant, done in runs:
            try:
                results.mutant(mutant, *verdict(mutant, *done.result()))
            except FileNotFoundError as error:
                results.mutant(mutant, "fail", f"not built: {error.filename}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default="build/sm_90a")
    parser.add_argument("--build-only", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--run-built", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--host", action="store_true", help="only those that need no GPU")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()

    unknown = set(options.only or []) - {m.name for m in MUTANTS}
    if unknown:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    mutants = [m for m in MUTANTS if not options.only or m.name in options.only]
    if options.build_only or options.run_built:
        mutants = [m for m in mutants if m.on_gpu]
    elif options.host:
        mutants = [m for m in mutants if not m.on_gpu]
    for mutant in MUTANTS:  # also those that are not asked for: a line that has changed must be found out where there is no GPU
        mutated(mutant, (ROOT / mutant.file).read_text())
    if options.list:
        for mutant in mutants:
            print(f"{mutant.name}: {mutant.bug}\n    {mutant.file} -> {mutant.program}: {mutant.test}")
    results = Results()
    if options.build_only:
        build_only(mutants, options.build, options.build_only, results)
    elif options.run_built:
        run_built(mutants, options.run_built, results)
    elif not options.list:
        build_and_run(mutants, options.build, results)
    for bug, reason in NOT_APPLICABLE:
        print(f"does not apply: {bug}: {reason}")
    return results.close(options.json) if not options.list else 0


if __name__ == "__main__":
    sys.exit(main())
