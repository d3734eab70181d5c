#!/usr/bin/env python3
"""A model of weak scaling to 1,024 H100s: what share of one GPU's speed is left, from figures measured on one and two GPUs.

Weak scaling: every GPU has the same tokens a step, so the global batch grows with the GPUs. N GPUs in nodes of 8; shards are cut
among the n = N / R ranks of a group, R groups are replicas (--replicate R; "a node" means R = N / 8). k micro-batches a step.

    step      = k (forward + backward) + per-step kernels + exposed communication + SMs taken
    forward   = 1/3, backward = 2/3 of (6 P + 6 L C T) tokens / (MFU x peak), in L equal blocks f, b and the head's part of its unit

A collective of S bytes over n ranks, p of them on each node (a ring, as NCCL models it):

    time      = fixed + steps + (n - 1)/n x S / speed                       gather; a reduction, which scatters too: twice the rest
    steps     = (n - n/p) hops inside nodes + (n/p - 1) hops between nodes   so it grows with the ranks, and with every collective
    tree      = 2 (p hops inside + log2(n/p) hops between)                   instead of a reduction's ring, where that is shorter
    speed     = the smaller of `bus`, measured inside a node, and links / 8 x p x 50 GB/s x 0.85 between nodes

A scatter of gradients is an exchange: every rank sends each other its part of the slice, and they are added where they arrive. So nothing
is added up on the way, and what leaves a node is p times a ring's:

    time      = fixed + hop + (n - p)/8 hops between + the longer of (p - 1)/n x S / bus and (n - p)/n x S / (links / 8 x 50 GB/s x 0.85)

    fixed and bus come from the measured microseconds: the straight line through them (least squares of relative errors).

One communication stream, in program order; a unit is a block, or embedding and head (their bytes count as any unit's):

    optimizer   reduction of each unit (scatter in the group, then reduction of the shard among replicas) behind the backward of the
                blocks below it, in the last micro-batch; gather of each unit after the cast, before the next step begins: only the transposed
                copies of the blocks before it run beside it
    full        every micro-batch gathers each block before its forward and again before its backward, one ahead of it, and scatters its
                gradients behind the backward of the next; replicas reduce the shards in the last micro-batch. Embedding and head are
                gathered once a step; their gradients are scattered behind the next micro-batch's forward
    exposed     = first gathers + last scatter and reduction (nothing beside them) + sum over blocks of max(0, communication - compute)
    SMs taken   = TAKEN x the part of the communication that is hidden: while it runs, compute is that much slower
    kernels     full a micro-batch, optimizer a step: a transposed copy of each block (2 bytes an element); sums of what arrived (all ranks'
                parts, as wide as they travel, and 8 bytes of the shard, 6 more of the unit where they travel in BF16). A step: AdamW
                (28 bytes), norm (4), casts (5) of what the rank holds

Efficiency is against one GPU that holds everything: above 100 % where the shared optimizer saves more than communication costs.

Memory is masters and moments (12 bytes a parameter of the shard), gradients (4 bytes: of the shard and two units for full, of all
otherwise; of the largest unit where they arrive), weights, saved activations of one micro-batch (15 C + 3 F bytes a token and block, FP8; 18 C + 4 F in BF16; no recomputation),
and 2.5 to 3.5 GiB; a row that needs more than 79 GiB says so: its speed is what it would be with more memory.

Measured: MFU, copy speed, collectives. Assumed: the hops (NCCL's own constants), 8 messages of an exchange at a time, 0.85, the same MFU for larger shapes, no stragglers, no
congestion. Where tokens a GPU are few, MFU is not what was measured with many.
"""
import argparse
import dataclasses
import math

# ----------------------------------------------------------------------------------------------------------------------
# Measured figures. Each with the device it is from.

PEAK = 989.4e12              # H100 SXM, dense BF16
MFU = {"fp8": 0.726,         # one H100 80GB HBM3: 1558M, micro-batch 16, tensorwise (tests/gpu_report/train.json)
       "bf16": 0.533}        #   the same, bf16
