"""What every task's config shares: the argument after the colon; the sections.

`--config=configs/sft.py:model=PATH,method=lora` picks structure, and
`--config.optim.lr=1e-3` sets a value. A key that a method does not
have is not there, so it cannot be set.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def parse_arg(arg: str | None, **defaults: str) -> ConfigDict:
    """'model=PATH,method=full,smoke' over the defaults; a bare word means 'yes'.

    >>> parse_arg('method=full', method='lora', model='base').method
    'full'
    """
    values = dict(defaults)
    for part in (arg or "").split(","):
        key, equals, value = part.strip().partition("=")
        if not key:
            continue
        if key not in defaults:
            known = ", ".join(f"{k}={v or '...'}" for k, v in defaults.items())
            raise ValueError(f"{key!r} is not one of: {known}")
        values[key] = value if equals else "yes"
    return ConfigDict(values)


def base_config(arg: ConfigDict) -> ConfigDict:
    """The sections, the same in every task."""
    c = ConfigDict()
    c.task = ""
    c.seed = 0
    c.model = model_config(arg.model)
    c.method = method_config(arg.method)
    c.quant = quant_config(arg.method)
    c.data = data_config()

    c.loss = ConfigDict()  # a task adds its own keys
    c.loss.chunk = 64  # positions per row that the head handles at a time

    c.optim = optim_config()
    c.train = train_config()

    c.mesh = ConfigDict()
    c.mesh.data = -1  # -1: the devices that are left
    c.mesh.fsdp = 1
    c.parallel = "jit"  # pmap: all weights on every device

    c.log = ConfigDict()
    c.log.tensorboard = True
    c.log.wandb = False
    c.log.wandb_project = "ftjax"
    return c


def model_config(path: str) -> ConfigDict:
    """Which model, and how its numbers are stored."""
    model = ConfigDict()
    model.path = path  # 'base', a directory, a preset, or a Hub name
    model.revision = "main"  # of a Hub name
    model.dtype = "auto"  # of the computation: float32, bfloat16; auto: bf16 on GPU/TPU
    model.param_dtype = "auto"  # storage of frozen weights; auto: as the computation
    model.norm_dtype = "auto"  # storage of frozen norms; auto: as param_dtype
    model.head_dtype = "auto"  # of the frozen head (tied: the embedding); the same
    model.remat = "none"  # none, dots, full: what the backward pass computes again
    model.from_scratch = False  # random weights of the same shape
    return model


def method_config(name: str) -> ConfigDict:
    """The keys of one method, and no others."""
    # QLoRA (arXiv 2305.14314) is LoRA over a quantized base: `quant` tells them apart.
    method = ConfigDict({"name": "lora" if name == "qlora" else name})
    if method.name == "lora":
        method.rank = 16
        method.alpha = 32.0
        method.dropout = 0.0
        method.targets = "all-linear"  # or regexes: q_proj,v_proj
        method.rank_pattern = ""  # regex=rank,...: the first that matches wins
        method.alpha_pattern = ""
        method.use_rslora = False  # scale alpha / sqrt(rank)
        method.use_dora = False  # each output's length is trained apart (DoRA)
        method.init = "kaiming"  # kaiming, gaussian, a_zero; of the weights: pissa,
        # olora, and loftq, which wants a quantized base
        method.loftq_iters = 1  # of loftq: more change the codes of the base too
    if name == "vera":
        method.rank = 256
        method.dropout = 0.0
        method.targets = "all-linear"
        method.d_initial = 0.1
        method.projection_prng_key = 0  # draws the frozen matrices; `seed` does not
    if name == "freeze":
        method.layers = 1  # the last ones; 0: none
        method.pattern = ""  # regexes of other weights: lm_head,.*norm
    if name == "bottleneck":
        method.kind = "houlsby"  # houlsby, pfeiffer
        method.size = 16  # of the hidden layers
        method.activation = "gelu"  # gelu, relu, silu
    if name == "ia3":
        method.targets = "k_proj,v_proj,down_proj"
        method.feedforward = "down_proj"  # of these, whose inputs are multiplied
    if name == "prompt":
        method.tokens = 20  # virtual ones, before every row
        method.text = ""  # they begin as its tokens; empty: as random tokens
    if name == "prefix":
        method.tokens = 20  # keys and values, before every row and in every layer
        method.std = 0.02  # of their start; PEFT's is 1
    if method.name not in ("full", "freeze"):
        # Of the adapter, as it is stored and updated. TRL trains in bfloat16 beside a
        # quantized base, where an update below a 256th of its weight is lost; PEFT
        # alone trains in float32. Moments, and the adapter's files, are float32.
        method.dtype = "float32"  # float32, bfloat16
        method.also_train = ""  # regexes of weights of the base: embed_tokens,.*norm
    return method


def quant_config(method: str) -> ConfigDict:
    """How the frozen base is stored: method=qlora means nf4, double quantization."""
    quant = ConfigDict()
    quant.format = "nf4" if method == "qlora" else "none"  # none, nf4, fp4, int8, int4
    quant.double_quant = method == "qlora"  # of nf4 and fp4: 8-bit scales
    quant.group = -1  # numbers per scale; 0: an output channel; -1: as usual
    quant.scheme = "symmetric"  # of int8 and int4: symmetric, affine
    quant.targets = "all-linear"  # or regexes of projections; the rest stays float
    quant.pattern = ""  # regex=format,...: the first that matches wins; none: float
    return quant


def data_config() -> ConfigDict:
    """Where the rows come from, and how they become tokens."""
    data = ConfigDict()
    data.train = ""  # a .jsonl(.gz), .json, .parquet or .txt file, pydoc:..., a name
    data.eval = "auto"  # the same; empty: none; auto: pydoc's for pydoc, else none
    data.split = "train"  # of a `datasets` name
    data.max_length = 0  # tokens per row; 0: 1024, or the model's positions if fewer
    data.separator = ""  # of the texts in a .txt; see configs/generic.py
    data.overlong = "truncate"  # truncate (keeps the start), drop, error, split
    data.join = False  # texts in one stream: windows of max_length, no borders
    data.packing = True  # several examples per row, kept apart by segments
    data.share_prompt = False  # of pairs: the prompt once, before both answers
    data.completion_only = True  # False: train on the prompt too
    data.empty_completion = "drop"  # drop, error
    data.on_bad_row = "error"  # error, skip
    data.chat_template = ""  # a jinja file instead of the tokenizer's own; or: plain
    data.shuffle = True
    # A stream is a .jsonl file that may still grow, a named pipe or - (standard input),
    # read once, in its own order, until train.steps or its end.
    data.stream = False
    data.stream_wait = 10.0  # seconds without a new byte that end a growing file
    data.eval_rows = 0  # at most so many rows of eval; 0: all
    # Rows with a `prompt` and `chosen` alone, or `rejected` alone, are joined to pairs
    # where their prompts are equal and they stand at most so many rows apart.
    data.join_window = 1000  # 0: none is joined
    return data


def optim_config() -> ConfigDict:
    """The update, and how its rate changes."""
    optim = ConfigDict()
    optim.name = "adamw"  # adamw8bit, adafactor, lion, muon, schedule_free
    optim.lr = 1e-4  # lion wants a tenth of it
    optim.b_lr_ratio = 1.0  # LoRA+: the rate of LoRA's b over that of a
    optim.schedule = "cosine"  # constant, linear, cosine, wsd
    optim.warmup = -1  # steps; -1: 10, or half of a run that is shorter than 20
    optim.decay = 0.2  # of wsd alone: the share of the steps, at the end, that fall
    optim.final = 0.1  # of lr, at the last step; not of constant
    optim.b1 = -1.0  # -1: as usual, for these three; not of adafactor
    optim.b2 = -1.0  # not of adafactor
    optim.eps = -1.0  # not of adafactor and lion
    optim.weight_decay = 0.0
    optim.clip_norm = 1.0  # 0: no clipping
    return optim


def train_config() -> ConfigDict:
    """How long, in what parts, and what is done on the way."""
    train = ConfigDict()
    train.steps = placeholder(int)  # steps or epochs, not both; neither: one epoch
    train.epochs = placeholder(float)
    train.batch_size = 8  # rows per optimizer step, over all devices
    train.accumulate = 1  # micro-batches that a step is cut into
    train.log_every = 10
    train.eval_every = 100  # 0: at the start and the end only
    train.save_every = 100
    train.sample_every = 100  # 0: at the start and the end only
    train.sample_rows = 3  # prompts of the eval rows to answer; 0: none
    train.sample_tokens = 64  # tokens per answer
    train.keep_last = 2  # checkpoints
    train.keep_best = 1  # by eval loss
    train.max_skipped = 10  # updates left out in a row before the run gives up
    return train
