#!/usr/bin/env python3
"""Compares data/prepare's GPT-2 ids with tiktoken's, document by document: random and adversarial strings, then real text.

    pip install tiktoken          # or: pip install --target deps/python tiktoken
    make data-gpt2-ranks data-golang-1.19-src data-rust-src
    python3 tests/tokenizer_tiktoken.py downloads --megabytes 100 --strings 60000

All documents go through data/prepare as one file with separators, so its cutting and its threads are tested, too. Ends with
"N strings and M MB of text: equal" or with the first difference and status 1; with status 77 where tiktoken or the ranks lack.
"""
import argparse
import array
import base64
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "deps/python"))
END_OF_TEXT = 50256
SEPARATOR = b"\xff<=separator of documents=>\xff"
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000"
EMOJI = ["\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd", "\u2764\ufe0f",
         "#\ufe0f\u20e3", "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"]
FRAGMENTS = ["'s", "'S", "'ll", "'re", "'d", "''", "\u2019s", "don't", "I'VE", "<|endoftext|>", "<|endoftext", "0x1F", "3.14", "\u0663\u0664", "\u2167", "\xb2",
             "caf\xe9", "cafe\u0301", "\u0939\u093f\u0928\u094d\u0926\u0940", "\u4e2d\u6587", "\ufeff", "\u200b", "\u180e", "\xad", "\0", "\x1b[0m", "\x7f", "\ufffd",
             "\U0010ffff", "====", "----", "    ", "\n\n", " \n ", "\r\n", "#include", "return;", "the", " the", "The", " in"]


def code_point(rng):
    limit = rng.choice([0x80, 0x250, 0x3000, 0x10000, 0x110000])
    while 0xd800 <= (point := rng.randrange(limit)) < 0xe000:
        pass
    return chr(point)


def random_bytes(rng):
    return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 60)))


def random_characters(rng):
    return "".join(code_point(rng) for _ in range(rng.randrange(1, 40))).encode()


def control_and_space(rng):
    return "".join(rng.choice([chr(rng.randrange(33)), rng.choice(SPACES), "a", "1", "."]) for _ in range(rng.randrange(1, 50))).encode()


def fragments(rng):
    pool = FRAGMENTS + EMOJI + list(SPACES)
    return "".join(rng.choice(pool) for _ in range(rng.randrange(1, 30))).encode()


def repeated(rng):
    return (rng.choice(FRAGMENTS + EMOJI + list(SPACES)) * rng.randrange(1, 300) + rng.choice(["", "x", " x", "\n"])).encode()


def damaged(rng):
    """Good text with bytes removed, changed or added."""
    text = bytearray(fragments(rng) + random_characters(rng))
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(text))
        text[at:at + rng.randrange(2)] = bytes(rng.choice([0x80, 0xbf, 0xc0, 0xc3, 0xe2, 0xed, 0xf0, 0xf4, 0xf8, 0xff]) for _ in range(rng.randrange(2)))
        if not text:
            break
    return bytes(text) or b"x"


def letters(rng):
    return "".join(rng.choice("etaoinshrdlu") for _ in range(rng.randrange(1, 400))).encode()


def strings(count):
    rng = random.Random(50257)
    kinds = [random_bytes, random_characters, control_and_space, fragments, repeated, damaged, letters]
    made = 0
    while made < count:
        text = kinds[made % len(kinds)](rng)
        if SEPARATOR not in text:
            made += 1
            yield text


def real_texts(folders, wanted_bytes):
    total = 0
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
            text = path.read_bytes()
            if not text or b"\0" in text or SEPARATOR in text:
                continue
            yield text
            total += len(text)
            if total >= wanted_bytes:
                return
    print(f"the folders hold only {total / 1e6:.1f} MB of text")


def our_ids(documents, ranks, folder, threads):
    """One list of ids a document, and the program's summary."""
    text = folder / "text"
    with text.open("wb") as file:
        file.write(b"x" * 5000)  # what is binary is decided by the first 4 KiB
        for document in documents:
            file.write(SEPARATOR)
            file.write(document)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The separator is no UTF-8, so it travels as bytes.
    done = subprocess.run([b"data/prepare", b"--out", bytes(folder / "shards"), b"--overwrite", b"--tokenizer", b"gpt2", b"--gpt2-ranks", bytes(ranks),
                           b"--val-fraction", b"0", b"--threads", str(threads).encode(), b"--document-separator", SEPARATOR, bytes(text)],
                          cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.decode(errors="replace"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"data/prepare: {text.stat().st_size / 1e6:.1f} MB in {seconds:.2f} s of processor time: {text.stat().st_size / 1e6 / seconds:.1f} MB/s a core")
    for shard in sorted((folder / "shards").glob("train_*.bin")):
        tokens = array.array("H")
        tokens.frombytes(shard.read_bytes()[1024:])
        if sys.byteorder == "big":
            tokens.byteswap()
        yield from tokens


def one_document(ids):
    """The ids up to the next end of text, which is taken off, too."""
    found = []
    for token in ids:
        if token == END_OF_TEXT:
            break
        found.append(token)
    return found


def compare(encoding, documents, ranks, threads):
    with tempfile.TemporaryDirectory(prefix="tiktoken_") as folder:
        ids = our_ids(documents, ranks, pathlib.Path(folder), threads)
        assert next(ids) == END_OF_TEXT and one_document(ids)  # what our_ids put before them
        for number, document in enumerate(documents):
            expected = encoding.encode_ordinary(document.decode("utf-8", errors="replace"))
            found = one_document(ids)
            if found != expected:
                at = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), min(len(found), len(expected)))
                print(f"document {number} differs at token {at}: ours {found[at:at + 8]}, tiktoken {expected[at:at + 8]}\n{document[:400]!r}")
                return False
        rest = list(ids)
        assert not rest, f"{len(rest)} tokens too many"
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=pathlib.Path, nargs="*", help="of real text")
    parser.add_argument("--ranks", type=pathlib.Path, default=ROOT / "deps/gpt2.tiktoken")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--strings", type=int, default=60000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    try:
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str
        lines = arguments.ranks.read_bytes().splitlines()
    except (ImportError, OSError) as missing:
        print(f"skipped: {missing}")
        return 77
    mergeable = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=mergeable, special_tokens={"<|endoftext|>": END_OF_TEXT})

    start = time.time()
    random_texts = list(strings(arguments.strings))
    if not compare(encoding, random_texts, arguments.ranks, arguments.threads):
        return 1
    texts = list(real_texts(arguments.folders, arguments.megabytes * 1e6)) if arguments.folders else []
    if texts:
        texts.append(b"".join(texts[:400]))  # a document of many parts
        if not compare(encoding, texts, arguments.ranks, arguments.threads):
            return 1
    print(f"{len(random_texts)} strings and {sum(map(len, texts)) / 1e6:.1f} MB of text: equal ({time.time() - start:.0f} s, tiktoken {tiktoken.__version__})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
