"""Tests of the Python tools that look at runs: reading a log, the plot, the exports. What needs a library that is not here is
skipped after the tool has said so in one line."""
import dataclasses
import json
import pathlib
import re
import struct
import subprocess
import sys
import tempfile

from program_runs import ROOT, TINY, Scratch, Skipped, train

sys.path[:0] = [str(ROOT / "dev"), str(ROOT / "tests" / "gpu")]
import program as gpu_program  # noqa: E402
import run_log  # noqa: E402
import saving  # noqa: E402

STEPS = 20


def record_of_step(step, loss):
    return {"kind": "step", "step": step, "loss": loss, "grad_norm": 1.0 + step, "lr": 1e-3, "seconds": 0.5, "tokens_per_s": 1000.0 + step, "skipped_steps": 0}


def log_lines():
    """A run that was resumed after step 10, with a loss that is not a number and a torn last line."""
    lines = [{"kind": "run", "step": 0, "time": "2026-01-01T00:00:00Z", "model": "tiny", "recipe": "bf16", "parameters": 5}]
    lines += [record_of_step(step, 5.0) for step in range(1, 13)]
    lines += [{"kind": "run", "step": 10, "time": "2026-01-01T01:00:00Z", "model": "tiny"}]
    lines += [record_of_step(step, 4.0 - step / 100) for step in range(11, STEPS + 1)]
    lines[5]["loss"] = None
    lines += [{"kind": "eval", "step": STEPS, "loss": 3.5}, {"kind": "choices", "step": STEPS, "accuracy": 0.25, "questions": 8},
              {"kind": "sample", "step": STEPS, "sample": 0, "prompt": "a ", "text": "cat \u20ac"}]
    return [json.dumps(line) for line in lines] + ['{"kind": "step", "st']


class Runs:
    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="train_gpt_fp8_")
        path = pathlib.Path(self.folder.name)
        for name in ("a", "b"):
            (path / name).mkdir()
            (path / name / "log.jsonl").write_text("\n".join(log_lines()))
        return path

    def __exit__(self, *_):
        self.folder.cleanup()


def tool(library, name, *arguments):
    """Runs dev/NAME.py; skips when the library is missing and the tool says so in one line."""
    done = subprocess.run([sys.executable, str(ROOT / "dev" / f"{name}.py"), *map(str, arguments)], capture_output=True, text=True, timeout=300)
    lacking = subprocess.run([sys.executable, "-c", f"import sys; sys.path.append({str(run_log.PACKAGES)!r}); import {library}"], capture_output=True).returncode != 0
    if lacking:
        lines = done.stderr.strip().splitlines()
        assert done.returncode != 0 and len(lines) == 1 and f"needs python3's {library}" in lines[0], done.stderr
        raise Skipped(lines[0].removeprefix("error: "))
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout


def reads_a_log():
    with Runs() as runs:
        records = run_log.read_records(runs / "a")
        assert records == run_log.read_records(runs / "a" / "log.jsonl")
        losses = dict(run_log.curve(records, "step", "loss"))
        assert len(losses) == STEPS - 1 and 5 not in losses, losses
        assert losses[10] == 5.0 and losses[11] == 3.89, "a record after a resume replaces the old one"
        times = run_log.wall_times(records)
        assert times[STEPS] - times[0] == 0.5 * STEPS and times[0] == 1767225600.0, times
        assert run_log.scalars_of(records[("choices", STEPS)]) == {"choices/accuracy": 0.25}
        assert set(run_log.named([str(runs / "a"), f"x={runs / 'b'}"])) == {"a", "x"}
        assert set(run_log.named([str(runs / "a"), str(runs / "a" / "log.jsonl")])) == {str(runs / "a"), str(runs / "a" / "log.jsonl")}


def draws_runs():
    with Runs() as runs:
        picture = runs / "runs.png"
        said = tool("matplotlib", "plot", "--out", picture, runs / "a", f"second={runs / 'b'}")
        assert "drew 2 runs" in said and picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20000


