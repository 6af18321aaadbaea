"""LoRA on a converted model by PEFT: python examples/lora.py MODEL TEXT OUTPUT.

The few numbers a head that conversion added learn in full beside the adapter's matrices.
"""

import sys

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from train_with_noise import STEPS, rows
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_linattn


def main(name: str, text: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    model.config.use_cache = False
    added = [path for path, module in model.named_modules() if isinstance(module, hf_linattn.LinAttnParams)]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", modules_to_save=added))
    adapted.print_trainable_parameters()
    trainer = Trainer(
        model=adapted,
        args=TrainingArguments(output, max_steps=STEPS, per_device_train_batch_size=4, logging_steps=5, report_to=[], save_strategy="no"),
        train_dataset=rows(text, tokenizer),
        optimizers=(torch.optim.AdamW(hf_linattn.parameter_groups(adapted, 1e-3, 0.03)), None),
    )
    trainer.train()
    adapted.save_pretrained(output)
    tokenizer.save_pretrained(output)

    again = AutoPeftModelForCausalLM.from_pretrained(output)  # base model and adapter, linear attention and all
    print("attention of the adapter's model:", again.config._attn_implementation)


if __name__ == "__main__":
    main(*sys.argv[1:4])
