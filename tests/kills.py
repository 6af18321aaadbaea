"""Kills a command at random moments and looks at what it leaves: python tests/kills.py KILLS [SEED]

Conversion, then training, overwrite their own output. At every moment the output must be there and whole, old or new; nothing of the
user's may change; and after a run that is let end, nothing of ours may be left. Everything is imported once and each run is a fork of
this process, so that most of a run is work and not imports. Every second run is one where names cannot be exchanged in one step.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import recipes.common.files as files
from convert import linearize
from recipes.common import cli
from recipes.common.marks import digest, foreign, read_mark
from recipes.quickstart.corpus import stories
from recipes.tinystories import train

# What the commands import late, once their arguments are right: here once, and not in every fork.
for module in ("convert.card", "convert.check", "convert.companions", "convert.gguf", "convert.report", "recipes.tinystories.training"):
    importlib.import_module(module)

START = "<|endoftext|>"
RUNS_TO_THE_END = 10  # one after so many kills


def make_user(home: Path) -> None:
    """What a user has: a model, text, a config, and a thesis beside the output and under names much like ours."""
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([START, *sorted(pre_tokenizers.ByteLevel.alphabet())])}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=START).save_pretrained(home / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, bos_token_id=0, eos_token_id=0, **sizes)).save_pretrained(home / "model")
    (home / "stories.txt").write_text(f"\n{START}\n".join(stories(40)))
    settings = {"output": str(home / "out"), "model": str(home / "model"), "train_data": [str(home / "stories.txt")], "valid_stories": 5}
    settings |= {"length": 32, "batch_size": 2, "steps": 12, "log_every": 1, "eval_every": 6, "eval_sequences": 2, "checkpoint_every": 3}
    (home / "config.yaml").write_text(yaml.safe_dump({**settings, "samples": 0}))
    for name in ("thesis.txt", ".out.partial-1/thesis.txt", ".out.old-2/thesis.txt", ".out.partial-x"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text("years of work")


def snapshot(home: Path) -> dict[str, str]:
    """Digests of everything but the output and what commands put beside it under their marks."""
    ours = {path for path in home.iterdir() if path.name == "out" or (path.is_dir() and read_mark(path))}
    found = (path for path in home.rglob("*") if path.is_file() and not ours & set(path.parents))
    return {str(path.relative_to(home)): digest(path) for path in found if not path.name.startswith(".hf_linattn")}


def forked(work: Callable[[], object], after: float | None) -> bool:
    """Do `work` in a fork that is killed `after` so many seconds, or never; whether it came to its end."""
    with tempfile.TemporaryFile() as screen:
        child = os.fork()
        if child == 0:
            os.dup2(screen.fileno(), 1)
            os.dup2(screen.fileno(), 2)
            _end_with(work)
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        screen.seek(0)
        assert not os.WIFEXITED(status) or not os.WEXITSTATUS(status), screen.read().decode()[-2000:]
    return os.WIFEXITED(status)


def _end_with(work: Callable[[], object]) -> None:
    """Do `work` and end this process with its status."""
    status = 1
    try:
        work()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def attack(home: Path, run: Callable[[], object], kills: int, chance: random.Random) -> dict[str, int]:
    """Kill `run` so many times; how many came to their end first, how many left something, how often the output was missing."""
    told = {"kills": 0, "ended first": 0, "left something": 0, "put back later": 0}
    before, out, one_step = snapshot(home), home / "out", files.exchange
    began = time.monotonic()
    forked(run, None)
    seconds = time.monotonic() - began
    users = {path.name for path in home.iterdir()}
    while told["kills"] < kills:
        number = told["kills"] + told["ended first"]
        files.exchange = one_step if number % 2 else lambda one, other: False
        killed = not forked(run, chance.uniform(0, 1.05 * seconds))
        told["kills" if killed else "ended first"] += 1
        extra = {path.name for path in home.iterdir()} - users
        inside = [path for path in out.rglob(".*.partial-*") if path.is_dir()]
        told["left something"] += bool(extra or inside)
        assert snapshot(home) == before, "something of the user's has changed"
        if not out.exists():  # two renames cannot be one: the old stands aside until the next run
            told["put back later"] += 1
            assert files.exchange is not one_step and [name for name in extra if name.startswith(".out.old-")], "the output is lost"
        elif not inside:
            mark = read_mark(out)
            assert mark and mark.files and not foreign(out, mark), "the output is not whole"
        if number % RUNS_TO_THE_END == RUNS_TO_THE_END - 1 or told["kills"] == kills:
            assert forked(run, None)
            assert {path.name for path in home.iterdir()} == users, "something of ours is left beside the output"
            left = [path for path in out.rglob(".*") if not path.name.startswith(".hf_linattn.json")]
            assert not left, f"something of ours is left in the output: {left}"
            assert snapshot(home) == before
    return told


def main(kills: int, seed: int = 0) -> None:
    """Attack conversion and training, each in a folder of its own; print what happened, as JSON."""
    torch.set_num_threads(1)
    for name, command in (("convert.linearize", linearize.main), ("recipes.tinystories.train", train.main)):
        with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as cache:
            home = Path(place)
            os.environ["HF_LINATTN_CACHE"] = cache
            forked(lambda home=home: make_user(home), None)
            paths = [home / "model", home / "out"] if command is linearize.main else ["--config", home / "config.yaml"]
            run = functools.partial(cli.app(command), [*map(str, paths), "--overwrite"])
            print(json.dumps({"command": name, **attack(home, run, kills, random.Random(seed))}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