def refuses_what_is_no_run():
    with Runs() as runs:
        (runs / "empty.jsonl").write_text("")
        for name, library in (("plot", "matplotlib"), ("export_tensorboard", "tensorboard"), ("export_wandb", "wandb")):
            done = subprocess.run([sys.executable, str(ROOT / "dev" / f"{name}.py"), "--out", str(runs / "out"), "/nonexistent"], capture_output=True, text=True)
            assert done.returncode != 0 and len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
        (runs / "hollow").mkdir()
        (runs / "noise.jsonl").write_bytes(b"\xff\xfe\n" * 9)
        for run, mention in (("nope", "nope: no log.jsonl there: give a run's folder"), ("hollow", "hollow: no log.jsonl there: give a run's folder"),
                             ("empty.jsonl", "no record in"), ("noise.jsonl", "no record in"), ("a/log.jsonl/x", "cannot read: Not a directory")):
            done = subprocess.run([sys.executable, str(ROOT / "dev" / "plot.py"), "--out", str(runs / "out.png"), str(runs / run)], capture_output=True, text=True)
            assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and mention in done.stderr and "Errno" not in done.stderr, f"{run}: {done.stderr}"


def writes_tensorboard_events():
    with Runs() as runs:
        tool("tensorboard", "export_tensorboard", "--out", runs / "events", runs / "a")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(str(runs / "events" / "a"))
        events.Reload()
        losses = {e.step: e.value for e in events.Scalars("train/loss")}
        assert len(losses) == STEPS - 1 and abs(losses[11] - 3.89) < 1e-6 and abs(events.Scalars("val/loss")[0].value - 3.5) < 1e-6, losses
        assert abs(events.Scalars("choices/accuracy")[0].value - 0.25) < 1e-6
        text = events.Tensors("sample")[0].tensor_proto.string_val[0].decode()
        assert text == "a cat \u20ac", text


def leveldb_log(data, header):
    """The records of a LevelDB log, which is what a .wandb file is behind its header: blocks of 32 KiB, fragments of a check
    sum, a length, a type (1 whole, 2 first, 3 middle, 4 last)."""
    at, whole = header, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def writes_wandb_offline_runs():
    with Runs() as runs:
        said = tool("wandb", "export_wandb", "--out", runs / "exported", runs / "a")
        assert f"{STEPS} steps of a" in said, said
        found = list((runs / "exported" / "wandb").glob("offline-run-*/run-*.wandb"))
        assert len(found) == 1, found
        from wandb.proto import wandb_internal_pb2
        history = []
        for data in leveldb_log(found[0].read_bytes(), header=7):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
        assert len(history) == STEPS and history[10]["train/loss"] == 3.89 and history[-1]["val/loss"] == 3.5, history