COPY = 3.02e12               # one H100, bytes read and written a second (the copy of tests/gpu_report/quantize.json)
MEMORY_GIB = 79.0
# Microseconds of one collective of so many MiB over 2 ranks (`dev/collectives bench`), by --shard, whose bounds of CTAs differ
# (trainer/parallel.cpp): two H200s, NVLink, NVLS off, NCCL 2.28, NCCL's choice of CTAs in both. Not measured yet: copy engines, which carry
# gathers and exchanges inside a node, and 16 CTAs, for full. The exchange has reduce_scatter's figures.
GATHER_US = {"optimizer": {1: 52, 4: 58, 16: 83, 64: 186, 256: 594, 1024: 2049}}
SCATTER_US = {"optimizer": {1: 75, 4: 60, 16: 82, 64: 195, 256: 630, 1024: 2041}}  # FP32
GATHER_US["full"], SCATTER_US["full"] = GATHER_US["optimizer"], SCATTER_US["optimizer"]
CTAS = {"optimizer": 32, "full": 16}
TAKEN = {"optimizer": None, "full": None}  # what the same bench prints as lost of the communication's time; None: not measured, CTAs / 132

# ----------------------------------------------------------------------------------------------------------------------
# Assumed

NODE = 8                     # GPUs
LINK, LINK_SHARE = 50e9, 0.85  # 400 Gb/s, and what a collective gets of it
HOP_INSIDE, HOP_BETWEEN = 3.4e-6, 14e-6  # a ring's step in NCCL's tuning, Simple protocol: NVLink, network
AT_ONCE = 8                    # messages of an exchange
SMS = 132
OTHER_GIB, NCCL_GIB = 2.5, 1.0  # scratch, library workspaces, logits; NCCL's buffers


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    width: int
    ffn: int
    block: float        # parameters of a block's matrices
    vocabulary: int
    tied: bool
    context: int
    micro_batch: int    # tokens

    @property
    def head(self):
        return self.vocabulary * self.width

    @property
    def embeddings(self):  # lookup tables and head
        return self.head * (1 if self.tied else 2)

    @property
    def parameters(self):
        return self.layers * self.block + self.embeddings

    def block_flops(self):  # of a token, forward and backward
        return 6 * self.block + 6 * self.width * self.context

    def head_flops(self):
        return 6 * self.head


SHAPES = [
    Shape("gpt2-1558M", 48, 1600, 6400, 12 * 1600**2, 50257, True, 1024, 16384),
    Shape("8B", 32, 4096, 14336, 4096**2 * 2.5 + 3 * 4096 * 14336, 128256, False, 4096, 8192),
    Shape("70B", 80, 8192, 28672, 8192**2 * 2.25 + 3 * 8192 * 28672, 128256, False, 2048, 2048),
]


@dataclasses.dataclass(frozen=True)
class Setting:
    shape: Shape
    gpus: int
    mode: str                  # optimizer or full
    replicas: int = 1
    tokens: int = 65536        # of a GPU and step
    gradient_bytes: int = 4
    weight_bytes: int = 1
    links: int = 8             # of a node

    @property
    def ranks(self):           # of a group
        return self.gpus // self.replicas

    @property
    def micro_batches(self):
        return max(1, round(self.tokens / self.shape.micro_batch))


# ----------------------------------------------------------------------------------------------------------------------
# Collectives


def fitted(table):
    """(fixed seconds, bytes a second) of the straight line through measured microseconds over 2 ranks, one hop taken off."""
    points = [((2**20 * mib) / 2, us * 1e-6) for mib, us in table.items()]
    # time / measured = 1: least squares of a / t + b x / t - 1
    aa, ab, bb = (sum(w / t**2 for w, t in ((f(x), t) for x, t in points)) for f in (lambda x: 1, lambda x: x, lambda x: x * x))
    a1, b1 = sum(1 / t for _, t in points), sum(x / t for x, t in points)
    slope = (aa * b1 - ab * a1) / (aa * bb - ab * ab)
    return max(0.0, (a1 - ab * slope) / aa - HOP_INSIDE), 1 / slope


def speed_between(per_node, links):
    """Of ranks that share a node's links with its other groups: a node's 8 / per_node groups run at the same time."""
    return links * LINK * LINK_SHARE * per_node / NODE


