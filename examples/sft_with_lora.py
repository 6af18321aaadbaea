"""Fine-tunes a converted model by TRL's SFTTrainer, with PEFT's LoRA: python examples/sft_with_lora.py MODEL DATA OUTPUT.

DATA are JSON lines, each a prompt and its completion (or `messages`, for a tokenizer with a chat template); the loss is that of
completions. The few numbers a head that conversion added learn in full beside the adapter's matrices, at a rate of their own.
"""

import argparse

import torch
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import hf_linattn

LENGTH, STEPS = 512, 20


def main(name: str, data: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    added = [path for path, module in model.named_modules() if isinstance(module, hf_linattn.LinAttnParams)]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", modules_to_save=added))
    adapted.print_trainable_parameters()
    options = {"max_steps": STEPS, "max_length": LENGTH, "per_device_train_batch_size": 4, "logging_steps": 5, "report_to": []}
    trainer = SFTTrainer(
        model=adapted,
        args=SFTConfig(output, bf16=torch.cuda.is_available(), **options),
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=tokenizer,
        optimizers=(torch.optim.AdamW(hf_linattn.parameter_groups(adapted, 1e-3, 0.03)), None),
    )
    trainer.train()
    trainer.save_model(output)

    again = AutoPeftModelForCausalLM.from_pretrained(output)  # base model and adapter, linear attention and all
    print("attention of the adapter's model:", again.config._attn_implementation)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("MODEL", "DATA", "OUTPUT"):
        parser.add_argument(name)
    main(*vars(parser.parse_args()).values())
