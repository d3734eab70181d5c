"""Tests of the program as a user runs it, on the reference device: learning, resuming, refusing."""
import contextlib
import json
import math
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time

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


class Skipped(Exception):
    """This machine cannot run the test; the text says why."""


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


def test_table_of_options_is_current():
    assert (ROOT / "OPTIONS.md").read_text() == train("--help-markdown").stdout, "OPTIONS.md is stale: make options"


def test_a_run_from_a_file_saves_its_configuration():
    with Scratch() as out:
        text = "".join(f'{a.removeprefix("--")} = {b if b[0].isdigit() else json.dumps(b)}\n' for a, b in zip(TINY[::2], TINY[1::2]))
        (out / "run.toml").write_text(text)
        done = train("--config", str(out / "run.toml"), "--steps", "2", "--out", str(out / "a # b"))
        assert (out / "a # b" / "config.toml").read_text() == records(out / "a # b", "run")[0]["config"]
        assert f'out = "{out}/a # b"' in done.stdout, done.stdout
        train("--config", str(out / "a # b" / "config.toml"), "--out", str(out / "again"))
        assert checkpoint_bytes(out / "a # b", 2) == checkpoint_bytes(out / "again", 2)


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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with Scratch() as out:
            process = subprocess.Popen([str(program()), *TINY, "--steps", "100000", "--eval-every", "0", "--out", str(out / "run")], cwd=ROOT,
                                       stdout=subprocess.PIPE, text=True)
            for line in process.stdout:
                if line.startswith("step 3/"):
                    process.send_signal(number)
                    break
            process.communicate(timeout=120)
            assert process.returncode == 0, f"{number.name}: exit status {process.returncode}"
            assert list((out / "run").glob("step_*/checkpoint.json")), f"no checkpoint after {number.name}"


