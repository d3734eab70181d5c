#!/usr/bin/env python3
"""A model of weak scaling to 1,024 H100s: what share of one GPU's speed is left, from figures measured on one and two GPUs.

Weak scaling: every GPU has the same tokens a step, so the global batch grows with the GPUs. N GPUs in nodes of 8; shards are cut
among the n = N / R ranks of a group, R groups are replicas (--replicate R; "a node" means R = N / 8). k micro-batches a step.

    step      = k (forward + backward) + kernels + exposed communication + compute taken by what is hidden
    forward   = 1/3, backward = 2/3 of (6 P + 6 L C T) tokens / (MFU x peak), in L equal blocks f, b and the head's part of its unit

A group on one node gathers S bytes, and exchanges those of gradients, by copy engines; what arrives is added by a kernel of its own:

    time      = fixed + hop + (n - 1)/n x S / speed

Groups over several nodes, p ranks on each, gather and reduce_scatter by NCCL's kernels, a ring as NCCL models it. Replicas reduce by them
wherever they are, which scatters and gathers: twice the rest.

    time      = fixed + steps + (n - 1)/n x S / speed
    steps     = (n - n/p) hops inside nodes + (n/p - 1) hops between nodes   so it grows with the ranks, and with every collective
    tree      = 2 (p hops inside + log2(n/p) hops between)                   instead of a reduction's ring, where that is shorter
    speed     = the smaller of `bus`, measured inside a node, and links / 8 x p x 50 GB/s x 0.85 between nodes

    fixed and bus come from the measured microseconds: the straight line through them (least squares of relative errors). Beside compute
    bus is slower, by SLOWED.

One communication stream, in program order; a unit is a block, or embedding and head (their bytes count as any unit's):

    optimizer   gather of each block with the first micro-batch, beside the forward pass of the blocks before; reduction of
                each unit (scatter in the group, then reduction of the shard among replicas) behind the backward of the blocks below it, in
                the last micro-batch
    full        every micro-batch gathers each block before its forward and again before its backward, one ahead of it, and scatters its
                gradients behind the backward of the next; replicas reduce the shards in the last micro-batch. The two blocks gathered last are
                still there for the other direction and the next micro-batch
    both        embedding and head are gathered once a step, beside AdamW. What is complete last, the gradients of the first block and of the
                embedding, is scattered beside the norm of the others, of earlier micro-batches (full) beside the next forward pass
    exposed     = the first block's gather, what replicas reduce last (nothing beside them) + what does not fit beside its compute
                + BARE x (micro-batches that reduce + 1 for the optimizer): of what could be hidden a little is not, as compute has gaps
    taken       = TAKEN x the time of communication that is hidden: while it runs, compute is that much slower
    kernels     full a micro-batch, optimizer a step: a transposed copy of each block (2 bytes an element); sums of what arrived (inside a node all
                ranks' parts, as wide as they travel, otherwise one; 4 bytes of the shard, 8 after the first; 6 more of the unit where they travel
                in BF16). A step: AdamW (28 bytes), norm (4), casts (5) of
                what the rank holds

Efficiency is against one GPU that holds everything: above 100 % where the shared optimizer saves more than communication costs.

Memory is masters and moments (12 bytes a parameter of the shard), gradients (4 bytes: of the shard and two units for full, of all
otherwise; of two blocks and the embedding where they arrive), weights, saved activations of one micro-batch (15 C + 3 F bytes a token and block, FP8; 18 C + 4 F in BF16; no recomputation),
and 2.5 to 3.5 GiB; a row that needs more than 79 GiB says so: its speed is what it would be with more memory.

Inputs are in weak_scaling_inputs.py. Measured: MFU, copy speed, collectives. Fitted, to whole steps of two H200s: SLOWED, TAKEN and BARE; the first lines printed say how far the model is
off there, and on four, to which nothing is fitted. More have not been measured. Assumed: an exchange has a gather's figures (the same bytes by the same engines), eight GPUs
have two's speed each, the hops (NCCL's own constants), 0.85, SLOWED, TAKEN and BARE for any number of ranks, the same MFU for larger shapes, no congestion, and
ranks that are level: one that is ahead waits, and what it exchanges meanwhile has no compute beside it, which costs no time but is most of what two
H200s of one host expose with 262,144 tokens a GPU. Where tokens a GPU are few, MFU is not what was measured with many.
"""
import argparse
import dataclasses
import math

