#!/usr/bin/env python3
"""Writes runs in the offline format of Weights & Biases, without network or account.

    export_wandb.py --out FOLDER [--project NAME] [NAME=]RUN ...        then: wandb sync FOLDER/wandb/offline-run-*

A RUN is a run's folder or its log.jsonl. Needs the package wandb (pip install wandb, or pip install --target deps/python wandb).
"""
import argparse
import os
import sys

from run_log import named, read_records, scalars_of


def by_step(records):
    """{step: scalars of all its records}"""
    steps = {}
    for (_, step), record in records.items():
        steps.setdefault(step, {}).update(scalars_of(record))
    return dict(sorted((step, values) for step, values in steps.items() if values))


def write_run(run, name, arguments):
    import wandb
    records = read_records(run)
    first = min((r for (kind, _), r in records.items() if kind == "run"), key=lambda r: r["step"], default={})
    config = {key: first[key] for key in ("model", "recipe", "parameters", "tokens_per_step", "command", "commit", "device", "config") if key in first}
    with wandb.init(mode="offline", dir=arguments.out, project=arguments.project, name=name, config=config,
                    settings=wandb.Settings(silent=True, x_disable_stats=True, x_disable_meta=True)) as writer:
        steps = by_step(records)
        for step, values in steps.items():
            writer.log(values, step=step)
        return len(steps), writer.dir


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN")
    parser.add_argument("--out", required=True)
    parser.add_argument("--project", default="train_gpt_fp8")
    arguments = parser.parse_args()
    try:
        os.makedirs(arguments.out, exist_ok=True)
        for name, run in named(arguments.runs).items():
            steps, folder = write_run(run, name, arguments)
            print(f"{os.path.dirname(folder)}: {steps} steps of {name}")
    except ModuleNotFoundError as missing:
        sys.exit(f"error: this needs python3's {missing.name}: pip install wandb")
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