def test_nohup_survives_the_end_of_a_terminal():
    with Scratch() as out:
        with Running(*TINY, "--steps", "100000", "--eval-every", "0", "--out", str(out / "run"),
                     preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as run:
            run.wait_for("step 2/")
            run.process.send_signal(signal.SIGHUP)
            at = len(records(out / "run", "step"))
            run.wait_for(f"step {at + 20}/")
            assert run.stop() == 0


def test_output_that_nobody_reads_does_not_end_the_run():
    with Scratch() as out:
        process = subprocess.Popen([str(program()), *TINY, "--steps", "30", "--eval-every", "0", "--out", str(out / "run")], cwd=ROOT, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step 2/"):
                break
        process.stdout.close()
        errors = process.stderr.read().splitlines()
        process.stderr.close()
        assert process.wait(timeout=120) == 0, f"exit status {process.returncode}: {errors}"
        assert [r["step"] for r in records(out / "run", "step")] == list(range(1, 31)) and complete_checkpoints(out / "run") == [30]
        assert len(errors) == 1 and "standard output" in errors[0] and "log.jsonl" in errors[0], errors


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


# ----------------------------------------------------------------------------------------------------------------------
# Modes


def test_verify_and_dry_run():
    done = train("--verify", "--device", "cpu")
    assert "linears 48 of 49 in FP8" in done.stdout and "verify: ok" in done.stdout, done.stdout
    assert "twice the same bits" in done.stdout or "equal bits" in done.stdout, done.stdout
    done = train("--dry-run", "--model", "gpt2-1558M", "--micro-batch", "16")
    for part in ("1557611200 parameters", "master weights (FP32)", "mlp.c_fc (6400 x 1600, 48 blocks)", "FP8", "a step,"):
        assert part in done.stdout, f"{part}: {done.stdout}"
    big = ["--dry-run", "--model", "gpt2-1558M", "--micro-batch", "16", "--device", "auto"]
    four = {mode: subprocess.run([str(program()), *big, "--shard", mode], cwd=ROOT, capture_output=True, text=True, timeout=60,
                                 env={**os.environ, "RANK": "0", "WORLD_SIZE": "4"}).stdout for mode in ("none", "full")}  # as a launcher would start them
    assert "NCCL's buffers" in four["none"] and "gathered weights" not in four["none"] and "4 groups of 1" in four["none"], four["none"]
    assert "gathered weights" in four["full"] and "1 groups of 4" in four["full"], four["full"]
    other = subprocess.run([str(program()), *big], cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, "RANK": "1", "WORLD_SIZE": "4"})
    assert other.returncode == 0 and other.stdout == "", other.stdout  # one rank tells
    done = train(*TINY, "--dry-run")
    assert "measured on one micro-batch" in done.stdout and "tokens in 1 shards" in done.stdout, done.stdout


def test_micro_batch_auto_is_recorded_and_kept():
    with Scratch() as out:
        common = [*TINY, "--micro-batch", "auto", "--eval-every", "0", "--out", str(out / "run"), "--resume", "auto"]
        first = train(*common, "--steps", "2").stdout
        config = (out / "run" / "config.toml").read_text()
        chosen = [line for line in config.splitlines() if line.startswith("micro-batch = ")][0].split()[-1]
        assert chosen in ("8", "4", "2", "1") and f"micro-batch auto: {chosen}\n" in first, first + config
        assert f"micro-batch auto: {chosen}, as in checkpoint" in train(*common, "--steps", "3").stdout
        other = "2" if chosen != "2" else "4"
        done = train(*TINY, "--micro-batch", other, "--eval-every", "0", "--out", str(out / "run"), "--resume", "auto", "--steps", "4")
        assert f"was trained with --micro-batch {chosen} and goes on with {other}" in done.stdout, done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Runs that are disturbed


def complete_checkpoints(out):
    return sorted(int(p.parent.name.removeprefix("step_")) for p in out.glob("step_*/checkpoint.json"))


def kill_at_random_moments(kills, steps=30):
    """kill -9 at random moments of runs that save every step; each goes on from its newest checkpoint to the same bits."""
    command = [str(program()), *TINY, "--recipe", "tensorwise", "--steps", str(steps), "--eval-every", "0", "--checkpoint-every", "1", "--keep", "2"]
    with Scratch() as out:
        start = time.monotonic()
        train(*command[1:], "--out", str(out / "whole"))
        whole_s = time.monotonic() - start
        expected = checkpoint_bytes(out / "whole", steps)
        done, run = 0, 0
        while done < kills:
            folder = out / f"run{run}"
            run += 1
            finished = False
            while not finished:
                process = subprocess.Popen([*command, "--out", str(folder), "--resume", "auto"], cwd=ROOT, stdout=subprocess.DEVNULL,
                                           stderr=subprocess.PIPE, text=True)
                if done < kills:
                    try:
                        process.wait(random.uniform(0, 0.6 * whole_s))
                    except subprocess.TimeoutExpired:
                        process.kill()
                        done += 1
                error = process.communicate(timeout=300)[1]
                was_done = process.returncode == 1 and "nothing to do" in error  # killed between its last save and its end
                assert process.returncode in (0, -9) or was_done, f"after {done} kills: exit status {process.returncode}: {error}"
                assert "passed over" not in error, f"after {done} kills: a kill left a checkpoint that does not load: {error}"
                finished = process.returncode == 0 or was_done
            assert checkpoint_bytes(folder, steps) == expected, f"run {run} after {done} kills ends with other bits"
            logged = [r["step"] for r in records(folder, "step")]
            assert logged == list(range(1, steps + 1)), f"the log holds steps {logged}"
            shutil.rmtree(folder)
        return done, run


def test_kill_at_random_moments():
    kill_at_random_moments(int(os.environ.get("KILLS", "6")))


class SmallDisk:
    """A file system of a few megabytes."""

    def __init__(self, megabytes):
        self.size = megabytes

    def __enter__(self):
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="train_gpt_fp8_disk_"))
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.size}m", "tmpfs", str(self.path)], capture_output=True, text=True)
        if made.returncode != 0:
            self.path.rmdir()
            raise Skipped(f"cannot mount a small file system here: {made.stderr.strip()}")
        return self

    def remount(self, mode):
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.path)], check=True)

    def __exit__(self, *_):
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)
        self.path.rmdir()


