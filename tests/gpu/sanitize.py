#!/usr/bin/env python3
"""compute-sanitizer over the checks of every dev program, in their small mode, which keeps the odd shapes.

    sanitize.py [--json FILE] [--jobs N] [--seconds N] [--earlier FILE] [PROGRAM...]

Many run at a time, spread over the machine's GPUs or those of CUDA_VISIBLE_DEVICES, the longest first. What has not ended --seconds after the start is a skipped result.
--earlier FILE: results of a call of the same sources, for the programs that are not named.
One result a tool and program: no report of the tool, and the checks pass under it. `engines` runs whole training steps, cuBLASLt's kernels included; racecheck instruments those too and takes many minutes there, so it is left out: every
kernel of ours is racechecked by its own program. Kernels that a tool cannot judge are excluded from it by name, and each
exclusion is a skipped result with its reason; the program's other kernels are judged. dev/attention runs none of cuDNN's kernels in its small mode.
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / os.environ.get("TRAIN_GPT_BUILD", "build/sm_90a")
TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")
LEFT_OUT = {("racecheck", "engines"): "takes many minutes in cuBLASLt's kernels; ours are racechecked by their own programs",
            **{(tool, "collectives"): "runs NCCL's kernels and none of ours, and does not end under it" for tool in ("initcheck", "racecheck")},
            **{(tool, "sharding"): "runs NCCL's kernels, under which it does not end; ours are judged by engines and their own programs" for tool in ("initcheck", "racecheck")}}
# What a library asks of the driver while it finds out what it can use, which memcheck reports as errors of CUDA's API. Our own calls
# are all checked, and accesses of memory are reported in any case.
API_ERRORS = {program: "NCCL asks for kernels that it has for other GPUs only" for program in ("collectives", "sharding")}
SLOWEST = ("sharding", "collectives", "engines", "attention", "layernorm", "embedding", "gemm", "quantize")
OTHER_TOOLS = "; memcheck, initcheck and synccheck cover these kernels"
# (tool, program): the part of mangled kernel names that the tool is told to leave out, which may be that of a file, and of
# each file or kernel that has it, why the tool cannot judge it. without_reason() sees to it that nothing else hides behind the part.
EXCLUDED = {
    ("racecheck", "attention"): ("hopper_", {
        "hopper_forward.cu": "racecheck does not follow mbarriers in PTX, which order TMA's writes of Q, K and V and the position of the next tile that the "
                             "producer stores for its consumers (mailbox), the only ordinary store handed over" + OTHER_TOOLS,
        "hopper_backward.cu": "racecheck does not follow mbarriers in PTX: it reports LSE and delta, floats that one warp stores and another reads after "
                              "waiting for their mbarrier" + OTHER_TOOLS}),
    ("racecheck", "ptx"): ("ring_kernel", {
        "ring_kernel": "racecheck does not follow mbarriers in PTX, the only order between a chunk's copy, its readers and the copy over it: the readers meet "
                       "at a named barrier, then one arrives at the mbarrier (release) for which the producer waits (acquire) before it copies again" + OTHER_TOOLS})}
SUMMARY = re.compile(r"(ERROR SUMMARY: \d+ errors?|RACECHECK SUMMARY: [^\n]*)")
CLEAN = re.compile(r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)")
TIMEOUT_S = 540


def programs():
    return sorted(p.stem for p in (ROOT / "dev").glob("*.cu") if "run_dev_program" in p.read_text())


def without_reason():
    """Files and kernels that an excluded part of a name hides with no reason given, and reasons for what is not there."""
    found = []
    for (_, program), (part, reasons) in EXCLUDED.items():
        files = [p for p in (ROOT / "kernels").rglob("*.cu") if part in p.stem]
        kernels = re.findall(r"^__global__[^;{]*?(\w+)\(", re.sub(r"__launch_bounds__\([^)]*\)", "", (ROOT / "dev" / f"{program}.cu").read_text()), re.M)
        found += {p.name for p in files} ^ {name for name in reasons if name.endswith(".cu")}
        found += {name for name in kernels if part in name} ^ {name for name in reasons if not name.endswith(".cu")}
    return sorted(found)


def run(tool, program, gpu, ends):
    name = f"sanitizer: {tool} {program}"
    if (tool, program) in LEFT_OUT:
        return {"name": name, "status": "skip", "figure": LEFT_OUT[tool, program]}
    start = time.monotonic()
    excluded = ["--kernel-name-exclude", f"kernel_substring={EXCLUDED[tool, program][0]}"] if (tool, program) in EXCLUDED else []
    if program in API_ERRORS and tool == "memcheck":
        excluded += ["--report-api-errors", "no"]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "10", *excluded, str(BUILD / "dev" / program), "check", "--small"]
    left_s = ends - time.monotonic()
    if left_s <= 0:
        return {"name": name, "status": "skip", "figure": "had no time left to begin"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=min(TIMEOUT_S, left_s), env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu})
    except subprocess.TimeoutExpired:
        if left_s < TIMEOUT_S:
            return {"name": name, "status": "skip", "figure": f"not finished after {left_s:.0f} s, when the time of all was over"}
        return {"name": name, "status": "fail", "figure": f"not finished after {TIMEOUT_S} s"}
    output = done.stdout + done.stderr
    summary = SUMMARY.findall(output)
    checks = re.search(r"\d+ passed, \d+ failed", output)
    ok = done.returncode == 0 and summary and all(CLEAN.fullmatch(s) for s in summary)
    if not ok:
        print("\n".join(line for line in output.splitlines() if "| ok" not in line)[-4000:])
    figure = f"{summary[-1] if summary else 'no summary'}; {checks[0] if checks else 'no checks'}; {time.monotonic() - start:.0f} s"
    print(f"{name} | {figure} | {'pass' if ok else 'fail'}", flush=True)
    return {"name": name, "status": "pass" if ok else "fail", "figure": figure}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*")
    parser.add_argument("--json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--earlier", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time for all")
    arguments = parser.parse_args()
    ends = time.monotonic() + arguments.seconds
    found = len(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()) if shutil.which("nvidia-smi") else 0
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(found)))).split(",")
    if found == 0:
        print("sanitize: skipped: no GPU")
        return 77
    chosen = sorted(arguments.programs or programs(), key=lambda program: (SLOWEST + (program,)).index(program))
    work = sorted(((tool, program) for program in chosen for tool in TOOLS), key=lambda item: item != ("racecheck", "attention"))
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        tests = list(pool.map(lambda turn: run(*turn[1], gpus[turn[0] % len(gpus)], ends), enumerate(work)))
    tests += [{"name": f"sanitizer: {tool} {program}, {'kernels of ' if name.endswith('.cu') else ''}{name}", "status": "skip", "figure": reason}
              for (tool, program), (_, reasons) in EXCLUDED.items() if (tool, program) in work for name, reason in reasons.items()]
    tests += [{"name": f"sanitizer: {name}", "status": "fail", "figure": "is excluded from a tool without a reason, or has a reason and is not there"}
              for name in without_reason()]
    tests += [{"name": f"sanitizer: memcheck {program}, errors of CUDA's API", "status": "skip", "figure": reason} for program, reason in API_ERRORS.items() if program in chosen]
    if arguments.earlier:
        others = {program for program in programs() if program not in chosen}
        tests += [test for test in json.loads(arguments.earlier.read_text())["tests"] if re.split(r"[ ,]+", test["name"])[2] in others]
    for test in [test for test in tests if test["status"] == "skip"]:
        print(f"{test['name']} | {test['figure']} | skip")
    print(f"{sum(test['status'] == 'pass' for test in tests)} passed, {sum(test['status'] == 'fail' for test in tests)} failed")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps({"tests": tests, "bench": []}, indent=1) + "\n")
    return 1 if any(test["status"] == "fail" for test in tests) else 0


if __name__ == "__main__":
    sys.exit(main())
