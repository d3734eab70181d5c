"""Tests of the tool that writes tests/gpu_report (its parts, perf floors), and that README has its figures."""
import json
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests/gpu"), str(ROOT / "tests")]

import floors  # noqa: E402
import report  # noqa: E402
import sanitize  # noqa: E402
from program_runs import Skipped  # noqa: E402

FLOORS = """
# a comment
[Card]
k | copy 4x4 | of_ceiling | >= 0.8   # why
k | copy 8x8 | us | <= 10
other | copy 4x4 | of_ceiling | >= 0.99
train | m r | tokens_per_s | >= 100
"""


def kernel(case, **figures):
    return {"kind": "kernel", "name": "copy", "case": case, **figures}


def statuses(name, device, bench):
    return [test["status"] for test in floors.tests(name, device, bench, FLOORS)]


def test_floors_decide():
    good = [kernel("4x4", of_ceiling=0.8), kernel("8x8", us=10.0)]
    assert statuses("k", "Card", good) == ["pass", "pass"]
    assert statuses("k", "Card", [kernel("4x4", of_ceiling=0.799), kernel("8x8", us=10.1)]) == ["fail", "fail"]
    assert statuses("k", "Another card", good) == ["skip"]
    assert statuses("unguarded", "Another card", good) == []
    assert statuses("other", "Card", good) == ["fail"], "0.8 is below 0.99"


def test_a_floor_without_its_row_fails():
    assert statuses("k", "Card", [kernel("4x4", us=3.0)]) == ["fail", "fail"]
    assert statuses("k", "Card", [kernel("4x4", of_ceiling=0.9)] * 2 + [kernel("8x8", us=1.0)]) == ["fail", "pass"]


def test_training_rows_are_told_apart():
    row = {"kind": "train", "model": "m", "recipe": "r", "tokens_per_s": 100.0, "command": "profile"}
    deterministic = row | {"tokens_per_s": 1.0, "command": "profile --deterministic"}
    another_program = row | {"tokens_per_s": 1.0, "program": "llm.c"}
    assert statuses("train", "Card", [row, deterministic, another_program]) == ["pass"]


def test_the_fastest_peer_decides():
    floor = "[Card]\nk | f [ours] c | best_peer_ratio | >= 1.0"

    def status(*peers):
        rows = [{"kind": "kernel", "name": "f [ours]", "case": "c", "us": 10.0}, {"kind": "kernel", "name": "f [ours]", "case": "other", "us": 1.0}, *peers]
        return [test["status"] for test in floors.tests("k", "Card", rows, floor)]

    cudnn = {"kind": "kernel", "name": "f [cudnn]", "case": "c", "us": 11.0}
    torch = {"kind": "kernel", "program": "PyTorch", "name": "f", "case": "c", "us": 12.0}
    assert status(cudnn, torch) == status(cudnn) == status(torch) == ["pass"]
    assert status(cudnn, torch | {"us": 9.9}) == ["fail"]
    assert status(cudnn | {"us": 9.9}, torch) == ["fail"]
    assert status() == ["fail"], "without a peer there is no ratio"


def test_lines_of_another_form_are_refused():
    for text in ("k | copy | us | <= 1", "[Card]\nk | copy | us | 1", "[Card]\nk | us | >= 1"):
        try:
            floors.parse(text)
        except ValueError:
            continue
        assert False, f"accepted: {text}"


def test_every_report_has_its_makers():
    """A dev program that is no longer found would silently drop out of the report, with its checks."""
    known = {entry.path.name for entry in report.entries().values()}
    assert {path.name for path in report.FOLDER.glob("*.json")} <= known, known
    assert {"sharding", "collectives", "attention", "ptx"} <= set(sanitize.programs()) and set(sanitize.programs()) <= set(report.entries())


def readme_rows(header):
    """Cells of the table in README whose header begins so."""
    lines = (ROOT / "README.md").read_text().split(header, 1)[1].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def report_of(name):
    return json.loads((report.FOLDER / f"{name}.json").read_text())


def thousands(rate):
    return f"{rate / 1e3:.0f}k" if rate >= 1e5 else f"{rate / 1e3:.1f}k"


def test_readme_has_the_training_rows_of_the_report():
    made = report_of("train")
    column = {"NVIDIA H100 80GB HBM3": 1, "NVIDIA H200": 2}.get(made["device"])
    if column is None:
        raise Skipped(f"README has no column of {made['device']}")
    rows = readme_rows("| T=1024, `build/sm_90a/dev/profile ...` |")
    ours = [row for row in made["bench"] if "dev/profile" in row["command"]]
    assert len(rows) == len(ours) >= 7, f"{len(rows)} rows in README, {len(ours)} in the report"
    for cells, row in zip(rows, ours):
        assert all(f"--{option}" in cells[0] for option in ("deterministic", "attention mma", "attention cudnn") if f"--{option}" in row["command"]), f"{cells} and {row}"
        expected = [thousands(row["tokens_per_s"]), f"{row['ms_per_step']:.0f}", f"{100 * row['mfu']:.1f} %", f"{100 * row['sol']:.1f} %", f"{row['memory_gib']:.1f} GiB"]
        assert [cells[column], *cells[3:]] == expected, f"README has {cells}, the report {expected}"


