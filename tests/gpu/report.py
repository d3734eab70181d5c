#!/usr/bin/env python3
"""The committed record of what ran on a GPU: one file a dev program or system test, tests/gpu_report/NAME.json.

    report.py [NAME...]      run these (default: all but the long ones) on this machine's GPU and write their files
    report.py --stale-only   just those whose file is missing or older than the sources it covers
    report.py --part PART    only the "checks" (what is right; several such calls may share a GPU) or only the "benchmarks" (what is
                             fast; wants the GPU alone); the other part is kept from the file if it is of the same sources and device
    report.py --check        run nothing: list stale and missing files, exit status 1 if there is one
    report.py --list         names, and the commands behind them

Each file holds the hash of every source file that the result depends on: the include closure of the objects that are
linked (the compiler's .d files), for Python tests also the scripts. Without a build (a fresh clone), --check takes the
list of sources from the file itself. The Makefile is not among them. Needs nothing but Python's standard library.
"""
import argparse
import ctypes
import datetime
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import floors

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / os.environ.get("TRAIN_GPT_BUILD", "build/sm_90a")
FOLDER = ROOT / "tests/gpu_report"
NO_GPU = 77
OUTSIDE = ("build/", "deps/", "/")  # not of this repository

# ----------------------------------------------------------------------------------------------------------------------
# What there is to report


CHECKS, BENCHMARKS = PARTS = ("checks", "benchmarks")
OF_RANKS = ("collectives", "sharding")  # dev programs that run on all GPUs of a machine, a rank each


class Entry:
    """`commands`: (part, argument list); each gets --json FILE and writes {"tests": [...], "bench": [...]} there."""

    def __init__(self, name, commands, objects, scripts=(), long=False):
        self.name, self.commands, self.objects, self.scripts, self.long = name, commands, objects, list(scripts), long

    @property
    def path(self):
        return FOLDER / f"{self.name}.json"


def python_test(script, *arguments):
    return [sys.executable, str(ROOT / "tests/gpu" / script), *arguments]


def train_command(model, micro_batch, tokens, recipe, *more):
    return [str(BUILD / "dev/profile"), "--model", model, "--recipe", recipe, "--micro-batch", str(micro_batch),
            "--global-batch-tokens", str(tokens), *more]


def library_objects():
    """Everything that the trainer links (the Makefile's list), as paths of .d files relative to the build folder without suffix."""
    folders = ("kernels", "kernels/*", "trainer", "trainer/reference", "trainer/run", "trainer/distributed", "data")
    return [name for folder in folders for name in objects_in(folder) if name not in ("data/prepare", "data/inspect")]


def objects_in(folder):
    sources = sorted(p for suffix in (".cu", ".cpp") for p in ROOT.glob(f"{folder}/*{suffix}"))
    return [str(p.relative_to(ROOT).with_suffix("")) for p in sources]


def gpus():
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(visible.split(",")) if visible else len([line for line in output_of("nvidia-smi", "-L").splitlines() if line.startswith("GPU ")])


def on_all_gpus(command):
    """One rank a GPU. What is appended, --json FILE, is the last rank's alone: mpirun numbers the ranks in the order of its parts."""
    ranks = gpus()
    if ranks < 2:
        return command
    part = ["-x", "NCCL_NVLS_ENABLE=0", *command]
    return ["mpirun", "--allow-run-as-root", "--bind-to", "none", "-np", str(ranks - 1), *part, ":", "-np", "1", *part]


def has_cudnn():
    try:
        ctypes.CDLL("libcudnn.so.9")
        return True
    except OSError:
        return False


