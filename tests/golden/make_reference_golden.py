#!/usr/bin/env python3
"""Writes reference_train.safetensors: five training steps of a small GPT-2 by PyTorch and transformers, in float; and
reference_rounded.safetensors: gradients of the recipes `bf16` and `tensorwise`.

Training: every part of the loop differs from the default, so that none can be forgotten unnoticed: gradient accumulation
with unequal masks, clipping that bites, decay groups, a learning rate that changes every step, all parameters random.

Computed in float64 (from weights that float32 holds exactly), stored as float32: the oracle then adds no noise of its
own, and the file does not depend on the machine that makes it. The script checks that float32 PyTorch agrees.

Rounded gradients: the model written out with PyTorch's autograd, torchao's Float8Linear (emulated) and a rounding to
BF16 wherever the GPU stores BF16, forward and backward. Small, so that next to no value lies so near a tie that float
and float64 round it differently.

    pip install torch transformers torchao safetensors && python3 tests/golden/make_reference_golden.py
"""
import pathlib

import torch
from safetensors.torch import save_file
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear
from transformers import GPT2Config, GPT2LMHeadModel

STEPS, MICRO_BATCHES, B, T, V = 5, 3, 2, 16, 61
LEARNING_RATES = [4e-4, 8e-4, 1.2e-3, 1.6e-3, 1.4e-3]  # warm-up, then the first step of the decay
MAX_GRAD_NORM = 0.5
MASKED = [0.1, 0.8, 0.0]  # share of masked targets, by micro-batch


def make_model():
    # dropouts off; gelu_new is the tanh form
    config = GPT2Config(vocab_size=V, n_positions=T, n_embd=40, n_layer=2, n_head=5, n_inner=160, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_new", layer_norm_epsilon=1e-5,
                        tie_word_embeddings=True, attn_implementation="eager", bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.15 * noise)
    return model


def make_data():
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(V, (STEPS, MICRO_BATCHES, B, T + 1), generator=generator)
    inputs, targets = text[..., :-1].clone(), text[..., 1:].clone()
    for i, share in enumerate(MASKED):
        targets[:, i][torch.rand(targets[:, i].shape, generator=generator) < share] = -1
    return inputs, targets


def train(dtype):
    model = make_model().to(dtype)
    inputs, targets = make_data()
    parameters = dict(model.named_parameters())  # the tied head is not listed again
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                                  betas=(0.9, 0.95), eps=1e-8)
    out = {"initial." + name: p.detach().clone() for name, p in parameters.items()}
    losses, norms = [], []
    for step in range(STEPS):
        valid = (targets[step] >= 0).sum()
        loss_sum = 0.0
        for x, y in zip(inputs[step], targets[step]):
            logits = model(input_ids=x).logits
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), y.reshape(-1), ignore_index=-1, reduction="sum") / valid
            loss.backward()
            loss_sum += loss.item()
        if step == 0:
            out |= {"grad0." + name: p.grad.clone() for name, p in parameters.items()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM).item()
        assert norm > 1.2 * MAX_GRAD_NORM, f"clipping does not bite: norm {norm}"
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATES[step]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum)
        norms.append(norm)
    out |= {"final." + name: p.detach().clone() for name, p in parameters.items()}
    out |= {"loss": torch.tensor(losses, dtype=dtype), "grad_norm": torch.tensor(norms, dtype=dtype)}
    return out, inputs, targets


# ----------------------------------------------------------------------------------------------------------------------
# Rounded gradients

R_DIM, R_HEADS, R_VOCAB, R_T, R_MICRO_BATCHES = 32, 2, 50, 8, 2


