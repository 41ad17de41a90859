"""Run by an interpreter with transformers: greedy ids of every prompt, alone and in a batch.

python in_transformers.py REQUEST ANSWER: `protocol.py`.
"""

import torch
import transformers
from protocol import serve
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling


def answer(directory, prompts, new_tokens):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    # The training batch of the default collator, which pads.
    DataCollatorForLanguageModeling(tokenizer, mlm=False)([tokenizer(text) for text in prompts])
    alone = []
    for prompt in prompts:
        encoded = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**encoded, max_new_tokens=new_tokens, do_sample=False)
        alone.append(ids[0, encoded["input_ids"].shape[1] :].tolist())
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    ids = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "decoded": [tokenizer.decode(tokenizer(prompt)["input_ids"]) for prompt in prompts],
        "ids": alone,
        "batched_ids": ids[:, batch["input_ids"].shape[1] :].tolist(),
        "rows": len(tokenizer),
    }


if __name__ == "__main__":
    serve(transformers.__version__, answer)
