"""Tests of data/prepare and data/inspect as a user runs them."""
import gzip
import json
import os
import re
import resource
import shutil
import subprocess

from program_runs import ROOT, Scratch, Skipped, SmallDisk, program


def data_program(name, *options, ok=True, **how):
    done = subprocess.run([str(program().parent / "data" / name), *options], **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300, **how})
    assert (done.returncode == 0) == ok, f"exit status {done.returncode}:\n{(done.stdout or '')[-2000:]}{done.stderr[-2000:]}"
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


def refused(name, *options, **how):
    """The one line of the error."""
    done = data_program(name, *options, ok=False, **how)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and not done.stdout, f"{options}: {done.stderr!r}"
    return lines[0]


def test_ranks_are_found_where_the_program_was_built():
    with Scratch() as out:
        for folder in ("build/arch/data", "deps", "elsewhere"):
            (out / folder).mkdir(parents=True)
        copy = shutil.copy(program().parent / "data" / "prepare", out / "build/arch/data/prepare")
        (out / "elsewhere" / "a.txt").write_text("some text")

        def error():
            done = subprocess.run([copy, "--out", "shards", "--tokenizer", "gpt2", "a.txt"], cwd=out / "elsewhere", capture_output=True, text=True, timeout=60)
            assert done.returncode == 1, done.stdout + done.stderr
            return done.stderr
        absent = error()
        for part in ("deps/gpt2.tiktoken", str(out / "build/arch/data"), "make data-gpt2-ranks", "--gpt2-ranks"):
            assert part in absent, f"{part}: {absent}"
        (out / "deps" / "gpt2.tiktoken").write_text("YQ== 0\n")  # whose fault is told with its name
        assert str(out / "deps" / "gpt2.tiktoken") in error(), error()


def test_wrong_usage_is_one_clear_line():
    """Options first, then the input, then the output; nothing is made before all of them are right."""
    with Scratch() as out:
        (out / "text").mkdir()
        (out / "text" / "a.txt").write_text("some text")
        (out / "bad.jsonl").write_text('{"a": 1}\n')
        cases = [
            ("prepare", [], "INPUT is required, see --help"),
            ("prepare", ["text"], "--out is required, see --help"),
            ("prepare", ["--out"], "--out: 1 required TEXT missing, see --help"),
            ("prepare", ["--out", "o", "--threadz", "1", "text"], "--threadz: no such option"),
            ("prepare", ["--out", "o", "--val-fraction", "abc", "text"], "--val-fraction abc: is not a value"),
            ("prepare", ["--out", "o", "--shard-tokens", "1e6", "text"], "--shard-tokens: must be a whole number in plain digits from 4096 to 9223372036854775807, is 1e6"),
            ("prepare", ["--out", "text/a.txt", "--shard-tokens", "1", "none"], "--shard-tokens: must be a whole number in plain digits from 4096 to 9223372036854775807, is 1,"),
            ("prepare", ["--out", "o", "--shard-tokens", "9" * 20, "text"], f"from 4096 to 9223372036854775807, is {'9' * 20}"),
            ("prepare", ["--out", "o", "--shard-tokens", "0100000", "text"], "in plain digits from 4096 to 9223372036854775807, is 0100000"),
            ("prepare", ["--out", "o", "--threads", "9" * 20, "text"], f"--threads: must be a whole number in plain digits from 1 to 1024, is {'9' * 20}"),
            ("prepare", ["--out", "text/a.txt", "--tokenizer", "foo", "none"], '"foo": must be bytes or gpt2'),
            ("prepare", ["--out", "text/a.txt", "none"], "none: no such file or folder"),
            ("prepare", ["--out", "text/a.txt", "text"], "text/a.txt: is not a folder"),
            ("prepare", ["--out", "text/a.txt/o", "text"], "text/a.txt/o: cannot make this folder: Not a directory"),
            ("prepare", ["--out", "", "text"], "--out: is empty"),
            ("prepare", ["--out", "o", "--extensions", "", "text"], "--extensions: is empty"),
            ("prepare", ["--out", "o", "--extensions", ".txt,*.md", "text"], '--extensions ".txt,*.md": "*.md" is no extension'),
            ("prepare", ["--out", "o", "--extensions", "xyz", "text"], "text: no files with the extensions xyz, 1 with others: see --extensions"),
            ("prepare", ["--out", "o", "--skip-bad-lines", "bad.jsonl"], "no documents in the input: 1 lines"),
            ("inspect", [], "INPUT is required, see --help"),
            ("inspect", ["none"], "none: cannot open: No such file"),
            ("inspect", ["text"], "text: no shards: expected *.bin files in this folder"),
            ("inspect", ["--samples", "-1", "text"], "--samples: must be a whole number in plain digits from 0 to 1000, is -1"),
            ("inspect", ["--sample-tokens", "010", "text"], "--sample-tokens: must be a whole number in plain digits from 1 to 100000, is 010"),
            ("inspect", ["--seed", "18446744073709551616", "text"], "--seed: must be a whole number in plain digits from 0 to 18446744073709551615, is 18446744073709551616"),
        ]
        for name, options, mention in cases:
            line = refused(name, *options, cwd=out)
            assert mention in line, f"{name} {options}: {line}"
        assert not (out / "o").exists()


