#!/usr/bin/env python3
"""Writes runs as TensorBoard event files: scalars of steps, evaluations and multiple choice, texts of samples.

    export_tensorboard.py --out FOLDER [NAME=]RUN ...        then: tensorboard --logdir FOLDER

A RUN is a run's folder or its log.jsonl. Needs the package tensorboard (pip install tensorboard, or pip install --target deps/python tensorboard).
"""
import argparse
import sys

from run_log import named, read_records, scalars_of, wall_times

TEXT_OF_SAMPLE = "sample"


def write_run(run, folder):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    records = read_records(run)
    times = wall_times(records)
    writer = EventFileWriter(str(folder))
    events = 0
    for (kind, step), record in sorted(records.items(), key=lambda item: item[0][1]):
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars_of(record).items()]
        if values:
            writer.add_event(Event(wall_time=times[step], step=step, summary=Summary(value=values)))
        if kind == TEXT_OF_SAMPLE:
            writer.add_event(Event(wall_time=times[step], step=step, summary=text_pb(TEXT_OF_SAMPLE, record["prompt"] + record["text"])))
        events += bool(values)
    writer.close()
    return events


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    try:
        for name, run in named(arguments.runs).items():
            folder = f"{arguments.out}/{name.strip('/')}"
            print(f"{folder}: {write_run(run, folder)} events")
    except ModuleNotFoundError as missing:
        sys.exit(f"error: this needs python3's {missing.name.split('.')[0]}: pip install tensorboard")
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
