#!/usr/bin/env python3
"""Writes the seeds of the fuzz programs: FOLDER/TARGET/NAME. Small valid files of every format, from the formats'
descriptions alone, and a few that are damaged in ways that the fuzzer would need long to find.

    tests/fuzz/make_seeds.py FOLDER [--config run.toml]
"""
import argparse
import base64
import gzip
import json
import pathlib
import struct

MICRO = {"name": "micro", "n_layers": 1, "dim": 16, "n_heads": 1, "ffn_dim": 16, "vocab_size": 4, "seq_len": 2}


def shard(magic, version, tokens, form, vocab_size=0, tokenizer=0, end_of_text=0):
    words = [magic, version, len(tokens), 0, vocab_size, tokenizer, end_of_text]
    return struct.pack("<256i", *words, *[0] * (256 - len(words))) + struct.pack(f"<{len(tokens)}{form}", *tokens)


def token_files():
    yield "bytes", shard(20240520, 1, list(b"text of a shard") + [256], "H", 257, 2, 256)
    yield "foreign16", shard(20240520, 1, [50256, 15496, 995], "H")
    yield "foreign32", shard(20240801, 7, [128000, 9906, 1917], "I")
    yield "truncated", shard(20240520, 1, [1, 2, 3], "H")[:-3]


def safetensors(tensors, metadata=None):
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, (dtype, shape, payload) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(payload)]}
        data += payload
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def micro_tensors(dtype):
    dim, ffn, size = MICRO["dim"], MICRO["ffn_dim"], {"F32": 4, "BF16": 2}[dtype]
    block = "transformer.h.0."
    shapes = {"transformer.wte.weight": [MICRO["vocab_size"], dim], "transformer.wpe.weight": [MICRO["seq_len"], dim]}
    for norm in (block + "ln_1", block + "ln_2", "transformer.ln_f"):
        shapes |= {norm + ".weight": [dim], norm + ".bias": [dim]}
    for linear, rows, columns in (("attn.c_attn", dim, 3 * dim), ("attn.c_proj", dim, dim), ("mlp.c_fc", dim, ffn), ("mlp.c_proj", ffn, dim)):
        shapes |= {block + linear + ".weight": [rows, columns], block + linear + ".bias": [columns]}
    tensors = {}
    for name, shape in shapes.items():
        count = shape[0] * (shape[1] if len(shape) == 2 else 1)
        tensors[name] = (dtype, shape, b"\0" * (count * size))
    return tensors


def safetensors_files():
    yield "f32", safetensors(micro_tensors("F32"), {"format": "pt"})
    yield "bf16", safetensors({name.removeprefix("transformer."): t for name, t in micro_tensors("BF16").items()})
    head = micro_tensors("F32")
    yield "head", safetensors(head | {"lm_head.weight": head["transformer.wte.weight"]})
    yield "scalar", safetensors({"a": ("I64", [], b"12345678"), "b": ("F8_E4M3", [0, 3], b"")})
    yield "overflow", safetensors({"a": ("F32", [2**62, 8], b"")})
    yield "empty", safetensors({})


def checkpoint_files():
    header = {"format_version": 1, "step": 12, "adam_t": 11, "skipped_steps": 1, "saved_ns": 1700000000000000000, "model": MICRO,
              "recipe": "bf16", "seed": 1337, "tokens_per_step": 4096, "samples_per_epoch": 99, "config": "steps = 12\n",
              "gemm_choices": "", "files": {"params.safetensors": 8736, "adam.safetensors": 17000}}
    yield "wrong_sizes", json.dumps(header, indent=2).encode()
    yield "deep", b"[" * 2000
    yield "wrong_type", json.dumps(header | {"step": "twelve", "seed": -1.5e300}).encode()


def ranks_files():
    def lines(tokens, first):
        return b"".join(base64.b64encode(t) + b" %d\n" % (first + i) for i, t in enumerate(tokens))
    merges = [b"th", b"the", b" t", b" the", b"in", b"ing", b"aa", b"aaaa", b"\xc3\xa9"]
    yield "merges", b"+" + lines(merges, 256) + b"\nthe thing in the thething aaaaaaa"
    yield "long", b"+" + lines(merges, 256) + b"\n" + b"a" * 70 + b"the" * 20
    yield "single", lines([bytes([b]) for b in range(256)], 0)
    yield "gap", b"+" + lines([b"ab"], 300)
    yield "huge_rank", b"+QUI= 4294967294\n"


def jsonl_files():
    yield "plain", b'{"id": 1, "text": "a\\nb\\u00e9\\ud83d\\ude00", "meta": {"text": "no"}}\n\n{"x": [1.5e3, null, true], "text": "yes"}\n'
    yield "wrong", b'{"text": 5}\n["text"]\n{"text": "\\ud800"}\n{"text": "x"'
    yield "not_utf8", b'{"text": "\xff\xc3\xa9\xed\xa0\x80"}'


def questions_files():
    yield "good", (pathlib.Path(__file__).resolve().parents[1] / "data/questions.jsonl").read_bytes()[:1000]
    yield "hellaswag", b'{"ind": 4, "ctx": "a \\u00e9", "endings": ["b", "c", "d"], "label": "2", "split": "val"}\n \r\n'
    yield "wrong", b'{"context": "a", "endings": ["b", ""], "label": 18446744073709551615}'
    yield "deep", b'{"context": "a", "endings": ' + b"[" * 2000


def zstd_frame(text):
    """One raw block: RFC 8878 with a single segment and a content size of one byte."""
    return b"\x28\xb5\x2f\xfd\x20" + bytes([len(text)]) + struct.pack("<I", len(text) << 3 | 1)[:3] + text


def packed_files():
    text = b"text in a packed file, text in a packed file\n" * 4
    yield "gzip", gzip.compress(text, mtime=0)
    yield "members", gzip.compress(text, mtime=0) + gzip.compress(b"", mtime=0) + b"\0" * 16
    yield "cut", gzip.compress(text, mtime=0)[:-9]
    yield "zstd", zstd_frame(text)
    yield "frames", zstd_frame(b"a") + zstd_frame(text)
    yield "plain", text


def config_files(given):
    if given:
        yield "resolved", given.read_bytes()
    yield "small", b"# run\nmodel = 'tiny'\nsteps = 10\nlr = 6e-4\ntrain = 'shards/x'\n"
    yield "wrong", b"steps = ten\nno-such-key = 1\n[section]\nlr = [1, 2]\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--config", type=pathlib.Path, help="a resolved configuration, as --print-config prints it")
    arguments = parser.parse_args()
    seeds = {"token_file": token_files(), "safetensors": safetensors_files(), "checkpoint": checkpoint_files(), "ranks": ranks_files(),
             "jsonl": jsonl_files(), "questions": questions_files(), "packed": packed_files(), "config": config_files(arguments.config)}
    for target, files in seeds.items():
        folder = arguments.folder / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, contents in files:
            (folder / name).write_bytes(contents)


if __name__ == "__main__":
    main()
