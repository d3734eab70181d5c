#!/usr/bin/env python3
"""What the whole step is compared with: the same GPT-2 in PyTorch, torch.compile, SDPA, fused AdamW, torchao's float8 where it is here.

    train_peers.py [--json FILE] [--seconds N]

The peer is given what makes it fastest: weights, gradients and moments are BF16 (ours are FP32 masters, so it moves half of our
optimizer's bytes), the vocabulary is 50304, cuDNN's attention if it is there, the same batch every time. A step is its micro-batches,
the clipping and the update; three warm up, the median of five counts. Configurations that do not begin within N seconds are
skipped results: most of the time is compilation.
"""
import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

T, V = 1024, 50304
# name, layers, width, heads, micro-batch, tokens of a step: the rows of the `train` report
MODELS = {"gpt2-124M": (12, 768, 12, 64, 524288), "gpt2-1558M": (48, 1600, 25, 16, 131072)}
CONFIGURATIONS = [("gpt2-124M", "bf16"), ("gpt2-124M", "tensorwise"), ("gpt2-1558M", "bf16"), ("gpt2-1558M", "tensorwise")]
WARM_UP, TIMED = 3, 5


def make_model(torch, layers, width, heads):
    nn, sdpa = torch.nn, torch.nn.functional.scaled_dot_product_attention

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in self.attention_in(self.norm1(x)).chunk(3, -1))
            x = x + self.attention_out(sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            return x + self.mlp(self.norm2(x))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(V, width), nn.Embedding(T, width)
            self.layers = nn.ModuleList(Layer() for _ in range(layers))
            self.norm = nn.LayerNorm(width)

        def forward(self, inputs, targets):
            x = self.tokens(inputs) + self.positions.weight
            for layer in self.layers:
                x = layer(x)
            logits = torch.nn.functional.linear(self.norm(x), self.tokens.weight)
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    model = GPT()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model.bfloat16()


def attention_backends(torch):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)


def step_seconds(torch, model_name, recipe):
    """(median seconds of a step, GiB)."""
    layers, width, heads, B, tokens = MODELS[model_name]
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        model = make_model(torch, layers, width, heads)
    if recipe == "tensorwise":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        convert_to_float8_training(model, config=Float8LinearConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled = torch.compile(model)
    batch = torch.randint(0, 50257, (B, T + 1), device="cuda")
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def step():
        for _ in range(tokens // (B * T)):
            (compiled(inputs, targets) * (B * T / tokens)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    seconds = []
    for i in range(WARM_UP + TIMED):
        start = time.monotonic()
        step()
        torch.cuda.synchronize()
        if i >= WARM_UP:
            seconds.append(time.monotonic() - start)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**30


def measure(torch, tests, bench, limit_s):
    begin = time.monotonic()
    for model, recipe in CONFIGURATIONS:
        name = f"train peer: PyTorch {model} {recipe}"
        if time.monotonic() - begin > limit_s:
            tests.append({"name": name, "status": "skip", "figure": f"{limit_s} s were over"})
            continue
        try:
            with attention_backends(torch):
                seconds, gib = step_seconds(torch, model, recipe)
        except ImportError as error:
            tests.append({"name": name, "status": "skip", "figure": str(error)})
            continue
        B, tokens = MODELS[model][3:]
        bench.append({"kind": "train", "program": f"PyTorch {torch.__version__}, torch.compile" + (", torchao float8" if recipe != "bf16" else ""), "model": model,
                      "recipe": recipe, "gpus": 1, "seq_len": T, "micro_batch": B, "tokens_per_step": tokens, "tokens_per_s": round(tokens / seconds),
                      "ms_per_step": round(seconds * 1e3, 2), "memory_gib": round(gib, 2), "command": "tests/gpu/train_peers.py"})
        print(f"{name} | {tokens / seconds:.0f} tokens/s, {seconds * 1e3:.1f} ms a step, {gib:.1f} GiB | {time.monotonic() - begin:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="results for tests/gpu_report")
    parser.add_argument("--seconds", type=int, default=600, help="no configuration begins later than this")
    arguments = parser.parse_args()
    if not shutil.which("nvidia-smi") or subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode != 0:
        print("train_peers: skipped: no GPU")
        return 77
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    tests, bench = [], []
    try:
        import torch
    except ImportError as error:
        tests.append({"name": "train peers", "status": "skip", "figure": str(error)})
    else:
        measure(torch, tests, bench, arguments.seconds)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps({"tests": tests, "bench": bench}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
