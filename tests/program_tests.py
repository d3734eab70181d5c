"""Tests of the program as a user runs it, on the reference device: learning, resuming, refusing; survival_tests.py disturbs it."""
import json
import math
import os
import re
import shutil
import subprocess
import time

from program_runs import ROOT, SHARDS, TINY, Scratch, checkpoint_bytes, program, records, train, without_stdout


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


def test_a_command_whose_output_is_lost_fails():
    with Scratch() as out:
        train(*TINY, "--steps", "2", "--eval-every", "0", "--out", str(out / "run"))
        run = str(out / "run")
        for options in (["--help"], ["-h"], ["--help-markdown"], [*TINY, "--print-config"], ["--verify", "--device", "cpu"], ["--dry-run", "--model", "gpt2-124M"],
                        ["--generate", run, "--device", "cpu", "--max-tokens", "5"],
                        ["--evaluate", run, "--device", "cpu", "--val", str(SHARDS), "--eval-tokens", "512"]):
            with open("/dev/full", "w") as full:
                done = subprocess.run([str(program()), *options], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=600)
            errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
            assert done.returncode == 1 and len(errors) == 1 and "standard output" in errors[0] and "No space left" in errors[0], f"{options}: {done.returncode} {done.stderr}"
            done = without_stdout(*options)
            assert done.returncode == 1 and "standard output" in done.stderr, f"{options}: {done.returncode} {done.stderr}"


def test_a_printed_configuration_is_the_same_at_any_time():
    with Scratch() as out:
        options = [*TINY[:-2], "--steps", "60", "--micro-batch", "auto", "--prompt", 'a "b"\n']  # without its warm-up
        first = train(*options, "--print-config").stdout
        time.sleep(1.1)  # a folder's date has seconds
        assert train(*options, "--print-config").stdout == first
        (out / "run.toml").write_text(first)
        assert train("--config", str(out / "run.toml"), "--print-config").stdout == first
        for name in ("a", "b"):  # a file for any number of runs
            train("--config", str(out / "run.toml"), "--micro-batch", "4", "--steps", "3", "--eval-every", "0", "--out", str(out / name))
        assert "warmup-steps = 0\n" in (out / "a" / "config.toml").read_text() and "# warmup-steps = 3\n" in first, first


def test_resume_takes_a_run():
    with Scratch() as out:
        common = [*TINY, "--eval-every", "0", "--checkpoint-every", "2", "--keep", "0"]
        train(*common, "--steps", "6", "--out", str(out / "run"))
        for options in (["--out", str(out / "new")], ["--out", str(out / "auto"), "--micro-batch", "auto"]):
            done = train(*common, "--steps", "7", *options, "--resume", str(out / "run"))
            assert f"start   step 6 of {out / 'run' / 'step_000006'}" in done.stdout and done.stderr == "", done.stdout + done.stderr
        file = out / "run" / "step_000006" / "adam.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        done = train(*common, "--steps", "7", "--resume", str(out / "run"), "--out", str(out / "run"))
        assert "start   step 4 of" in done.stdout and "passed over" in done.stderr and str(file) in done.stderr, done.stdout + done.stderr
        for where, mention in ((str(out), "holds no checkpoint"), (str(SHARDS / "meta.json"), "no such folder")):
            done = train(*common, "--steps", "9", "--resume", where, "--out", str(out / "other"), ok=False)
            assert len(done.stderr.splitlines()) == 1 and mention in done.stderr and where in done.stderr, done.stderr
            assert not (out / "other").exists(), "a refused run left a folder"


def test_short_help_is_help():
    assert train("-h").stdout == train("--steps", "5", "-h").stdout == train("--help").stdout != ""