class Stored(torch.autograd.Function):
    """A tensor that is stored in BF16, and so is its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.bfloat16().to(x.dtype)

    @staticmethod
    def backward(ctx, dx):
        return dx.bfloat16().to(dx.dtype)


class Copy(torch.autograd.Function):
    """The BF16 copy of a weight; the gradient of the weight is not rounded."""

    @staticmethod
    def forward(ctx, w):
        return w.bfloat16().to(w.dtype)

    @staticmethod
    def backward(ctx, dw):
        return dw


class Attention(torch.autograd.Function):
    """Backward uses D = rowsum(dO * O) with the stored O, as FlashAttention does (kernels/attention.h)."""

    @staticmethod
    def forward(ctx, q, k, v):  # (heads, T, head_dim)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        p = scores.softmax(-1)
        out = Stored.apply(p @ v)
        ctx.save_for_backward(q, k, v, p, out)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, p, out = ctx.saved_tensors
        dout = Stored.apply(dout)
        ds = p * (dout @ v.transpose(1, 2) - (dout * out).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
        return ds @ k, ds.transpose(1, 2) @ q, p.transpose(1, 2) @ dout


def linear(x, weight, bias, recipe):  # weight as in the file: (in, out)
    if recipe == "bf16":
        return Stored.apply(x @ Copy.apply(weight) + Copy.apply(bias))
    layer = torch.nn.Linear(*weight.shape, bias=False, dtype=weight.dtype)
    layer = Float8Linear.from_float(layer, Float8LinearConfig(emulate=True))
    del layer.weight
    layer.weight = weight.T
    return Stored.apply(layer(x) + Copy.apply(bias))


def norm(x, p, name):
    return Stored.apply(torch.nn.functional.layer_norm(x, x.shape[-1:], p[name + ".weight"], p[name + ".bias"], 1e-5))


def rounded_loss(p, inputs, targets, recipe):  # one sequence; the sum of its losses
    wte, h = Copy.apply(p["transformer.wte.weight"]), "transformer.h.0."
    x1 = Stored.apply(wte[inputs] + Copy.apply(p["transformer.wpe.weight"]))

    def apply(x, name):
        return linear(x, p[h + name + ".weight"], p[h + name + ".bias"], recipe)

    qkv = apply(norm(x1, p, h + "ln_1"), "attn.c_attn")
    heads = [t.reshape(R_T, R_HEADS, -1).transpose(0, 1) for t in qkv.split(R_DIM, dim=-1)]
    attention = Attention.apply(*heads).transpose(0, 1).reshape(R_T, R_DIM)
    x2 = Stored.apply(x1 + apply(attention, "attn.c_proj"))
    hidden = apply(norm(x2, p, h + "ln_2"), "mlp.c_fc")
    x3 = Stored.apply(x2 + apply(Stored.apply(torch.nn.functional.gelu(hidden, approximate="tanh")), "mlp.c_proj"))
    logits = Stored.apply(norm(x3, p, "transformer.ln_f") @ wte.T)
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


def rounded_gradients(seed):
    random = torch.Generator().manual_seed(seed)
    C, h = R_DIM, "transformer.h.0."
    shapes = {"transformer.wte.weight": (R_VOCAB, C), "transformer.wpe.weight": (R_T, C), h + "attn.c_attn.weight": (C, 3 * C),
              h + "attn.c_proj.weight": (C, C), h + "mlp.c_fc.weight": (C, 4 * C), h + "mlp.c_proj.weight": (4 * C, C)}
    initial = {name: 0.2 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    for name, shape in list(shapes.items())[2:]:
        initial[name.replace("weight", "bias")] = 0.1 * torch.randn(shape[1], generator=random)
    for name in (h + "ln_1", h + "ln_2", "transformer.ln_f"):
        initial[name + ".weight"] = 1 + 0.2 * torch.randn(C, generator=random)
        initial[name + ".bias"] = 0.1 * torch.randn(C, generator=random)
    inputs = torch.randint(R_VOCAB, (R_MICRO_BATCHES, R_T), generator=random)
    targets = torch.randint(R_VOCAB, (R_MICRO_BATCHES, R_T), generator=random)
    targets[0, 3] = -1
    out = {"initial." + name: x for name, x in initial.items()} | {"inputs": inputs.int(), "targets": targets.int()}
    # what the GPU holds: a float, so that the gradient of a logit is the product of the same two numbers
    inverse_valid = (1 / (targets >= 0).sum().float()).double()
    for recipe in ("bf16", "tensorwise"):
        p = {name: x.double().requires_grad_() for name, x in initial.items()}
        loss = sum((rounded_loss(p, x, y, recipe) * inverse_valid for x, y in zip(inputs, targets)))
        loss.backward()
        out[recipe + ".loss"] = loss.detach().reshape(1).float()
        out |= {f"{recipe}.grad.{name}": x.grad.float() for name, x in p.items()}
    return out


def main():
    golden, inputs, targets = train(torch.float64)
    single, _, _ = train(torch.float32)
    worst = max(((single[k].double() - golden[k]).norm() / golden[k].norm()).item() for k in golden if "c_attn.bias" not in k)
    print(f"float32 PyTorch differs by {worst:.1e} (relative, worst tensor)")
    assert worst < 1e-5
    file = {k: v.float().contiguous() for k, v in golden.items()}
    file |= {"inputs": inputs.int(), "targets": targets.int(), "learning_rate": torch.tensor(LEARNING_RATES),
             "max_grad_norm": torch.tensor([MAX_GRAD_NORM])}
    print("losses", golden["loss"].tolist(), "norms", golden["grad_norm"].tolist())
    rounded = {k: v.contiguous() for k, v in rounded_gradients(seed=5).items()}
    for name, tensors in (("train", file), ("rounded", rounded)):
        path = pathlib.Path(__file__).with_name(f"reference_{name}.safetensors")
        save_file(tensors, path, metadata={"torch": torch.__version__})
        print(path, path.stat().st_size, "bytes")


main()
