"""Every key there is, with its default: the vanilla MoE at size `debug`.

Other files change values, never add keys.
"""

from ml_collections import ConfigDict

from configs import sizes


def get_config(size: str = "") -> ConfigDict:
    """The base config at a size of `sizes.py` ("" is tiny)."""
    config = ConfigDict()
    config.seed = 0  # parameters, router noise and the order of the data
    # The directory of an OLMoE of the sizes below, as Hugging Face has it: its weights, and its
    # tokenizer.json unless data.tokenizer names another, are what step 0 starts from. "" draws the
    # weights.
    config.init_from = ""
    config.init_upcycled = _upcycling()

    config.model = _model()
    config.routers = _routers()
    config.losses = _losses()
    config.data = _data()
    config.optimizer = _optimizer()
    config.train = _train()
    config.guard = _guard()
    config.mesh = _mesh()
    config.eval = _evaluation()
    config.checkpoint = _checkpoint()
    config.log = _log()
    config.resume = _resume()
    sizes.apply(config, size or "tiny")
    return config


def _upcycling():
    """Of a dense checkpoint whose copies the experts are at step 0: moe_erc/hf/upcycle.py."""
    upcycling = ConfigDict()
    # Its directory: an OLMoE of the sizes below but with one expert, as moe_erc.export writes a run
    # of model.experts = 1. Its tokenizer.json is used as init_from's is. The router is drawn. The
    # weights of a token must have one sum: routers.softmax.renormalize = True.
    upcycling.path = ""
    # 0 copies exactly, and the model computes what the dense one does. Above 0 every entry of a
    # copy is multiplied by 1 + noise n, with n standard normal.
    upcycling.noise = 0.0
    return upcycling


def _model():
    """Sizes and method: moe_erc/model/config.py."""
    model = ConfigDict()
    model.vocab_size = 512  # rows of embedding and head; at least the tokenizer's
    model.layers = 2
    model.width = 32  # D
    model.heads = 2  # query heads; width / heads must be even
    model.kv_heads = 2  # key/value heads, shared by groups of query heads; divides heads
    model.experts = 4  # E, in every layer
    model.experts_per_token = 2  # K
    model.expert_width = 16  # F
    # Or aoe, competition, mpi, routing_free, sigmoid, xmoe (4 experts at least). Their options:
    # config.routers.
    model.router = "softmax"
    model.shared_experts = 0  # always on, of width F each, beside the routed ones
    model.rope_theta = 1e4
    model.norm_eps = 1e-5
    model.clip_qkv = 0.0  # queries, keys and values are clipped to [-c, c]; 0 clips nothing
    model.init_std = 0.02  # truncated normal, cut at 3 sigma
    model.tie_embeddings = False  # head = embedding
    # The dtype of matmuls: float32 or bfloat16. Parameters, losses and norms are float32.
    model.dtype = "float32"
    # "block" recomputes each layer in the backward pass: less memory, a third more time.
    model.remat = "none"
    # Layers per turn of the scan over layers: fewer copies, longer compilation.
    model.scan_unroll = 1
    # Or xla (in slices of queries), cudnn (GPU, bfloat16; T is even where attention stays within
    # documents), or splash (TPU).
    model.attention_implementation = "auto"
    # Or dense (the oracle), block_loop (CPU), megablox or ragged (TPU), pallas or tokamax (GPU).
    model.experts_implementation = "auto"
    return model


def _routers():
    """moe_erc/moe/routers/, one file each; model.router names the one in use."""
    routers = ConfigDict()
    # True routes evenly, whatever the router says. A benchmark then depends on no weights.
    routers.forced_balance = False
    routers.softmax = _top_k()  # one row of the model's width per expert
    routers.softmax.init = "normal"  # of the rows: as other matrices; or orthogonal
    routers.mpi = _top_k()  # rows turned towards their experts' gates
    routers.mpi.init = "normal"
    routers.mpi.scale = 4.0  # C': the length of a turned row is C' / sqrt(E)
    routers.sigmoid = ConfigDict()  # every expert is asked by itself whether it fits
    routers.sigmoid.init = "normal"
    routers.sigmoid.renormalize = True  # as DeepSeek-V3's
    routers.sigmoid.scale = 1.0  # what the weights of a token sum to; 2.5 in DeepSeek-V3
    routers.sigmoid.bias_rate = 0.0
    routers.xmoe = _top_k()  # cosines in E / 2 dimensions
    routers.aoe = _top_k()  # no rows: experts are chosen by the first factor of their gates
    # r of a gate w_low @ w_high; 0 takes D F / (D + F), rounded down: as large as a whole gate.
    routers.aoe.rank = 0
    routers.competition = ConfigDict()  # softmax, and now and then all experts run
    routers.competition.init = "normal"
    routers.competition.renormalize = False
    routers.competition.rate = 0.07  # the probability that the experts of a layer compete on a step
    routers.competition.max_layers = 3  # the most layers that compete on the same step
    routers.routing_free = ConfigDict()  # every expert decides by itself
    routers.routing_free.rank = 0  # as aoe's
    routers.routing_free.theta = 0.05  # the least gate with which an expert runs
    # By which share a step may change the weight of the balance loss.
    routers.routing_free.controller_rate = 0.02
    return routers


