"""Tests of the program on several ranks of this machine, on the reference device: started by mpirun, and as torchrun would.

Without mpirun (or without the plugin) they cannot run, and count as skipped. tests/host/test_ranks and test_world prove the same
parts in finer steps; here the whole program must keep what they promise.
"""
import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

from program_runs import ROOT, SHARDS, Scratch, Skipped, SmallDisk, checkpoint_bytes, program, records

SMALL = ["--model", "tiny", "--n-layers", "3", "--dim", "48", "--n-heads", "3", "--seq-len", "16", "--device", "cpu", "--micro-batch", "2",
         "--global-batch-tokens", "384", "--train", str(SHARDS), "--val", str(SHARDS), "--eval-every", "1000", "--eval-tokens", "320", "--lr", "1e-3",
         "--warmup-steps", "1"]
MODES = ("none", "optimizer", "gradients", "full")
# Of the losses of 20 steps on 1 and N ranks, relative: the sums over micro-batches are in another order. Deviations at this learning
# rate are 2e-5 at the twentieth step (at 3e-3 training is chaotic, and they are a per cent). tests/host/test_ranks measures, for its
# own model, what noise in the last place of the weights does, and takes three times that.
FIRST_STEPS, LAST_STEPS = 1e-5, 5e-4


def environment(**more):
    return os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"} | more


def mpirun(ranks):
    if not shutil.which("mpirun") or not (program().parent / "mpi_plugin.so").exists():
        raise Skipped("mpirun or the MPI plugin is not here")
    return ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]


