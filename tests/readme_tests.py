"""The commands that README.md shows, run as they stand: every fenced block marked ```sh ci, in order, in one scratch folder
that looks like the repository's root. What a block writes, the next ones use."""
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

from program_runs import ROOT, Skipped

BLOCK = re.compile(r"^```sh ci\n(.*?)^```$", re.M | re.S)
WRITTEN = {"runs", "shards", "build"}  # of these the scratch folder has its own
# A newcomer must see each of these work; the README cannot lose one unnoticed.
SHOWN = ("data/prepare", "data/inspect", "--help", "--print-config", "--config", "--resume", "--init-from", "--profile", "--generate", "--evaluate", "--verify",
         "--dry-run", "--micro-batch auto", "--sample-every", "--multiple-choice", "make plot")
# What a command with this text must print: that it did what the README says of it.
PRINTS = {"--help": "--micro-batch", "--verify": "verify: ok", "--dry-run": "a step,", "--resume auto": "start   step 20 of runs/bf16",
          "--init-from": "start   weights of runs/mine", "--sample-every": "sample 1 after step 10 | void ", "--generate": "--- sample 2", "--evaluate": "val loss",
          "--multiple-choice": "accuracy", "--profile": "of ceiling", "data/inspect": "documents", "--steps 60": "step 60/60", "make plot": "drew 2 runs"}


def blocks():
    return BLOCK.findall((ROOT / "README.md").read_text())


def commands(block):
    """One string a command: lines that end with a backslash go on."""
    return [c for c in re.sub(r"\\\n\s*", " ", block).splitlines() if c.strip() and not c.lstrip().startswith("#")]


def scratch_root():
    folder = pathlib.Path(tempfile.mkdtemp(prefix="train_gpt_fp8_readme_"))
    for entry in ROOT.iterdir():
        if entry.name not in WRITTEN and entry.name != ".git":
            (folder / entry.name).symlink_to(entry)
    return folder


def run(command, folder):
    done = subprocess.run(["bash", "-eo", "pipefail", "-c", command], cwd=folder, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "MAKEFLAGS": ""})
    lacks = re.search(r"error: (.*needs python3's.*)", done.stderr)
    if done.returncode != 0 and lacks:
        raise Skipped(lacks[1])
    assert done.returncode == 0, f"exit status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
    assert done.stdout.strip() or " > " in command, "it printed nothing"
    for text, printed in PRINTS.items():
        assert text not in command or printed in done.stdout, f"it did not print {printed!r}: {done.stdout[-1500:]}"


def tests():
    """(name, function) of every command, and of what must be among them."""
    folder = scratch_root()

    def shows_everything():
        text = "\n".join(blocks())
        missing = [what for what in SHOWN if what not in text]
        assert not missing, f"no block marked ```sh ci shows {', '.join(missing)}"
    yield "shows every kind of command", shows_everything
    try:
        for block in blocks():
            for command in commands(block):
                yield command, lambda command=command: run(command, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