def _top_k():
    """Options of every router that takes the K most probable experts."""
    options = ConfigDict()
    # Weights sum to 1 over the K chosen; False, as in OLMoE: probabilities sum to 1 over all E.
    options.renormalize = False
    # Below 1: of the K only the smallest prefix whose probabilities sum to more.
    options.top_p = 1.0
    options.bias_rate = 0.0  # of loss-free balancing (1e-3); 0 has no bias
    return options


def _losses():
    """moe_erc/losses/, one file each; a loss of weight 0 is not computed."""
    losses = ConfigDict()
    losses.lm = ConfigDict()  # next-token cross-entropy
    losses.lm.weight = 1.0
    losses.lm.chunk = 1024  # time steps whose logits exist at once
    losses.load_balance = ConfigDict()  # 1 when balanced
    losses.load_balance.weight = 0.01
    # Or "step": the counts of the step's earlier micro-batches are added to its own.
    losses.load_balance.scope = "micro_batch"
    losses.router_z = ConfigDict()  # mean squared logsumexp of the router scores; OLMoE uses 1e-3
    losses.router_z.weight = 0.0
    losses.erc = ConfigDict()  # expert-router coupling
    losses.erc.weight = 0.0
    # Above 0: the weight is multiplied by this over the loss of step 0. With weight 1 the term then
    # begins at this value, so that two alphas are of equal strength.
    losses.erc.weight_at_init = 0.0
    # The share of the matching response that a foreign one may reach; 0.5 is best at E = 256.
    losses.erc.alpha = 1.0
    losses.erc.noise = "uniform"  # "expected": integrated out; "none": the clean router rows
    losses.erc.activation = "gate"  # what is measured: gate, up, silu_gate, swiglu, output
    losses.erc.detach_router = False  # train the experts alone
    losses.erc.normalize = False  # the scale-invariant form
    losses.erc.layer_reduction = "mean"  # or sum
    # Of its matmuls on TPU and GPU: default (one bfloat16 pass), high (three), highest (float32);
    # "auto" is high where that costs less than 0.05 % of a step's FLOPs, else default. The
    # diagnosis is float32 always.
    losses.erc.precision = "auto"
    # Squared cosines of router rows; ERNIE 4.5 uses 1e-2.
    losses.router_orthogonality = ConfigDict()
    losses.router_orthogonality.weight = 0.0
    # True: router -= weight * gradient, after the optimizer's update.
    losses.router_orthogonality.decoupled = False
    losses.simbal = ConfigDict({"weight": 0.0})  # |R R^T - I| of router rows, entry by entry
    # Each chosen expert's output, projected on another's.
    losses.output_overlap = ConfigDict({"weight": 0.0})
    losses.output_overlap.reading = "paper"  # or "released": what the authors' code computes
    # Minus the variance of an expert's weights.
    losses.routing_variance = ConfigDict({"weight": 0.0})
    losses.routing_variance.reading = "paper"
    # Cosine of the chosen experts' hidden activations.
    losses.specialization = ConfigDict({"weight": 0.0})
    # Minus the chosen's probabilities in adjacent layers.
    losses.path_coupling = ConfigDict({"weight": 0.0})
    losses.routing_entropy = ConfigDict({"weight": 0.0})  # of the router's probabilities
    # The error of the router beside experts that compete; needs model.router = "competition".
    losses.competition = ConfigDict({"weight": 0.0})
    return losses


def _data():
    """moe_erc/data/."""
    data = ConfigDict()
    # embedded | planted | TFDS name (c4/en) | prepared TFDS directory | directory of .txt, .jsonl,
    # .json lines, also .gz | tokens:PATTERN of token shards (.npy, .ds, .bin), local, gs:// or s3://
    data.sources = ("embedded",)
    data.weights = ()  # one per source; () is in proportion to size
    data.tokenizer = "bytes"  # or the path of a Hugging Face tokenizer.json
    data.text_key = "text"  # the feature or JSON key that holds the text
    # The share of the documents, by hash, where no name in a source says what is held out. Of token
    # shards, the last share of each.
    data.validation_fraction = 0.02
    data.sequence_length = 64  # T
    data.cache_dir = ""  # "" is $MOE_ERC_CACHE, else ~/.cache/moe_erc
    # A window holds documents end to end. True, as the ERC paper and OLMoE trained: a token attends
    # to all before it in the window, other documents too. False: to its own document alone, in
    # which positions start at 0; a document that begins before the window starts at 0 where the
    # window does. Evaluation follows the run's setting.
    data.attend_across_documents = True
    data.planted = _planted()
    data.tokens = _tokens()
    return data


