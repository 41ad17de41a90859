"""The peer of `benchmarks.step`: OLMoE of `transformers` in PyTorch, with the paper's ERC.

It has the same shapes, loss terms, AdamW and clipping, and needs the extra `hf`. A trial chooses
the fastest of the built-in implementations of experts, with and without torch.compile; all trials
are in the JSON. ERC has the naive form, on all experts of a layer at once: M[i, j] =
|proxy_i @ w_gate_j| by one einsum "id,jdf->ijf".
"""

import shutil

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from benchmarks import timed

COMPILED = ", compiled"
# batched_mm is left out: it copies three weight matrices for every assignment, 6 GB a layer at K 8,
# and is 60 times slower at E 8, K 4.
EXPERTS = ("eager", "grouped_mm", "grouped_mm" + COMPILED)


def build(model, batch_size, length, threads):
    """(run, facts) for `benchmarks.Subject`.

    `model` holds the fields of the config's `model` block.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = OlmoeForCausalLM(olmoe_config(model, length))
    # The fused AdamW, one kernel for each parameter, is the fastest of torch on a CPU.
    adamw = torch.optim.AdamW(
        network.parameters(), 4e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )
    compiled = torch.compile(network)
    forward = network

    def step():
        tokens_BT = torch.randint(model["vocab_size"], (batch_size, length))
        train_step(forward, network, adamw, tokens_BT)

    def use(trial):
        nonlocal forward
        network.set_experts_implementation(trial.removesuffix(COMPILED))
        forward = compiled if trial.endswith(COMPILED) else network

    run = timed(step)
    trials = {}
    # Trials take turns, twice, so that one disturbance does not decide.
    for trial in (*EXPERTS, *EXPERTS):
        if trial.endswith(COMPILED) and not shutil.which("g++"):
            continue  # torch.compile needs it
        use(trial)
        trials[trial] = min(*run(4)[1:], trials.get(trial, float("inf")))
    fastest = min(trials, key=trials.get)
    use(fastest)
    parameters = sum(leaf.numel() for leaf in network.parameters())
    return run, {"experts_implementation": fastest, "trials_s": trials, "parameters": parameters}


def build_on_device(model, batch_size, length, trial):
    """`run` of one trial, on a GPU if there is one.

    Parameters, moments and matmuls are in bfloat16, attention is scaled-dot-product attention, and
    layers are recomputed in the backward.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        network = OlmoeForCausalLM(olmoe_config(model, length)).to(torch.bfloat16)
    network.set_experts_implementation(trial.removesuffix(COMPILED))
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    network.train()
    adamw = torch.optim.AdamW(
        network.parameters(), 4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    forward = torch.compile(network) if trial.endswith(COMPILED) else network

    def step():  # it reads the loss, and so waits for the end of the step
        tokens_BT = torch.randint(model["vocab_size"], (batch_size, length), device=device)
        train_step(forward, network, adamw, tokens_BT)

    return timed(step)


def build_matmul(size, threads):
    """(run, facts) of a square float32 matmul by PyTorch."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2, size, size)

    def step():
        torch.matmul(a, b)

    return timed(step), {}


def olmoe_config(model, length):
    """Our sizes in the names of transformers."""
    return OlmoeConfig(
        vocab_size=model["vocab_size"],
        hidden_size=model["width"],
        intermediate_size=model["expert_width"],
        num_hidden_layers=model["layers"],
        num_attention_heads=model["heads"],
        num_key_value_heads=model["kv_heads"],
        num_experts=model["experts"],
        num_experts_per_tok=model["experts_per_token"],
        max_position_embeddings=length,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        use_cache=False,
        eos_token_id=None,  # the default is beyond a small vocabulary
    )


def train_step(forward, network, adamw, tokens_BT):
    """Forward, backward, clip, update; returns the loss."""
    layers = network.model.layers
    loss = forward(input_ids=tokens_BT, labels=tokens_BT).loss
    erc = 0
    for layer in layers:
        erc = erc + naive_erc(layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj)
    loss = loss + erc / len(layers)
    adamw.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    adamw.step()
    return loss.item()


def naive_erc(router_ED, gate_up_EGD, alpha=1.0):
    """ERC of one layer on all pairs at once: an (E, E, F) array, without skipping any expert."""
    experts = len(router_ED)
    w_gate_EDF = gate_up_EGD[:, : gate_up_EGD.shape[1] // 2].transpose(1, 2)
    with torch.no_grad():
        distance_EE = torch.cdist(router_ED, router_ED).fill_diagonal_(float("inf"))
        bound_E1 = (distance_EE.min(dim=1).values / (2 * router_ED.norm(dim=1)))[:, None]
        noise_ED = 1 + bound_E1 * (2 * torch.rand_like(router_ED) - 1)
    coupling_EE = torch.einsum("id,jdf->ijf", router_ED * noise_ED, w_gate_EDF).norm(dim=-1)
    bar_E = alpha * coupling_EE.diagonal()
    excess_EE = torch.relu(coupling_EE - bar_E[:, None]) + torch.relu(coupling_EE - bar_E[None, :])
    return (excess_EE * (1 - torch.eye(experts, device=excess_EE.device))).sum() / experts**2
