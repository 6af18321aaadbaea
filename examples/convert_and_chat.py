"""Converts a softmax checkpoint, loads the result and talks with it: python examples/convert_and_chat.py MODEL OUTPUT.

Each turn goes on from the state that the last one left, so nothing is read twice. A converted model has to be trained before it writes
well: `linattn calibrate`, `transfer` and `distill` do that.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_linattn
from convert.linearize import ConversionError, LinearizeOptions, linearize  # from a wheel: hf_linattn.convert.linearize

SAID = ["Tell me about a little owl.", "And what did it find?"]


def main(source: str, output: str) -> list[str]:
    report = linearize(source, output, LinearizeOptions(form="window", window=64, kernel="quadratic", decay="key_head"))
    print(f"{len(report['linear_layers'])} layers are linear; a sequence's state takes {report['costs']['state']:,} bytes")
    return chat(AutoModelForCausalLM.from_pretrained(output).eval(), AutoTokenizer.from_pretrained(output))


def chat(model, tokenizer, tokens: int = 30) -> list[str]:
    """The replies to SAID."""
    messages, told, cache = [], "", None
    ids = torch.empty(1, 0, dtype=torch.long)
    for said in SAID:
        messages.append({"role": "user", "content": said})
        whole = prompt(tokenizer, messages)
        assert whole.startswith(told), "this template writes earlier turns anew: give all of `whole`, without a cache"
        new = tokenizer(whole[len(told) :], add_special_tokens=tokenizer.chat_template is None and not told, return_tensors="pt")
        ids = torch.cat([ids, new["input_ids"]], dim=1)
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=tokens,
                do_sample=False,
                return_dict_in_generate=True,
            )
        reply = tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": reply})
        cache = out.past_key_values
        print(f"> {said}\n{reply}\n  (after {out.sequences.shape[1]} tokens the cache holds {hf_linattn.cache_bytes(cache):,} bytes)")
        # The template closes a reply in its own way. The token that closed it here is not in the cache yet.
        closed = int(out.sequences[0, -1]) in tokenizer.all_special_ids
        told, ids = whole + reply, out.sequences[:, :-1] if closed else out.sequences
    return [message["content"] for message in messages if message["role"] == "assistant"]


def prompt(tokenizer, messages: list[dict[str, str]]) -> str:
    """What has been said, up to where the model goes on; without a template as plain text."""
    if tokenizer.chat_template is None:
        return "".join(message["content"] + "\n" for message in messages)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("MODEL", "OUTPUT"):
        parser.add_argument(name)
    given = parser.parse_args()
    if Path(given.OUTPUT).exists():
        parser.error(f"{given.OUTPUT} exists already; give another OUTPUT")
    try:
        main(given.MODEL, given.OUTPUT)
    except ConversionError as error:
        parser.error(str(error))