def entries():
    found = []
    for source in sorted((ROOT / "dev").glob("*.cu")):
        if "run_dev_program" not in source.read_text():
            continue  # a tool
        own = [f"dev/{source.stem}", *objects_in(f"dev/parts/{source.stem}"), "dev/harness"]
        kernel = [f"kernels/{source.stem}", *objects_in(f"kernels/{source.stem}"), "kernels/common/mark", "trainer/reference/quantizer"]
        linked = kernel if (ROOT / "kernels" / source.name).exists() else library_objects()
        program = str(BUILD / "dev" / source.stem)
        parts = [(CHECKS, [program, "check"]), (BENCHMARKS, [program, "bench"])]
        found.append(Entry(source.stem, [(part, on_all_gpus(command) if source.stem in OF_RANKS else command) for part, command in parts], own + linked))
        if source.stem == "attention":  # the peers in the same call
            found[-1].commands.append((BENCHMARKS, python_test("attention_peers.py")))
            found[-1].scripts.append("tests/gpu/attention_peers.py")
    library = library_objects()
    found.append(Entry("gradients", [(CHECKS, python_test("gradients.py"))], ["dev/gradients"] + library, ["tests/gpu/gradients.py"]))
    small, large = ("gpt2-124M", 64, 524288), ("gpt2-1558M", 16, 131072)
    train = [train_command(*small, "bf16"), train_command(*small, "tensorwise"), train_command(*small, "tensorwise", "--deterministic"),
             *(train_command(*small, "tensorwise", "--attention", backend) for backend in ("mma", *(["cudnn"] if has_cudnn() else []))),
             train_command(*large, "bf16"), train_command(*large, "tensorwise")]
    train.append(python_test("train_peers.py", *os.environ.get("TRAIN_PEERS_OPTIONS", "").split()))  # in the same call
    found.append(Entry("train", [(BENCHMARKS, command) for command in train], ["dev/profile"] + library, ["tests/gpu/train_peers.py"]))
    found.append(Entry("program", [(BENCHMARKS, python_test("program.py"))], ["train_gpt_fp8"] + library, ["tests/gpu/program.py"]))
    found.append(Entry("saving", [(BENCHMARKS, python_test("saving.py"))], ["train_gpt_fp8"] + library, ["tests/gpu/saving.py"]))
    checked = sorted({name for entry in found if str(BUILD / "dev" / entry.name) in entry.commands[0][1] for name in entry.objects})
    found.append(Entry("sanitizer", [(CHECKS, python_test("sanitize.py", *os.environ.get("SANITIZE_OPTIONS", "").split()))], checked, ["tests/gpu/sanitize.py"], long=True))
    built = os.environ.get("MUTANTS_BUILT")  # folder of `tests/mutants.py --build-only`, for a machine that should not compile
    mutants = [sys.executable, str(ROOT / "tests/mutants.py"), *(["--run-built", built] if built else [])]
    found.append(Entry("mutants", [(CHECKS, mutants)], checked, ["tests/mutants.py"], long=True))
    shards = os.environ.get("LEARNING_SHARDS", "shards/code_gpt2")
    found.append(Entry("multi_gpu", [(BENCHMARKS, python_test("multi_gpu.py", "--train", shards, "--val", shards, *os.environ.get("MULTI_GPU_OPTIONS", "").split()))], ["train_gpt_fp8"] + library,
                       ["tests/gpu/multi_gpu.py", "tests/gpu/multi_gpu_runs.py", "tests/gpu/multi_gpu_torch.py", "tests/gpu/fsdp_peer.py", "tests/gpu/train_peers.py", "tests/distributed_tests.py", "tests/program_runs.py"], long=True))
    runs = os.environ.get("LEARNING_RUNS", "runs/learning")
    found.append(Entry("learning", [(CHECKS, python_test("learning.py", "--shards", shards, "--work", runs, "--plot", str(FOLDER / "learning.png")))],
                       ["train_gpt_fp8", "dev/export_run"] + library, ["tests/gpu/learning.py", "dev/plot.py", "dev/run_log.py"], long=True))
    found.append(Entry("attention_training", [(CHECKS, python_test("attention_training.py"))], ["train_gpt_fp8", "data/prepare"] + library,
                       ["tests/gpu/attention_training.py", "dev/run_log.py"], long=True))
    return {entry.name: entry for entry in found}


# ----------------------------------------------------------------------------------------------------------------------
# Sources and their hashes


