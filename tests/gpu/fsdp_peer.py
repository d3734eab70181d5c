#!/usr/bin/env python3
"""What several GPUs are compared with: the same GPT-2 in PyTorch as TorchTitan runs it. One process a GPU, started by torchrun:

    torchrun --nproc-per-node 2 fsdp_peer.py --json FILE [--model gpt2-1558M] [--recipe bf16|tensorwise] [--tokens 8192 262144]

FSDP2 over every layer and the rest, FP32 masters, BF16 parameters while they are used, gradients reduced in FP32 with the last micro-batch;
torch.compile layer by layer and of the head, cuDNN's or FlashAttention; `tensorwise`: torchao's float8 with its FP8 all-gather and scales of all
weights in one all_reduce. Layers are resharded after forward, which is our --shard full. Tokens are of a GPU and step. Two steps warm up, the mean
of three (of short steps eight) counts. --device cpu with --model tiny tries the script without a GPU.
"""
import argparse
import json
import os
import pathlib
import time

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from train_peers import attention_backends

V = 50304
MODELS = {"gpt2-124M": (12, 768, 12, 1024, 64), "gpt2-1558M": (48, 1600, 25, 1024, 16), "tiny": (2, 64, 4, 64, 4)}  # layers, width, heads, T, micro-batch
WARM_UP, TIMED, TIMED_SHORT, SHORT = 2, 3, 8, 8192


class Layer(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        nn = torch.nn
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.attention_in(self.norm1(x)).chunk(3, -1))
        x = x + self.attention_out(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def head_loss(x, weight, targets):
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, weight).flatten(0, 1).float(), targets.flatten())


class GPT(torch.nn.Module):
    def __init__(self, layers, width, heads, T):
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(V, width), torch.nn.Embedding(T, width)
        self.layers = torch.nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = torch.nn.LayerNorm(width)
        self.loss = torch.compile(head_loss, fullgraph=True, dynamic=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)

    def forward(self, inputs, targets):
        x = self.tokens(inputs) + self.positions.weight
        for layer in self.layers:
            x = layer(x)
        return self.loss(self.norm(x), self.tokens.weight, targets)


def sharded_model(a):
    layers, width, heads, T, _ = MODELS[a.model]
    with torch.device(a.device):
        model = GPT(layers, width, heads, T)
    if a.recipe == "tensorwise":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        convert_to_float8_training(model, config=Float8LinearConfig(enable_fsdp_float8_all_gather=True))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        layer.compile(fullgraph=True, dynamic=False)  # for each size of the batch its own
        fully_shard(layer, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mp_policy=policy)  # the rest stays for the backward pass
    return model


def make_step(a, model, tokens):
    T, micro_batch = MODELS[a.model][3:]
    B = min(a.micro_batch or micro_batch, tokens // T)
    count = tokens // (B * T)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batch = torch.randint(0, 50257, (B, T + 1), device=a.device)
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def step():
        for i in range(count):
            model.set_requires_gradient_sync(i == count - 1)
            (model(inputs, targets) / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        if a.recipe == "tensorwise":
            from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp
            precompute_float8_dynamic_scale_for_fsdp(model)
        optimizer.zero_grad(set_to_none=True)
    return step, B


def synchronize(a):
    if a.device == "cuda":
        torch.cuda.synchronize()
    torch.distributed.barrier()


def measure(a, model, tokens):
    step, B = make_step(a, model, tokens)
    for _ in range(WARM_UP):
        step()
    synchronize(a)
    start, timed = time.monotonic(), TIMED_SHORT if tokens <= SHORT else TIMED
    for _ in range(timed):  # the host runs ahead of the GPU
        step()
    synchronize(a)
    ranks, s = torch.distributed.get_world_size(), (time.monotonic() - start) / timed
    memory = torch.cuda.max_memory_allocated() / 2**30 if a.device == "cuda" else 0.0
    return {"kind": "train", "program": f"PyTorch {torch.__version__}, FSDP2, torch.compile" + (", torchao float8 with FP8 all-gather" if a.recipe != "bf16" else ""), "model": a.model,
            "recipe": a.recipe, "gpus": ranks, "shard": "full", "seq_len": MODELS[a.model][3], "micro_batch": B, "tokens_per_step": tokens * ranks,
            "tokens_per_s": round(tokens * ranks / s), "ms_per_step": round(s * 1e3, 2), "memory_gib": round(memory, 2), "command": "tests/gpu/fsdp_peer.py"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--model", choices=MODELS, default="gpt2-1558M")
    parser.add_argument("--recipe", choices=("bf16", "tensorwise"), default="tensorwise")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 262144])
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    a = parser.parse_args()
    rank = int(os.environ["RANK"])
    if a.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if a.device == "cuda" else "gloo")
    begin, rows, model = time.monotonic(), [], sharded_model(a)
    with attention_backends(torch) if a.device == "cuda" else torch.device("cpu"):
        for tokens in a.tokens:
            rows.append(measure(a, model, tokens))
            if rank == 0:
                print(f"{a.recipe}, {tokens} tokens a GPU and step | {rows[-1]['tokens_per_s'] / rows[-1]['gpus']:.0f} tokens/s a GPU, {rows[-1]['ms_per_step']} ms a step, "
                      f"{rows[-1]['memory_gib']} GiB | {time.monotonic() - begin:.0f} s", flush=True)
    if rank == 0 and a.json:
        a.json.write_text(json.dumps(rows, indent=1) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