def models_weak_scaling():
    import weak_scaling as model
    shape = {s.name: s for s in model.SHAPES}
    for table in [model.COPIES_US] + [tables[mode] for tables in (model.GATHER_US, model.SCATTER_US) for mode in ("optimizer", "full")]:
        for mib, us in table.items():
            line = model.copied(mib * 2**20, 2) if table is model.COPIES_US else model.Ring(table, 2, 2, 8).one_way(mib * 2**20)
            assert abs(line * 1e6 / us - 1) < 0.35, f"the line misses {us} us of {mib} MiB"
    for m in model.MEASURED:
        modelled, measured = model.efficiency(model.measured_setting(m)), m.rate / m.alone
        assert abs(modelled - measured) < 0.016, f"{m}: {modelled:.3f} of one GPU instead of {measured:.3f}"  # no better fit: dev/LOG.md
        communication, exposed = (1e3 * x for x in model.measured_communication(m))
        assert abs(communication / m.communication_ms - 1) < 0.08, f"{m}: {communication:.1f} ms"
        # With many tokens the faster rank also waits, which the model does not have.
        assert exposed < m.exposed_ms if m.tokens > 8192 else abs(exposed / m.exposed_ms - 1) < 0.1, f"{m}: {exposed:.1f} exposed"

    for m in model.UNSEEN:
        modelled, measured = model.efficiency(model.measured_setting(m)), m.rate / m.alone
        assert abs(modelled - measured) < (0.022 if m.replicas == 1 else 0.036), f"{m}: {modelled:.3f} of one GPU instead of {measured:.3f}"

    def setting(name, gpus, mode, **more):
        return model.Setting(shape[name], gpus, mode, **more)

    def units(s):
        return model.unit_times(s, s.shape.block, 1), model.unit_times(s, s.shape.embeddings, 2)
    times = [model.Ring(model.GATHER_US["full"], n, min(n, 8), 8).one_way(2**20) for n in (2, 8, 16, 128, 1024)]
    assert times == sorted(times) and times[-1] > 40 * times[0], f"a ring's latency grows with its ranks: {times}"
    inside, between = (units(setting("8B", n, "full"))[0] for n in (8, 64))
    assert 0.95 < inside.scatter.alone / (4 * inside.gather.alone) < 1.0 and inside.scatter.alone == model.copied(4 * shape["8B"].block, 8), "copies inside a node"
    ring = model.Ring(model.SCATTER_US["full"], 64, 8, 8)
    assert between.scatter.alone == ring.one_way(4 * shape["8B"].block) < 2.5 * inside.scatter.alone, "between nodes gradients are added on the way"
    assert between.scatter.beside > 2 * between.scatter.alone and inside.scatter.beside < 1.2 * inside.scatter.alone, "kernels wait for multiprocessors"
    sums = [model.sums(setting("8B", n, mode)) for n, mode in ((8, "full"), (64, "full"), (64, "optimizer"))]
    assert sums[0] > 10 * sums[1] > 0 == sums[2], f"of all parts, of a slice, of nothing: {sums}"
    full, few_links = (model.step(setting("8B", 16, "full", links=links)) for links in (8, 1))
    assert few_links.exposed > 2 * full.exposed, "one link of 400 Gb/s for a node limits"
    assert model.efficiency(setting("gpt2-1558M", 1024, "full", replicas=128)) > 2 * model.efficiency(setting("gpt2-1558M", 1024, "full")), "shards inside a node"
    s = setting("gpt2-1558M", 2, "optimizer")
    (block, edge), optimizer = units(s), model.step(s)
    assert abs(optimizer.exposed - 2 * model.BARE - block.gather.alone) < 1e-9, "nothing is beside the first gather alone: an H100's norm is long enough for what is complete last"
    everything = block.gather.alone + 47 * block.gather.beside + 48 * block.scatter.beside + edge.gather.beside + edge.scatter.beside
    assert abs((optimizer.hidden + optimizer.exposed) / everything - 1) < 1e-6, "every unit once, all but the first gather beside compute"
    one, two = (setting("gpt2-1558M", 2, "full", tokens=k * 16384) for k in (1, 2))
    (block, edge), steps = units(one), [model.step(s) for s in (one, two)]
    more = steps[1].hidden + steps[1].exposed - steps[0].hidden - steps[0].exposed
    first = edge.gather.beside + block.gather.alone + 93 * block.gather.beside + 48 * block.scatter.beside + edge.scatter.beside
    assert abs((steps[0].hidden + steps[0].exposed) / first - 1) < 1e-6, "one micro-batch: every unit once, and all blocks but two again"
    again = 92 * block.gather.beside + 48 * block.scatter.beside + edge.scatter.beside
    assert abs(more / again - 1) < 1e-6, f"a further micro-batch gathers all blocks but two, twice: {more}, {again}"
    full = model.step(setting("8B", 8, "full"))
    assert full.hidden > full.taken > 0 and full.seconds == full.compute + full.kernels + full.exposed + full.taken
    assert model.memory_gib(setting("8B", 8, "optimizer")) > model.MEMORY_GIB > model.memory_gib(setting("8B", 8, "full"))
    for gpus, mode, planned in ((1, "optimizer", 60.1), (2, "optimizer", 53.0), (2, "full", 48.6), (8, "full", 39.2)):  # by --dry-run
        assert abs(model.memory_gib(setting("gpt2-1558M", gpus, mode)) - planned) < 1.5, f"1558M on {gpus} GPUs, {mode}"
    wider = dataclasses.replace(shape["gpt2-1558M"], vocabulary=500000)
    exposed = [model.step(dataclasses.replace(setting("gpt2-1558M", 8, "full"), shape=s)).exposed - 5 * model.BARE for s in (shape["gpt2-1558M"], wider)]
    assert exposed[1] > 3 * exposed[0] > 0, f"the norm of the others is too short for the last scatter of a wide embedding: {exposed}"
    said = subprocess.run([sys.executable, str(ROOT / "dev/weak_scaling.py"), "--links", "1"], capture_output=True, text=True)
    assert said.returncode == 0 and "does not fit" in said.stdout and len(said.stdout.splitlines()) > 60, said.stderr
    few = subprocess.run([sys.executable, str(ROOT / "dev/weak_scaling.py"), "--tokens", "8192"], capture_output=True, text=True).stdout.splitlines()
    first = next(line for line in few if line.startswith("gpt2-1558M"))
    step_ms, rate = (float(first.split()[i]) for i in (4, 9))
    assert abs(step_ms * rate / 8192e3 - 1) < 0.01, f"fewer tokens than a micro-batch of the table: {first}"


