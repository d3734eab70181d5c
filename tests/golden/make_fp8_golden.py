#!/usr/bin/env python3
"""Writes fp8_quantizer.safetensors: what PyTorch and torchao make of numbers that trainer/reference/quantizer.h must
reproduce bit for bit.

    FORMAT.values          the value of each of the 256 codes
    FORMAT.cast.x, .codes  single casts: every code's value, all midpoints between neighbours and the floats on either
                           side of them, overflow, signed zeros, infinities, NaN
    CASE.FORMAT.x, .amax, .scale, .codes    whole tensors, tensorwise dynamic scaling; CASE names the situation and ends
                           in the type of the input that torchao saw (f32, bf16)
    bf16.x, .rounded       casts to bfloat16, ties included
    linear.x, .weight, .dy -> .y, .dx, .dweight            Float8Linear, default recipe, emulated: dequantized float products

    pip install torch torchao safetensors numpy && python3 tests/golden/make_fp8_golden.py
"""
import pathlib

import numpy as np
import torch
import torchao
from safetensors.torch import save_file
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear
from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
from torchao.float8.float8_training_tensor import GemmInputRole, LinearMMConfig
from torchao.float8.float8_utils import tensor_to_amax, tensor_to_scale, to_fp8_saturated

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def neighbours(x):
    x = x.numpy()
    return torch.from_numpy(np.concatenate([np.nextafter(x, np.float32(-np.inf)), x, np.nextafter(x, np.float32(np.inf))]))


def cast_inputs(dtype):
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = values[values.isfinite()].unique()  # sorted; merges the two zeros
    midpoints = (finite[1:].double() + finite[:-1].double()).div(2).float()  # exact: one bit more than a code has
    most = torch.finfo(dtype).max
    rest = torch.tensor([0.0, -0.0, most * 1.01, most * 1.0625, most * 1.07, most * 2, 3e38, float("inf"), 1e-30, 1e-45, float("nan")])
    return torch.cat([values, neighbours(midpoints), rest, -rest])


def tensors():
    random = torch.Generator().manual_seed(3)
    normal = torch.randn(16, 24, generator=random)
    outlier = normal.clone()
    outlier[5, 7] = -3.0e4
    spread = normal * 2.0 ** torch.randint(-24, 1, normal.shape, generator=random)  # most end as FP8 subnormals or zero
    not_finite = normal[:4].clone()
    not_finite[1, 2] = float("inf")
    nan = normal[:4].clone()
    nan[2, 3] = float("nan")
    f32 = {"normal": normal, "gradient": normal * 3.7e-6, "outlier": outlier, "spread": spread, "zeros": torch.zeros(4, 4),
           "below_epsilon": normal[:4] * 1e-14, "at_epsilon": torch.tensor([[1e-12, -5e-13, 1.1e-12]]),
           "denormal": normal[:4] * 1e-41, "largest": torch.tensor([[3.4028235e38, 1e38, -2e30]]),
           "power_of_two": torch.tensor([[0.25, 0.249, -0.125, 0.2]]), "inf": not_finite, "nan": nan}
    for name, x in f32.items():
        yield name + ".f32", x
    for name in ("normal", "gradient", "outlier", "spread", "zeros", "inf"):
        yield name + ".bf16", f32[name].bfloat16()


def bf16_inputs():
    bits = np.arange(0, 1 << 16, 97, dtype=np.uint32) << 16
    bits = np.concatenate([bits | low for low in (0, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    return torch.from_numpy(bits.view(np.float32))


def linear():
    random = torch.Generator().manual_seed(4)
    layer = torch.nn.Linear(48, 64, bias=False)
    with torch.no_grad():
        layer.weight.copy_(0.05 * torch.randn(64, 48, generator=random))
    layer = Float8Linear.from_float(layer, Float8LinearConfig(emulate=True))
    x = torch.randn(32, 48, generator=random).bfloat16().float().requires_grad_()
    dy = (1e-4 * torch.randn(32, 64, generator=random)).bfloat16().float()
    y = layer(x)
    y.backward(dy)
    return {"linear.x": x.detach(), "linear.weight": layer.weight.detach(), "linear.dy": dy, "linear.y": y.detach(),
            "linear.dx": x.grad, "linear.dweight": layer.weight.grad}


def main():
    out = linear()
    for format_name, dtype in FORMATS.items():
        out[format_name + ".values"] = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        x = cast_inputs(dtype)
        out[format_name + ".cast.x"], out[format_name + ".cast.codes"] = x, to_fp8_saturated(x, dtype).view(torch.uint8)
        for case, x in tensors():
            quantized = hp_tensor_to_float8_dynamic(x, dtype, LinearMMConfig(), gemm_input_role=GemmInputRole.INPUT)
            scale = tensor_to_scale(x, dtype)
            assert torch.equal(scale, quantized._scale.reshape(scale.shape)) or scale.isnan().any()
            name = f"{case}.{format_name}"
            out[name + ".x"] = x.float().clone()
            out[name + ".amax"] = tensor_to_amax(x).float().reshape(1)
            out[name + ".scale"] = scale.float().reshape(1)
            out[name + ".codes"] = quantized._data.view(torch.uint8).clone()
    out["bf16.x"] = bf16_inputs()
    out["bf16.rounded"] = out["bf16.x"].bfloat16().float()
    path = pathlib.Path(__file__).with_name("fp8_quantizer.safetensors")
    save_file({k: v.contiguous() for k, v in out.items()}, path, metadata={"torch": torch.__version__, "torchao": torchao.__version__})
    print(path, path.stat().st_size, "bytes")


main()