class Running:
    """A run whose output is read line by line."""

    def __init__(self, *options, **how):
        self.lines = []
        self.process = subprocess.Popen([str(program()), *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)

    def wait_for(self, *texts, limit_s=120):
        """Until each of the texts has been seen from now on, in any order."""
        missing = set(texts)
        timer = threading.Timer(limit_s, self.process.kill)
        timer.start()
        for line in self.process.stdout:
            self.lines.append(line)
            missing = {text for text in missing if text not in line}
            if not missing:
                break
        timer.cancel()
        assert not missing, f"ended without {missing}: {''.join(self.lines[-20:])}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    @contextlib.contextmanager
    def held(self):
        """The process stands still."""
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        yield
        self.process.send_signal(signal.SIGCONT)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.lines += self.process.communicate(timeout=120)[0].splitlines(True)
        return self.process.returncode


def fill(file):
    with open(file, "ab", buffering=0) as stream:
        for size in (65536, 4096, 1):
            try:
                while stream.write(b"x" * size) == size:
                    pass
            except OSError:
                pass


def full_disk_and_back(run, out, filler):
    """Saves fail while the disk is full, and succeed when it has room again."""
    run.wait_for("saved /")
    for _ in range(4):  # a save that fails in the middle frees what it had taken
        with run.held():
            fill(filler)
        time.sleep(0.2)
    run.wait_for("training goes on, the newest checkpoint is", "its lines wait in memory")
    with run.held():
        assert complete_checkpoints(out), "a failing save took the checkpoint before it"
        filler.unlink()
    run.wait_for("nothing was lost", "saved /")


def test_a_full_disk_leaves_the_run_alive_and_a_read_only_one_is_refused():
    with SmallDisk(6) as disk:
        out = disk.path / "run"
        options = [*TINY, "--eval-every", "0", "--keep", "1", "--out", str(out)]
        with Running(*options, "--steps", "1000000", "--checkpoint-every", "5") as run:
            full_disk_and_back(run, out, disk.path / "filler")
            status = run.stop()
            assert status == 0, f"exit status {status}: {''.join(run.lines[-10:])}"
        steps = [r["step"] for r in records(out, "step")]
        assert steps == list(range(1, steps[-1] + 1)), "the log lost or doubled steps"
        assert complete_checkpoints(out)[-1] == steps[-1]
        train(*options, "--steps", str(steps[-1] + 1), "--resume", "auto", "--checkpoint-every", "0")
        disk.remount("ro")
        for more, mention in ((["--out", str(disk.path / "new")], "--out"), (["--resume", "auto", "--steps", "1000000"], "log.jsonl")):
            done = train(*options, *more, ok=False)
            lines = done.stderr.strip().splitlines()
            assert len(lines) == 1 and mention in lines[0], done.stderr
        disk.remount("rw")


def test_a_save_that_fails_halfway_loses_nothing():
    """The limit lets params.safetensors through and stops adam.safetensors in its middle."""
    with Scratch() as out:
        common = [*TINY, "--eval-every", "0", "--out", str(out / "run"), "--resume", "auto", "--checkpoint-every", "2"]
        train(*common, "--steps", "2")
        before = checkpoint_bytes(out / "run", 2)
        done = subprocess.run([str(program()), *common, "--steps", "6"], cwd=ROOT, capture_output=True, text=True,
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (700000, 700000)))
        errors = done.stderr.strip().splitlines()
        assert done.returncode == 1 and "step 6/6" in done.stdout, done.stdout[-500:] + done.stderr
        assert [e.split(":")[0] for e in errors] == ["warning", "error"] and "adam.safetensors" in errors[0] and "step_000002" in errors[0], done.stderr
        assert checkpoint_bytes(out / "run", 2) == before and complete_checkpoints(out / "run") == [2]
        assert not list((out / "run").glob(".step*")), "a failed save left files"
        train(*common, "--steps", "6")