def test_readme_has_the_sharded_rows_of_the_report():
    by_name = {row["name"]: row for row in report_of("multi_gpu")["bench"]}
    rows = readme_rows("| tokens a GPU and step | mode |")
    assert len(rows) >= 6, rows
    for tokens, mode, rate, share, communication, exposed, memory in rows:
        tokens, mode = int(tokens.replace(",", "")), "alone" if mode == "one GPU" else mode.strip("`")
        row = by_name[f"speed gpt2-1558M tensorwise {mode}, {tokens} tokens a GPU and step"]
        expected = [f"{row['tokens_per_s'] / row['gpus']:,.0f}", "", "", "", f"{row['memory_gib']:.1f} GiB"]
        if mode != "alone":
            expected[1:4] = [f"{row['share_of_one_gpu']:.1%}".replace("%", " %"), f"{row['communication_ms']:.1f} ms of {row['ms_per_step']:.0f}", f"{row['exposed_ms']:.1f} ms"]
        assert [rate, share, communication, exposed, memory] == expected, f"README has {[rate, share, communication, exposed, memory]}, the report {expected}"


def test_readme_has_the_losses_and_checks_of_the_report():
    text = (ROOT / "README.md").read_text()
    for what, figures in (("learning", [t["figure"] for t in report_of("learning")["tests"] if "final validation losses" in t["name"]]),
                          ("sharding", [f"{sum(t['status'] == 'pass' for t in report_of('sharding')['tests']):,}"])):
        numbers = re.findall(r"\d[\d,]*(?:\.\d+)?", " ".join(figures).replace("bf16", ""))
        assert numbers and all(number in text for number in numbers), f"{what}: README lacks one of {numbers}"


def test_the_floors_are_of_reports_that_exist():
    names = set(report.entries())
    parsed = floors.parse(floors.FILE.read_text())
    assert parsed, "no floors"
    for device, lines in parsed.items():
        assert len({line[:3] for line in lines}) == len(lines), f"{device}: a floor stands twice"
        for line in lines:
            assert line[0] in names, f"{device}: no report {line[0]}"


def command_that_reports(results):
    """What a dev program does with --json, without a GPU."""
    return [sys.executable, "-c", f"import sys; open(sys.argv[2], 'w').write({json.dumps(results)!r})"]


def test_parts_run_apart_and_go_stale_together():
    entry = report.Entry("k", [(report.CHECKS, command_that_reports({"tests": [{"name": "right", "status": "pass", "figure": ""}], "bench": []})),
                               (report.BENCHMARKS, command_that_reports({"tests": [], "bench": [kernel("4x4", us=1.0)]}))], [])
    header = {"device": "Card"}
    folder, closure = report.FOLDER, report.closure
    with tempfile.TemporaryDirectory() as temporary:
        source = pathlib.Path(temporary) / "source"
        source.write_text("one")
        report.FOLDER, report.closure = pathlib.Path(temporary), lambda _: [str(source)]
        try:
            assert report.staleness(entry) == "missing"
            assert report.run(entry, header, [report.CHECKS])
            assert report.staleness(entry) == "its benchmarks have not run"
            assert report.run(entry, header, [report.BENCHMARKS])
            assert report.staleness(entry) == ""
            written = json.loads(entry.path.read_text())
            assert [test["name"] for test in written["tests"]] == ["right"] and len(written["bench"]) == 1
            assert report.run(entry, {"device": "Another card"}, [report.BENCHMARKS])
            assert report.staleness(entry) == "its checks have not run", "a part of another device is not kept"
            assert report.run(entry, header, report.PARTS)
            source.write_text("two")
            assert report.staleness(entry).startswith("changed: ")
            assert report.run(entry, header, [report.CHECKS])
            assert report.staleness(entry) == "its benchmarks have not run", "a part of other sources is not kept"
        finally:
            report.FOLDER, report.closure = folder, closure


def test_the_trainer_is_what_the_makefile_links():
    """A report whose hash leaves out an object would not go stale when that object's source changes."""
    printed = subprocess.run(["make", "-s", "-f", "Makefile", "--eval", "objects: ; @echo $(TRAINER_OBJECTS) $(KERNEL_OBJECTS) $(DATA_OBJECTS)", "objects"],
                             cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    linked = {word.split("/", 2)[2].removesuffix(".o") for word in printed if word.endswith(".o")}
    assert set(report.library_objects()) == linked, set(report.library_objects()) ^ linked
