"""What the configs of tasks share that learn from their own answers."""

from ml_collections import ConfigDict

from configs.common import base_config


def online_config(arg: ConfigDict) -> ConfigDict:
    """The sections of every task, and those of rollouts and rewards."""
    c = base_config(arg)
    c.data.train = "pydoc:instructions[train]"
    c.data.eval_rows = 64
    c.data.packing = False
    c.optim.lr = 1e-6 if arg.method in ("full", "freeze") else 1e-4
    c.train.steps = 100
    c.train.batch_size = 32  # completions per optimizer step
    c.train.eval_every = 50

    c.rollout = ConfigDict()
    c.rollout.group = 8  # completions of each prompt
    c.rollout.max_new_tokens = 64
    c.rollout.max_num_seqs = 0  # rows side by side, the next one where one ends; 0: all
    c.rollout.top_k = 0  # 0: all
    c.rollout.top_p = 1.0  # 1: all
    c.rollout.batches = 1  # optimizer steps that the completions are spread over
    c.rollout.passes = 1  # how often each is trained on
    c.rollout.eval_temperature = 0.0  # of evaluation; 0: the likeliest answer

    c.reward = ConfigDict()
    # exact_match, format, length, words, module:function, or several, with commas
    # between; auto: length, where no model judges.
    c.reward.function = "auto"
    c.reward.model = ""  # a run of configs/reward.py, or a model of one label
    c.reward.weights = ""  # of the functions, then of the model; empty: 1 each
    c.reward.words_wanted = 12  # of length
    c.reward.pattern = ""  # of format: a regex that the whole answer must match
    c.reward.words = ""  # of words: a list, with commas between
    c.reward.unfinished = 0.0  # added where an answer was cut at max_new_tokens
    c.reward.max_nan = 0.0  # the share of rewards that may be NaN; more ends the run

    c.loss.temperature = 1.0  # of sampling, and of the probabilities that are trained
    c.loss.clip_low = 0.2  # how far p / p_old may fall below 1
    c.loss.clip_high = 0.2  # and rise above; 0.28 in DAPO
    c.loss.mask_truncated = False  # learn nothing from answers that were cut
    c.loss.max_kl = 0.0  # ends the run where the KL per token is larger; 0: no limit
    return c
