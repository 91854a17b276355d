"""Merging a whole checkpoint: new processes side by side, ours, Hugging Face PEFT's and `cp -r`.

``python -m tests.benchmarks.checkpoints`` makes a Llama-shaped checkpoint (bf16, hidden 2048, 12
layers: 1.3 GB in three shards) and adapters of its seven projections, in a directory that it
removes. ``--layers`` makes another size, ``--work`` says where, ``--measuring`` says what rounding
and measuring take of the arithmetic.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pytest

from peft_any import Adapter, merge_checkpoint, write_safetensors
from peft_any.backend import astype, resolve
from peft_any.layer import Dense, Site
from peft_any.method import Tuner
from peft_any.methods.boft import BOFTConfig
from peft_any.methods.lora import LoraConfig
from peft_any.methods.oft import OFTConfig
from peft_any.rng import Fresh
from peft_any.surgery import patches
from peft_any.surgery.sums import Sums
from tests.benchmarks.timing import SLOW

HIDDEN, INNER, NARROW, VOCABULARY, LAYERS, SHARDS = 2048, 5632, 256, 32000, 12, 3
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (NARROW, HIDDEN),
    "self_attn.v_proj": (NARROW, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
MODULES = [name.split(".")[1] for name in PROJECTIONS]
MEMORY = 300
"""MB that the merge of a LoRA may take beside mapped files."""


class Method(NamedTuple):
    """An adapter, and by how much its merge is to be quicker than Hugging Face PEFT's."""

    name: str
    config: Tuner
    target: float


