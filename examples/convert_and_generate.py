"""Converts a softmax checkpoint, loads the result and goes on with a text: python examples/convert_and_generate.py MODEL OUTPUT.

A converted model has to be trained before it writes well: `linattn calibrate`, `transfer` and `distill` do that.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_linattn
from convert.linearize import LinearizeOptions, linearize  # from a wheel: hf_linattn.convert.linearize


def main(source: str, output: str) -> None:
    report = linearize(source, output, LinearizeOptions(form="window", window=64, kernel="quadratic", decay="key_head"))
    print(f"{len(report['linear_layers'])} layers are linear; a sequence's state takes {report['costs']['state']:,} bytes")

    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
    print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))
    print(f"its cache holds {hf_linattn.cache_bytes(out.past_key_values):,} bytes, and will after any number of tokens")


if __name__ == "__main__":
    main(*sys.argv[1:3])
