"""What the tests of the program share: starting it on a tiny model, reading what it wrote, standing in its way."""
import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARDS = ROOT / "shards" / "cuda_headers"
TINY = ["--model", "tiny", "--device", "cpu", "--micro-batch", "4", "--global-batch-tokens", "512", "--train", str(SHARDS), "--val", str(SHARDS),
        "--eval-every", "4", "--eval-tokens", "512", "--lr", "1e-3", "--warmup-steps", "1"]


def program():
    return pathlib.Path(os.environ.get("TRAIN_GPT_BUILD", ROOT / "build" / "sm_90a")) / "train_gpt_fp8"


def train(*options, ok=True):
    done = subprocess.run([str(program()), *options], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode == 0) == ok, f"exit status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done


def without_stdout(*options):
    """The shell closes it; a file that the program opens then must not take its place."""
    return subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", str(program()), *options], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=600)


def records(out, kind):
    return [r for r in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if r["kind"] == kind]


class Skipped(Exception):
    """This machine cannot run the test; the text says why."""


class Scratch:
    """A folder that is gone afterwards."""

    def __enter__(self):
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="train_gpt_fp8_"))
        return self.path

    def __exit__(self, *_):
        shutil.rmtree(self.path)


def checkpoint_bytes(out, step):
    folder = out / f"step_{step:06d}"
    return {f: (folder / f).read_bytes() for f in ("params.safetensors", "adam.safetensors")}


def complete_checkpoints(out):
    return sorted(int(p.parent.name.removeprefix("step_")) for p in out.glob("step_*/checkpoint.json"))


class SmallDisk:
    """A file system of a few megabytes."""

    def __init__(self, megabytes):
        self.size = megabytes

    def __enter__(self):
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="train_gpt_fp8_disk_"))
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.size}m", "tmpfs", str(self.path)], capture_output=True, text=True)
        if made.returncode != 0:
            self.path.rmdir()
            raise Skipped(f"cannot mount a small file system here: {made.stderr.strip()}")
        return self

    def remount(self, mode):
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.path)], check=True)

    def __exit__(self, *_):
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)
        self.path.rmdir()


class Running:
    """A run whose output is read line by line."""

    def __init__(self, *options, **how):
        self.lines = []
        self.process = subprocess.Popen([str(program()), *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)

    def wait_for(self, *texts, limit_s=120):
        """Until each of the texts has been seen from now on, in any order."""
        missing = set(texts)
        timer = threading.Timer(limit_s, self.process.kill)
        timer.start()
        for line in self.process.stdout:
            self.lines.append(line)
            missing = {text for text in missing if text not in line}
            if not missing:
                break
        timer.cancel()
        assert not missing, f"ended without {missing}: {''.join(self.lines[-20:])}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    @contextlib.contextmanager
    def held(self):
        """The process stands still."""
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        yield
        self.process.send_signal(signal.SIGCONT)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.lines += self.process.communicate(timeout=120)[0].splitlines(True)
        return self.process.returncode