def dependencies(d_file):
    """Files named in a compiler's dependency file, relative to the repository, those of other places left out."""
    text = d_file.read_text().replace("\\\n", " ")
    words = [word for line in text.splitlines() for word in re.split(r"(?<!\\)\s+", line.split(":", 1)[-1]) if word]
    inside = set()
    for word in words:
        path = os.path.relpath(os.path.join(ROOT, word.replace("\\ ", " ")), ROOT)
        if not path.startswith((*OUTSIDE, "..")):
            inside.add(path)
    return inside


def closure(entry):
    """The sources of an entry, or None where an object has not been built."""
    sources = set(entry.scripts)
    for name in entry.objects:
        d_file = BUILD / f"{name}.d"
        if not d_file.exists():
            return None
        sources |= dependencies(d_file)
    return sorted(sources)


def hashes(sources):
    """{path: sha256}; a file that is gone has the hash "missing"."""
    return {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() if (ROOT / name).is_file() else "missing" for name in sources}


def combined(table):
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in sorted(table.items())).encode()).hexdigest()


def staleness(entry):
    """"" when the file is up to date, else why not."""
    if not entry.path.exists():
        return "missing"
    report = json.loads(entry.path.read_text())
    recorded = report["sources"]
    now = hashes(closure(entry) or recorded)
    if combined(now) == report["sources_sha256"]:
        return f"its {', '.join(report['not_run'])} have not run" if report.get("not_run") else ""
    changed = sorted(name for name in now.keys() | recorded.keys() if now.get(name) != recorded.get(name))
    return "changed: " + ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")


# ----------------------------------------------------------------------------------------------------------------------
# Running


def output_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def cublaslt_version():
    for name in ("libcublasLt.so", "libcublasLt.so.13", "libcublasLt.so.12", "/usr/local/cuda/lib64/libcublasLt.so"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.cublasLtGetVersion.restype = ctypes.c_size_t
        version = library.cublasLtGetVersion()
        return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
    return "unknown"


def nccl_version():
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version)) != 0:
            return None
    except OSError:
        return None
    return f"{version.value // 10000}.{version.value // 100 % 100}.{version.value % 100}"


def machine():
    device, _, driver = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0").partition(", ")
    nvcc = output_of(os.environ.get("CUDA", "/usr/local/cuda") + "/bin/nvcc", "--version")
    release = re.search(r"release ([\d.]+), V([\d.]+)", nvcc)
    return {"device": device, "driver": driver, "cuda": release[2] if release else "unknown", "cublaslt": cublaslt_version(), "nccl": nccl_version()}


def relative_command(command):
    return " ".join(word.replace(str(ROOT) + "/", "").replace(sys.executable, "python3") for word in command)