def judges_saving():
    """Each of the three rows of tests/gpu/saving.py fails for its own reason alone."""
    def statuses(slow, ends=8):
        records = []
        for step in range(1, 13):
            records.append({"kind": "step", "step": step, "seconds": slow.get(step, 9.0 if step == 1 else 1.0)})
            if step == ends:  # of the snapshot after step 5
                records.append({"kind": "checkpoint", "step": 5, "seconds": 3.0})
        return [test["status"] for test in saving.judge("m", 5, records)]

    for slow, expected in (({}, ["pass"] * 3), ({7: 1.09}, ["pass"] * 3), ({6: 1.09, 7: 1.09, 8: 1.09}, ["fail", "pass", "pass"]),
                           ({6: 1.3, 7: 0.9, 8: 0.9}, ["pass", "fail", "pass"]), ({4: 1.5}, ["pass", "pass", "fail"])):
        assert statuses(slow) == expected, f"{slow}: {statuses(slow)}"
    assert [test["status"] for test in saving.judge("m", 5, [])] == ["fail"]
    assert statuses({}, ends=99) == ["fail"], "no save ended"


def judges_modes_of_the_program():
    """What tests/gpu/program.py demands of --verify, --profile and --micro-batch auto, of texts that the reference device printed,
    put into a GPU's words; each planted fault is found."""
    for recipe in ("bf16", "tensorwise"):
        printed = train("--verify", "--device", "cpu", "--recipe", recipe).stdout
        assert len(gpu_program.faults_of_verify(printed, recipe)) == 2, "neither device nor graphs are a GPU's"
        printed = printed.replace("twice the same bits (no graphs on this device)", "replayed graphs and single launches give equal bits")
        printed = re.sub(r"^device .*", "device  NVIDIA H100 80GB HBM3", printed, flags=re.M)
        assert gpu_program.faults_of_verify(printed, recipe) == [], printed
        for line in printed.splitlines():
            if line.startswith(("linears", "gemm", "steps", "verify")):
                assert gpu_program.faults_of_verify(printed.replace(line, ""), recipe), f"{line!r} is not missed"
        assert gpu_program.faults_of_verify(printed, "f32" if recipe == "tensorwise" else "tensorwise")

    with Scratch() as out:
        printed = train(*TINY, "--micro-batch", "auto", "--steps", "4", "--profile", "2", "--eval-every", "0", "--out", str(out / "run")).stdout
    assert gpu_program.faults_of_micro_batch(printed, 8, 4) == [], gpu_program.faults_of_micro_batch(printed, 8, 4)
    chosen = re.search(r"^micro-batch auto: (\d+)$", printed, re.M)[1]
    for old, new in ((f"auto: {chosen}\n", "auto: 3\n"), (f"  micro-batch = {chosen}\n", "  micro-batch = 3\n"), ("step 4/4 | loss", "step 4/4 | lost"),
                     (f"auto: {chosen} sequences", "auto: 3 sequences")):
        assert old in printed and gpu_program.faults_of_micro_batch(printed.replace(old, new), 8, 4), old

    assert gpu_program.faults_of_profile(printed), "without ceilings it is no GPU's"
    table = re.sub(r"        n/a  ", "       80 %  ", printed)
    assert gpu_program.faults_of_profile(table) == [], gpu_program.faults_of_profile(table)
    rows = [match[0] for match in gpu_program.PROFILE_ROW.finditer(table)]
    for wrong in (table.replace(rows[3] + "\n", ""), table.replace(rows[0], "").replace(rows[9], rows[9] + "\n" + rows[0]),
                  table.replace(rows[2], rows[2].replace("80 %", "130 %")), table.replace(rows[1], "9" + rows[1].strip()), printed.replace("profile of", "")):
        assert gpu_program.faults_of_profile(wrong), wrong


def tests():
    return [(function.__name__, function) for function in (judges_saving, judges_modes_of_the_program, models_weak_scaling, reads_a_log, draws_runs, refuses_what_is_no_run, writes_tensorboard_events, writes_wandb_offline_runs)]
