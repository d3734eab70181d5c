#!/usr/bin/env python3
"""Does FP8 learn like BF16, and do both learn like PyTorch? GPT-2 124M, 400 steps of 65,536 tokens.

    learning.py --shards FOLDER --work FOLDER [--json FILE] [--plot FILE] [--steps N] [--compile]

FOLDER holds shards of GPT-2 tokens (data/prepare --tokenizer gpt2), train and val. Makes three runs of the trainer in WORK
(bf16 with two seeds, tensorwise with the first) and one of PyTorch: Hugging Face's GPT2LMHeadModel, float32 weights under
BF16 autocast, fused AdamW, from the same weights, on the same batches, with the same learning rates, clipping and decay
groups, evaluated on the same samples. A run is not made again when its log is complete and comes from the same program and options.
No text is seen twice: more steps than an epoch of FOLDER are refused.

The final validation losses of bf16, tensorwise and PyTorch must agree pairwise within max(0.5 %, twice the spread of the
two bf16 seeds).
"""
import argparse
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "dev"))
import plot  # noqa: E402

BUILD = ROOT / os.environ.get("TRAIN_GPT_BUILD", "build/sm_90a")
SEEDS = (1337, 2718)
RELATIVE_BOUND = 0.005
SPREADS = 2
MADE_BY = "made_by.json"  # beside a log

# ----------------------------------------------------------------------------------------------------------------------
# Our runs


def trainer_options(arguments, recipe, seed):
    options = {"model": arguments.model, "recipe": recipe, "seed": seed, "train": arguments.shards, "val": arguments.shards,
               "micro-batch": arguments.micro_batch, "global-batch-tokens": arguments.batch_tokens, "steps": arguments.steps,
               "lr": arguments.lr, "warmup-steps": arguments.steps // 10, "eval-every": max(1, arguments.steps // 8),
               "eval-tokens": arguments.eval_tokens, "checkpoint-every": 0, "device": arguments.device}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def run(command):
    print("  " + " ".join(map(str, command)), flush=True)
    start = time.time()
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"failed with status {done.returncode}:\n{done.stdout[-4000:]}")
    print(f"  {time.time() - start:.0f} s; " + (done.stdout.strip().splitlines() or [""])[-1], flush=True)


def final_loss(log, steps):
    """The validation loss after the last step, None for a run that is not complete."""
    if not log.exists():
        return None
    return dict(plot.read_log(log)[1]).get(steps)


def require_one_epoch(arguments):
    tokens, needed = json.loads((pathlib.Path(arguments.shards) / "meta.json").read_text())["train"]["tokens"], arguments.steps * arguments.batch_tokens
    if needed > tokens:
        sys.exit(f"error: {arguments.steps} steps of {arguments.batch_tokens:,} tokens are more than an epoch of {arguments.shards} ({tokens:,} tokens): "
                 "fewer --steps or more text")


