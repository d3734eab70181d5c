"""Tests of the program as a user runs it, on the reference device: learning, resuming, refusing."""
import json
import math
import os
import pathlib
import shutil
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARDS = ROOT / "shards" / "cuda_headers"
TINY = ["--model", "tiny", "--device", "cpu", "--micro-batch", "4", "--global-batch-tokens", "512", "--train", str(SHARDS), "--val", str(SHARDS),
        "--eval-every", "4", "--eval-tokens", "512", "--lr", "1e-3", "--warmup-steps", "1"]


def program():
    return pathlib.Path(os.environ.get("TRAIN_GPT_BUILD", ROOT / "build" / "sm_90a")) / "train_gpt_fp8"


def train(*options, ok=True):
    done = subprocess.run([str(program()), *options], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode == 0) == ok, f"exit status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done


def records(out, kind):
    return [r for r in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if r["kind"] == kind]


class Scratch:
    """A folder that is gone afterwards."""

    def __enter__(self):
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="train_gpt_fp8_"))
        return self.path

    def __exit__(self, *_):
        shutil.rmtree(self.path)


def checkpoint_bytes(out, step):
    folder = out / f"step_{step:06d}"
    return {f: (folder / f).read_bytes() for f in ("params.safetensors", "adam.safetensors")}


def test_learns_and_resumes_with_the_same_bits():
    for recipe in ("bf16", "tensorwise", "f32"):
        with Scratch() as out:
            common = [*TINY, "--recipe", recipe, "--steps", "8", "--checkpoint-every", "4", "--keep", "0"]
            train(*common, "--out", str(out / "whole"))
            losses = [r["loss"] for r in records(out / "whole", "step")]
            assert len(losses) == 8 and losses[-1] < losses[0] - 0.1, f"{recipe}: no learning: {losses}"

            shutil.copytree(out / "whole", out / "resumed")
            shutil.rmtree(out / "resumed" / "step_000008")
            train(*common, "--out", str(out / "resumed"), "--resume", "auto")
            assert checkpoint_bytes(out / "whole", 8) == checkpoint_bytes(out / "resumed", 8), f"{recipe}: resumed run differs"
            assert [r["loss"] for r in records(out / "resumed", "step")] == losses, f"{recipe}: resumed losses differ"


def test_learns_more_than_byte_frequencies():
    """The default corpus and model, a short run: half a nat below the entropy of single bytes, and the log says so."""
    entropy = json.loads((SHARDS / "meta.json").read_text())["val_byte_entropy_nats"]
    with Scratch() as out:
        train(*TINY, "--micro-batch", "16", "--global-batch-tokens", "4096", "--recipe", "tensorwise", "--steps", "120", "--lr", "3e-3", "--warmup-steps", "10",
              "--eval-every", "120", "--eval-tokens", "16384", "--out", str(out / "run"))
        loss = records(out / "run", "eval")[-1]["loss"]
        assert loss <= entropy - 0.5, f"validation loss {loss:.3f}, unigram entropy {entropy:.3f}"


def test_same_run_twice_is_bit_equal():
    with Scratch() as out:
        for name in ("a", "b"):
            train(*TINY, "--steps", "3", "--out", str(out / name))
        assert checkpoint_bytes(out / "a", 3) == checkpoint_bytes(out / "b", 3)


def test_interrupt_saves():
    with Scratch() as out:
        process = subprocess.Popen([str(program()), *TINY, "--steps", "100000", "--eval-every", "0", "--out", str(out / "run")], cwd=ROOT,
                                   stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(2)
                break
        process.communicate(timeout=120)
        assert process.returncode == 0, f"exit status {process.returncode}"
        assert list((out / "run").glob("step_*/checkpoint.json")), "no checkpoint after Ctrl-C"


def test_bad_input_is_one_clear_line():
    cases = [
        (["--recipe", "fp4"], "--recipe"),
        (["--model", "gpt5"], "--model"),
        (["--n-heads", "5"], "--n-heads"),
        (["--global-batch-tokens", "500"], "--global-batch-tokens"),
        (["--train", "/nonexistent/folder"], "/nonexistent/folder"),
        (["--vocab-size", "100"], "100"),  # the shards hold larger token ids
        (["--resume", "/nonexistent/step_000001"], "/nonexistent/step_000001"),
        (["--no-such-option", "1"], "--no-such-option"),
    ]
    for options, mention in cases:
        with Scratch() as out:
            done = train(*TINY, "--steps", "1", "--out", str(out / "run"), *options, ok=False)
            lines = done.stderr.strip().splitlines()
            assert len(lines) == 1 and mention in lines[0], f"{options}: {done.stderr!r}"


def test_resume_refuses_what_would_mix_runs():
    with Scratch() as out:
        train(*TINY, "--steps", "2", "--out", str(out / "run"))
        first = str(out / "run" / "step_000002")
        other = out / "other"
        other.mkdir()
        text = "".join(f"line {i} of another text\n" for i in range(20000))
        (other / "a.txt").write_text(text)
        (other / "b.txt").write_text(text[::-1])
        done = subprocess.run([str(program().parent / "data" / "prepare"), "--tokenizer", "bytes", "--val-fraction", "0.5", "--out", str(out / "shards"), str(other)],
                              cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        cases = [
            (["--resume", first, "--out", str(out / "b"), "--train", str(out / "shards")], "--train"),   # other data
            (["--resume", first, "--out", str(out / "b"), "--steps", "2"], "--steps 2"),                   # nothing to do
            (["--resume", first, "--out", str(out / "b"), "--seed", "5"], "--seed 5"),
            (["--out", str(out / "run")], "--out"),                                                        # somebody's folder
        ]
        for options, mention in cases:
            done = train(*TINY, "--steps", "4", *options, ok=False)
            lines = done.stderr.strip().splitlines()
            assert len(lines) == 1 and mention in lines[0], f"{options}: {done.stderr!r}"


def test_data_order_does_not_depend_on_the_micro_batch():
    with Scratch() as out:
        losses = []
        for micro_batch in ("2", "8"):
            train(*TINY, "--recipe", "f32", "--micro-batch", micro_batch, "--steps", "3", "--eval-every", "0", "--out", str(out / micro_batch))
            losses.append([r["loss"] for r in records(out / micro_batch, "step")])
        for a, b in zip(*losses):
            assert math.isclose(a, b, rel_tol=1e-5), losses


# ----------------------------------------------------------------------------------------------------------------------
# The build


def test_missing_optional_libraries_are_said_once():
    with Scratch() as build:
        def say(without):
            return subprocess.run(["make", "-n", "layers", f"BUILD={build}", f"WITHOUT={without}"], cwd=ROOT, capture_output=True, text=True).stderr

        first, again, changed = say("MPI NCCL"), say("MPI NCCL"), say("MPI")
        assert first.count("MPI is not here: ") == 1 and first.count("NCCL is not here: ") == 1, first
        assert "is not here" not in again, f"said again: {again}"
        assert "MPI is not here" in changed and "NCCL=" in (build / "libraries.txt").read_text(), changed
