#!/usr/bin/env python3
"""A model of weak scaling to 1,024 H100s: what share of one GPU's speed is left, from figures measured on one and two GPUs.

Weak scaling: every GPU has the same tokens a step, so the global batch grows with the GPUs. One optimizer step of one GPU is

    t = k (t_forward + t_backward) + t_optimizer + exposed communication,      k micro-batches of M tokens

    t_forward, t_backward   1/3 and 2/3 of (6 N + 6 L C T) M / (MFU * 989.4 TFLOP/s), in L equal blocks
    t_optimizer             30 bytes a parameter that the rank updates, at the measured copy speed
    collective of S bytes   latency(n) + (n - 1)/n * S / bus(S), over the n ranks that it spans

    latency(n)              25 us to launch, and one hop of 2 us a doubling inside a node, 8 us a doubling between nodes (trees)
    bus(S)                  inside a node: measured on two H200s, interpolated in log S; between nodes the smaller of that and the
                            node's links: 8 x 400 Gb/s x 0.85, which its 8 GPUs' rings share
    none, optimizer         a block's gradients are reduced behind the backward of the blocks below it, in the last micro-batch;
                            weights are gathered behind the next step's first forward:
                            exposed = last unit's collective + max(0, L * collective - hidden work), for each of the two
    full                    every micro-batch gathers each block before its forward and its backward, one block ahead, and
                            scatters its gradients behind the backward of the next:
                            exposed = first gather + last scatter + L * (max(0, gather - forward) + max(0, gather + scatter - backward))

Not in it: stragglers, congestion, and what collectives take from the SMs (bounded by --ctas / 132 of the compute while they run).
The MFU, bandwidths and copy speed are measured; latencies, the 0.85 and the equal MFU of the larger shapes are assumptions.
"""
import argparse
import dataclasses
import math

BF16_PEAK = 989.4e12
COPY = 3.01e12                       # one H100, bytes read and written
NODE, LINK, LINK_SHARE = 8, 50e9, 0.85
# Two H200s, NVLink, NVLS off, NCCL 2.28: bus bandwidth, GB/s, by MiB.
GATHER = {1: 10, 4: 36, 16: 101, 64: 180, 256: 226, 1024: 262}
SCATTER = {1: 7, 4: 35, 16: 102, 64: 172, 256: 213, 1024: 263}  # FP32


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    width: int
    block: float       # parameters of a block's matrices
    embeddings: float  # lookup tables and head
    head: float        # of these, what is multiplied
    context: int
    micro_batch_tokens: int

    @property
    def parameters(self):
        return self.layers * self.block + self.embeddings

    def flops(self):   # of a token, forward and backward
        return 6 * (self.layers * self.block + self.head) + 6 * self.layers * self.width * self.context


SHAPES = [
    Shape("gpt2-1558M", 48, 1600, 12 * 1600**2, 51.9e3 * 1600, 50257 * 1600, 1024, 16384),
    Shape("8B", 32, 4096, 4096**2 * 2.5 + 3 * 4096 * 14336, 2 * 128256 * 4096, 128256 * 4096, 8192, 8192),
    Shape("70B", 80, 8192, 8192**2 * 2.25 + 3 * 8192 * 28672, 2 * 128256 * 8192, 128256 * 8192, 8192, 8192),
]


def bus(table, size):
    """Bytes a second, log-linear between the measured sizes and flat outside of them (below: in proportion)."""
    mib = size / 2**20
    sizes = sorted(table)
    if mib <= sizes[0]:
        return table[sizes[0]] * 1e9 * mib / sizes[0]
    if mib >= sizes[-1]:
        return table[sizes[-1]] * 1e9
    low = max(s for s in sizes if s <= mib)
    high = min(s for s in sizes if s > mib)
    part = math.log(mib / low) / math.log(high / low)
    return (table[low] + part * (table[high] - table[low])) * 1e9


def collective(table, size, ranks):
    if ranks == 1:
        return 0.0
    inside = min(ranks, NODE)
    nodes = ranks / inside
    latency = 25e-6 + 2e-6 * math.log2(inside) + 8e-6 * math.log2(max(1, nodes))
    speed = bus(table, size)
    if nodes > 1:
        speed = min(speed, NODE * LINK * LINK_SHARE)
    return latency + (ranks - 1) / ranks * size / speed


def step(shape, gpus, mode, tokens, mfu, gradient_bytes, weight_bytes):
    """Seconds of a step, exposed seconds, bytes of state a GPU."""
    k = max(1, round(tokens / shape.micro_batch_tokens))
    compute = shape.flops() * shape.micro_batch_tokens / (mfu * BF16_PEAK)
    forward, backward = compute / 3 / shape.layers, compute * 2 / 3 / shape.layers  # of a block
    gather = collective(GATHER, shape.block * weight_bytes, gpus)
    scatter = collective(SCATTER, shape.block * gradient_bytes, gpus)
    if mode == "full":
        exposed = k * (gather + scatter + shape.layers * (max(0, gather - forward) + max(0, gather + scatter - backward)))
    else:
        all_reduce = scatter + collective(SCATTER, shape.block * gradient_bytes, gpus)
        reduce = scatter if mode == "optimizer" else all_reduce
        exposed = reduce + max(0, shape.layers * reduce - (shape.layers - 1) * backward)
        if mode == "optimizer":
            exposed += gather + max(0, shape.layers * gather - (shape.layers - 1) * forward)
    edge = collective(SCATTER, shape.embeddings * gradient_bytes, gpus) * (k if mode == "full" else 1)  # the tied or last unit, behind nothing
    exposed += edge
    slices = 1 if mode == "none" else gpus
    optimizer = 30 * shape.parameters / slices / COPY
    state = shape.parameters * (12 / slices + (4 + 2 * weight_bytes if mode != "full" else (4 + weight_bytes) / slices))
    return k * compute + optimizer + exposed, exposed, state


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mfu", type=float, default=0.55, help="of one GPU (of the BF16 peak)")
    parser.add_argument("--tokens", type=int, default=65536, help="of a GPU and step")
    parser.add_argument("--gradient-bytes", type=int, default=4, choices=(2, 4), help="--reduce-dtype bf16 or f32")
    parser.add_argument("--weight-bytes", type=int, default=1, choices=(1, 2), help="FP8 or BF16 gather")
    a = parser.parse_args()
    print(f"{a.tokens} tokens a GPU and step, MFU of one GPU {a.mfu:.0%}, gradients {a.gradient_bytes} bytes, weights {a.weight_bytes}")
    print("model        shard       GPUs   step ms  exposed ms  efficiency  tokens/s a GPU  state GiB a GPU")
    for shape in SHAPES:
        for mode in ("optimizer", "full"):
            alone = step(shape, 1, "none", a.tokens, a.mfu, a.gradient_bytes, a.weight_bytes)[0] - 30 * shape.parameters / COPY
            for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
                seconds, exposed, state = step(shape, gpus, mode, a.tokens, a.mfu, a.gradient_bytes, a.weight_bytes)
                fits = "" if state < 70 * 2**30 else "  does not fit in 80 GB"
                tokens = max(1, round(a.tokens / shape.micro_batch_tokens)) * shape.micro_batch_tokens
                print(f"{shape.name:12} {mode:10} {gpus:5} {seconds * 1e3:9.1f} {exposed * 1e3:11.1f} {alone / seconds:11.1%} {tokens / seconds:15.0f} "
                      f"{state / 2**30:16.1f}{fits}")


if __name__ == "__main__":
    main()
