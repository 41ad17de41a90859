"""Run by an interpreter with peft: a step of a LoRA, which leaves the base as it was.

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
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            frozen[name] = parameter.clone()
    optimizer = torch.optim.SGD(trained, 1.0)
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for _ in range(2):
        loss = model(**batch, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    now = dict(model.named_parameters())
    moved = [name for name, before in frozen.items() if not torch.equal(now[name], before)]
    return {"losses": losses, "moved": moved}


if __name__ == "__main__":
    serve(peft.__version__, answer)
