#!/usr/bin/env python3
"""Draws the loss of any number of runs: training (thin, smoothed) and validation (points) over steps.

    plot.py --out loss.png [NAME=]LOG.jsonl ...

A log is the trainer's log.jsonl: one JSON object a line, {"kind": "step" | "eval", "step": n, "loss": x, ...}.
"""
import argparse
import json
import pathlib
import sys


def read_log(path):
    """[(step, loss)] of training and of validation. A torn last line is ignored; a record after a resume replaces the old."""
    train, val = {}, {}
    for line in pathlib.Path(path).read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        into = {"step": train, "eval": val}.get(record.get("kind"))
        if into is not None and isinstance(record.get("loss"), (int, float)):
            into[record["step"]] = record["loss"]
    return sorted(train.items()), sorted(val.items())


def smoothed(points, weight):
    """Exponential mean, corrected for its start."""
    total, norm, out = 0.0, 0.0, []
    for step, loss in points:
        total, norm = weight * total + (1 - weight) * loss, weight * norm + (1 - weight)
        out.append((step, total / norm))
    return out


def draw(logs, out, title="", smoothing=0.9):
    """logs: {name: path}"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(9, 5.5))
    lowest, marks = [], []
    for i, (name, path) in enumerate(logs.items()):
        train, val = read_log(path)
        color = f"C{i % 10}"
        if train:
            line = smoothed(train, smoothing)
            axes.plot(*zip(*line), color=color, linewidth=1, alpha=0.8, label=f"{name}: training")
            lowest.append(min(loss for _, loss in line))
            marks.append(line[len(line) // 20][1])
        if val:
            axes.plot(*zip(*val), color=color, marker="o", markersize=4, linestyle="--", linewidth=1,
                      label=f"{name}: validation {val[-1][1]:.4f}")
            lowest.append(min(loss for _, loss in val))
    if marks:  # the first steps fall so steeply that they would flatten all the rest
        axes.set_ylim(min(lowest) - 0.1, max(marks))
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", metavar="[NAME=]LOG")
    parser.add_argument("--out", required=True)
    parser.add_argument("--title", default="")
    parser.add_argument("--smoothing", type=float, default=0.9)
    arguments = parser.parse_args()
    logs = {}
    for word in arguments.logs:
        name, _, path = word.rpartition("=")
        logs[name or pathlib.Path(path).parent.name or path] = path
    draw(logs, arguments.out, arguments.title, arguments.smoothing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
