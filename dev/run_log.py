"""Reads log.jsonl of a run: one JSON object a line, {"kind": "run" | "step" | "eval" | ..., "step": n, ...}."""
import datetime
import json
import pathlib
import sys

# Where `pip install --target deps/python NAME` puts packages that the system lacks.
PACKAGES = pathlib.Path(__file__).resolve().parent.parent / "deps/python"
sys.path.append(str(PACKAGES))


def log_of(run):
    path = pathlib.Path(run)
    return path / "log.jsonl" if path.is_dir() else path


def text_of(run):
    try:
        return log_of(run).read_text(errors="replace")
    except FileNotFoundError:
        raise OSError(f"{run}: no log.jsonl there: give a run's folder or its log.jsonl") from None
    except OSError as error:
        raise OSError(f"{run}: cannot read: {error.strerror}") from None


def read_records(run):
    """Records by (kind, step). A torn last line is ignored; a record after a resume replaces the old."""
    records = {}
    for line in text_of(run).splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "step" in record:
            records[(record.get("kind"), record["step"])] = record
    return records


def curve(records, kind, key):
    """[(step, value)] in order, numbers only."""
    return sorted((step, r[key]) for (k, step), r in records.items() if k == kind and isinstance(r.get(key), (int, float)))


def named(words):
    """{"mine": "runs/mine"} of ["runs/mine"] or ["mine=runs/mine"]; equal names get the whole path."""
    pairs = []
    for word in words:
        name, _, run = word.rpartition("=")
        log = log_of(run)
        pairs.append((name or (log.parent.name if log.name == "log.jsonl" else log.stem) or run, run))
    names = [name for name, _ in pairs]
    return {name if names.count(name) == 1 else run: run for name, run in pairs}


# Kind of record -> the name its scalars get, and which of them there are.
SCALARS = {
    "step": ("train", ("loss", "grad_norm", "lr", "tokens_per_s", "mfu", "sol", "skipped_steps")),
    "eval": ("val", ("loss",)),
    "choices": ("choices", ("accuracy", "accuracy_by_token", "accuracy_by_byte")),
}


def scalars_of(record):
    """{"train/loss": 3.2, ...} of a record; {} of a kind that has none."""
    prefix, keys = SCALARS.get(record.get("kind"), ("", ()))
    return {f"{prefix}/{key}": record[key] for key in keys if isinstance(record.get(key), (int, float))}


def wall_times(records):
    """{step: seconds since 1970}, from the first run record's time and the steps' durations."""
    runs = [r for (kind, _), r in records.items() if kind == "run"]
    now = datetime.datetime.fromisoformat(min(r["time"] for r in runs).replace("Z", "+00:00")).timestamp() if runs else 0.0
    durations = {step: r.get("seconds") or 0.0 for (kind, step), r in records.items() if kind == "step"}
    times = {}
    for step in sorted({step for _, step in records}):
        now += durations.get(step, 0.0)
        times[step] = now
    return times
