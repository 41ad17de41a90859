"""Run by an interpreter with vLLM on a CPU: greedy ids of every prompt.

python in_vllm.py REQUEST ANSWER: `protocol.py`.
"""

import gc
import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

import vllm
from protocol import serve
from vllm.distributed import cleanup_dist_env_and_memory


def answer(directory, prompts, new_tokens):
    model = vllm.LLM(
        directory, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=16
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=new_tokens)
    outputs = model.generate(prompts, sampling, use_tqdm=False)
    found = {
        "prompt_ids": [list(output.prompt_token_ids) for output in outputs],
        "ids": [list(output.outputs[0].token_ids) for output in outputs],
    }
    # The next model starts from nothing.
    del model
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


if __name__ == "__main__":
    serve(vllm.__version__, answer)