def run_commands(entry, part):
    """(tests, bench) of the commands of a part, or None without a GPU."""
    tests, bench = [], []
    for words in [words for its_part, words in entry.commands if its_part == part]:
        print(f"{entry.name}: {relative_command(words)}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            results = pathlib.Path(folder) / "results.json"
            status = subprocess.run([*words, "--json", str(results)], cwd=ROOT).returncode
            if status == NO_GPU:
                return None
            found = json.loads(results.read_text()) if results.exists() else {"tests": [], "bench": []}
        tests += [{**test, "part": part} for test in found["tests"]]
        bench += found["bench"]
        if status != 0 and all(test["status"] != "fail" for test in found["tests"]):
            tests.append({"name": relative_command(words), "status": "fail", "figure": f"exit status {status}", "part": part})
    for row in bench:
        row["command"] = row.get("command", "").replace(str(ROOT) + "/", "")
    return tests, bench


def kept(entry, header, sources, part):
    """(tests, bench) that the file has of a part, or None where it has none or was made from other sources or elsewhere."""
    old = json.loads(entry.path.read_text()) if entry.path.exists() else {}
    if old.get("sources_sha256") != combined(sources) or any(old.get(key) != header[key] for key in header) or part in old.get("not_run", []):
        return None
    return [test for test in old["tests"] if test.get("part") == part], old["bench"] if part == BENCHMARKS else []


def run(entry, header, parts):
    """Runs the parts of an entry and writes its file. Returns True if everything in it passed."""
    before = closure(entry)
    if before is None:
        print(f"{entry.name}: not built; `make` and `make dev` first")
        return False
    sources, tests, bench, not_run = hashes(before), [], [], []
    for part in [part for part in PARTS if any(its_part == part for its_part, _ in entry.commands)]:
        results = run_commands(entry, part) if part in parts else kept(entry, header, sources, part)
        if results is None and part in parts:
            print(f"{entry.name}: no GPU, nothing written")
            return False
        if results is None:
            not_run.append(part)
            continue
        tests += results[0]
        bench += results[1]
        if part == BENCHMARKS:
            tests = [test for test in tests if not test["name"].startswith("floor: ")]
            tests += [{**test, "part": part} for test in floors.tests(entry.name, header["device"], bench)]
    report = {"name": entry.name, "sources": sources, "sources_sha256": combined(sources), **header,
              "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
              **({"not_run": not_run} if not_run else {}), "tests": tests, "bench": bench}
    FOLDER.mkdir(parents=True, exist_ok=True)
    temporary = entry.path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.rename(entry.path)
    failed = sum(test["status"] == "fail" for test in tests)
    missing = "".join(f", {part} not run" for part in not_run)
    print(f"{entry.name}: {len(tests)} tests, {failed} failed, {len(bench)} benchmarks{missing} -> {os.path.relpath(entry.path, ROOT)}", flush=True)
    return failed == 0


def failures(entry, report):
    """Names of what failed, by the floors of today."""
    own = [test for test in report["tests"] if not test["name"].startswith("floor: ")]
    return [test["name"] for test in own + floors.tests(entry.name, report["device"], report["bench"]) if test["status"] == "fail"]


def check(chosen):
    outdated = 0
    for entry in chosen:
        reason = staleness(entry)
        report = None if reason else json.loads(entry.path.read_text())
        failed = failures(entry, report) if report else []
        skipped = sum(test["status"] == "skip" for test in report["tests"]) if report else 0
        outdated += bool(reason or failed)
        print(f"{entry.name}: {reason or ('FAILED: ' + ', '.join(failed[:5]) if failed else 'up to date')}" + (f" ({skipped} not run)" if skipped else ""))
    known = {entry.path.name for entry in entries().values()}
    for path in sorted(FOLDER.glob("*.json")):
        if path.name not in known:
            outdated += 1
            print(f"{path.stem}: nothing makes this file any more")
    print(f"{outdated} to be renewed" if outdated else "all up to date")
    return 1 if outdated else 0


def main():
    global BUILD
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--stale-only", action="store_true")
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--build", default=str(BUILD), help="the build folder")
    arguments = parser.parse_args()
    BUILD = ROOT / arguments.build
    os.environ["TRAIN_GPT_BUILD"] = str(BUILD)  # for the scripts that are run
    table = entries()
    unknown = [name for name in arguments.names if name not in table]
    if unknown:
        parser.error(f"no such report: {', '.join(unknown)}; there are {', '.join(table)}")
    chosen = [table[name] for name in arguments.names] or [e for e in table.values() if arguments.check or arguments.list or not e.long]
    if arguments.list:
        for entry in chosen:
            print("\n".join(f"{entry.name}: {relative_command(words)}" for _, words in entry.commands))
        return 0
    if arguments.check:
        return check(chosen)
    if arguments.stale_only:
        chosen = [entry for entry in chosen if staleness(entry)]
    header = machine()
    if not header["device"]:
        print("no GPU: nothing to run")
        return NO_GPU
    parts = [arguments.part] if arguments.part else PARTS
    chosen = [entry for entry in chosen if any(part in parts for part, _ in entry.commands)]
    return 0 if all([run(entry, header, parts) for entry in chosen]) else 1


if __name__ == "__main__":
    sys.exit(main())