def test_damaged_checkpoints_are_one_clear_line():
    with Scratch() as out:
        run = out / "run"
        train(*TINY, "--steps", "4", "--eval-every", "0", "--checkpoint-every", "2", "--keep", "0", "--out", str(run))
        good = shutil.copytree(run / "step_000004", out / "good")
        header = json.loads((good / "checkpoint.json").read_text())
        unsealed = {key: value for key, value in header.items() if not key.startswith("checksum")}  # as older programs wrote it

        def damage(name, change):
            file = run / "step_000004" / name
            file.write_bytes(change(file.read_bytes()))

        cases = [
            (lambda: damage("params.safetensors", lambda b: b[:-4]), "params.safetensors", True),
            (lambda: damage("adam.safetensors", lambda b: b"\xff" * 16 + b[16:]), "adam.safetensors", True),
            (lambda: damage("adam.safetensors", lambda b: b[:-2] + bytes([b[-2] ^ 1]) + b[-1:]), "adam.safetensors", True),
            (lambda: damage("params.safetensors", lambda b: b[:50000] + bytes([b[50000] ^ 128]) + b[50001:]), "params.safetensors", True),
            (lambda: damage("checkpoint.json", lambda b: b.replace(b'"seed": 1337', b'"seed": 1336')), "checkpoint.json", True),
            (lambda: damage("checkpoint.json", lambda b: b[:100]), "checkpoint.json", True),
            (lambda: damage("checkpoint.json", lambda b: b""), "checkpoint.json", True),
            (lambda: damage("checkpoint.json", lambda b: json.dumps({**unsealed, "step": -1}).encode()), "step", True),
            (lambda: (run / "step_000004" / "adam.safetensors").unlink(), "adam.safetensors", True),
            (lambda: damage("checkpoint.json", lambda b: json.dumps({**unsealed, "model": {**header["model"], "n_layers": 3}}).encode()), "n-layers", False),
        ]
        for change, mention, auto_finds_another in cases:
            shutil.rmtree(run / "step_000004")
            shutil.copytree(good, run / "step_000004")
            change()
            damaged = {f.name: f.read_bytes() for f in (run / "step_000004").iterdir()}
            done = train(*TINY, "--steps", "5", "--resume", str(run / "step_000004"), "--out", str(run), ok=False)
            lines = done.stderr.strip().splitlines()
            assert mention in lines[-1] and [line.split(":")[0] for line in lines] in (["error"], ["note", "error"]), f"{mention}: {done.stderr!r}"
            assert {f.name: f.read_bytes() for f in (run / "step_000004").iterdir()} == damaged, "an error changed the checkpoint"
            if auto_finds_another:
                copy = shutil.copytree(run, out / "copy")
                done = train(*TINY, "--steps", "5", "--eval-every", "0", "--resume", "auto", "--out", str(copy))
                assert "step 2 of" in done.stdout
                assert len(done.stderr.splitlines()) == 1 and "passed over" in done.stderr and mention in done.stderr, done.stderr
                shutil.rmtree(copy)


def test_auto_does_not_begin_anew_over_damaged_checkpoints():
    with Scratch() as out:
        common = [*TINY, "--eval-every", "0", "--out", str(out / "run"), "--resume", "auto"]
        train(*common, "--steps", "2")
        file = out / "run" / "step_000002" / "params.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        log = (out / "run" / "log.jsonl").read_bytes()
        done = train(*common, "--steps", "4", ok=False)
        assert len(done.stderr.splitlines()) == 1 and str(file) in done.stderr, done.stderr
        assert (out / "run" / "log.jsonl").read_bytes() == log


def test_an_older_checkpoint_without_checksums_loads_with_a_note():
    with Scratch() as out:
        common = [*TINY, "--eval-every", "0", "--out", str(out / "run"), "--resume", "auto"]
        train(*common, "--steps", "2")
        file = out / "run" / "step_000002" / "checkpoint.json"
        header = {key: value for key, value in json.loads(file.read_text()).items() if not key.startswith("checksum")}
        file.write_text(json.dumps(header))
        done = train(*common, "--steps", "4")
        assert len(done.stderr.splitlines()) == 1 and "checksums" in done.stderr, done.stderr
        assert "checksum" in json.loads((out / "run" / "step_000004" / "checkpoint.json").read_text())


