"""Every key there is, with its default: the vanilla MoE at size `debug`. Other files change values, never add keys."""

from ml_collections import ConfigDict

from configs import sizes


def get_config(size=""):
    """The base config at a size of `sizes.py` ("" is tiny)."""
    config = ConfigDict()
    config.seed = 0  # parameters, router noise and the order of the data

    config.model = ConfigDict()  # moe_erc/model/config.py
    config.model.vocab_size = 512  # rows of embedding and head; at least the tokenizer's
    config.model.layers = 2
    config.model.width = 32  # D
    config.model.heads = 2  # query heads; width / heads must be even
    config.model.kv_heads = 2  # key/value heads, shared by groups of query heads; divides heads
    config.model.experts = 4  # E, in every layer
    config.model.experts_per_token = 2  # K
    config.model.expert_width = 16  # F
    config.model.router = "softmax"  # moe_erc/moe/routers/: or aoe, competition, mpi, routing_free, xmoe
    config.model.router_init = "normal"  # of router rows; or orthogonal
    config.model.renormalize = False  # routing weights sum to 1 over the K chosen (OLMoE: over all E)
    config.model.top_p = 1.0  # below 1: of the K only the smallest prefix whose probabilities sum to more
    config.model.bias_rate = 0.0  # of loss-free balancing (1e-3); 0 has no bias
    config.model.shared_experts = 0  # always on, of width F each, beside the routed ones
    config.model.gate_rank = 0  # r of a gate w_low @ w_high, for aoe and routing_free; 0: the gate is whole
    config.model.mpi_scale = 4.0  # mpi: C', the length of a row is C' / sqrt(E)
    config.model.competition_rate = 0.07  # competition: probability that a layer's experts compete on a step
    config.model.competition_layers = 3  # competition: at most so many layers a step
    config.model.theta = 0.05  # routing_free: the least gate with which an expert runs
    config.model.controller_rate = 0.02  # routing_free: by how much a step may change the weight of the balance loss
    config.model.rope_theta = 1e4
    config.model.norm_eps = 1e-5
    config.model.init_std = 0.02  # truncated normal, cut at 3 sigma
    config.model.tie_embeddings = False  # head = embedding
    config.model.dtype = "float32"  # of matmuls: float32 or bfloat16; parameters, losses and norms are float32
    config.model.remat = "none"  # "block" recomputes each layer in the backward pass: less memory, a third more time
    config.model.scan_unroll = 1  # layers per turn of the scan over layers: fewer copies, longer compilation
    config.model.attention_implementation = "auto"  # of jax.nn.dot_product_attention: xla, cudnn
    config.model.experts_implementation = "auto"  # dense (oracle), block_loop (CPU, GPU), ragged (TPU)

    config.losses = ConfigDict()  # moe_erc/losses/objective.py; a loss of weight 0 is not computed
    config.losses.lm = ConfigDict()  # next-token cross-entropy
    config.losses.lm.weight = 1.0
    config.losses.lm.chunk = 1024  # time steps whose logits exist at once
    config.losses.load_balance = ConfigDict()  # 1 when balanced
    config.losses.load_balance.weight = 0.01
    config.losses.load_balance.scope = "micro_batch"  # "step": loads of the step's earlier micro-batches count too
    config.losses.router_z = ConfigDict()  # mean squared logsumexp of the router scores; OLMoE uses 1e-3
    config.losses.router_z.weight = 0.0
    config.losses.erc = ConfigDict()  # expert-router coupling
    config.losses.erc.weight = 0.0
    config.losses.erc.alpha = 1.0  # share of the matching response that a foreign one may reach; 0.5 best at E = 256
    config.losses.erc.noise = "uniform"  # "expected": integrated out; "none": the clean router rows
    config.losses.erc.activation = "gate"  # what is measured: gate, up, silu_gate, swiglu, output
    config.losses.erc.detach_router = False  # train the experts alone
    config.losses.erc.normalize = False  # the scale-invariant form
    config.losses.erc.layer_reduction = "mean"  # or sum
    config.losses.router_orthogonality = ConfigDict()  # squared cosines of router rows; ERNIE 4.5 uses 1e-2
    config.losses.router_orthogonality.weight = 0.0
    config.losses.router_orthogonality.decoupled = False  # router -= weight * gradient after the optimizer's update
    config.losses.simbal = ConfigDict({"weight": 0.0})  # |R R^T - I| of router rows, entry by entry
    config.losses.output_overlap = ConfigDict({"weight": 0.0})  # of the chosen experts' outputs, projected on another
    config.losses.routing_variance = ConfigDict({"weight": 0.0})  # minus the variance of an expert's weights
    config.losses.specialization = ConfigDict({"weight": 0.0})  # cosine of the chosen experts' hidden activations
    config.losses.path_coupling = ConfigDict({"weight": 0.0})  # minus the chosen's probabilities in adjacent layers
    config.losses.routing_entropy = ConfigDict({"weight": 0.0})  # of the router's probabilities
    config.losses.competition = ConfigDict({"weight": 0.0})  # router against the winners; router competition alone

    config.data = ConfigDict()  # moe_erc/data/
    config.data.sources = (
        "embedded",
    )  # embedded | TFDS name (c4/en) | prepared TFDS directory | directory of .txt, .jsonl
    config.data.weights = ()  # one per source; () is in proportion to size
    config.data.tokenizer = "bytes"  # or the path of a Hugging Face tokenizer.json
    config.data.text_key = "text"  # the feature or JSON key that holds the text
    config.data.validation_fraction = 0.02  # of the documents, by hash, where a source has no split of its own
    config.data.sequence_length = 64  # T
    config.data.cache_dir = ""  # "" is $MOE_ERC_CACHE, else ~/.cache/moe_erc

    config.optimizer = ConfigDict()  # moe_erc/training/optimizer.py
    config.optimizer.name = "adamw"  # or muon (matrices; embeddings, head, router and norms stay with adamw)
    config.optimizer.learning_rate = 4e-4  # at the peak
    config.optimizer.schedule = "cosine"  # linear, constant, wsd (warmup-stable-decay)
    config.optimizer.warmup_steps = 10
    config.optimizer.decay_fraction = 0.2  # wsd: the last share of the steps
    config.optimizer.final_fraction = 0.1  # of the peak, at the last step
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.1  # of matrices, not of norm scales
    config.optimizer.clip_norm = 1.0  # global gradient norm; inf does not clip

    config.train = ConfigDict()
    config.train.steps = 20
    config.train.batch_size = 8  # sequences a step, over all devices and micro-batches
    config.train.micro_batches = 1  # the step's batch is processed in so many parts
    config.train.profile_step = 0  # XProf trace of three steps from here into workdir/profile; 0 takes none

    config.mesh = ConfigDict()  # moe_erc/sharding.py; on a CPU every core is a device
    config.mesh.data = -1  # devices; -1, for one of the two: all that the other leaves
    config.mesh.expert = 1

    config.eval = ConfigDict()
    config.eval.every = 10  # steps; the last step is always evaluated
    config.eval.batch_size = 8  # sequences
    config.eval.windows = 8  # of each domain during training, evenly spaced
    config.eval.report_windows = 0  # of each domain for the final report and eval.py; 0 reads all
    config.eval.prompt = "def "  # continued after every evaluation; "" samples nothing
    config.eval.sample_tokens = 32
    config.eval.temperature = 0.8  # of the sample

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 10  # steps; the last step is always saved
    config.checkpoint.keep = 2  # newest so many

    config.log = ConfigDict()
    config.log.every = 5  # steps
    config.log.tensorboard = True
    config.log.wandb_project = ""  # "" does not use Weights & Biases

    sizes.apply(config, size or "tiny")
    return config