from weak_scaling_inputs import (ADAMW, BARE, CAST, COPIES_US, GATHER_US, H100, H200_COPY, HOP_BETWEEN, HOP_INSIDE, LINK, LINK_SHARE, MEASURED, MEMORY_GIB, NCCL_GIB, NODE, NORM,
                                 OTHER_GIB, PEAK, SCATTER_US, SHAPES, SLOWED, TAKEN, UNSEEN, Device, Shape)


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
    device: Device = H100

    @property
    def ranks(self):           # of a group
        return self.gpus // self.replicas

    @property
    def per_node(self):        # of a group's ranks
        return min(self.ranks, NODE)

    @property
    def copies(self):          # by copy engines: NcclCommunicator's on_one_machine
        return self.ranks <= NODE

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


def copied(size, ranks):
    """Seconds in which each rank of one node sends each other its part of `size` bytes, of its own or of what it has for it."""
    fixed, speed = fitted(COPIES_US)
    return fixed + HOP_INSIDE + (ranks - 1) / ranks * size / speed


@dataclasses.dataclass(frozen=True)
class Ring:
    """Of ranks in nodes, by NCCL's kernels."""
    table: dict
    ranks: int
    per_node: int
    links: int
    slowed: float = 1.0

    @property
    def nodes(self):
        return self.ranks // self.per_node

    def steps(self):
        return (self.ranks - self.nodes) * HOP_INSIDE + (self.nodes - 1) * HOP_BETWEEN

    def fixed(self):
        return fitted(self.table)[0]

    def bytes_time(self, size):
        speed = fitted(self.table)[1] / self.slowed
        if self.nodes > 1:
            between = speed_between(self.per_node, self.links)
            speed = min(speed, between) if self.per_node > 1 else between
        return (self.ranks - 1) / self.ranks * size / speed

    def one_way(self, size):
        """Seconds of a gather, or a reduce_scatter, of `size` bytes in all."""
        return 0.0 if self.ranks == 1 else self.fixed() + self.steps() + self.bytes_time(size)

    def reduction(self, size):
        if self.ranks == 1:
            return 0.0
        tree = self.per_node * HOP_INSIDE + math.log2(self.nodes) * HOP_BETWEEN
        return self.fixed() + 2 * (min(self.steps(), tree) + self.bytes_time(size))


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Seconds of communication."""
    alone: float = 0.0
    beside: float = 0.0       # the same beside compute
    taken: float = 0.0        # what it then takes of compute

    def __add__(self, other):
        return Transfer(self.alone + other.alone, self.beside + other.beside, self.taken + other.taken)


def by_copies(s, size):
    alone = copied(size, s.ranks) if s.ranks > 1 else 0.0
    beside = alone * SLOWED["copies"]
    return Transfer(alone, beside, beside * TAKEN["copies"])


def by_kernels(s, time):
    """`time` of how much slower the bus is."""
    beside = time(SLOWED[s.mode])
    return Transfer(time(1.0), beside, beside * TAKEN["kernels"])


@dataclasses.dataclass(frozen=True)
class Unit:
    """Collectives of a unit of the model: gather and scatter in the group, reduction of the shard among replicas."""
    gather: Transfer
    scatter: Transfer
    replicate: Transfer


def unit_times(s, elements, weight_bytes):
    # Replicas of a group that spans whole nodes have one rank a node each; of a smaller one, 8 / ranks of them share a node.
    replicas_per_node = min(s.replicas, NODE // s.per_node)

    def in_group(table, size):
        return by_copies(s, size) if s.copies else by_kernels(s, lambda slowed: Ring(table, s.ranks, s.per_node, s.links, slowed).one_way(size))
    return Unit(in_group(GATHER_US[s.mode], elements * weight_bytes), in_group(SCATTER_US[s.mode], elements * s.gradient_bytes),
                by_kernels(s, lambda slowed: Ring(SCATTER_US[s.mode], s.replicas, replicas_per_node, s.links, slowed).reduction(elements * 4 / s.ranks)))


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

    def expose(self, *transfers):
        self.exposed += sum(t.alone for t in transfers)

    def beside(self, transfer, compute, times=1):
        """Communication that may run behind compute."""
        if transfer.beside == 0.0:
            return
        hidden = min(transfer.beside, compute)
        self.hidden += times * hidden
        self.exposed += times * transfer.alone * (1 - hidden / transfer.beside)
        self.taken += times * transfer.taken * hidden / transfer.beside

    def bare(self, seconds):
        """Of what could be hidden, what is not."""
        seconds = min(seconds, self.hidden)
        if seconds > 0.0:
            self.taken *= 1 - seconds / self.hidden
            self.hidden -= seconds
            self.exposed += seconds


def sums(s):
    """Seconds to add the gradients of a step's micro-batches that arrived."""
    elements, slices = s.shape.parameters, s.shape.parameters / s.ranks
    if s.mode == "optimizer" and s.gradient_bytes == 4 and not s.copies:
        return 0.0            # NCCL leaves them where they belong
    one = (elements if s.copies else slices) * s.gradient_bytes + 4 * slices + (6 * elements if s.gradient_bytes == 2 else 0)
    k = s.micro_batches if s.mode == "full" else 1
    return (k * one + (k - 1) * 4 * slices) / s.device.copy


