"""Which names mean a split: the names that people give to the parts of a data set.

A file or directory is a split if its name begins with a word for one, in any case, and then ends or
goes on with a digit, a space or one of `- _ .`. Such names are `train-00000-of-00002.jsonl`, `Val/`
and `dev_1.txt`, but not `validated.jsonl`. A word inside a name means a split only if the same name
has a training and a held-out form (`c4-train.0.json`, `c4-validation.0.json`).

In a path any held-out name wins over any training name, and the outermost of several wins: a text
that may be held out is never trained on.
"""

import re
from collections.abc import Collection, Iterable

TRAIN = "train"
# The first of these that is present is used for validation. The others are not trained on either.
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
# Other names may begin with these words as well (training_notes). They mean a split only if nothing
# but the number of a shard follows.
_ALONE = re.compile(rf"(?P<word>training|testing|evaluation)(?:{_SHARD})*", re.IGNORECASE)
_SUFFIXES = re.compile(
    r"(\.(txt|jsonl?|ndjson|parquet|arrow|csv|tsv))?(\.(gz|zst|bz2|xz))?$", re.IGNORECASE
)


class SplitNames:
    """The names of one data set, which together decide whether a word inside a name is a split."""

    def __init__(self, components: Iterable[str]):
        """`components` are all names of files and directories in any of the paths."""
        later: dict[str, tuple[str, str]] = {}
        words_by_rest: dict[str, set[str]] = {}
        for name in set(components):
            found = None if split_word(name) else _later(name)
            if found:
                word, rest = found
                later[name] = found
                words_by_rest.setdefault(rest, set()).add(word)
        # Only names that have a training and a held-out form mean a split.
        self._later: dict[str, str] = {}
        for name, (word, rest) in later.items():
            words = words_by_rest[rest]
            if TRAIN in words and len(words) > 1:
                self._later[name] = word

    def word(self, component: str) -> str | None:
        """`TRAIN`, one of `HELD_OUT`, or None for a name that means no split."""
        return split_word(component) or self._later.get(component)

    def decide(self, parts: Iterable[str]) -> tuple[str | None, int]:
        """(split, number of leading parts that decide it) of a path.

        (None, 0) if no part is a split.
        """
        words = [self.word(part) for part in parts]
        for depth, word in enumerate(words, start=1):
            if word in HELD_OUT:
                return word, depth
        if TRAIN in words:
            return TRAIN, words.index(TRAIN) + 1
        return None, 0


def split_word(component: str) -> str | None:
    """`TRAIN` or one of `HELD_OUT` if a name begins with a word for it, else None."""
    stem = _SUFFIXES.sub("", component)
    found = _FIRST.match(component) or _ALONE.fullmatch(stem)
    if not found:
        return None
    word = _canonical(found["word"])
    if word != TRAIN:
        return word
    # train-dev.txt is held out, or holds both splits. In either case it is not trained on.
    second = _FIRST.match(component[found.end() :].lstrip("-_. "))
    return _canonical(second["word"]) if second else word


def held_out_name(names: Collection[str]) -> str | None:
    """The name in `names` that is used for validation, or None if there is none."""
    return next((name for name in HELD_OUT if name in names), None)


def _later(component: str) -> tuple[str, str] | None:
    """The last word for a split inside a name, and the name without it and numbers of shards."""
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