def ring(table, size, ranks, per_node, links):
    """Seconds of a gather of `size` bytes in all."""
    if ranks == 1:
        return 0.0
    nodes = ranks // per_node
    fixed, speed = fitted(table)
    if nodes > 1:
        speed = min(speed, speed_between(per_node, links)) if per_node > 1 else speed_between(1, links)
    return fixed + (ranks - nodes) * HOP_INSIDE + (nodes - 1) * HOP_BETWEEN + (ranks - 1) / ranks * size / speed


def exchange(table, size, ranks, per_node, links):
    """Seconds in which every rank of a group sends each other its part of `size` bytes; the groups of a node do so at the same time."""
    if ranks == 1:
        return 0.0
    fixed, speed = fitted(table)
    away = ranks - per_node
    inside, between = (per_node - 1) / ranks * size / speed, away / ranks * size / speed_between(1, links)
    return fixed + HOP_INSIDE + away / AT_ONCE * HOP_BETWEEN + max(inside, between)


def reduction(table, size, ranks, per_node, links):
    if ranks == 1:
        return 0.0
    nodes = ranks // per_node
    fixed, _ = fitted(table)
    one_way = ring(table, size, ranks, per_node, links) - fixed
    steps = (ranks - nodes) * HOP_INSIDE + (nodes - 1) * HOP_BETWEEN
    tree = per_node * HOP_INSIDE + math.log2(nodes) * HOP_BETWEEN
    return fixed + 2 * (one_way - steps + min(steps, tree))


@dataclasses.dataclass(frozen=True)
class Unit:
    """Collectives of a unit of the model, seconds: gather and scatter in the group, reduction of the shard among replicas."""
    gather: float
    scatter: float
    replicate: float


