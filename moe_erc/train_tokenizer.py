"""Learns a byte-pair tokenizer from the training documents of a config.

    python -m moe_erc.train_tokenizer --config=configs/erc.py:tiny --vocab_size=8192 \
        --output=tokenizer.json

The 256 bytes are always in the vocabulary, so that every text can be encoded. Merges are added by
frequency until the vocabulary is full.
"""

from absl import flags

from moe_erc.data import bpe, paths
from moe_erc.data.config import DataConfig
from moe_erc.launch import command_line

VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 8192, "Number of token ids, as --vocab_size=32000")
OUTPUT = flags.DEFINE_string(
    "output", "tokenizer.json", "File to write, as --output=tokenizer.json"
)


def main() -> None:
    """The command."""
    command_line.run(learn, default_config="configs/erc.py:tiny", block="data.")


def learn(_: list[str]) -> None:
    """Learn from `config.data` and write a tokenizer.json."""
    with command_line.refusing_bad_input():
        # Learning takes minutes, so a file that cannot be written is refused before.
        path = paths.writable_file(OUTPUT.value)
        texts = bpe.training_texts(DataConfig(**flags.FLAGS.config.data))
        tokenizer = bpe.train(texts, VOCAB_SIZE.value)
        bpe.save(tokenizer, path)
    tokens = tokenizer.get_vocab_size()
    print(f"{tokens} tokens; use them with --config.data.tokenizer={path}")


if __name__ == "__main__":
    main()
