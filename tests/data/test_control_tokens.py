"""Control tokens: no text makes one, whatever a tokenizer.json calls it.

Ordinary added tokens stay text.
"""

import hashlib
import json

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from moe_erc.checks import BadInput
from moe_erc.data import tokenizer as tokenizers_of_ours
from moe_erc.data.tokenizer import END_OF_DOCUMENT

CONTROL = [
    *END_OF_DOCUMENT,
    "<|im_start|>",
    "<｜end▁of▁sentence｜>",
    "<pad>",
    "<s>",
    "<mask>",
    "[CLS]",
    "[PAD]",
    "<unk>",
]
NUMBER = 270  # of the first token that is added to `byte_level`


def byte_level(*added):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox"], trainer=trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def unigram(specials):
    pieces = [*specials, "▁", *"abcs</>|endoftx▁"]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -float(number)) for number, piece in enumerate(pieces)], unk_id=1)
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def word_level(specials):
    words = [*specials, "a", "b", "<", "/"]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def load(tokenizer, directory):
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizers_of_ours.load(str(directory / "tokenizer.json"))


def control_ids(loaded, spelled):
    known = loaded._tokenizer.get_vocab(with_added_tokens=True)
    return {known[token] for token in spelled}


@pytest.mark.parametrize("options", [
    {},
    {"normalized": True},
    {"lstrip": True, "rstrip": True},
    {"single_word": True},
    {"special": True},
], ids=str)  # fmt: skip
def test_no_text_makes_a_control_token(options, tmp_path):
    added = [
        AddedToken(token, **{"special": False, "normalized": False} | options) for token in CONTROL
    ]
    loaded = load(byte_level(*added), tmp_path)
    text = " ".join(f"a {token} b{token}" for token in CONTROL)
    ids = loaded.encode(text)
    assert not control_ids(loaded, CONTROL) & set(ids.tolist())
    assert loaded.decode(ids) == text
    assert loaded.decode([loaded.eos_id, *loaded.encode("the fox")]) == "the fox"


def test_ordinary_added_tokens_encode_as_they_do_elsewhere(tmp_path):
    ordinary = [
        "    ",
        "\n\n",
        "|||EMAIL_ADDRESS|||",
        "<b>",
        "</table>",
        "<tool_call>",
        "[INST]",
        "➤",
    ]
    given = byte_level(
        AddedToken("<|endoftext|>", special=True), *(AddedToken(token) for token in ordinary)
    )
    loaded = load(given, tmp_path)
    text = "x".join(ordinary)
    assert loaded.encode(text).tolist() == given.encode(text, add_special_tokens=False).ids
    assert control_ids(loaded, ordinary) <= set(loaded.encode(text).tolist())


def test_a_normalizer_that_lowers_capitals_makes_none(tmp_path):
    given = byte_level(AddedToken("<|endoftext|>", special=False, normalized=True))
    given.normalizer = normalizers.Lowercase()
    loaded = load(given, tmp_path)
    assert loaded.eos_id not in loaded.encode("A <|ENDOFTEXT|> b")


def test_templates_add_nothing(tmp_path):
    given = byte_level(AddedToken("<s>"), AddedToken("</s>"))
    begin, end = (("<s>", given.token_to_id("<s>")), ("</s>", given.token_to_id("</s>")))
    given.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[begin, end]
    )
    loaded = load(given, tmp_path)
    assert loaded.decode(loaded.encode("the fox")) == "the fox" and loaded.eos_id == end[1]
    assert not {begin[1], end[1]} & set(loaded.encode("the fox").tolist())


@pytest.mark.parametrize("make", [unigram, word_level])
def test_a_model_whose_words_are_control_tokens_makes_none(make, tmp_path):
    specials = ["</s>", "<unk>", "<pad>"]
    given = make(specials)
    raw = given.encode("a </s> b <pad>", add_special_tokens=False)
    assert {0, 2} <= set(raw.ids)  # the library alone makes them of text
    loaded = load(given, tmp_path)
    ids = loaded.encode("a </s> b <pad>").tolist()
    assert not {0, 2} & set(ids) and ids[-1] != 2
    assert loaded.encode("a b").tolist() == given.encode("a b", add_special_tokens=False).ids


def test_what_a_vocabulary_does_not_hold_is_the_unknown_token(tmp_path):
    loaded = load(unigram(["</s>", "<unk>", "<pad>"]), tmp_path)
    assert loaded.encode("aЖb").tolist().count(1) == 1
    # The vocabulary holds neither u nor k.
    assert loaded.encode("a<unk>").tolist().count(1) == 2


def test_a_control_token_of_one_character_is_dropped(tmp_path):
    given = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "☃": 2, "a": 3}, unk_token="<unk>"))
    given.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    given.add_special_tokens(["</s>", "☃"])
    assert load(given, tmp_path).encode("a ☃ a").tolist() == [3, 3]


@pytest.mark.parametrize("name, content", [
    ("tokenizer_config.json", {"eos_token": "@end@"}),
    ("tokenizer_config.json", {"eos_token": {"content": "@end@", "special": False}}),
    ("special_tokens_map.json", {"eos_token": "@end@"}),
    ("generation_config.json", {"eos_token_id": NUMBER}),
    ("generation_config.json", {"eos_token_id": [NUMBER, 1]}),
    ("config.json", {"eos_token_id": NUMBER}),
])  # fmt: skip
def test_the_end_that_only_a_file_beside_it_names(name, content, tmp_path):
    given = byte_level(AddedToken("@end@", special=False))
    assert given.token_to_id("@end@") == NUMBER
    (tmp_path / name).write_text(json.dumps(content))
    loaded = load(given, tmp_path)
    assert loaded.eos == "@end@" and loaded.eos_id == given.token_to_id("@end@")
    assert loaded.eos_id not in loaded.encode("a @end@ b")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"eos_token": "absent"}', '{"eos_token": null}', '{"eos_token": []}']
)
def test_a_file_that_names_no_end_is_passed_over(content, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(
        BadInput, match=r"has no end-of-document token; add one of .* or name it as eos_token"
    ):
        load(byte_level(), tmp_path)


def test_identity_follows_the_end_and_stays_where_the_file_alone_decides(tmp_path):
    identities = set()
    given = byte_level(AddedToken("@end@"), AddedToken("@other@"))
    for end in ("@end@", "@other@"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        identities.add(load(given, tmp_path).identity)
    assert len(identities) == 2
    loaded = load(byte_level(AddedToken("<|endoftext|>", special=True)), tmp_path)
    assert loaded.identity == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    forgotten = load(byte_level(AddedToken("<|endoftext|>", special=False)), tmp_path)
    assert (
        forgotten.identity != hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    )