def sharding_kernels(s):
    """Transposed copies of what was gathered, sums of what arrived."""
    if s.ranks == 1:
        return 0.0
    transposed = 2 * s.shape.layers * s.shape.block / s.device.copy if s.weight_bytes == 1 else 0.0
    return (s.micro_batches if s.mode == "full" else 1) * transposed + sums(s)


def per_step_kernels(s):
    held = s.shape.parameters / s.ranks
    return held * (ADAMW + NORM + CAST) / s.device.copy


def micro_batch_flops(shape):
    return shape.micro_batch * (shape.layers * shape.block_flops() + shape.head_flops())


def step(s):
    shape, k, L = s.shape, s.micro_batches, s.shape.layers
    rate = s.device.mfu[s.weight_bytes] * PEAK
    f, b = (part * shape.block_flops() * shape.micro_batch / rate for part in (1 / 3, 2 / 3))
    result = Step(compute=k * micro_batch_flops(shape) / rate, kernels=per_step_kernels(s) + sharding_kernels(s))
    unit, edge = unit_times(s, shape.block, s.weight_bytes), unit_times(s, shape.embeddings, 2)  # embeddings are BF16 always
    last = unit.scatter + edge.scatter  # a tied unit is ready last
    result.expose(unit.gather)
    if s.mode == "full":
        for micro_batch in range(k):
            reduced = unit.scatter + (unit.replicate if micro_batch == k - 1 else Transfer())
            result.beside(unit.gather, f, L - 1 if micro_batch == 0 else L - 2)
            if micro_batch > 0:
                result.beside(last, max(0.0, L * f - (L - 2) * unit.gather.beside))
            result.beside(unit.gather + reduced, b, L - 2)
            result.beside(reduced, b)
    else:
        result.beside(unit.gather, f, L - 1)
        result.beside(unit.scatter + unit.replicate, b, L - 1)
    result.beside(last, NORM * shape.parameters / s.ranks / s.device.copy)
    result.expose(unit.replicate, edge.replicate)
    result.beside(edge.gather, ADAMW * shape.layers * shape.block / s.ranks / s.device.copy)
    result.bare(BARE * (1 + (k if s.mode == "full" else 1)))
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
        held += (2 * shape.block + shape.embeddings) * s.gradient_bytes
    return (state + held + saved) / 2**30 + OTHER_GIB + (NCCL_GIB if s.gpus > 1 else 0)


