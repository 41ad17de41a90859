"""What a client is asked and what it answers, as JSON in two files. Standard library alone.

REQUEST   {"models": {name: directory}, "prompts": [text], "new_tokens": number}
ANSWER    {"version": text, "models": {name: what the client found, or {"refused": why}}}
"""

import json
import pathlib
import sys
import traceback
from collections.abc import Callable


def serve(version: str, answer: Callable) -> None:
    """Answers sys.argv[1] in sys.argv[2] by `answer(directory, prompts, new_tokens)` of each."""
    asked, answered = map(pathlib.Path, sys.argv[1:])
    request = json.loads(asked.read_text(encoding="utf-8"))
    answers = {}
    for name, directory in request["models"].items():
        try:
            answers[name] = answer(directory, request["prompts"], request["new_tokens"])
        except Exception as error:
            traceback.print_exc()
            answers[name] = {"refused": repr(error)}
    content = {"version": version, "models": answers}
    answered.write_text(json.dumps(content), encoding="utf-8")
