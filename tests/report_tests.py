"""Tests of the tool that writes tests/gpu_report: perf floors."""
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/gpu"))

import floors  # noqa: E402
import report  # noqa: E402

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
    assert statuses("k", "Another card", good) == []
    assert statuses("other", "Card", good) == ["fail"], "0.8 is below 0.99"


def test_a_floor_without_its_row_fails():
    assert statuses("k", "Card", [kernel("4x4", us=3.0)]) == ["fail", "fail"]
    assert statuses("k", "Card", [kernel("4x4", of_ceiling=0.9)] * 2 + [kernel("8x8", us=1.0)]) == ["fail", "pass"]


def test_training_rows_are_told_apart():
    row = {"kind": "train", "model": "m", "recipe": "r", "tokens_per_s": 100.0, "command": "profile"}
    deterministic = row | {"tokens_per_s": 1.0, "command": "profile --deterministic"}
    another_program = row | {"tokens_per_s": 1.0, "program": "llm.c"}
    assert statuses("train", "Card", [row, deterministic, another_program]) == ["pass"]


def test_lines_of_another_form_are_refused():
    for text in ("k | copy | us | <= 1", "[Card]\nk | copy | us | 1", "[Card]\nk | us | >= 1"):
        try:
            floors.parse(text)
        except ValueError:
            continue
        assert False, f"accepted: {text}"


def test_the_floors_are_of_reports_that_exist():
    names = set(report.entries())
    parsed = floors.parse(floors.FILE.read_text())
    assert parsed, "no floors"
    for device, lines in parsed.items():
        assert len({line[:3] for line in lines}) == len(lines), f"{device}: a floor stands twice"
        for line in lines:
            assert line[0] in names, f"{device}: no report {line[0]}"
