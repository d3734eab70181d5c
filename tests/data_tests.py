"""Tests of data/prepare and data/inspect as a user runs them."""
import gzip
import json
import re
import subprocess

from program_runs import ROOT, Scratch, program


def data_program(name, *options, ok=True):
    done = subprocess.run([str(program().parent / "data" / name), *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == ok, f"exit status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done


def test_prepare_and_inspect_as_a_user():
    with Scratch() as out:
        lines = [json.dumps({"id": i, "content": f"document {i}: " + "words " * (i % 50)}) for i in range(2000)]
        (out / "docs.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        done = data_program("prepare", "--out", str(out / "a"), "--text-field", "content", "--threads", "1", str(out / "docs.jsonl.gz"))
        assert re.search(r"train \| +\d+ documents", done.stdout) and "MB/s" in done.stdout, done.stdout
        data_program("prepare", "--out", str(out / "b"), "--text-field", "content", "--threads", "4", str(out / "docs.jsonl.gz"))
        for name in ("train_000000.bin", "val_000000.bin"):
            assert (out / "a" / name).read_bytes() == (out / "b" / name).read_bytes(), f"{name} depends on the number of threads"
        shown = data_program("inspect", str(out / "a" / "val_000000.bin"), "--samples", "2").stdout
        assert "tokenizer bytes" in shown and "documents  |" in shown and "<|endoftext|>document" in shown, shown

        (out / "cut.gz").write_bytes((out / "docs.jsonl.gz").read_bytes()[:5000])
        (out / "cut.bin").write_bytes((out / "a" / "val_000000.bin").read_bytes()[:3000])
        cases = [
            (["prepare", "--out", str(out / "c"), str(out / "docs.jsonl.gz")], "docs.jsonl.gz:1"),      # no member "text"
            (["prepare", "--out", str(out / "c"), str(out / "cut.gz")], "cut short"),
            (["prepare", "--out", str(out / "a"), "--text-field", "content", str(out / "docs.jsonl.gz")], "--overwrite"),
            (["prepare", "--out", str(out / "c"), "--tokenizer", "gpt2", "--gpt2-ranks", "/nonexistent", str(ROOT / "data")], "make data-gpt2-ranks"),
            (["inspect", str(out / "cut.bin")], "truncated"),
        ]
        for command, mention in cases:
            done = data_program(*command, ok=False)
            lines = done.stderr.strip().splitlines()
            assert len(lines) == 1 and mention in lines[0], f"{command}: {done.stderr!r}"
        assert not list((out / "c").glob("*")), "a failed preparation leaves files"
