"""Run by an interpreter with huggingface_hub: the metadata of the card, as the Hub reads it.

python in_hub.py REQUEST ANSWER: `protocol.py`.
"""

import pathlib

import huggingface_hub
from protocol import serve


def answer(directory, prompts, new_tokens):
    card = huggingface_hub.ModelCard.load(pathlib.Path(directory) / "README.md")
    return {"data": card.data.to_dict(), "text": card.text}


if __name__ == "__main__":
    serve(huggingface_hub.__version__, answer)