def test_what_may_not_be_read_or_written_is_said():
    if os.geteuid() != 0:
        raise Skipped("needs root, to become somebody with fewer rights")
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    with Scratch() as out:
        out.chmod(0o755)
        for folder in ("text", "secret", "closed"):
            (out / folder).mkdir()
            (out / folder / "a.txt").write_text("some text")
        (out / "text" / "mine.txt").write_text("mine")
        (out / "text" / "mine.txt").chmod(0o600)
        (out / "secret").chmod(0o700)
        (out / "open").mkdir(mode=0o777)
        (out / "open").chmod(0o777)
        cases = [
            ("prepare", ["--out", "open/o", "text/mine.txt"], "text/mine.txt: cannot open: Permission denied"),
            ("prepare", ["--out", "open/o", "text"], "text/mine.txt: cannot open: Permission denied"),
            ("prepare", ["--out", "open/o", "secret"], "secret: cannot list this folder: Permission denied"),
            ("prepare", ["--out", "open/o", "secret/a.txt"], "secret/a.txt: cannot open: Permission denied"),
            ("prepare", ["--out", "closed/o", "closed"], "--out closed/o: cannot make this folder: Permission denied"),
            ("prepare", ["--out", "closed", "closed"], "--out closed: cannot write there: Permission denied"),
            ("inspect", ["secret"], "secret: cannot list this folder: Permission denied"),
            ("inspect", ["secret/a.txt"], "secret/a.txt: Permission denied"),
        ]
        for name, options, mention in cases:
            line = refused(name, *options, cwd=out, **nobody)
            assert mention in line and "change its permissions" in line, f"{name} {options}: {line}"
        assert not list((out / "open").iterdir()), "an error leaves something"


def test_a_full_or_read_only_disk_leaves_what_was_there():
    with Scratch() as out, SmallDisk(2) as disk:
        for name, megabytes in (("small", 1), ("large", 4)):
            (out / name).write_text("a line of text\n" * (megabytes * 1000000 // 15))
        data_program("prepare", "--out", str(disk.path / "o"), "--val-fraction", "0", str(out / "small"))
        before = {f.name: f.read_bytes() for f in (disk.path / "o").iterdir()}
        for where, more in (("o", ["--overwrite"]), ("new/o", [])):
            line = refused("prepare", "--out", str(disk.path / where), *more, str(out / "large"))
            assert "No space left on device: free some space, or use another place" in line, line
        assert [f.name for f in disk.path.iterdir()] == ["o"] and {f.name: f.read_bytes() for f in (disk.path / "o").iterdir()} == before
        disk.remount("ro")
        for where, more, mention in (("o", ["--overwrite"], "cannot write there: Read-only"), ("new", [], "cannot make this folder: Read-only")):
            line = refused("prepare", "--out", str(disk.path / where), *more, str(out / "small"))
            assert mention in line and "use a place that can be written" in line, line
        disk.remount("rw")


def test_a_limit_on_the_size_of_files_leaves_what_was_there():
    with Scratch() as out:
        for name, lines in (("small", 1000), ("large", 100000)):
            (out / name).write_text("a line of text\n" * lines)
        data_program("prepare", "--out", str(out / "o"), "--val-fraction", "0", str(out / "small"))
        before = {f.name: f.read_bytes() for f in (out / "o").iterdir()}
        limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))}
        for where, more in (("o", ["--overwrite"]), ("new/o", [])):
            line = refused("prepare", "--out", str(out / where), "--val-fraction", "0", *more, str(out / "large"), **limit)
            assert "train_000000.bin.tmp: cannot write: File too large: raise the limit on a file's size (ulimit -f)" in line, line
        assert {f.name: f.read_bytes() for f in (out / "o").iterdir()} == before and not (out / "new").exists()


def test_output_that_does_not_arrive_is_no_success():
    with Scratch() as out, open("/dev/full", "w") as full:
        (out / "a.txt").write_text("some text\n" * 100)
        data_program("prepare", "--out", str(out / "o"), str(out / "a.txt"))
        for name, options in (("prepare", ["--help"]), ("inspect", ["--help"]), ("inspect", [str(out / "o")]), ("prepare", ["--overwrite", "--out", str(out / "o"), str(out / "a.txt")])):
            done = data_program(name, *options, ok=False, capture_output=False, stdout=full, stderr=subprocess.PIPE)
            assert len(done.stderr.splitlines()) == 1 and "standard output: cannot write: No space left on device" in done.stderr, f"{name} {options}: {done.stderr!r}"