def alone(s):
    return dataclasses.replace(s, gpus=1, replicas=1, mode="optimizer")


def efficiency(s):
    return step(alone(s)).seconds / step(s).seconds


def measured_setting(m):
    """H200s as fast, each alone, as one was."""
    shape = dataclasses.replace(SHAPES[0], micro_batch=m.micro_batch)
    s = Setting(shape, m.gpus, m.mode, m.replicas, tokens=m.tokens, device=Device({1: 1.0}, H200_COPY))
    compute = m.tokens / m.alone - per_step_kernels(alone(s))
    mfu = s.micro_batches * micro_batch_flops(shape) / compute / PEAK
    return dataclasses.replace(s, device=Device({1: mfu}, H200_COPY))


def rows(a):
    for shape in (dataclasses.replace(shape, micro_batch=min(shape.micro_batch, a.tokens)) for shape in SHAPES):
        for mode, group in (("optimizer", None), ("full", None), ("full", NODE), ("full", 8 * NODE)):
            for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
                replicas = gpus // group if group else 1
                if group and replicas <= 1:
                    continue
                yield Setting(shape, gpus, mode, replicas, a.tokens, a.gradient_bytes, a.weight_bytes, a.links)


def measured_communication(m):
    """Seconds of it by the model, and of these exposed."""
    s = measured_setting(m)
    t = step(s)
    return t.hidden + t.exposed, t.exposed


def print_measured():
    print("H200s of one host, gpt2-1558M: model / measured; fitted to two GPUs, not to four")
    for m in MEASURED + UNSEEN:
        communication, exposed = (1e3 * seconds for seconds in measured_communication(m))
        print(f"{m.gpus} GPUs, {m.mode:9} {m.replicas} replicas, {m.tokens:6} tokens a GPU and step: {efficiency(measured_setting(m)):.1%} / {m.rate / m.alone:.1%} of one GPU, "
              f"communication {communication:.1f} / {m.communication_ms} ms, exposed {exposed:.1f} / {m.exposed_ms} ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="of a GPU and step")
    parser.add_argument("--gradient-bytes", type=int, default=4, choices=(2, 4), help="--reduce-dtype bf16 or f32")
    parser.add_argument("--weight-bytes", type=int, default=1, choices=(1, 2), help="FP8 or BF16 gather (and compute)")
    parser.add_argument("--links", type=int, default=8, help="400 Gb/s links of a node")
    a = parser.parse_args()
    print_measured()
    for name, table in [("copies", COPIES_US)] + [(f"{name}, {mode}", tables[mode]) for name, tables in (("gather", GATHER_US), ("scatter", SCATTER_US)) for mode in tables]:
        fixed, speed = fitted(table)
        print(f"{name:18} {fixed * 1e6:.0f} us + bytes at {speed * 1e-9:.0f} GB/s inside a node, {speed_between(NODE, a.links) * 1e-9:.0f} GB/s between nodes")
    print(f"{a.tokens} tokens a GPU and step, MFU of one GPU {H100.mfu[a.weight_bytes]:.1%}, gradients {a.gradient_bytes} bytes, weights {a.weight_bytes}")
    print("model        shard      replicas  GPUs   step ms  exposed ms  taken ms  kernels ms  efficiency  tokens/s a GPU   GiB")
    for s in rows(a):
        t, gib = step(s), memory_gib(s)
        tokens = s.micro_batches * s.shape.micro_batch
        note = "" if gib <= MEMORY_GIB else f"  does not fit in {MEMORY_GIB:.0f} GiB"
        print(f"{s.shape.name:12} {s.mode:10} {s.replicas:8} {s.gpus:5} {t.seconds * 1e3:9.1f} {t.exposed * 1e3:11.1f} {t.taken * 1e3:9.1f} {t.kernels * 1e3:11.1f} "
              f"{efficiency(s):11.1%} {tokens / t.seconds:15.0f} {gib:5.1f}{note}")


if __name__ == "__main__":
    main()