def test_bad_input_is_one_clear_line():
    cases = [
        (["--recipe", "fp4"], "--recipe"),
        (["--model", "gpt5"], "--model"),
        (["--n-heads", "5"], "--n-heads"),
        (["--global-batch-tokens", "500"], "--global-batch-tokens"),
        (["--train", "/nonexistent/folder"], "/nonexistent/folder"),
        (["--vocab-size", "100"], "tokenizer bytes; give --vocab-size 257"),  # the shards hold larger token ids
        (["--val", "/nonexistent/folder", "--eval-every", "0"], "/nonexistent/folder"),
        (["--val", "/nonexistent/folder", "--eval-every", "0", "--dry-run"], "/nonexistent/folder"),
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
        same_size = shutil.copytree(SHARDS, out / "same_size")
        for shard in same_size.glob("train*.bin"):
            data = shard.read_bytes()
            shard.write_bytes(data[:len(data) // 2] + bytes(len(data) - len(data) // 2))
        cases = [
            (["--resume", first, "--out", str(out / "b"), "--train", str(out / "shards")], "--train"),   # other data
            (["--resume", first, "--out", str(out / "b"), "--train", str(same_size)], "but other text"),
            (["--resume", first, "--out", first + "/new"], "lies in checkpoint"),
            (["--resume", first, "--out", str(out / "b"), "--steps", "2"], "--steps 2"),                   # nothing to do
            (["--resume", first, "--out", str(out / "b"), "--seed", "5"], "--seed 5"),
            (["--out", str(out / "run")], "--out"),                                                        # somebody's folder
        ]
        for options, mention in cases:
            done = train(*TINY, "--steps", "4", *options, ok=False)
            lines = done.stderr.strip().splitlines()
            assert len(lines) == 1 and mention in lines[0], f"{options}: {done.stderr!r}"
        done = train(*TINY, "--steps", "3", "--resume", first, "--out", str(out / "c"), "--lr", "2e-3", "--beta2", "0.9")
        assert re.search(r"^note: checkpoint \S+ goes on with --lr 0.002 \(was 0.001\), --beta2 0.9 \(was 0.95\)$", done.stdout, re.M), done.stdout


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


def test_options_beside_a_mode():
    with Scratch() as out:
        train(*TINY, "--steps", "2", "--eval-every", "0", "--out", str(out / "run"))
        plain = train("--device", "cpu", "--max-tokens", "5", "--generate", str(out / "run"))
        more = train("--device", "cpu", "--max-tokens", "5", "--generate", str(out / "run"), "--steps", "100", "--recipe", "bf16")
        assert more.stdout == plain.stdout and "note: --generate has no use for --recipe, --steps\n" in more.stderr, more.stderr
        assert "note" not in plain.stderr and train(*TINY, "--dry-run", "--prompt", "x").stderr == ""


def test_what_is_no_regular_file_is_refused_at_once():
    with Scratch() as out:
        common = [*TINY, "--eval-every", "0", "--steps", "2"]
        train(*common, "--out", str(out / "run"))
        pipe = out / "pipe"
        os.mkfifo(pipe)
        for name in ("log", "header", "weights"):
            shutil.copytree(out / "run", out / name)
        for file in ("log/log.jsonl", "header/step_000002/checkpoint.json", "weights/step_000002/params.safetensors"):
            (out / file).unlink()
            os.mkfifo(out / file)
        cases = [[*common, "--train", str(pipe)], [*common, "--val", str(pipe)], [*common, "--multiple-choice", str(pipe)], [*common, "--multiple-choice", "/dev/zero"],
                 [*common, "--init-from", str(out / "header")], [*common, "--resume", str(out / "header" / "step_000002")],
                 [*common, "--steps", "3", "--resume", str(out / "weights")], [*common, "--steps", "3", "--resume", "auto", "--out", str(out / "log")],
                 ["--device", "cpu", "--generate", str(out / "header")], ["--device", "cpu", "--evaluate", str(out / "weights"), "--val", str(SHARDS)]]
        for options in cases:
            done = subprocess.run([str(program()), *options, *([] if "--out" in options else ["--out", str(out / "new")])], cwd=ROOT, capture_output=True, text=True, timeout=20)
            errors = [line for line in done.stderr.splitlines() if not line.startswith("note")]
            assert done.returncode == 1 and len(errors) == 1 and "is not a regular file" in errors[0], f"{options}: {done.stderr!r}"
        done = subprocess.run(["bash", "-c", 'exec "$0" "$@" --print-config --config <(echo steps = 7)', str(program()), *TINY], cwd=ROOT, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0 and "steps = 7\n" in done.stdout, done.stderr


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
        done = train(*TINY, "--steps", "4", "--profile", "2", "--profile-trace", str(out / "trace.json"), "--eval-every", "0", "--out", str(out / "run"))
        table = done.stdout[done.stdout.index("profile of 2 steps"):]
        assert "backward matmul" in table and "phases | forward" in table, table
        shares = [float(line.split()[1]) for line in table.splitlines()[2:12]]
        assert len(shares) == 10 and shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100.5, table
        events = [e for e in json.loads((out / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
        assert any(e["name"] == "backward matmul" and e["dur"] > 0 for e in events) and min(e["ts"] for e in events) == 0, events[:3]
        done = train(*TINY, "--steps", "4", "--profile", "2", "--profile-trace", str(out / "no/folder.json"), "--eval-every", "0", "--out", str(out / "again"))
        assert "--profile-trace" in done.stderr and "cannot be written: No such file" in done.stderr, done.stderr
        assert "--profile-trace x.json: needs --profile N" in train(*TINY, "--profile-trace", "x.json", ok=False).stderr


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
    start = time.monotonic()
    done = train("--dry-run", "--device", "cpu", "--model", "gpt2-1558M", "--steps", "1000000000000")
    assert "assumed: 5 GFLOP/s" in done.stdout and "years for 1000000000000 steps" in done.stdout and time.monotonic() - start < 20, done.stdout
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
# Starting from what another run left


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
