#!/usr/bin/env python3
"""Draws runs to a PNG: loss (training thin and smoothed, validation as points), learning rate, gradient norm, tokens a second.

    plot.py --out runs.png [NAME=]RUN ...

A RUN is a run's folder or its log.jsonl: one JSON object a line, {"kind": "step" | "eval" | ..., "step": n, "loss": x, ...}.
"""
import argparse
import sys

from run_log import curve, log_of, named, read_records

# Panel -> kind of record and key; what a key has not is not drawn.
PANELS = {
    "learning rate": ("step", "lr"),
    "gradient norm": ("step", "grad_norm"),
    "tokens/s": ("step", "tokens_per_s"),
}


def read_log(run):
    """[(step, loss)] of training and of validation."""
    records = read_records(run)
    return curve(records, "step", "loss"), curve(records, "eval", "loss")


def smoothed(points, weight):
    """Exponential mean, corrected for its start."""
    total, norm, out = 0.0, 0.0, []
    for step, loss in points:
        total, norm = weight * total + (1 - weight) * loss, weight * norm + (1 - weight)
        out.append((step, total / norm))
    return out


def draw_loss(axes, runs, smoothing):
    lowest, marks = [], []
    for i, (name, run) in enumerate(runs.items()):
        train, val = read_log(run)
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
        axes.set_ylim(min(lowest) - 0.1, max(marks) + 0.1)
    axes.set_ylabel("loss, nats a token")
    axes.legend(fontsize=8)


def draw_panel(axes, runs, title, smoothing):
    kind, key = PANELS[title]
    for i, (name, run) in enumerate(runs.items()):
        points = curve(read_records(run), kind, key)
        if title == "tokens/s":
            points = points[1:]  # the first step captures graphs
        if points:
            axes.plot(*zip(*(points if title == "learning rate" else smoothed(points, smoothing))), color=f"C{i % 10}", linewidth=1, label=name)
    axes.set_ylabel(title)


def draw(runs, out, title="", smoothing=0.9, panels=()):
    """runs: {name: folder or log}; panels: names of PANELS to draw below the loss."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1 + len(panels), squeeze=False, sharex=True, figsize=(9, 5.5 + 2 * len(panels)),
                                height_ratios=[5.5] + [2] * len(panels))
    axes = axes[:, 0]
    draw_loss(axes[0], runs, smoothing)
    for panel, below in zip(panels, axes[1:]):
        draw_panel(below, runs, panel, smoothing)
    for each in axes:
        each.grid(alpha=0.3)
    axes[0].set_title(title)
    axes[-1].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN")
    parser.add_argument("--out", required=True)
    parser.add_argument("--title", default="")
    parser.add_argument("--smoothing", type=float, default=0.9)
    arguments = parser.parse_args()
    runs = named(arguments.runs)
    try:
        if not any(read_records(run) for run in runs.values()):
            raise ValueError("no record in " + ", ".join(str(log_of(run)) for run in runs.values()))
        draw(runs, arguments.out, arguments.title, arguments.smoothing, list(PANELS))
    except ModuleNotFoundError as missing:
        sys.exit(f"error: plotting needs python3's {missing.name}: apt-get install python3-matplotlib, or pip install matplotlib")
    except (OSError, ValueError) as error:
        named_file = getattr(error, "filename", None)
        sys.exit(f"error: {named_file}: {error.strerror}" if named_file else f"error: {error}")
    print(f"drew {len(runs)} run{'s' if len(runs) > 1 else ''} to {arguments.out}")


if __name__ == "__main__":
    main()
