#!/usr/bin/env python3
"""Writes tests/golden/tokenizer_gpt2.txt: adversarial texts and the ids that tiktoken's gpt2 encoding gives them.

    pip install tiktoken
    python3 tests/golden/make_tokenizer_golden.py r50k_base.tiktoken > tests/golden/tokenizer_gpt2.txt

A line is "hex of the bytes, '-' for none" and "ids joined by commas, '-' for none". tiktoken takes str; bytes that are
not UTF-8 reach it through decode(errors="replace"), which is the rule that data/gpt2_tokenizer.h states.
"""
import base64
import random
import sys

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

WRITTEN_OUT = [
    "", " ", "  ", "\n", "\r\n", "\t", " \n ", "\n\n\n", "a", " a", "  a", "a ", "a  ", "a \n", "a\n\nb", "a \n b", "\n a",
    "Hello, world!", "don't can't I'll we've they're it's I'm you'd", "DON'T IT'S", "'s't're've'm'll'd", "''s ' s", "'S",
    "x'll'", "1'st", "3.14159", "1234567890", "v1.2.3-rc4", " 12 ab12cd", "a_b__c", "snake_case camelCase", "#include <a.h>",
    "    if (x) {\n        return;\n    }\n", "\tfor(;;)\n\t\tx++;\n", "// ------------------------", "==== **** ////",
    "<|endoftext|>", "a<|endoftext|>b", "<|endoftext", "\0", "a\0b", "\x01\x02\x1b[31m", "\x7f", "\x0b\x0c",
    "\x1c\x1d\x1e\x1f", "a\x85b", "a\xa0b", " \xa0 \xa0a", "a\u180eb \u180e", "a\u200bb", "\u2028\u2029", "\u3000\u3000x",
    "\u1680 \u2003\u202f\u205f", "\ufeffBOM", "\ufffd", "\ufffe\uffff", "caf\xe9 cafe\u0301", "na\xefve \xc0 la", "\u00df\u1e9e",
    "\u4e2d\u6587\u5b57\u7b26", "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8", "\ud55c\uad6d\uc5b4", "\u0420\u0443\u0441\u0441\u043a\u0438\u0439",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629", "\u05e2\u05d1\u05e8\u05d9\u05ea", "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0e44\u0e17\u0e22", "\u0661\u0662\u0663", "\u2160\u2161 \u2167", "\xb2\xb3\xbc", "\u2460\u3007", "\U0001f600",
    "\U0001f600 \U0001f601", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd",
    "a\U0001f600b", " \U0001f600", "\U0001d400\U0001d7d8", "\U00020000\U0002a6df", "\U000e0001\U0010ffff", "\u0301", "a\u0301 \u0301",
]
DAMAGED_UTF8 = [
    "80", "bf", "c0", "c080", "c1bf", "c2", "c261", "e0", "e080", "e0a0", "e0a061", "e08080", "eda080", "edbfbf",
    "eda080edb080", "ef", "efbf", "f0", "f090", "f09080", "f0908061", "f0808080", "f08f8080", "f4908080", "f48fbf", "f5808080",
    "f888808080", "fe", "ff", "fffe", "61ff62", "20ff", "ff20", "27ff73", "c3a9c3", "f09f98", "f09f9861", "e4b8ade4b8",
    "ff0a", "0aff0a0a", "efbbbfff", "c328a0a1", "e28228", "f0288cbc",
]
ALPHABETS = [
    "  \n\t\r'sdmtlverRaZ09.,!",
    " \n\xe9\u4e2d\x85\xa0\u180e\u2028\u3000\u200b\U0001f600\u0301\xb2\u2160\u0660a'1-",
    "abcdefghijklmnopqrstuvwxyzetaoin",
    "01 9(){};=+-*/<>_\n    ",
]


def texts():
    """Every case as bytes, the same ones on every run."""
    yield from (text.encode() for text in WRITTEN_OUT)
    yield from (bytes.fromhex(text) for text in DAMAGED_UTF8)
    rng = random.Random(20240520)
    for alphabet in ALPHABETS:
        for length in [3, 8, 20, 40, 63, 64, 65, 130] * 5:  # byte-pair merging changes its method at 64 bytes
            yield "".join(rng.choice(alphabet) for _ in range(length)).encode()
    for _ in range(60):
        yield bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40)))
    for _ in range(40):
        yield "".join(chr(rng.choice([rng.randrange(0xd800), rng.randrange(0xe000, 0x110000)])) for _ in range(8)).encode()
    for unit in ["a", "ab", "-", "=", " ", "\n", "the", "\xe9", " \n", "\u4e2d", "\U0001f600"]:
        for count in (31, 64, 129, 400):
            yield (unit * count + rng.choice(["", "x", " y"])).encode()


def main():
    with open(sys.argv[1], "rb") as file:
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file)}
    encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 50256})
    print(f"# by make_tokenizer_golden.py, tiktoken {tiktoken.__version__}, pattern {r50k_pat_str}")
    for text in texts():
        ids = encoding.encode_ordinary(text.decode("utf-8", errors="replace"))
        print(text.hex() or "-", ",".join(map(str, ids)) or "-")


if __name__ == "__main__":
    main()
