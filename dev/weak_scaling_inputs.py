"""What weak_scaling.py computes with: measured figures, each with the device it is from, what is fitted to them, what is assumed, and shapes of models."""
import dataclasses

PEAK = 989.4e12              # H100 SXM, dense BF16


@dataclasses.dataclass(frozen=True)
class Device:
    mfu: dict                # of one, by bytes of a weight: 1 FP8, 2 BF16
    copy: float              # bytes read and written a second


# One H100 80GB HBM3: 1558M, micro-batch 16, tensorwise and bf16; the copy of `make bench-quantize`.
H100 = Device({1: 0.726, 2: 0.533}, 3.02e12)
H200_COPY = 4.25e12          # the copy of `make bench-accumulate`
MEMORY_GIB = 79.0
# Two H200s of one host, whose NVLink is the H100's, NVLS off, NCCL 2.28.9, 2026-11-28: microseconds of one collective of so many MiB over 2 ranks,
# in a graph (`mpirun -np 2 dev/collectives bench`). By copy engines (zero CTAs), in every mode:
COPIES_US = {1: 16.0, 4: 24.2, 16: 40.4, 32: 62.7, 64: 105.7, 128: 191.0, 256: 362.7}
# By kernels, as many CTAs as --shard lets NCCL have (trainer/parallel.cpp): its choice, 16. Gradients in FP32.
GATHER_US = {"optimizer": {1: 10.0, 4: 24.4, 16: 49.6, 32: 85.1, 64: 150.5, 128: 276.3, 256: 523.9},
             "full": {1: 10.9, 4: 26.2, 16: 53.4, 32: 92.4, 64: 165.8, 128: 298.3, 256: 562.4}}
SCATTER_US = {"optimizer": {1: 9.8, 4: 23.3, 16: 49.1, 32: 88.2, 64: 157.5, 128: 292.6, 256: 558.1},
              "full": {1: 10.3, 4: 24.5, 16: 53.5, 32: 96.2, 64: 174.3, 128: 315.5, 256: 592.7}}
# Time of communication in a step over that of the same collectives alone. Copies: fitted to the four rows below. Kernels: reduce_scatter while it served
# groups on one node too, 1558M: 16 CTAs in full (153 ms of 4 micro-batches), NCCL's choice in optimizer (24 ms).
SLOWED = {"copies": 1.1, "optimizer": 1.8, "full": 2.6}
# Compute lost of the time that communication runs beside it. Copies: what leaves the smallest of the largest errors of the four shares. Kernels: NCCL's all_gather beside GEMMs of one
# shape, of the time that it takes alone; the step of those 153 ms lost as much of them.
TAKEN = {"copies": 0.34, "kernels": 0.26}
BARE = 1.4e-3                # seconds; fitted to the exposed time with 8,192 tokens


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of 1558M, tensorwise, on H200s of one host: tokens/s a GPU, ms of communication a step and of it exposed."""
    mode: str
    tokens: int              # of a GPU and step
    micro_batch: int
    alone: float             # one GPU's tokens/s, in the same call
    rate: float
    communication_ms: float
    exposed_ms: float        # on the worse rank
    gpus: int = 2
    replicas: int = 1


# Two GPUs, means of two calls of 2026-11-28 with the same step (the second's are in tests/gpu_report/multi_gpu.json). Shares of the two differ by up to 1.2
# points, exposed milliseconds by up to a third (8,192 tokens) and a half (full, 262,144).
MEASURED = [
    Measured("optimizer", 262144, 16384, 78233, 77906, 12.7, 8.9),
    Measured("full", 262144, 16384, 78233, 73622, 266.2, 53.0),
    Measured("optimizer", 8192, 8192, 66785, 65968, 12.71, 2.61),
    Measured("full", 8192, 8192, 66785, 65450, 16.41, 3.17),
]
# Four GPUs, against one of an earlier call of the same evening: nothing is fitted to these (dev/LOG.md has what the model said before).
UNSEEN = [
    Measured("optimizer", 262144, 16384, 78429, 77906, 22.7, 7.1, gpus=4),
    Measured("full", 262144, 16384, 78429, 74347, 447.5, 77.9, gpus=4),
    Measured("full", 262144, 16384, 78429, 73957, 349.6, 85.5, gpus=4, replicas=2),
    Measured("optimizer", 8192, 8192, 67175, 67804, 21.2, 4.6, gpus=4),
    Measured("full", 8192, 8192, 67175, 66881, 25.0, 4.3, gpus=4),
    Measured("full", 8192, 8192, 67175, 62316, 35.7, 5.3, gpus=4, replicas=2),
]
# Bytes of memory traffic an element.
ADAMW, NORM, CAST = 28, 4, 5

# ----------------------------------------------------------------------------------------------------------------------
# Assumed

NODE = 8                     # GPUs
LINK, LINK_SHARE = 50e9, 0.85  # 400 Gb/s, and what a collective gets of it
HOP_INSIDE, HOP_BETWEEN = 3.4e-6, 14e-6  # a ring's step in NCCL's tuning, Simple protocol: NVLink, network
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
