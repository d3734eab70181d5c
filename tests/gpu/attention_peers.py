#!/usr/bin/env python3
"""What our attention is compared with: cuDNN and FlashAttention-2 as PyTorch calls them, timed as dev/attention times ours.

    attention_peers.py [--json FILE] [--quick]

A CUDA graph of 10 calls, replayed 21 times, median; TFLOP/s with the causal half counted once, the backward as 5 matmuls to
the forward's 2. PyTorch's backward cannot be captured without its forward: its time is that of both less the forward's.
Queries, keys and values are (B, T, heads, head_dim) tensors seen as (B, heads, T, head_dim).
"""
import argparse
import json
import pathlib
import subprocess
import sys

CALLS, REPLAYS, WARM_UP = 10, 21, 3
SHAPES = [(32, 12, 12, 1024, 64), (64, 12, 12, 1024, 64), (32, 14, 2, 1024, 64), (16, 25, 25, 1024, 64), (32, 12, 2, 1024, 128),
          (8, 32, 8, 4096, 128), (4, 32, 8, 8192, 128), (4, 32, 8, 8192, 64), (2, 16, 16, 16384, 128)]


def microseconds_of_call(torch, call):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    for _ in range(WARM_UP):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in zip(events, events[1:]))
    return times[REPLAYS // 2] / CALLS * 1e3


def measure(torch, backend, shape):
    """Microseconds (forward, backward)."""
    from torch.nn.attention import sdpa_kernel
    B, H, KV, T, D = shape
    q, k, v = (torch.randn(B, T, heads, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for heads in (H, KV, KV))
    gradient = torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    def forward():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != KV)

    def both():
        return torch.autograd.grad(forward(), (q, k, v), gradient)

    with sdpa_kernel(backend):
        forward_us = microseconds_of_call(torch, forward)
        return forward_us, microseconds_of_call(torch, both) - forward_us


def rows_of(program, shape, times):
    B, H, KV, T, D = shape
    flops = 2.0 * B * H * T * T * D
    for direction, us, factor in (("forward", times[0], 1), ("backward", times[1], 2.5)):
        yield {"kind": "kernel", "program": program, "name": f"attention.{direction}", "case": f"B{B} H{H}/{KV} T{T} D{D}",
               "us": round(us, 2), "tflops": round(factor * flops / us * 1e-6, 1), "command": "tests/gpu/attention_peers.py"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="results for tests/gpu_report")
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    arguments = parser.parse_args()
    if subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode != 0:
        print("attention_peers: skipped: no GPU")
        return 77
    tests, bench = [], []
    try:
        import torch
        from torch.nn.attention import SDPBackend
    except ImportError as error:
        tests.append({"name": "attention peers", "status": "skip", "figure": str(error)})
    else:
        version = torch.backends.cudnn.version()
        programs = {f"PyTorch {torch.__version__}, cuDNN {version // 10000}.{version // 100 % 100}.{version % 100}": SDPBackend.CUDNN_ATTENTION,
                    f"PyTorch {torch.__version__}, FlashAttention-2": SDPBackend.FLASH_ATTENTION}
        for shape in SHAPES[:1] if arguments.quick else SHAPES:
            for program, backend in programs.items():
                found = list(rows_of(program, shape, measure(torch, backend, shape)))
                bench += found
                print(f"{found[0]['case']} | {program} | forward {found[0]['tflops']:.0f}, backward {found[1]['tflops']:.0f} TFLOP/s", flush=True)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps({"tests": tests, "bench": bench}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
