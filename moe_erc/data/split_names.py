"""Which names mean a split: how people call the training and the held-out part of a data set.

A file or directory is a split by the word that its name begins with, whatever the case, if the end,
a digit, or one of `- _ .` and a space follows: `train-00000-of-00002.jsonl`, `Val/`, `dev_1.txt`;
not `validated.jsonl`. A word further behind counts only where the same name has a training and a
held-out form (`c4-train.0.json`, `c4-validation.0.json`). In a path any held-out name wins over any
training name, and the outermost of several: what may be held out is never trained on.
"""

import re
from collections.abc import Collection, Iterable

TRAIN = "train"
# What is validated on, the most fitting first; the others are kept out of training as well.
HELD_OUT = ("validation", "dev", "eval", "heldout", "test")

_OTHER_SPELLINGS = {
    "training": TRAIN,
    "valid": "validation",
    "val": "validation",
    "evaluation": "eval",
}
_OTHER_SPELLINGS |= {"holdout": "heldout", "testing": "test"}
_WORD = (
    r"(?P<word>train|validation|valid|val|dev|eval|h[eo]ld[-_ ]?out|test)"
    r"(?:set|split)?(?=[-_.\s\d]|$)"
)
_FIRST = re.compile(_WORD, re.IGNORECASE)
_LATER = re.compile(rf"(?<=[-_.\s]){_WORD}", re.IGNORECASE)
_SHARD = r"[-_.\s]*\d+(?:[-_.]of[-_.]\d+)?"
# Words that begin other names as well (training_notes) count only if nothing but a shard's number
# follows.
_ALONE = re.compile(rf"(?P<word>training|testing|evaluation)(?:{_SHARD})*", re.IGNORECASE)
_SUFFIXES = re.compile(
    r"(\.(txt|jsonl?|ndjson|parquet|arrow|csv|tsv))?(\.(gz|zst|bz2|xz))?$", re.IGNORECASE
)


class SplitNames:
    """The names of one data set.

    A word inside a name means a split if the names together say so.
    """

    def __init__(self, components: Iterable[str]):
        """`components`: every name of a file or directory in any of the paths."""
        later = {
            name: found
            for name in set(components)
            if not split_word(name) and (found := _later(name))
        }
        words_by_rest: dict[str, set[str]] = {}
        for word, rest in later.values():
            words_by_rest.setdefault(rest, set()).add(word)
        both = {rest for rest, words in words_by_rest.items() if TRAIN in words and len(words) > 1}
        self._later = {name: word for name, (word, rest) in later.items() if rest in both}

    def word(self, component: str) -> str | None:
        """`TRAIN`, one of `HELD_OUT`, or None for a name that means no split."""
        return split_word(component) or self._later.get(component)

    def decide(self, parts: Iterable[str]) -> tuple[str | None, int]:
        """(split, number of leading parts that say so) of a path.

        (None, 0) if no part is a split.
        """
        words = [self.word(part) for part in parts]
        held_out = next((depth for depth, word in enumerate(words) if word in HELD_OUT), None)
        depth = held_out if held_out is not None else words.index(TRAIN) if TRAIN in words else None
        return (None, 0) if depth is None else (words[depth], depth + 1)


def split_word(component: str) -> str | None:
    """`TRAIN` or one of `HELD_OUT` if a name begins with a word for it, else None."""
    stem = _SUFFIXES.sub("", component)
    found = _FIRST.match(component) or _ALONE.fullmatch(stem)
    if not found:
        return None
    word = _canonical(found["word"])
    # train-dev.txt is either held out or holds both: not to be trained on, either way.
    second = _FIRST.match(component[found.end() :].lstrip("-_. ")) if word == TRAIN else None
    return _canonical(second["word"]) if second else word


def held_out_name(names: Collection[str]) -> str | None:
    """The one of some of `HELD_OUT` to validate on, or None if there is none."""
    return next((name for name in HELD_OUT if name in names), None)


def _later(component: str) -> tuple[str, str] | None:
    """The last word for a split inside a name, and the name without it.

    Numbers of shards are left out as well.
    """
    stem = _SUFFIXES.sub("", component)
    found = list(_LATER.finditer(stem))
    if not found:
        return None
    rest = stem[: found[-1].start()] + stem[found[-1].end() :]
    return _canonical(found[-1]["word"]), re.sub(_SHARD, "", rest).casefold().strip("-_. ")


def _canonical(word: str) -> str:
    plain = re.sub(r"[-_ ]", "", word.casefold())
    plain = plain.replace("holdout", "heldout")
    return _OTHER_SPELLINGS.get(plain, plain)
