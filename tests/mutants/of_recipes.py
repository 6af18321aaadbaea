"""Slips in the recipes."""

from .mutant import RECIPES, named

STORIES, DATA, RUN = "recipes/tinystories/train.py", "recipes/tinystories/data.py", "recipes/common/run.py"
ARENA, BATCHES, STATE = "recipes/lra/train.py", "recipes/lra/batches.py", "recipes/common/state.py"

MUTANTS = [
    *named(
        RECIPES,
        # noise, which the log tells of and the model feels
        ("noise one step late in the model, right in the log", STORIES, "self.noise(step))\n                with",
         "self.noise(max(step - 1, 0)))\n                with"),
        ("noise never lowered in the model, right in the log", STORIES, "self.noise(step))\n                with",
         "self.noise(0))\n                with"),
        ("noise one step late in the log", STORIES, "float(self.noise(step - 1))", "float(self.noise(max(step - 2, 0)))"),
        ("noise of the arena never lowered", ARENA, "self.noise(round(done * 1_000_000))", "self.noise(0)"),
        # after a resume
        ("the best score forgotten by a resume", ARENA, 'self.best, self.best_step = float(progress.get("best", -1.0))',
         "self.best, self.best_step = float(-1.0)"),
        ("the time before a resume forgotten", ARENA, 'self.seconds = before = float(progress.get("seconds", 0.0))',
         "self.seconds = before = 0.0"),
        ("the time before a resume forgotten, of stories", STORIES, 'float(progress.get("seconds", 0.0))', "0.0"),
        ("a resume that skips accumulated batches by half", STORIES,
         "within * s.batch_size * s.gradient_accumulation * accelerator.num_processes",
         "within * s.batch_size * accelerator.num_processes"),
        ("records beyond the checkpoint kept", RUN, 'if record["step"] <= step]', 'if record["step"] <= step + 1]'),
        ("the checkpoint's own records cut off", RUN, 'if record["step"] <= step]', 'if record["step"] < step]'),
        ("settings that are gone not missed", RUN, "for key in [*new, *old]:", "for key in new:"),
        ("a step beyond the run's end", STATE, "(steps is not None and step > steps)", "False"),
        ("another run's checkpoint", STATE, 'or progress.get("run") != run:', "or False:"),
        ("an older score that equals the newer kept", ARENA, "if score >= self.best:", "if score > self.best:"),
        # the second of many
        ("a digest of the first thousand sequences", DATA, '        whole.update(batch["input_ids"].tobytes())\n',
         '        whole.update(batch["input_ids"].tobytes())\n        break\n'),
        ("tokens left over between batches dropped", DATA, "            del stream[:whole]", "            stream.clear()"),
        ("a mean over all of log_every where the run ends before", STORIES, "/ ((step - 1) % s.log_every + 1)).tolist()",
         "/ s.log_every).tolist()"),
        ("a mean over all of log_every in the arena", ARENA, "accelerator.reduce(losses / counted",
         "accelerator.reduce(losses / s.log_every"),
        ("a mean of batches of unlike size", ARENA, "total += output.loss * len(indices)",
         "total += output.loss * self.settings.eval_batch_size"),
        ("one order for all epochs", BATCHES, "np.random.default_rng([seed, epoch])", "np.random.default_rng([seed])"),
        ("what fills no batch taken in order", BATCHES, "rng.permutation(len(lengths))[: per_epoch * batch_size]",
         "rng.permutation(per_epoch * batch_size)"),
        # the optimizer
        ("gradients hardly clipped", STORIES, "self.model.parameters(), s.clip)", "self.model.parameters(), 1000 * s.clip)"),
        ("gradients of the arena hardly clipped", ARENA, "self.model.parameters(), s.gradient_clip)",
         "self.model.parameters(), 1000 * s.gradient_clip)"),
        ("no warm-up", STORIES, "round(s.warmup * self.steps)", "round(0 * self.steps)"),
        ("beta2 left at its default", STORIES, "betas=(0.9, s.beta2)", "betas=(0.9, 0.999)"),
        ("beta2 left at its default in the arena", ARENA, "betas=(0.9, settings.beta2)", "betas=(0.9, 0.999)"),
        ("no weight decay", STORIES, "s.linattn_learning_rate, s.weight_decay)", "s.linattn_learning_rate, 0.0)"),
        ("weight decay on biases", ARENA, '"weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}',
         '"weight_decay": weight_decay}, {"params": rest, "weight_decay": weight_decay}'),
        ("the run's seed left out", STORIES, "        set_seed(s.seed)\n", ""),
        ("an epoch's order without the seed", DATA, "self.seed * 1_000_003 + self.epoch", "self.epoch"),
        # measures
        ("a perplexity in bits", "recipes/tinystories/metrics.py", "math.exp(min(mean, 700.0))", "2.0 ** min(mean, 700.0)"),
        ("an error of the whole and not of a sample", "recipes/tinystories/metrics.py", "ddof=1", "ddof=0"),
        ("more validation than asked for", STORIES, "min(len(valid), s.eval_sequences)", "len(valid)"),
        ("sums of a pooled state in half precision", "recipes/lra/model.py", "hidden.sum(1, dtype=torch.float32)", "hidden.sum(1)"),
        ("a deviation of the whole and not of a sample", "recipes/lra/report.py", "float(np.std(accuracies, ddof=1))",
         "float(np.std(accuracies))"),
        # files
        ("changes to a file not noticed", "recipes/common/marks.py", "written == [path.stat().st_size, digest(path)]",
         "written[0] == path.stat().st_size"),
        ("what grows counted as foreign", "recipes/common/marks.py", "    if _matches(name, mark.grows):\n        return True\n", ""),
        ("a digest of the first megabyte", "recipes/common/marks.py", "            sha.update(block)\n",
         "            sha.update(block)\n            break\n"),
    ),
]  # fmt: skip
