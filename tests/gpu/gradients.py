#!/usr/bin/env python3
"""Whole-model gradients against PyTorch.

The truth is Hugging Face's GPT2LMHeadModel in float32 (TF32 off) on the same weights and tokens. Of every tensor, our
gradient's error ||ours - truth|| / ||truth|| may be at most 1.25 times the error that PyTorch makes in the same precision:

  bf16        PyTorch with bf16 weights (model.to(bfloat16)), the field's usual way and, like ours, with a BF16 residual
              stream. Printed beside it: autocast, whose residual stream and norms are float32.
  tensorwise  the bf16 model with torchao's float8 linears (default recipe), head excluded

and its cosine with the truth may not be below 0.995 (bf16) or 0.98 (tensorwise). Errors are taken over several draws of
weights and tokens together, since the error of a small tensor in one draw is mostly chance. Some targets are masked.

    gradients.py [tiny] [gpt2-124M] [--recipe R] [--json FILE] [--details FILE] [--device cpu] [--work FOLDER]

With --device cpu the reference device stands in for the GPU (tiny only).
"""
import argparse
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")  # they want another PyTorch, and are not needed
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

ROOT = pathlib.Path(__file__).resolve().parents[2]
MAX_RATIO = 1.25
MIN_COSINE = {"bf16": 0.995, "tensorwise": 0.98}
MAX_LOSS_ERROR = {"bf16": 1e-3, "tensorwise": 3e-3}  # relative: a logit's error of a few percent, evened out over the tokens


@dataclasses.dataclass
class Model:
    layers: int
    dim: int
    heads: int
    vocab: int
    context: int
    batch: int
    draws: int


MODELS = {"tiny": Model(2, 64, 4, 257, 64, 4, 8), "gpt2-124M": Model(12, 768, 12, 50257, 1024, 4, 2)}

# ----------------------------------------------------------------------------------------------------------------------
# PyTorch's side


def new_model(m, attention):
    config = GPT2Config(n_layer=m.layers, n_embd=m.dim, n_head=m.heads, n_inner=4 * m.dim, vocab_size=m.vocab,
                        n_positions=m.context, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False,
                        bos_token_id=None, eos_token_id=None)
    config._attn_implementation = attention
    return GPT2LMHeadModel(config).train()


def random_weights(m):
    """GPT-2's initialization at the gain of width 768, with biases and norm weights that are not trivial."""
    weights = {}
    for name, p in new_model(m, "eager").state_dict().items():
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        noise = torch.randn_like(p)
        if p.dim() == 2:
            scale = (2 * m.layers) ** -0.5 if name.endswith("c_proj.weight") else 1
            weights[name] = noise * 0.02 * scale * (768 / m.dim) ** 0.5
        elif "ln_" in name:
            weights[name] = 1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise
        else:
            weights[name] = 0.05 * noise
    return weights


def load(m, weights, attention):
    model = new_model(m, attention)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(n == "lm_head.weight" or ".attn." in n for n in missing), (missing, unexpected)
    model.tie_weights()
    return model