def unit_times(s, elements, weight_bytes):
    per_node = min(s.ranks, NODE)
    # Replicas of a group that spans whole nodes have one rank a node each; of a smaller one, 8 / ranks of them share a node.
    replicas_per_node = min(s.replicas, NODE // per_node)
    gather, scatter = GATHER_US[s.mode], SCATTER_US[s.mode]
    return Unit(ring(gather, elements * weight_bytes, s.ranks, per_node, s.links),
                exchange(scatter, elements * s.gradient_bytes, s.ranks, per_node, s.links),
                reduction(scatter, elements * 4 / s.ranks, s.replicas, replicas_per_node, s.links))


# ----------------------------------------------------------------------------------------------------------------------
# A step


@dataclasses.dataclass
class Step:
    compute: float = 0.0      # forward and backward
    kernels: float = 0.0      # the optimizer's, transposes, sums
    exposed: float = 0.0
    hidden: float = 0.0
    taken: float = 0.0        # of compute, by what is hidden

    @property
    def seconds(self):
        return self.compute + self.kernels + self.exposed + self.taken

    def beside(self, communication, compute, times=1):
        """Communication that may run behind compute."""
        self.hidden += times * min(communication, compute)
        self.exposed += times * max(0.0, communication - compute)


def transposed_copy(s):
    """Seconds for a block's."""
    return 2 * s.shape.block / COPY if s.weight_bytes == 1 else 0.0


def sharding_kernels(s):
    """Transposed copies of what was gathered, sums of what arrived: once each."""
    if s.ranks == 1:
        return 0.0
    sums = s.shape.parameters * (s.gradient_bytes + 8 / s.ranks + (6 if s.gradient_bytes == 2 else 0)) / COPY
    return s.shape.layers * transposed_copy(s) + sums


def per_step_kernels(s):
    held = s.shape.parameters / s.ranks
    return held * (28 + 4 + 5) / COPY


def step(s):
    shape, k, L = s.shape, s.micro_batches, s.shape.layers
    rate = (MFU["fp8"] if s.weight_bytes == 1 else MFU["bf16"]) * PEAK
    block, head = shape.block_flops() * shape.micro_batch / rate, shape.head_flops() * shape.micro_batch / rate
    f, b = block / 3, block * 2 / 3
    result = Step(compute=k * (L * block + head), kernels=per_step_kernels(s) + (k if s.mode == "full" else 1) * sharding_kernels(s))
    unit, edge = unit_times(s, shape.block, s.weight_bytes), unit_times(s, shape.embeddings, 2)  # embeddings are BF16 always
    if s.mode == "full":
        result.exposed += edge.gather + unit.gather
        for micro_batch in range(k):
            result.beside(unit.gather, f, L)
            if micro_batch > 0:
                result.beside(edge.scatter, max(0.0, L * (f - unit.gather)))
            result.beside(unit.gather + unit.scatter + (unit.replicate if micro_batch == k - 1 else 0.0), b, L)
        result.exposed += edge.scatter + edge.replicate  # a tied unit is ready last
    else:
        result.beside(unit.scatter + unit.replicate, b, L - 1)
        result.exposed += unit.scatter + unit.replicate + edge.scatter + edge.replicate
        result.exposed += edge.gather
        result.beside(unit.gather, transposed_copy(s), L)
    result.taken = (CTAS[s.mode] / SMS if TAKEN[s.mode] is None else TAKEN[s.mode]) * result.hidden
    return result


def memory_gib(s):
    shape, ranks = s.shape, s.ranks
    bodies = shape.layers * shape.block
    saved = (15 * shape.width + 3 * shape.ffn if s.weight_bytes == 1 else 18 * shape.width + 4 * shape.ffn) * shape.layers * shape.micro_batch
    state = 12 * shape.parameters / ranks
    if s.mode == "full" and ranks > 1:
        buffers = 2 * shape.block * (4 + (2 if s.weight_bytes == 1 else 2)) + shape.embeddings * (4 + 2)
        held = shape.parameters / ranks * 4 + bodies / ranks * s.weight_bytes + shape.embeddings / ranks * 2 + buffers
    else:
        held = shape.parameters * 4 + bodies * 2 + shape.embeddings * 2
    if ranks > 1:
        held += max(shape.block, shape.head) * s.gradient_bytes
    return (state + held + saved) / 2**30 + OTHER_GIB + (NCCL_GIB if s.gpus > 1 else 0)


def alone(s):
    return dataclasses.replace(s, gpus=1, replicas=1, mode="optimizer")


def efficiency(s):
    return step(alone(s)).seconds / step(s).seconds


def rows(a):
    for shape in (dataclasses.replace(shape, micro_batch=min(shape.micro_batch, a.tokens)) for shape in SHAPES):
        for mode, hybrid in (("optimizer", False), ("full", False), ("full", True)):
            for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
                replicas = gpus // NODE if hybrid else 1
                if hybrid and replicas == 1:
                    continue
                yield Setting(shape, gpus, mode, replicas, a.tokens, a.gradient_bytes, a.weight_bytes, a.links)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="of a GPU and step")
    parser.add_argument("--gradient-bytes", type=int, default=4, choices=(2, 4), help="--reduce-dtype bf16 or f32")
    parser.add_argument("--weight-bytes", type=int, default=1, choices=(1, 2), help="FP8 or BF16 gather (and compute)")
    parser.add_argument("--links", type=int, default=8, help="400 Gb/s links of a node")
    a = parser.parse_args()
    for name, table in [(f"{name}, {mode}", tables[mode]) for name, tables in (("gather", GATHER_US), ("scatter", SCATTER_US)) for mode in tables]:
        fixed, speed = fitted(table)
        print(f"{name:18} {fixed * 1e6:.0f} us + bytes at {speed * 1e-9:.0f} GB/s inside a node, {speed_between(NODE, a.links) * 1e-9:.0f} GB/s between nodes")
    mfu = MFU["fp8" if a.weight_bytes == 1 else "bf16"]
    print(f"{a.tokens} tokens a GPU and step, MFU of one GPU {mfu:.1%}, gradients {a.gradient_bytes} bytes, weights {a.weight_bytes}")
    print("model        shard      replicas  GPUs   step ms  exposed ms  taken ms  kernels ms  efficiency  tokens/s a GPU   GiB")
    for s in rows(a):
        t, gib = step(s), memory_gib(s)
        tokens = s.micro_batches * s.shape.micro_batch
        note = "" if gib <= MEMORY_GIB else f"  does not fit in {MEMORY_GIB:.0f} GiB"
        print(f"{s.shape.name:12} {s.mode:10} {s.replicas:8} {s.gpus:5} {t.seconds * 1e3:9.1f} {t.exposed * 1e3:11.1f} {t.taken * 1e3:9.1f} {t.kernels * 1e3:11.1f} "
              f"{efficiency(s):11.1%} {tokens / t.seconds:15.0f} {gib:5.1f}{note}")


if __name__ == "__main__":
    main()
