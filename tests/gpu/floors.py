"""Perf floors: what tests/gpu/floors.txt demands of the figures of a report.

A line is `report | row | figure | bound`, below a [device name as nvidia-smi has it]. The row is a kernel's `name case`, or a
training row's `model recipe`, with ` deterministic` or ` attention BACKEND` behind it when its command says so. A bound is `>= x` or `<= x`.

The figure `best_peer_ratio` of a kernel `NAME [backend] CASE` is the time of the fastest peer over its own: of the rows of other
programs called `NAME CASE`, and of NAME's row with the backend cudnn. All ran in the same call.
"""
import operator
import pathlib
import re

FILE = pathlib.Path(__file__).with_name("floors.txt")
COMPARE = {">=": (operator.ge, "at least"), "<=": (operator.le, "at most")}


def parse(text):
    """{device: [(report, row, figure, sign, bound)]}; a line that says nothing of this form is a ValueError."""
    floors, device = {}, None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        if section := re.fullmatch(r"\[(.+)\]", line):
            device = floors.setdefault(section[1], [])
            continue
        fields = [field.strip() for field in line.split("|")]
        bound = re.fullmatch(r"(>=|<=) *([0-9.]+)", fields[-1])
        if device is None or len(fields) != 4 or not bound:
            raise ValueError(f"floors.txt, line {number}: not `report | row | figure | >= x` below a [device]: {line}")
        device.append((*fields[:3], bound[1], float(bound[2])))
    return floors


def label(row):
    if row["kind"] == "kernel":
        return f"{row['name']} {row['case']}".strip()
    command = row.get("command", "")
    attention = re.search(r"--attention (\w+)", command)
    return f"{row['model']} {row['recipe']}" + (" deterministic" if "--deterministic" in command else "") + (f" attention {attention[1]}" if attention else "")


def with_best_peer(bench):
    """The rows, those that have peers with `best_peer_ratio`."""
    def key(row):
        return re.sub(r" \[\w+\]$", "", row["name"]), row["case"]
    kernels = [row for row in bench if row["kind"] == "kernel" and row.get("us")]
    peers = {}
    for row in kernels:
        if "program" in row or row["name"].endswith("[cudnn]"):
            peers.setdefault(key(row), []).append(row["us"])
    return [row | {"best_peer_ratio": min(peers[key(row)]) / row["us"]} if row in kernels and key(row) in peers else row for row in bench]


def tests(report, device, bench, text=None):
    """One test a floor of this report and device. A floor that no row or several rows answer to fails: it guards nothing.
    On a device without floors, one skipped test says so for a report that has floors elsewhere."""
    floors, results = parse(FILE.read_text() if text is None else text), []
    if device not in floors and any(name == report for lines in floors.values() for name, *_ in lines):
        return [{"name": "floors", "status": "skip", "figure": f"floors.txt has none for {device}"}]
    bench = with_best_peer(bench)
    for name, row, figure, sign, bound in floors.get(device, []):
        if name != report:
            continue
        found = [r[figure] for r in bench if label(r) == row and figure in r and "program" not in r]
        holds, words = COMPARE[sign]
        ok = len(found) == 1 and holds(found[0], bound)
        text_of = f"{found[0]:g}, {words} {bound:g}" if len(found) == 1 else f"{len(found)} rows have this figure, must be one"
        results.append({"name": f"floor: {row}: {figure}", "status": "pass" if ok else "fail", "figure": text_of})
    return results