def with_float8(model, emulate):
    """Conv1D (in, out) -> nn.Linear (out, in), then torchao's conversion of all but the head."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                linear = torch.nn.Linear(*child.weight.shape, device=child.weight.device, dtype=child.weight.dtype)
                with torch.no_grad():
                    linear.weight.copy_(child.weight.t())
                    linear.bias.copy_(child.bias)
                setattr(module, name, linear)
    converted = []
    def keep(module, name):
        chosen = "lm_head" not in name
        converted.append(name) if chosen else None
        return chosen
    convert_to_float8_training(model, config=Float8LinearConfig(emulate=emulate), module_filter_fn=keep)
    assert len(converted) == 4 * model.config.n_layer, converted
    return model


def torch_gradients(model, tokens, targets, autocast=False):
    """{name: float32 gradient in Conv1D's orientation}, loss"""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
        logits = model(tokens).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss.backward()
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    grads = {}
    for name, p in model.named_parameters():
        is_linear = name.endswith(".weight") and name.removesuffix(".weight") in linears and not name.startswith("lm_head")
        is_wte = name == "transformer.wte.weight"
        grads[name] = (p.grad.t() if is_linear and not is_wte else p.grad).float()
    return grads, loss.item()


def peers_gradients(m, weights, tokens, targets, recipe, device):
    """{"name of the peer": gradients}; the first is the one to compare with."""
    def bf16():
        return load(m, weights, "sdpa").to(device, torch.bfloat16)
    if recipe == "bf16":
        return {"torch bf16": torch_gradients(bf16(), tokens, targets)[0],
                "torch autocast": torch_gradients(load(m, weights, "sdpa").to(device), tokens, targets, autocast=True)[0]}
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        print(f"torchao cannot be imported, its errors are not compared: {error}")
        return {}
    return {"torchao": torch_gradients(with_float8(bf16(), device.type == "cpu"), tokens, targets)[0]}


# ----------------------------------------------------------------------------------------------------------------------
# Our side


def our_gradients(program, name, m, recipe, files, device):
    command = [program, "--model", name, "--recipe", recipe, "--device", device.type.replace("cuda", "gpu"),
               "--micro-batch", m.batch, "--seq-len", m.context, "--global-batch-tokens", m.batch * m.context,
               "--params", files / "weights.safetensors", "--tokens", files / "tokens.i32", "--grads", files / "grads.safetensors",
               "--deterministic"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    grads = load_file(files / "grads.safetensors", device=str(device))
    return grads, grads.pop("loss").item()


# ----------------------------------------------------------------------------------------------------------------------
# Comparison


class Errors:
    """Sums over draws, a tensor: error and truth squared, products for the cosine."""

    def __init__(self):
        self.sums = {}

    def add(self, got, truth):
        assert got.keys() == truth.keys(), got.keys() ^ truth.keys()
        for name, want in truth.items():
            g, w = got[name].double(), want.double()
            assert g.shape == w.shape, (name, g.shape, w.shape)
            row = np.array([((g - w) ** 2).sum().item(), (w * w).sum().item(), (g * g).sum().item(), (g * w).sum().item()])
            self.sums[name] = self.sums.get(name, 0) + row

    def relative(self, name):
        error, want, _, _ = self.sums[name]
        return float(np.sqrt(error / want))

    def cosine(self, name):
        _, want, got, product = self.sums[name]
        return float(product / np.sqrt(want * got))


def at_most(x, bound):
    return bool(x <= bound)  # false for NaN


def judge(name, recipe, ours, peers, details):
    """One line and one test a class of tensors (the layers of a model are one): its worst tensor."""
    classes, tests = {}, []
    bar = next(iter(peers), None)
    for tensor in ours.sums:
        row = {"model": name, "recipe": recipe, "tensor": tensor, "ours": ours.relative(tensor), "cosine": ours.cosine(tensor)}
        row |= {peer: errors.relative(tensor) for peer, errors in peers.items()}
        row["ratio"] = row["ours"] / row[bar] if bar else None
        details.append(row)
        classes.setdefault(re.sub(r"\.h\.\d+\.", ".h.*.", tensor), []).append(row)
    for kind, rows in classes.items():
        worst = max(rows, key=lambda r: np.nan_to_num(r["ratio"] if bar else r["ours"], nan=np.inf))
        cosine = min(np.nan_to_num(r["cosine"], nan=-1.0) for r in rows)
        ok = at_most(MIN_COSINE[recipe], cosine) and all(not bar or at_most(r["ratio"], MAX_RATIO) for r in rows)
        figure = f"error {worst['ours']:.2e}" + "".join(f", {peer} {worst[peer]:.2e}" for peer in peers)
        figure += (f", ratio {worst['ratio']:.2f}" if bar else ", ratio not compared") + f", cosine {cosine:.5f}"
        status = "fail" if not ok else "pass"
        print(f"{name:10} {recipe:10} {kind:36} {figure} | {'ok' if ok else 'FAIL'}", flush=True)
        tests.append({"name": f"gradients {name} {recipe} {kind}", "status": status, "figure": figure})
    if not bar:
        tests.append({"name": f"gradients {name} {recipe} against torchao", "status": "skip", "figure": "torchao is not installed"})
    return tests


def compare(name, m, recipe, arguments, details):
    device = torch.device("cpu" if arguments.device == "cpu" else "cuda")
    ours, peers, loss_error = Errors(), {}, 0.0
    for draw in range(m.draws):
        torch.manual_seed(1000 + draw)
        weights = random_weights(m)
        tokens = torch.randint(0, m.vocab, (m.batch, m.context))
        targets = torch.randint(0, m.vocab, (m.batch, m.context))
        targets[torch.rand(targets.shape) < 0.1] = -1
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            files = pathlib.Path(folder)
            save_file(weights, files / "weights.safetensors")
            torch.stack([tokens, targets]).to(torch.int32).numpy().tofile(files / "tokens.i32")
            got, loss = our_gradients(arguments.program, name, m, recipe, files, device)
        tokens, targets = tokens.to(device), targets.to(device)
        truth, true_loss = torch_gradients(load(m, weights, "eager").to(device), tokens, targets)
        ours.add(got, truth)
        for peer, grads in peers_gradients(m, weights, tokens, targets, recipe, device).items():
            peers.setdefault(peer, Errors()).add(grads, truth)
        error = abs(loss - true_loss) / true_loss
        loss_error = error if not error <= loss_error else loss_error
    ok = at_most(loss_error, MAX_LOSS_ERROR[recipe])
    print(f"{name:10} {recipe:10} loss: relative error {loss_error:.1e} | {'ok' if ok else 'FAIL'}")
    tests = [{"name": f"loss {name} {recipe}", "status": "pass" if ok else "fail", "figure": f"relative error {loss_error:.1e}"}]
    return tests + judge(name, recipe, ours, peers, details)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[], help="default: all, on a CPU tiny")
    parser.add_argument("--recipe", choices=list(MIN_COSINE))
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--program", default=str(ROOT / os.environ.get("TRAIN_GPT_BUILD", "build/sm_90a") / "dev/gradients"))
    parser.add_argument("--work", help="folder for temporary files")
    parser.add_argument("--json", help="results for tests/gpu_report")
    parser.add_argument("--details", help="every tensor's figures, JSON")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if arguments.device == "gpu" and not torch.cuda.is_available():
        print("gradients: skipped: no GPU")
        return 77
    tests, details = [], []
    for name in arguments.models or (["tiny"] if arguments.device == "cpu" else list(MODELS)):
        for recipe in [arguments.recipe] if arguments.recipe else MIN_COSINE:
            tests += compare(name, MODELS[name], recipe, arguments, details)
    for path, content in ((arguments.json, {"tests": tests, "bench": []}), (arguments.details, details)):
        if path:
            pathlib.Path(path).write_text(json.dumps(content, indent=1) + "\n")
    failed = sum(test["status"] == "fail" for test in tests)
    print(f"gradients: {len(tests) - failed} passed or skipped, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