def _planted():
    """Of the source "planted", moe_erc/data/planted.py: Markov chains, whose entropy is known."""
    planted = ConfigDict()
    planted.regimes = 8  # G, each a domain with a chain of its own
    planted.alphabet = 32  # letters, which all regimes share
    planted.mixing = 0.25  # share of the chain that all regimes have in common
    planted.documents = 64  # of each regime, for training
    planted.letters = 4096  # of a document
    planted.validation = 4  # documents of each regime that are held out
    planted.seed = 0  # of the chains and the documents
    return planted


def _tokens():
    """Of sources "tokens:…", moe_erc/data/shards/: what the shards do not say of themselves."""
    tokens = ConfigDict()
    # uint16 or uint32, for flat arrays; "" is uint16 if the tokenizer's ids fit, else uint32.
    tokens.dtype = ""
    # The id that closes a document, as "50279"; "" is what an index of the shards says, else the
    # end-of-document token of data.tokenizer.
    tokens.end_of_document = ""
    # What shards call the tokenizer of data.tokenizer, if that is not its path.
    tokens.tokenizer = ""
    tokens.validation = ()  # patterns of held-out shards; () holds out the end of every shard
    return tokens


def _optimizer():
    """moe_erc/training/optimizer.py."""
    optimizer = ConfigDict()
    # Or muon, for matrices; embeddings, head, router and norms stay with adamw.
    optimizer.name = "adamw"
    optimizer.learning_rate = 4e-4  # at the peak
    optimizer.schedule = "cosine"  # linear, constant, wsd (warmup-stable-decay)
    optimizer.warmup_steps = 10
    optimizer.decay_fraction = 0.2  # wsd: the last share of the steps
    optimizer.final_fraction = 0.1  # of the peak, at the last step
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.1  # of matrices; biases, thresholds and temperatures are spared
    # True: the scales of norms decay as well, as OLMoE's did; the ERC paper does not say.
    optimizer.decay_norms = False
    optimizer.clip_norm = 1.0  # global gradient norm; inf does not clip
    return optimizer


def _train():
    """The run."""
    train = ConfigDict()
    train.steps = 20
    train.batch_size = 8  # sequences a step, over all devices and micro-batches
    train.micro_batches = 1  # the step's batch is processed in so many parts
    # An XProf trace of three steps from this one on goes to workdir/profile; 0 takes none.
    train.profile_step = 0
    return train


def _guard():
    """What happens to a step whose numbers cannot be trusted: moe_erc/training/guard.py."""
    guard = ConfigDict()
    # Where a loss, gradient or parameter is not finite. Or "skip": the step changes nothing.
    guard.nonfinite = "stop"
    guard.spike = "report"  # a loss far above the recent ones; or "skip"
    guard.zscore = 6.0  # how far above their mean, in standard deviations
    # The steps that mean and deviation are taken over. Before so many, nothing is a spike.
    guard.window = 100
    guard.limit = 10  # steps skipped in a row after which the run stops
    return guard


def _mesh():
    """moe_erc/sharding.py; on a CPU every core is a device."""
    mesh = ConfigDict()
    mesh.data = -1  # devices; -1, for one of the two: all that the other leaves
    mesh.expert = 1
    return mesh


def _evaluation():
    """What is evaluated, and when."""
    evaluation = ConfigDict()
    evaluation.every = 10  # steps; the last step is always evaluated, each after its checkpoint
    evaluation.batch_size = 8  # sequences
    evaluation.windows = 8  # of each domain during training, evenly spaced
    evaluation.report_windows = 0  # of each domain for the final report and eval.py; 0 reads all
    evaluation.prompt = "def "  # continued after every evaluation; "" samples nothing
    evaluation.sample_tokens = 32
    evaluation.temperature = 0.8  # of the sample
    evaluation.tasks = ()  # of the lm-evaluation-harness, by name; needs the extra `eval`
    evaluation.task_dir = ""  # YAML files of more tasks
    evaluation.task_limit = 100  # documents of each task; 0 takes all
    return evaluation


def _checkpoint():
    """What is saved, and when."""
    checkpoint = ConfigDict()
    checkpoint.every = 10  # steps; the last step is always saved
    checkpoint.keep = 2  # how many of the newest stay
    return checkpoint


def _log():
    """What is logged, and where."""
    log = ConfigDict()
    log.every = 5  # steps
    log.tensorboard = True
    # "" does not use Weights & Biases. Where it fails, it is switched off with one line.
    log.wandb_project = ""
    return log


def _resume():
    """What may change when a run is started again on its workdir.

    moe_erc/training/identity.py has the rule of every key.
    """
    resume = ConfigDict()
    # Names of blocks or keys, such as ('losses', 'routers.softmax.top_p'), whose change is meant.
    # Without it a run whose model, router, losses, text, optimizer (but for its schedule) or seed
    # differ is refused.
    resume.allow = ()
    return resume