def test_fine_tuning_starts_from_weights_alone():
    with Scratch() as out:
        train(*TINY, "--steps", "60", "--eval-every", "60", "--checkpoint-every", "30", "--keep", "0", "--out", str(out / "base"))
        base = out / "base"
        eval_after = {r["step"]: r["loss"] for r in records(base, "eval")}
        for where, name in ((base, "run"), (base / "step_000060", "checkpoint"), (base / "step_000060" / "params.safetensors", "file")):
            tuned = out / name
            done = train(*TINY, "--steps", "3", "--lr", "1e-4", "--init-from", str(where), "--out", str(tuned))
            assert "start   weights of " in done.stdout, done.stdout
            assert records(tuned, "eval")[0] | {"seconds": 0} == {"kind": "eval", "step": 0, "loss": eval_after[60], "tokens": 512, "seconds": 0}, records(tuned, "eval")
            assert [r["step"] for r in records(tuned, "step")] == [1, 2, 3]
            assert records(tuned, "step")[0]["loss"] < records(base, "step")[0]["loss"] - 1
            header = json.loads((tuned / "step_000003" / "checkpoint.json").read_text())
            assert (header["step"], header["adam_t"]) == (3, 3)
        # Interrupted, it goes on as any run does: the same command with --resume auto.
        train(*TINY, "--steps", "6", "--lr", "1e-4", "--init-from", str(base), "--resume", "auto", "--out", str(out / "auto"))
        done = train(*TINY, "--steps", "8", "--lr", "1e-4", "--init-from", str(base), "--resume", "auto", "--out", str(out / "auto"))
        assert "start   step 6 of" in done.stdout, done.stdout
        (base / "step_000030" / "params.safetensors").write_bytes(b"x" + (base / "step_000030" / "params.safetensors").read_bytes()[1:])
        cases = [
            (["--init-from", str(base), "--resume", str(base / "step_000060")], "--resume"),
            (["--init-from", str(out / "none")], "no such folder"),
            (["--init-from", str(SHARDS)], "holds no checkpoint"),
            (["--init-from", str(base), "--n-layers", "3"], "n-layers is 2, this run's is 3"),
            (["--init-from", str(base / "step_000060" / "params.safetensors"), "--n-layers", "3"], "transformer.h.2"),
            (["--init-from", str(base / "step_000030")], "damaged"),
        ]
        for options, mention in cases:
            done = train(*TINY, "--steps", "3", "--out", str(out / "refused"), *options, ok=False)
            lines = done.stderr.strip().splitlines()
            assert len(lines) == 1 and mention in lines[0], f"{options}: {done.stderr!r}"


def of_tokenizer(shards, name, into):
    """The same shards, which claim another tokenizer (word 5 of their header, data/FORMAT.md)."""
    shutil.copytree(shards, into)
    for file in into.glob("*.bin"):
        bytes_ = bytearray(file.read_bytes())
        bytes_[20:24] = {"gpt2": 1, "bytes": 2}[name].to_bytes(4, "little")
        file.write_bytes(bytes_)
    return str(into)


def test_another_tokenizer_is_refused_by_both_names():
    with Scratch() as out:
        other = of_tokenizer(SHARDS, "gpt2", out / "shards")
        train(*TINY, "--steps", "2", "--out", str(out / "run"))
        run = str(out / "run")
        cases = [
            ([*TINY, "--steps", "4", "--out", str(out / "b"), "--val", other], "--val"),
            ([*TINY, "--steps", "4", "--out", str(out / "b"), "--train", other, "--val", other, "--resume", run + "/step_000002"], "--train"),
            ([*TINY, "--steps", "4", "--out", str(out / "b"), "--train", other, "--val", other, "--init-from", run], "--init-from"),
            (["--device", "cpu", "--evaluate", run, "--val", other, "--eval-tokens", "512"], "--evaluate"),
        ]
        for options, mention in cases:
            done = train(*options, ok=False)
            lines = done.stderr.strip().splitlines()
            assert len(lines) == 1 and mention in lines[0] and "gpt2" in lines[0] and "bytes" in lines[0], f"{options}: {done.stderr!r}"
