"""Run by an interpreter with trl: one step of supervised fine-tuning.

python in_trl.py REQUEST ANSWER: `protocol.py`.
"""

import tempfile

import datasets
import trl
from protocol import serve


def answer(directory, prompts, new_tokens):
    with tempfile.TemporaryDirectory() as output:
        options = trl.SFTConfig(
            output_dir=output,
            max_steps=1,
            per_device_train_batch_size=len(prompts),
            learning_rate=1e-3,
            logging_steps=1,
            max_length=64,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        )
        texts = datasets.Dataset.from_dict({"text": [prompt * 3 for prompt in prompts]})
        trainer = trl.SFTTrainer(model=directory, args=options, train_dataset=texts)
        trainer.train()
    return {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


if __name__ == "__main__":
    serve(trl.__version__, answer)
