"""Slips in the converter."""

from .mutant import CONVERTER, named

CHECK, COMPANIONS, COSTS, USABLE, WEIGHTS = (f"convert/{name}.py" for name in ("check", "companions", "costs", "usable", "weights"))

MUTANTS = [
    *named(
        CONVERTER,
        # a check's tolerance
        ("twenty times the error of plain PyTorch", CHECK, "_BAR = 2\n", "_BAR = 20\n"),
        ("a floor of float32 a hundred times as high", CHECK, "torch.float32: 2e-6,", "torch.float32: 2e-4,"),
        ("a floor of float32 ten times as high", CHECK, "torch.float32: 2e-6,", "torch.float32: 2e-5,"),
        ("stored numbers ten times as far away", CHECK, "_NUMBERS_BAR = 5e-6", "_NUMBERS_BAR = 5e-5"),
        ("half precision alone", "convert/truth.py", "return (dtype, torch.float32) if dtype.itemsize < 4 else (dtype,)",
         "return (dtype,)"),
        ("the worst of the first precision alone", CHECK, 'max(errors["bar"] for errors in found)', 'found[0]["bar"]'),
        ("cached steps judged by a forward pass", CHECK, '("step_error", _CACHED_PIECES, slice(_CACHED_PIECES[0], None))',
         '("step_error", (PROBE_TOKENS,), slice(_CACHED_PIECES[0], None))'),
        ("a seed that never reaches the probe", CHECK, "manual_seed(options.seed)", "manual_seed(0)"),
        ("a weight of ours that the source has not", CHECK, "    if strange:", "    if False:"),
        ("weights that are lost", CHECK, "    if lost:", "    if False:"),
        ("weights that are not finite", CHECK, "and not torch.isfinite(value).all()", "and False"),
        # companions and modes
        ("code from beside the tokenizer left behind", COMPANIONS, "waiting += _imported(not_outside(folder, folder / name))", "pass"),
        ("code imported by its package left behind", COMPANIONS, r"|from\s+\.\s+import\s+(\w+))", r"|from\s+\.\s+imports\s+(\w+))"),
        ("chat templates of their own left behind", COMPANIONS, 'glob("*.jinja")', 'glob("*.json")'),
        ("the state of a training copied", COMPANIONS, '"conversion.json", "trainer_state.json", ', '"conversion.json", '),
        ("processors' code left behind", COMPANIONS, '"tokenizer_config.json", "processor_config.json",', '"tokenizer_config.json",'),
        ("weights that their owner alone can read", "recipes/common/files.py", "        path.chmod(usual)", "        pass"),
        ("ids one past the vocabulary", USABLE, "if largest >= size:", "if largest > size:"),
        ("a special token one past the vocabulary", USABLE, "-1 <= token < size:", "-1 <= token <= size:"),
        ("a special token of -1 refused", USABLE, "not -1 <= token < size:", "not 0 <= token < size:"),
        ("one special token of a list looked at", USABLE, "given if isinstance(given, list) else [given]",
         "given[:1] if isinstance(given, list) else [given]"),
        # weights, costs, report
        ("an index of the wrong size", WEIGHTS, "        total += _tensor_bytes(files[-1])", "        pass"),
        ("weights without the mark of PyTorch", WEIGHTS, 'save_file(_cast(shard, dtype), file, metadata={"format": "pt"})',
         "save_file(_cast(shard, dtype), file)"),
        ("integers cast too", WEIGHTS, "tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor for",
         "tensor.to(dtype, copy=True) for"),
        ("no room asked for", "convert/linearize.py", "if free < needed:", "if free < 0:"),
        ("float64 counted as float32", COSTS, "number = 8 if _dtype(config) == torch.float64 else 4", "number = 4"),
        ("a break-even one token late", COSTS, ">= state else (middle, high)", "> state else (middle, high)"),
        ("a state at the bound refused", COSTS, "if state > LARGEST_STATE", "if state >= LARGEST_STATE"),
        ("starting values rounded to hundredths", "convert/report.py", "round(number, 6)", "round(number, 2)"),
        ("runs of layers told as one", "convert/card.py", "layer == runs[-1][1] + 1", "layer >= runs[-1][1] + 1"),
        ("a temperature of 0", "convert/options.py", "self.temperature > 0)", "self.temperature >= 0)"),
        ("a negative dropout", "convert/options.py", "not 0 <= self.dropout < 1", "not self.dropout < 1"),
        ("the source's revision forgotten", "convert/linearize.py", "open_source(name, options.revision)", "open_source(name)"),
    ),
]  # fmt: skip
