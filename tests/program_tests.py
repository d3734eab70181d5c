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
# Looking at a run and using its checkpoint

QUESTIONS = ROOT / "tests" / "data" / "questions.jsonl"


def test_looking_does_not_change_the_run():
    """Samples, questions, evaluations and a profile between the steps: the same bits as without."""
    with Scratch() as out:
        common = [*TINY, "--recipe", "tensorwise", "--steps", "6"]
        train(*common, "--eval-every", "0", "--out", str(out / "plain"))
        looks = ["--eval-every", "2", "--multiple-choice", str(QUESTIONS), "--sample-every", "1", "--samples", "2", "--max-tokens", "5", "--profile", "2"]
        train(*common, *looks, "--out", str(out / "looked"))
        assert checkpoint_bytes(out / "plain", 6) == checkpoint_bytes(out / "looked", 6)
        assert [r["step"] for r in records(out / "looked", "sample")] == [s for s in range(1, 7) for _ in range(2)]


def test_samples_are_logged_and_follow_from_their_key():
    with Scratch() as out:
        common = [*TINY, "--steps", "2", "--sample-every", "1", "--samples", "2", "--max-tokens", "12", "--prompt", 'a "quote"\n']
        for name, more in (("a", []), ("b", []), ("seed", ["--seed", "2"]), ("cold", ["--temperature", "0"])):
            train(*common, *more, "--out", str(out / name))
        texts = {name: [r["text"] for r in records(out / name, "sample")] for name in ("a", "b", "seed", "cold")}
        assert texts["a"] == texts["b"] and texts["a"] != texts["seed"]
        assert texts["a"][0] != texts["a"][1] and texts["cold"][0] == texts["cold"][1], texts
        assert all(r["prompt"] == 'a "quote"\n' for r in records(out / "a", "sample"))


def test_generate_from_a_checkpoint():
    with Scratch() as out:
        train(*TINY, "--steps", "2", "--out", str(out / "run"))

        def generate(*options):
            return train("--device", "cpu", "--max-tokens", "20", "--prompt", "int main", *options)
        folder, run = generate("--generate", str(out / "run" / "step_000002")), generate("--generate", str(out / "run"))
        assert folder.stdout == run.stdout and folder.stdout.startswith("int main") and len(folder.stdout) > len("int main\n"), folder.stdout
        assert generate("--generate", str(out / "run"), "--seed", "9").stdout != run.stdout
        three = generate("--generate", str(out / "run"), "--samples", "3").stdout
        assert three.count("int main") == 3 and "--- sample 3" in three
        for where, mention in (("/nonexistent", "/nonexistent"), (str(out), "holds no checkpoint")):
            done = train("--device", "cpu", "--generate", where, ok=False)
            assert len(done.stderr.splitlines()) == 1 and mention in done.stderr, done.stderr


def test_multiple_choice():
    with Scratch() as out:
        train(*TINY, "--steps", "4", "--multiple-choice", str(QUESTIONS), "--out", str(out / "run"))
        found = records(out / "run", "choices")
        questions = len(QUESTIONS.read_text().splitlines())
        assert [r["step"] for r in found] == [0, 4] and all(r["questions"] == questions for r in found), found
        for r in found:
            for name in ("accuracy", "accuracy_by_token", "accuracy_by_byte"):
                assert math.isclose(r[name + "_stderr"], math.sqrt(r[name] * (1 - r[name]) / (questions - 1)), abs_tol=1e-9), r
        done = train("--device", "cpu", "--evaluate", str(out / "run"), "--multiple-choice", str(QUESTIONS), "--val", str(SHARDS), "--eval-tokens", "512")
        assert f"{questions} questions | accuracy {100 * found[-1]['accuracy']:.2f}" in done.stdout and "val loss" in done.stdout, done.stdout


def test_profile_of_the_host():
    with Scratch() as out:
        done = train(*TINY, "--steps", "4", "--profile", "2", "--eval-every", "0", "--out", str(out / "run"))
        table = done.stdout[done.stdout.index("profile of 2 steps"):]
        assert "backward matmul" in table and "phases | forward" in table, table
        shares = [float(line.split()[1]) for line in table.splitlines()[2:12]]
        assert len(shares) == 10 and shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100.5, table


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


def test_cudnn_is_not_linked():
    """It is opened when --attention cudnn asks for it, so that a machine without it runs everything else."""
    needed = subprocess.run(["readelf", "-d", str(program())], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed and "cudnn" not in needed, needed
