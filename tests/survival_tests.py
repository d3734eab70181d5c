"""Tests of what a run survives, on the reference device: signals, kills, full disks, damaged checkpoints."""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time

from program_runs import ROOT, SHARDS, TINY, Running, Scratch, SmallDisk, checkpoint_bytes, complete_checkpoints, program, records, train, without_stdout


def test_interrupt_saves():
    for number, times in ((signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGHUP, 1), (signal.SIGTERM, 2), (signal.SIGINT, 3)):  # timeout signals twice
        with Scratch() as out:
            process = subprocess.Popen([str(program()), *TINY, "--steps", "100000", "--eval-every", "0", "--out", str(out / "run")], cwd=ROOT,
                                       stdout=subprocess.PIPE, text=True)
            for line in process.stdout:
                if line.startswith("step 3/"):
                    for _ in range(times):
                        process.send_signal(number)
                        time.sleep(0.02)
                    break
            process.communicate(timeout=120)
            assert process.returncode == 0, f"{number.name}: exit status {process.returncode}"
            assert list((out / "run").glob("step_*/checkpoint.json")), f"no checkpoint after {number.name}"


# Minutes of looking at the validation data.
LONG_LOOK = ["--eval-every", "3", "--eval-tokens", "900000", "--steps", "6"]


def stopped_in_its_look(out, *options, after, cut):
    """A stop does not wait for the look that follows `after`: it is cut short, the step is saved, the log tells only what was done."""
    with Running(*TINY, *LONG_LOOK, *options, "--out", str(out)) as run:
        run.wait_for(after)
        time.sleep(0.3)  # into it
        start = time.monotonic()
        status = run.stop()
    text = "".join(run.lines)
    assert status == 0 and time.monotonic() - start < 5, f"exit status {status} after {time.monotonic() - start:.1f} s: {text[-1000:]}"
    assert text.count("| cut short, as a stop was asked for: no result") == 1 and f"\n{cut} | cut short" in text, text[-1000:]
    assert text.count("a signal again ends at once, without saving") == 1, text[-1000:]
    kinds = [r["kind"] for r in map(json.loads, (out / "log.jsonl").read_text().splitlines())]
    assert kinds == ["run"] + ["step"] * kinds.count("step") + ["checkpoint"] and complete_checkpoints(out) == [kinds.count("step")], kinds
    return complete_checkpoints(out)[0]


def test_a_stop_does_not_wait_for_an_evaluation():
    with Scratch() as out:
        assert stopped_in_its_look(out / "first", after="ready after", cut="eval 0/6") == 0
        (out / "many.jsonl").write_text((ROOT / "tests" / "data" / "questions.jsonl").read_text() * 2000)
        choices = ["--eval-every", "0", "--multiple-choice", str(out / "many.jsonl")]
        assert stopped_in_its_look(out / "last", *choices, after="step 6/6", cut="choices 6/6") == 6
        sampling = ["--eval-every", "0", "--sample-every", "2", "--max-tokens", "100000"]
        assert stopped_in_its_look(out / "sample", *sampling, after="step 2/6", cut="sample 2/6") == 2
        done = train(*TINY, "--eval-every", "3", "--eval-tokens", "512", "--steps", "6", "--resume", "auto", "--out", str(out / "sample"))
        assert "start   step 2 of" in done.stdout and [r["step"] for r in records(out / "sample", "eval")] == [3, 6], done.stdout


def test_a_second_signal_ends_at_once():
    with Scratch() as out:
        with Running(*TINY, "--steps", "2", "--global-batch-tokens", "4096000", "--eval-every", "0", "--out", str(out / "run")) as run:  # a step of minutes
            run.wait_for("ready after")
            time.sleep(0.5)  # into the step
            run.process.send_signal(signal.SIGINT)
            run.wait_for("a signal again ends at once, without saving")
            time.sleep(1.2)
            start = time.monotonic()
            assert run.stop() == -signal.SIGTERM and time.monotonic() - start < 5
        assert not complete_checkpoints(out / "run")


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


def test_one_run_at_a_time_writes_to_a_folder():
    with Scratch() as out:
        options = [*TINY, "--steps", "1000000", "--eval-every", "0", "--checkpoint-every", "2", "--out", str(out / "run")]
        with Running(*options) as run:
            run.wait_for("saved /")
            start = time.monotonic()
            refused = train(*options, ok=False).stderr.splitlines()
            assert len(refused) == 1 and time.monotonic() - start < 5, refused
            late = train(*options, "--resume", "auto", ok=False).stderr.splitlines()
            assert [line.split(":")[0] for line in late] == ["note", "error"], late
            for line in (refused[0], late[-1]):
                assert f"--out {out / 'run'}: another run" in line and str(run.process.pid) in line and "another folder" in line, line
            run.wait_for("saved /")  # and goes on
            with Running(*options, "--resume", "auto") as heir:  # waits for the one that is killed
                run.process.kill()
                heir.wait_for("start   step", "saved /")
                assert heir.stop() == 0
        steps = [r["step"] for r in records(out / "run", "step")]
        assert steps == list(range(1, steps[-1] + 1)) and not (out / "run" / "run.lock").exists(), steps


def test_a_run_without_standard_output_keeps_its_files():
    with Scratch() as out:
        done = without_stdout(*TINY, "--steps", "3", "--eval-every", "0", "--out", str(out / "run"))
        assert done.returncode == 0 and "standard output" in done.stderr, done.stderr
        assert [r["step"] for r in records(out / "run", "step")] == [1, 2, 3] and complete_checkpoints(out / "run") == [3]


def test_a_reader_that_leaves_before_training_does_not_end_the_run():
    with Scratch() as out:
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([str(program()), *TINY, "--steps", "3", "--eval-every", "0", "--out", str(out / "run")], cwd=ROOT, stdout=writer,
                              stderr=subprocess.PIPE, text=True, timeout=600)
        os.close(writer)
        assert done.returncode == 0 and complete_checkpoints(out / "run") == [3], f"exit status {done.returncode}: {done.stderr}"


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
        for more, mention in ((["--out", str(disk.path / "new")], "--out"), (["--resume", "auto", "--steps", "1000000"], "run.lock")):
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


HANGS_AT_THE_END = r"""
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
int close(int file) {  // of the log: the run is over
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    const ssize_t n = readlink(link, path, sizeof path);
    if (n > 9 && memcmp(path + n - 9, "log.jsonl", 9) == 0) pause();
    return (int)syscall(SYS_close, file);
}
"""


def test_an_error_is_printed_before_what_may_hang_when_it_goes():
    with Scratch() as out:
        (out / "hang.c").write_text(HANGS_AT_THE_END)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(out / "hang.so"), str(out / "hang.c")], check=True)
        shards = shutil.copytree(SHARDS, out / "shards")
        victim = sorted(shards.glob("train*.bin"))[0]
        size = victim.stat().st_size
        with open(victim, "r+b") as file:
            file.seek(1024 + (size - 1024) // 4 * 2)
            file.write(b"\xff" * ((size - 1024) // 4 * 2))
        with Running(*TINY, "--train", str(shards), "--steps", "100", "--eval-every", "0", "--out", str(out / "run"), env=os.environ | {"LD_PRELOAD": str(out / "hang.so")}) as run:
            run.wait_for("error: ", limit_s=60)
            assert "token 65535" in run.lines[-1], run.lines[-1]
            time.sleep(0.5)
            assert run.process.poll() is None, "nothing hung: the test proves nothing"


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