def maker(files, options):
    """What a result depends on: the sha256 of the files and the options."""
    return json.dumps({"sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}, "options": options}, indent=1) + "\n"


def is_current(log, steps, made_by):
    note = log.parent / MADE_BY
    return final_loss(log, steps) is not None and note.exists() and note.read_text() == made_by


def our_run(arguments, name, recipe, seed):
    out, program, options = arguments.work / name, BUILD / "train_gpt_fp8", trainer_options(arguments, recipe, seed)
    log, made_by = out / "log.jsonl", maker([program], options)
    if not is_current(log, arguments.steps, made_by):
        shutil.rmtree(out, ignore_errors=True)  # of a run that was cut off or of another program
        run([program, *options, "--out", out])
        (out / MADE_BY).write_text(made_by)
    return log


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch's run


class TorchRun:
    def __init__(self, exported, device, compiled):
        import numpy as np
        import torch
        from safetensors.torch import load_file
        from transformers import GPT2Config, GPT2LMHeadModel
        self.torch, self.device = torch, device
        self.run = run = json.loads((exported / "run.json").read_text())
        m = run["model"]
        config = GPT2Config(n_layer=m["n_layers"], n_embd=m["dim"], n_head=m["n_heads"], n_inner=m["ffn_dim"],
                            vocab_size=m["vocab_size"], n_positions=m["seq_len"], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                            activation_function="gelu_pytorch_tanh", use_cache=False, bos_token_id=None, eos_token_id=None)
        config._attn_implementation = "sdpa"
        self.model = GPT2LMHeadModel(config)
        missing, unexpected = self.model.load_state_dict(load_file(exported / "initial.safetensors"), strict=False)
        assert not unexpected and all(n == "lm_head.weight" or ".attn." in n for n in missing), (missing, unexpected)
        self.model.tie_weights()
        self.model.to(device)
        row = m["seq_len"] + 1
        self.train = np.fromfile(exported / "train.u16", np.uint16).reshape(run["steps"], run["samples_per_step"], row)
        self.val = np.fromfile(exported / "val.u16", np.uint16).reshape(run["val_samples"], row)
        self.optimizer = self.make_optimizer()
        self.forward = torch.compile(self.loss_sum) if compiled else self.loss_sum

    def make_optimizer(self):
        decays = set(self.run["decays"])
        groups = [{"params": [], "weight_decay": self.run["weight_decay"]}, {"params": [], "weight_decay": 0.0}]
        for name, p in self.model.named_parameters():  # names the tied weight once, as wte
            groups[0 if name in decays else 1]["params"].append(p)
        assert len(groups[0]["params"]) == len(decays), decays
        return self.torch.optim.AdamW(groups, lr=0.0, betas=tuple(self.run["betas"]), eps=self.run["eps"], fused=self.device == "cuda")

    def loss_sum(self, rows):
        with self.torch.autocast(self.device, self.torch.bfloat16):
            logits = self.model(rows[:, :-1]).logits
        return self.torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")

    def batches(self, samples):
        size = self.run["micro_batch"]
        for first in range(0, len(samples), size):
            yield self.torch.from_numpy(samples[first:first + size].astype("int64")).to(self.device)

    def evaluate(self):
        with self.torch.no_grad():
            total = sum(self.forward(rows).double() for rows in self.batches(self.val))
        return float(total) / (len(self.val) * (self.val.shape[1] - 1))

    def step(self, number):
        samples = self.train[number]
        tokens = samples.shape[0] * (samples.shape[1] - 1)
        total = 0.0
        for rows in self.batches(samples):
            loss = self.forward(rows) / tokens
            loss.backward()
            total = total + loss.detach()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = 0.0
        if self.run["max_grad_norm"] > 0:
            norm = self.torch.nn.utils.clip_grad_norm_(parameters, self.run["max_grad_norm"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.run["learning_rates"][number]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total), float(norm)


def torch_run(arguments):
    log, program, options = arguments.work / "pytorch" / "log.jsonl", BUILD / "dev/export_run", trainer_options(arguments, "bf16", SEEDS[0])
    made_by = maker([program, pathlib.Path(__file__)], [*options, f"compile={arguments.compile}"])
    if is_current(log, arguments.steps, made_by):
        return log
    exported = arguments.work / "export"
    shutil.rmtree(exported, ignore_errors=True)
    run([program, *options, "--to", exported])
    job = TorchRun(exported, "cpu" if arguments.device == "cpu" else "cuda", arguments.compile)
    log.parent.mkdir(parents=True, exist_ok=True)
    steps, every, start = job.run["steps"], job.run["eval_every"], time.time()
    with log.open("w") as file:
        def write(**record):
            print(json.dumps(record), file=file, flush=True)
        write(kind="eval", step=0, loss=job.evaluate())
        for number in range(steps):
            loss, norm = job.step(number)
            write(kind="step", step=number + 1, loss=loss, grad_norm=norm, lr=job.run["learning_rates"][number])
            if (number + 1) % every == 0 or number + 1 == steps:
                val = job.evaluate()
                write(kind="eval", step=number + 1, loss=val)
                print(f"  pytorch step {number + 1}/{steps} | loss {loss:.4f} | val loss {val:.4f} | {time.time() - start:.0f} s", flush=True)
    (log.parent / MADE_BY).write_text(made_by)
    return log


# ----------------------------------------------------------------------------------------------------------------------


def judge_start(ours, torchs):
    """Before the first step the two differ by BF16 rounding only: the same weights, the same samples."""
    a, b = (dict(plot.read_log(log)[1])[0] for log in (ours, torchs))
    return {"name": "learning: PyTorch starts from the same weights", "status": "pass" if abs(a - b) <= 1e-3 * b else "fail",
            "figure": f"validation loss {a:.5f} and {b:.5f}"}


def judge(losses):
    spread = abs(losses["bf16"] - losses["bf16, other seed"])
    bound = max(RELATIVE_BOUND * losses["PyTorch"], SPREADS * spread)
    figure = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    tests = [{"name": "learning: final validation losses", "status": "pass" if spread == spread else "fail", "figure": figure}]
    for a, b in (("bf16", "PyTorch"), ("tensorwise", "PyTorch"), ("tensorwise", "bf16")):
        difference = losses[a] - losses[b]
        ok = abs(difference) <= bound  # false for NaN
        tests.append({"name": f"learning: {a} against {b}", "status": "pass" if ok else "fail",
                      "figure": f"{difference:+.4f} ({100 * difference / losses[b]:+.2f} %), bound {bound:.4f}, seeds differ by {spread:.4f}"})
    return tests


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder of the runs")
    parser.add_argument("--model", default="gpt2-124M")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--eval-tokens", type=int, default=327680, help="tokens of validation")
    parser.add_argument("--device", default="gpu", choices=["gpu", "cpu"])
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--json", help="results for tests/gpu_report")
    parser.add_argument("--plot", help="PNG of the curves")
    arguments = parser.parse_args()
    if arguments.device == "gpu" and (not shutil.which("nvidia-smi") or subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode != 0):
        print("learning: skipped: no GPU")
        return 77
    require_one_epoch(arguments)
    logs = {"bf16": our_run(arguments, "bf16_a", "bf16", SEEDS[0]), "bf16, other seed": our_run(arguments, "bf16_b", "bf16", SEEDS[1]),
            "tensorwise": our_run(arguments, "tensorwise", "tensorwise", SEEDS[0]), "PyTorch": torch_run(arguments)}
    tests = [judge_start(logs["bf16"], logs["PyTorch"])]
    tests += judge({name: final_loss(log, arguments.steps) for name, log in logs.items()})
    for test in tests:
        print(f"{test['name']} | {test['figure']} | {'ok' if test['status'] == 'pass' else 'FAIL'}")
    if arguments.plot:
        plot.draw(logs, arguments.plot, f"{arguments.model}, {arguments.steps} steps of {arguments.batch_tokens:,} tokens")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps({"tests": tests, "bench": []}, indent=1) + "\n")
    return 1 if any(test["status"] == "fail" for test in tests) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