METHODS = [
    Method("LoRA r16", LoraConfig(r=16, target_modules=MODULES), 12),
    Method("DoRA r16", LoraConfig(r=16, use_dora=True, target_modules=MODULES), 5),
    Method("OFT b32", OFTConfig(oft_block_size=32, target_modules=MODULES), 5),
    Method("BOFT b32 m1", BOFTConfig(boft_block_size=32, target_modules=MODULES), 20),
]
THEIRS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
"""The shortest script that does the same with PEFT."""


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Name the shapes of a Llama's tensors."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in PROJECTIONS.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{norm}.weight"] = (HIDDEN,)
    return {**found, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make_base(folder: Path, layers: int) -> None:
    """Write the checkpoint: normal numbers of standard deviation 0.02 in bf16, norms of ones."""
    rng, shapes = np.random.default_rng(0), tensors(layers)
    pool = astype((rng.standard_normal(VOCABULARY * HIDDEN) * 0.02).astype("float32"), "bfloat16")
    folder.mkdir()
    names, where = list(shapes), {}
    for i in range(SHARDS):
        file, shard = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors", {}
        for name in names[i * len(names) // SHARDS : (i + 1) * len(names) // SHARDS]:
            shape, where[name] = shapes[name], file
            size = int(np.prod(shape))
            start = int(rng.integers(0, pool.size - size + 1))
            shard[name] = (
                pool[start : start + size].reshape(shape)
                if len(shape) > 1
                else (astype(np.ones(shape, "float32"), "bfloat16"))
            )
        write_safetensors(folder / file, shard, {"format": "pt"})
    size = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": VOCABULARY, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def make_adapter(folder: Path, config: Tuner, layers: int) -> None:
    """Write an adapter with parameters that look trained, as Hugging Face PEFT would."""
    rng, sites = np.random.default_rng(1), {}
    for i in range(layers):
        for name, (n_out, n_in) in PROJECTIONS.items():
            site = Site(f"model.layers.{i}.{name}", n_in=n_in, n_out=n_out, bias=False)
            base = Dense(np.zeros((n_out, n_in), "float32"), None, site)
            p = config.at(site).init(site, Fresh(0, resolve("numpy"), key=site.name, base=base))
            if "lora_magnitude_vector" in p:
                p["lora_magnitude_vector"] = np.full(n_out, 0.02 * n_in**0.5, "float32")
            sites[site.name] = {
                k: (v + 0.01 * rng.standard_normal(v.shape)).astype("float32") for k, v in p.items()
            }
    Adapter(config, sites).save(folder)


def run(command: Sequence[str]) -> float:
    """Time a new process, by the clock."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def anonymous(command: Sequence[str]) -> float:
    """Give the most anonymous memory, in MB, that a process and its children take together.

    Pages that a fork shares count once, as Linux's proportional set size counts them.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        found = [process.pid, *_children(process.pid)]
        most = max(most, sum(map(_anonymous, found)))
        time.sleep(0.01)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return most / 1024


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")), 0)


class Arena:
    """A directory with a checkpoint, and the commands to compare."""

    def __init__(self, work: Path, layers: int) -> None:
        work.mkdir(exist_ok=True)
        self.work, self.layers = work, layers
        self.base, self.out = work / "base", work / "out"
        make_base(self.base, layers)

    @property
    def gigabytes(self) -> float:
        """The checkpoint's size."""
        return sum(file.stat().st_size for file in self.base.iterdir()) / 1e9

    def adapter(self, config: Tuner) -> Path:
        """Make an adapter."""
        folder = self.work / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        make_adapter(folder, config, self.layers)
        return folder

    def ours(self, adapter: Path, *more: str) -> list[str]:
        """Merge with the command."""
        given = ["--base", self.base, "--adapter", adapter, "--out", self.out, "--quiet", *more]
        return [sys.executable, "-m", "peft_any", "merge", *map(str, given)]

    def theirs(self, adapter: Path) -> list[str]:
        """Merge with Hugging Face PEFT."""
        return [sys.executable, "-c", THEIRS, *map(str, (self.base, adapter, self.out))]

    def copied(self) -> list[str]:
        """Copy the base."""
        return ["cp", "-r", str(self.base), str(self.out)]

    def times(self, commands: dict[str, list[str]], rounds: int) -> dict[str, float]:
        """Run the commands in turn, after a round that is not counted; the median of each."""
        found: dict[str, list[float]] = {name: [] for name in commands}
        for i in range(rounds + 1):
            for name, command in commands.items():
                shutil.rmtree(self.out, ignore_errors=True)
                seconds = run(command)
                if i:
                    found[name].append(seconds)
        shutil.rmtree(self.out, ignore_errors=True)
        return {name: median(seconds) for name, seconds in found.items()}


def merges(arena: Arena, rounds: int) -> Iterator[str]:
    """Compare every method's merge with Hugging Face PEFT's, and with copying."""
    theirs = importlib.util.find_spec("peft") is not None
    yield (
        f"| merging a checkpoint of {arena.gigabytes:.1f} GB | HF PEFT ÷ ours | target | "
        "ours ÷ `cp -r` | anonymous memory | HF's |"
    )
    yield "|---|---|---|---|---|---|"
    for name, config, target in METHODS:
        adapter = arena.adapter(config)
        commands = {"cp": arena.copied(), "ours": arena.ours(adapter)}
        if theirs:
            commands["hf"] = arena.theirs(adapter)
        seconds = arena.times(commands, rounds)
        cells = ["–", f"{target:g}", f"{seconds['ours'] / seconds['cp']:.1f}"]
        if theirs:
            speed = seconds["hf"] / seconds["ours"]
            cells[0] = f"{speed:.1f}{'' if speed >= target else ' (missed)'}"
        for key in ("ours", "hf"):
            cells.append(f"{anonymous(commands[key]):.0f} MB" if key in commands else "–")
            shutil.rmtree(arena.out, ignore_errors=True)
        yield f"| {name} | {' | '.join(cells)} |"


def growth(work: Path, sizes: Sequence[int], rounds: int) -> Iterator[str]:
    """Compare the merge's time for a GB of checkpoints of several sizes."""
    yield "| size of the checkpoint | seconds for a GB ÷ the first's |"
    yield "|---|---|"
    first = None
    for layers in sizes:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            arena = Arena(Path(folder), layers)
            command = arena.ours(arena.adapter(METHODS[0].config))
            each = arena.times({"ours": command}, rounds)["ours"] / arena.gigabytes
            first = first or each
            yield f"| {arena.gigabytes:.1f} GB | {each / first:.2f} |"


def measuring(arena: Arena, rounds: int) -> Iterator[str]:
    """Say which part of a merge's processor time rounds and measures, nothing being written.

    The receipt costs less: without it, sums would have to be rounded all the same. Products of
    small factors are formed, added, rounded and measured in one pass, which is counted whole.
    """
    spent = 0.0

    def timed(f: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            nonlocal spent
            start = time.process_time()
            found = f(*given)
            spent += time.process_time() - start
            return found

        return run

    yield "| method | rounding and measuring ÷ the rest |"
    yield "|---|---|"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patches, "rounded", timed(patches.rounded))
        patch.setattr(Sums, "rounded", timed(Sums.rounded))
        for name, config, _ in METHODS:
            adapter, shares = arena.adapter(config), []
            for _ in range(rounds):
                spent, start = 0.0, time.process_time()
                merge_checkpoint(arena.base, adapter, None, dry_run=True, threads=1)
                shares.append(spent / (time.process_time() - start - spent))
            yield f"| {name} | {median(shares):.2f} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measuring", action="store_true")
    parser.add_argument("--growth", type=int, nargs="*", default=[], metavar="LAYERS")
    given = parser.parse_args()
    for name in (*SLOW, "PYTHONDONTWRITEBYTECODE"):  # installed packages have their bytecode
        os.environ.pop(name, None)
    tables: list[Any] = []
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        if given.layers:
            arena = Arena(Path(folder) / "merge", given.layers)
            table = measuring if given.measuring else merges
            tables.append(table(arena, given.rounds))
        if given.growth:
            tables.append(growth(Path(folder), given.growth, given.rounds))
        for table in tables:
            for line in table:
                print(line, flush=True)
            print()


if __name__ == "__main__":
    main()