def train(ranks, *options, ok=True):
    done = subprocess.run([*mpirun(ranks), str(program()), *SMALL, *options], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == ok, f"exit status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done


def losses_of(out):
    return [r["loss"] for r in records(out, "step")]


def own_errors(text):
    """Our lines; mpirun adds a page of its own when a rank fails."""
    return [line for line in text.splitlines() if line.startswith("error:")]


def test_every_mode_and_number_of_ranks():
    with Scratch() as out:
        for recipe in ("bf16", "tensorwise"):
            common = ["--recipe", recipe, "--steps", "20", "--checkpoint-every", "0"]
            expected = None
            for ranks in (1, 2, 3, 4):
                for mode in MODES:
                    folder = out / f"{recipe}-{ranks}-{mode}"
                    train(ranks, *common, "--shard", mode, "--out", str(folder))
                    losses = losses_of(folder)
                    first_eval = records(folder, "eval")[0]["loss"]
                    expected = expected or (losses, first_eval)
                    assert len(losses) == 20
                    # Before the first update every rank has the weights of one rank, bit for bit; so is their loss.
                    assert first_eval == expected[1], f"{recipe}, {ranks} ranks, {mode}: evaluation at the start {first_eval}, one rank {expected[1]}"
                    for i, (mine, one) in enumerate(zip(losses, expected[0])):
                        tolerance = (FIRST_STEPS if i < 2 else LAST_STEPS) * one
                        assert abs(mine - one) <= tolerance, f"{recipe}, {ranks} ranks, {mode}, step {i + 1}: {mine}, one rank {one}"


def test_checkpoints_do_not_depend_on_the_number_of_ranks():
    with Scratch() as out:
        common = ["--steps", "8", "--checkpoint-every", "4", "--keep", "0"]
        for ranks, mode in ((1, "none"), (2, "full"), (4, "optimizer")):
            train(ranks, *common, "--shard", mode, "--out", str(out / f"from{ranks}"))
        for start in (1, 2, 4):
            for ranks, mode in ((1, "none"), (2, "gradients"), (4, "full")):
                results = []
                for attempt in ("a", "b"):
                    folder = out / f"{start}-{ranks}-{attempt}"
                    shutil.copytree(out / f"from{start}" / "step_000004", folder / "step_000004")
                    train(ranks, *common, "--shard", mode, "--out", str(folder), "--resume", "auto")
                    results.append((checkpoint_bytes(folder, 8), losses_of(folder)))
                assert results[0] == results[1], f"saved on {start}, two resumes on {ranks} differ"
                whole = losses_of(out / f"from{start}")[4:]
                for mine, one in zip(results[0][1], whole):
                    assert abs(mine - one) <= LAST_STEPS * one, f"saved on {start}, resumed on {ranks}: {results[0][1]}, not {whole}"
                if ranks == start == 1:
                    assert results[0][1] == whole


def test_damage_in_what_several_ranks_wrote():
    with Scratch() as out:
        run = out / "run"
        train(3, "--steps", "4", "--checkpoint-every", "2", "--keep", "0", "--shard", "full", "--out", str(run))
        sums = [json.loads((run / f"step_{step:06d}" / "checkpoint.json").read_text())["checksums"] for step in (2, 4)]
        assert sums[0] != sums[1]
        for name in ("params.safetensors", "adam.safetensors"):
            file = run / "step_000004" / name
            good = file.read_bytes()
            at = len(good) - 1001
            file.write_bytes(good[:at] + bytes([good[at] ^ 16]) + good[at + 1:])
            lines = own_errors(train(2, "--steps", "6", "--shard", "gradients", "--out", str(run), "--resume", str(run / "step_000004"), ok=False).stderr)
            assert len(lines) == 1 and str(file) in lines[0], lines
            copy = shutil.copytree(run, out / "copy")
            errors = train(2, "--steps", "6", "--shard", "gradients", "--out", str(copy), "--resume", "auto").stderr
            assert errors.count("passed over a checkpoint") == 1 and f"step_000004/{name}" in errors, errors
            assert [r["step"] for r in records(copy, "step")] == [1, 2, 3, 4, 5, 6]
            shutil.rmtree(copy)
            file.write_bytes(good)


def test_weights_of_another_run_on_any_number_of_ranks():
    with Scratch() as out:
        train(2, "--steps", "8", "--shard", "full", "--out", str(out / "base"))
        digests = []
        for ranks, mode in ((1, "none"), (2, "none"), (3, "full")):
            folder = out / f"{ranks}-{mode}"
            train(ranks, "--steps", "2", "--shard", mode, "--init-from", str(out / "base"), "--out", str(folder))
            digests.append(records(folder, "eval")[0]["loss"])
        base = [r["loss"] for r in records(out / "base", "eval") if r["step"] == 8]
        assert digests == base * 3, f"{digests}, not {base}"


@contextlib.contextmanager
def running(ranks, out, *options):
    """A job that would run for ever, past its first checkpoint."""
    process = subprocess.Popen([*mpirun(ranks), str(program()), *SMALL, "--steps", "1000000", "--checkpoint-every", "5", "--keep", "2", "--shard", "full",
                                "--out", str(out), *options], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with job(process, out):
        yield process


@contextlib.contextmanager
def job(process, out):
    """From its first checkpoint on; nothing is left of it at the end."""
    try:
        for line in process.stdout:
            if "saved " in line and "/step_" in line:
                break
        yield
    finally:
        for pid in ranks_of(out).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()


def ranks_of(out):
    """Of each rank of the job that writes to `out`, the process."""
    found = {}
    for entry in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if not entry.name.isdigit() or str(out).encode() not in (entry / "cmdline").read_bytes().split(b"\0"):
                continue
            variables = dict(v.split(b"=", 1) for v in (entry / "environ").read_bytes().split(b"\0") if b"=" in v)
            for name in (b"OMPI_COMM_WORLD_RANK", b"RANK"):
                if name in variables:
                    found[int(variables[name])] = int(entry.name)
    return found


def expect_end(process, out, within_s, *words):
    start = time.monotonic()
    _, errors = process.communicate(timeout=within_s + 30)
    seconds = time.monotonic() - start
    lines = own_errors(errors)
    assert process.returncode != 0, "the job ended well"
    assert len(lines) == 1 and all(w in lines[0] for w in words), f"expected one line with {words}: {lines}\n{errors[-1500:]}"
    assert seconds <= within_s, f"took {seconds:.1f} s, not {within_s}"
    time.sleep(0.5)
    assert not ranks_of(out), f"orphans: {ranks_of(out)}"
    # The last checkpoint is whole: one rank goes on from it, for one step.
    newest = max(json.loads(p.read_text())["step"] for p in out.glob("step_*/checkpoint.json"))
    train(1, "--steps", str(newest + 1), "--out", str(out), "--resume", "auto", "--checkpoint-every", "0")
    assert records(out, "step")[-1]["step"] == newest + 1


def test_fault_killed_rank():
    for victim in (0, 2):
        with Scratch() as scratch:
            out = scratch / "run"
            with running(3, out, "--timeout", "20") as process:
                os.kill(ranks_of(out)[victim], signal.SIGKILL)
                expect_end(process, out, 10, f"rank {victim} (", "died")


def test_fault_stopped_rank():
    for victim in (0, 1, 2):
        with Scratch() as scratch:
            out = scratch / "run"
            with running(3, out, "--timeout", "3") as process:
                os.kill(ranks_of(out)[victim], signal.SIGSTOP)
                expect_end(process, out, 15, f"rank {victim} (", "no sign of life for 2.55 s")


def test_fault_mismatched_option():
    with Scratch() as out:
        command = [str(program()), *SMALL, "--steps", "2", "--out", str(out / "run")]
        done = subprocess.run([*mpirun(1), *command, ":", "-np", "1", *command, "--seed", "5"], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert own_errors(done.stderr) == ["error: rank 1 has --seed 5, rank 0 has 1337: start every rank with the same program, options and data"], done.stderr


def test_fault_out_of_memory():
    with Scratch() as out:
        command = [str(program()), *SMALL, "--n-layers", "8", "--dim", "1024", "--n-heads", "8", "--steps", "1", "--timeout", "20", "--out", str(out / "run")]
        lines = two_places(out, out, command, ["sh", "-c", 'ulimit -v 1500000; exec "$@"', "sh", *command])  # the weights alone have 400 MB, thrice
        assert lines == ["error: rank 1: not enough host memory: choose a smaller --model or --micro-batch"], lines


def two_places(first, second, command, others=None):
    """Our lines of two ranks that read what is named relatively in another folder each; the second may be of another command."""
    done = subprocess.run([*mpirun(1), "-wdir", str(first), *command, ":", "-np", "1", "-wdir", str(second), *(others or command)], env=environment(),
                          capture_output=True, text=True, timeout=60)
    assert done.returncode != 0, "it went well"
    return own_errors(done.stderr)


def flip(file, at):
    """One bit of a byte."""
    with file.open("r+b") as f:
        f.seek(at)
        byte = f.read(1)
        f.seek(at)
        f.write(bytes([byte[0] ^ 1]))


def test_fault_other_data():
    with Scratch() as out:
        other = shutil.copytree(SHARDS, out / SHARDS.name)
        for split in ("train", "val"):
            victim = sorted(other.glob(f"*{split}*.bin"))[0]
            middle = victim.stat().st_size // 4 * 2
            flip(victim, middle)
            command = [str(program()), *SMALL, "--train", SHARDS.name, "--val", SHARDS.name, "--steps", "2", "--out", str(out / "run")]
            lines = two_places(SHARDS.parent, out, command)
            what = {"train": "training", "val": "validation"}[split]
            assert len(lines) == 1 and f"rank 1 has {what} data 1 file of {victim.stat().st_size} bytes, contents " in lines[0], lines
            flip(victim, middle)


def test_fault_data_that_change():
    """As data do that are too many to be compared at the start: what a step reads is compared."""
    with Scratch() as scratch:
        out, other = scratch / "run", shutil.copytree(SHARDS, scratch / SHARDS.name)
        command = [str(program()), *SMALL, "--train", SHARDS.name, "--val", "", "--steps", "1000000", "--checkpoint-every", "5", "--out", str(out)]
        process = subprocess.Popen([*mpirun(1), "-wdir", str(SHARDS.parent), *command, ":", "-np", "1", "-wdir", str(scratch), *command], env=environment(),
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        with job(process, out):
            shard = sorted(other.glob("*train*.bin"))[0]
            with shard.open("r+b") as file:
                file.seek(shard.stat().st_size // 2)
                file.write(bytes([7, 0]) * 2**20)
            expect_end(process, out, 10, "rank 1 has other training data than rank 0 where step ")


def test_fault_other_weights():
    with Scratch() as out:
        run = out / "a" / "base"
        train(1, "--steps", "4", "--checkpoint-every", "0", "--out", str(run))
        copy = shutil.copytree(run, out / "b" / "base") / "step_000004"
        command = [str(program()), *SMALL, "--steps", "6", "--out", str(out / "run")]
        for name, option, says in (("adam.safetensors", "--resume", "checkpoint"), ("params.safetensors", "--init-from", "--init-from")):
            flip(copy / name, (copy / name).stat().st_size // 2)
            lines = two_places(out / "a", out / "b", [*command, option, "base"])
            assert len(lines) == 1 and f"rank 1 has {says} base/step_000004 " in lines[0], lines
        (copy / "params.safetensors").unlink()
        lines = two_places(out / "a", out / "b", [*command, "--init-from", "base"])
        assert len(lines) == 1 and "rank 1: base/step_000004/params.safetensors: cannot open" in lines[0], lines


def test_fault_folder_that_is_not_shared():
    with Scratch() as out:
        for folder in ("a", "b"):
            (out / folder).mkdir()
        command = [str(program()), *SMALL, "--steps", "2", "--timeout", "2", "--out", "run"]
        for _ in range(2):
            lines = two_places(out / "a", out / "b", command)
            assert len(lines) == 1 and "rank 1 (" in lines[0] and "does not see what rank 0 writes in --out run: give a folder" in lines[0], lines
            assert not list((out / "a").rglob("*seen*"))
            (out / "b" / "run").mkdir(exist_ok=True)  # then the folder is there, another one


def test_fault_other_program():
    with Scratch() as out:
        for file in (program(), program().parent / "mpi_plugin.so"):
            shutil.copy(file, out)
        with (out / "train_gpt_fp8").open("ab") as file:
            file.write(b"x")
        command = [*SMALL, "--steps", "2", "--out", str(out / "run")]
        lines = two_places(out, out, [str(program()), *command], [str(out / "train_gpt_fp8"), *command])
        assert len(lines) == 1 and lines[0].startswith("error: rank 1 has program "), lines


def test_fault_other_questions():
    with Scratch() as out:
        text = (ROOT / "tests" / "data" / "questions.jsonl").read_text()
        for folder, questions in (("a", text), ("b", text.rstrip("\n").rsplit("\n", 1)[0] + "\n"), ("c", None)):
            (out / folder).mkdir()
            if questions:
                (out / folder / "questions.jsonl").write_text(questions)
        command = [str(program()), *SMALL, "--multiple-choice", "questions.jsonl", "--steps", "1", "--out", str(out / "run")]
        for other, mention in (("b", "rank 1 has questions "), ("c", "rank 1: questions.jsonl: cannot open")):
            done = subprocess.run([*mpirun(1), "-wdir", str(out / "a"), *command, ":", "-np", "1", "-wdir", str(out / other), *command], env=environment(),
                                  capture_output=True, text=True, timeout=60)
            lines = own_errors(done.stderr)
            assert done.returncode != 0 and len(lines) == 1 and mention in lines[0], done.stderr
            assert not (out / "run").exists(), "a step was made"


def test_bad_option_is_one_line():
    with Scratch() as out:
        done = train(3, "--recipe", "fp4", "--out", str(out / "run"), ok=False)
        lines = own_errors(done.stderr)
        assert len(lines) == 1 and "--recipe fp4" in lines[0], done.stderr
        done = train(3, "--global-batch-tokens", "256", "--out", str(out / "run"), ok=False)
        assert "must be a multiple of the 3 ranks" in own_errors(done.stderr)[0], done.stderr
        done = train(3, "--shard", "full", "--replicate", "2", "--out", str(out / "run"), ok=False)
        assert "--replicate 2" in own_errors(done.stderr)[0], done.stderr


def store_of_torchrun():
    """Listens where the next port is free, too: below those that the system gives to connections, one of which may have it."""
    for port in range(20000 + os.getpid() % 10000, 32000, 2):
        store, following = socket.socket(), socket.socket()
        try:
            following.bind(("127.0.0.1", port + 1))
            store.bind(("127.0.0.1", port))
            store.listen()
            return store
        except OSError:
            store.close()
        finally:
            following.close()
    raise Skipped("no two ports in a row are free")


def torchrun_rank(store, size, command, rank, address="127.0.0.1"):
    variables = {"WORLD_SIZE": str(size), "MASTER_ADDR": address, "MASTER_PORT": str(store.getsockname()[1]), "TORCHELASTIC_RUN_ID": "none"}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **variables))


@contextlib.contextmanager
def as_torchrun(size, present, command):
    """Those ranks of a job of that size, without MPI; MASTER_PORT is taken by somebody else, as it is by torchrun's store."""
    with store_of_torchrun() as store:
        yield [torchrun_rank(store, size, command, r) for r in present]


def test_torchrun_environment():
    with Scratch() as out:
        options = ["--steps", "3", "--checkpoint-every", "0", "--shard", "optimizer"]
        with as_torchrun(2, (0, 1), [str(program()), *SMALL, "--out", str(out / "tcp"), *options]) as processes:
            for process in processes:
                _, errors = process.communicate(timeout=120)
                assert process.returncode == 0, errors
        if shutil.which("mpirun"):
            train(2, *options, "--out", str(out / "mpi"))
            assert losses_of(out / "tcp") == losses_of(out / "mpi"), "TCP and MPI differ"


TORCHRUN_THAT_DIES = """
import os, signal, subprocess, sys, time
for rank in "01":
    subprocess.Popen(sys.argv[2:], env=os.environ | {"RANK": rank, "LOCAL_RANK": rank})
while not os.path.exists(sys.argv[1]):
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_torchrun_leaves_no_ranks():
    """They save and end, as on SIGTERM."""
    with Scratch() as scratch, store_of_torchrun() as store:
        out = scratch / "run"
        variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.getsockname()[1]), "TORCHELASTIC_RUN_ID": "none"}
        subprocess.run([sys.executable, "-c", TORCHRUN_THAT_DIES, str(out / "step_000005"), str(program()), *SMALL, "--steps", "1000000", "--checkpoint-every", "5",
                        "--out", str(out)], cwd=ROOT, env=environment(**variables), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
        start = time.monotonic()
        while ranks_of(out) and time.monotonic() < start + 20:
            time.sleep(0.1)
        left = ranks_of(out)
        for pid in left.values():
            os.kill(pid, signal.SIGKILL)
        assert not left, f"ranks {sorted(left)} are still there"
        newest = max(json.loads(p.read_text())["step"] for p in out.glob("step_*/checkpoint.json"))
        assert newest == records(out, "step")[-1]["step"]


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=$rank "$@" &
  ranks+=($!)
done
for rank in "${ranks[@]}"; do wait "$rank" || status=1; done
exit ${status:-0}
"""


def test_sbatch_file():
    """dev/train.sbatch, with an srun that starts two ranks here."""
    with Scratch() as out, socket.socket() as free:
        for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n")):
            (out / name).write_text(text)
            (out / name).chmod(0o755)
        job = next(job for job in range(os.getpid(), os.getpid() + 10000) if free.connect_ex(("127.0.0.1", 20000 + job % 10000)) != 0)
        variables = environment(PATH=f"{out}:{os.environ['PATH']}", SLURM_JOB_ID=str(job), SLURM_JOB_NODELIST="node[1-2]", SLURM_CPUS_PER_TASK="1")
        (out / "train_gpt_fp8").symlink_to(program())
        options = ["--steps", "3", "--checkpoint-every", "0", "--shard", "optimizer", "--out", str(out / "run")]
        done = subprocess.run(["bash", str(ROOT / "dev/train.sbatch"), *SMALL, *options], cwd=out, env=variables, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert len(losses_of(out / "run")) == 3 and "ranks   2, TCP" in done.stdout, done.stdout[-2000:]


def test_multi_gpu_script():
    """A part of tests/gpu/multi_gpu.py's rehearsal, so that it still runs when there are GPUs to run it on."""
    mpirun(2)
    with Scratch() as out:
        parts = ["bf16 alone", "bf16 full", "of a block, full", "another option", "missing rank"]
        done = subprocess.run([sys.executable, str(ROOT / "tests/gpu/multi_gpu.py"), "--rehearse", "--train", str(SHARDS), "--val", str(SHARDS), "--json", str(out / "results.json"),
                               "--only", *parts], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        results = json.loads((out / "results.json").read_text())
        assert [test["status"] for test in results["tests"]] == ["pass"] * 5, results
        one, several = results["bench"]
        assert one.keys() == several.keys() and one["share_of_one_gpu"] == 1 and "--shard full" in several["command"], results


def test_mpirun_in_a_container_made_for_pytorch():
    with Scratch() as out:
        done = subprocess.run([*mpirun(2), str(program()), *SMALL, "--steps", "1", "--checkpoint-every", "0", "--out", str(out / "run")], cwd=ROOT,
                              env=environment(RANK="0", WORLD_SIZE="1"), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout.count("ranks   2, MPI") == 1, done.stdout[-2000:] + done.stderr


def test_strangers_on_rank_0s_port():
    """They connect first and say nothing; one says a little."""
    with Scratch() as out, store_of_torchrun() as store, contextlib.ExitStack() as strangers:
        command = [str(program()), *SMALL, "--steps", "1", "--checkpoint-every", "0", "--timeout", "4", "--out", str(out / "run")]
        ranks = [torchrun_rank(store, 2, command, 0)]
        start = time.monotonic()
        while time.monotonic() < start + 3:
            stranger = strangers.enter_context(socket.socket())
            if stranger.connect_ex(("127.0.0.1", store.getsockname()[1] + 1)) == 0:
                break
            time.sleep(0.05)
        stranger.send(b"GET")
        for _ in range(4):
            strangers.enter_context(socket.create_connection(stranger.getpeername()))
        ranks.append(torchrun_rank(store, 2, command, 1))
        for rank in ranks:
            errors = rank.communicate(timeout=60)[1]
            assert rank.returncode == 0, errors


def test_fault_rank_that_joins_twice():
    """The second one as of another machine: it has another speaker, which has not heard what rank 0 said."""
    with Scratch() as out, store_of_torchrun() as store:
        command = [str(program()), *SMALL, "--steps", "1", "--timeout", "15", "--out", str(out / "run")]
        start = time.monotonic()
        ranks = [torchrun_rank(store, 3, command, rank) for rank in (0, 1)]
        time.sleep(1)  # they wait for the third
        ranks.append(torchrun_rank(store, 3, command, 1, address="localhost"))
        errors = "".join(rank.communicate(timeout=60)[1] for rank in ranks)
        assert all(rank.returncode == 1 for rank in ranks)
        assert len(own_errors(errors)) == 1 and "rank 1 joined twice" in errors, errors
        assert time.monotonic() - start < 10


def test_fault_program_without_the_plugin():
    with Scratch() as out:
        bare = shutil.copy(program(), out)
        options = [*SMALL, "--steps", "1", "--timeout", "3", "--out", str(out / "run")]
        for first, second in ((program(), bare), (bare, program())):
            lines = two_places(out, out, [str(first), *options], [str(second), *options])
            assert len(lines) == 1 and "has no mpi_plugin.so" in lines[0], lines


def test_fault_full_disk_names_the_rank_once():
    with SmallDisk(1) as disk:
        done = train(3, "--steps", "2", "--out", str(disk.path / "run"), ok=False)
        lines = own_errors(done.stderr)
        assert len(lines) == 1 and "MiB" in lines[0] and lines[0].startswith("error: rank 0: /"), done.stderr


def test_fault_missing_rank():
    with Scratch() as out:
        start = time.monotonic()
        with as_torchrun(3, (0, 1), [str(program()), *SMALL, "--out", str(out / "run"), "--steps", "3", "--timeout", "2"]) as processes:
            errors = "".join(p.communicate(timeout=60)[1] for p in processes)
        assert all(p.returncode != 0 for p in processes)
        assert len(own_errors(errors)) == 1 and "rank 2 of 3 has not joined" in errors, errors
        assert time.monotonic() - start < 10


def test_fault_missing_rank_0():
    with Scratch() as out:
        with as_torchrun(4, (1, 2, 3), [str(program()), *SMALL, "--out", str(out / "run"), "--steps", "3", "--timeout", "1"]) as processes:
            errors = "".join(p.communicate(timeout=60)[1] for p in processes)
        assert all(p.returncode == 1 for p in processes)
        assert len(own_errors(errors)) == 1 and "rank 0 of 4 does not answer at 127.0.0.1" in errors, errors


def test_fault_rank_that_never_starts_mpi():
    with Scratch() as out:
        command = [str(program()), *SMALL, "--steps", "2", "--timeout", "2", "--out", str(out / "run")]
        start = time.monotonic()
        done = subprocess.run([*mpirun(2), *command, ":", "-np", "1", "sleep", "60"], env=environment(), capture_output=True, text=True, timeout=60)
        lines = own_errors(done.stderr)
        assert done.returncode != 0 and len(lines) == 1 and "rank 2 of 3 has not started MPI within 2 s" in lines[0], done.stderr
        assert time.monotonic() - start < 10


def test_interrupt_stops_all_after_one_step():
    with Scratch() as scratch:
        out = scratch / "run"
        with running(3, out) as process:
            os.kill(ranks_of(out)[1], signal.SIGTERM)  # one rank only
            process.communicate(timeout=60)
            assert process.returncode == 0
            newest = max(json.loads(p.read_text())["step"] for p in out.glob("step_*/checkpoint.json"))
            assert newest == records(out, "step")[-1]["step"]


def test_interrupt_of_one_rank_cuts_the_evaluation_of_all():
    with Scratch() as scratch:
        for mode in ("none", "full"):
            out = scratch / mode
            process = subprocess.Popen([*mpirun(3), str(program()), *SMALL, "--steps", "8", "--eval-every", "4", "--eval-tokens", "900000", "--shard", mode,
                                        "--out", str(out)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            with process:
                for line in process.stdout:
                    if "ready after" in line:
                        break
                time.sleep(0.3)
                start = time.monotonic()
                os.kill(ranks_of(out)[2], signal.SIGTERM)  # one rank only
                text = process.communicate(timeout=60)[0]
                assert process.returncode == 0 and time.monotonic() - start < 10, f"exit status {process.returncode}: {text}"
                assert text.count("eval 0/8 | cut short") == 1 and "stopped after step 0" in text and not records(out, "eval"), text


def tests():
    return [(name, test) for name, test in sorted(globals().items()) if name.startswith("test_")]
