"""Run by an interpreter with peft: one step of a LoRA, which must change the loss and only it.

python in_peft.py REQUEST ANSWER: `protocol.py`.
"""

import peft
import torch
from protocol import serve
from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(directory, prompts, new_tokens):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for _ in range(2):
        loss = model(**batch, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = [name for name, p in model.named_parameters() if name in frozen and
             not torch.equal(p, frozen[name])]  # fmt: skip
    return {"losses": losses, "moved": moved, "trained": config.r}


if __name__ == "__main__":
    serve(peft.__version__, answer)
