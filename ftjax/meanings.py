"""What every metric of a run means, in one line: for the report and for the table.

The names are TRL's where TRL has them. `python -m ftjax.meanings` prints the table that
is in `ftjax/objectives/README.md`.
"""

from typing import NamedTuple


class Meaning(NamedTuple):
    """`better` is 1 where more is better, -1 where less is, 0 where neither is."""

    shown: str  # a format
    better: int
    text: str


NATS, SHARE, PLAIN = "{:.4f}", "{:.2%}", "{:.4g}"
MEANINGS: dict[str, Meaning] = {
    "loss": Meaning(NATS, -1, "what is minimised: the sum of the terms of the task"),
    "perplexity": Meaning("{:.3f}", -1, "exp of the loss per token"),
    "bits_per_byte": Meaning(
        NATS, -1, "of text; this compares models with different tokenizers"
    ),
    "byte_perplexity": Meaning("{:.3f}", -1, "2 to the power of bits_per_byte"),
    "token_accuracy": Meaning(
        SHARE, 1, "trained tokens that the model ranks first; 1/n where n tie"
    ),
    "nll": Meaning(NATS, -1, "negative log-likelihood per token it is taken over"),
    "preference": Meaning(NATS, -1, "the term of the pairs, per pair"),
    "sft": Meaning(NATS, -1, "the likelihood term of a mixture, per chosen token"),
    "odds_ratio": Meaning(NATS, -1, "ORPO's term of the pairs, beta included"),
    "rated": Meaning(NATS, -1, "KTO's loss per answer; 0.5 says nothing is learned"),
    "distill": Meaning(NATS, -1, "the mixture of divergence and likelihood, per token"),
    "divergence": Meaning(NATS, -1, "of the student from the teacher, per token"),
    "rewards/chosen": Meaning(
        PLAIN,
        0,
        "beta log p / p_ref of the chosen answer. Falling is usual: both sides fall, "
        "and only their distance is trained; worry where it falls and the margin "
        "does not grow",
    ),
    "rewards/rejected": Meaning(PLAIN, 0, "the same of the rejected answer"),
    "rewards/margins": Meaning(PLAIN, 1, "rewards/chosen - rewards/rejected"),
    "rewards/accuracies": Meaning(
        SHARE,
        1,
        "pairs whose chosen reward is the larger; 0 before the first step, "
        "where all are equal",
    ),
    "rewards/accuracies_fair": Meaning(SHARE, 1, "the same with ties as one half"),
    "logps/chosen": Meaning(
        PLAIN, 0, "log p of the chosen answer: a sum, in ORPO, SimPO a mean per token"
    ),
    "logps/rejected": Meaning(PLAIN, 0, "the same of the rejected answer"),
    "logits/chosen": Meaning(
        PLAIN,
        0,
        "mean logit over the answer's tokens and the vocabulary; its level "
        "means nothing, a run-away does",
    ),
    "logits/rejected": Meaning(PLAIN, 0, "the same of the rejected answer"),
    "entropy": Meaning(NATS, 0, "of the next token, nats; near 0 the model is rigid"),
    "mean_token_accuracy": Meaning(SHARE, 1, "chosen tokens that are ranked first"),
    "log_odds_chosen": Meaning(PLAIN, 1, "log of the odds ratio, chosen to rejected"),
    "log_odds_ratio": Meaning(PLAIN, 1, "log-sigmoid of log_odds_chosen; at most 0"),
    "nll/pair": Meaning(NATS, -1, "likelihood of the chosen answers of pairs, alone"),
    "nll/answer": Meaning(NATS, -1, "likelihood of the answers to imitate, alone"),
    "nll/text": Meaning(NATS, -1, "likelihood of the plain text, alone"),
    "tokens/pair": Meaning(
        PLAIN, 0, "the weight of the pairs' tokens in the likelihood, summed"
    ),
    "tokens/answer": Meaning(PLAIN, 0, "the same of the answers to imitate"),
    "tokens/text": Meaning(PLAIN, 0, "the same of the plain text"),
    "reward": Meaning(PLAIN, 1, "what an answer earns, on the mean"),
    "reward_std": Meaning(
        PLAIN,
        0,
        "how rewards differ among the answers to one prompt; without a "
        "difference nothing is learned",
    ),
    "frac_reward_zero_std": Meaning(SHARE, -1, "prompts whose answers all earn alike"),
    "completions/mean_length": Meaning(PLAIN, 0, "new tokens of an answer"),
    "completions/mean_terminated_length": Meaning(PLAIN, 0, "of those that ended"),
    "completions/clipped_ratio": Meaning(SHARE, -1, "answers cut off unfinished"),
    "completions/empty_ratio": Meaning(SHARE, -1, "answers without a word"),
    "frac_reward_nan": Meaning(SHARE, -1, "answers whose reward is no number"),
    "objective/kl": Meaning(PLAIN, 0, "KL to the reference, of a whole answer"),
    "kl": Meaning(
        PLAIN,
        0,
        "how far the policy is from its reference, nats per token; measured where a "
        "reference is needed: loss.beta or loss.max_kl above 0",
    ),
    "accuracy": Meaning(SHARE, 1, "pairs whose chosen answer has the larger reward"),
    "accuracy_fair": Meaning(SHARE, 1, "the same with ties as one half"),
    "margin": Meaning(PLAIN, 1, "reward of the chosen answer less the rejected one's"),
    "mean_reward": Meaning(PLAIN, 0, "over both sides; centering keeps it near 0"),
    "min_reward": Meaning(PLAIN, 0, "the smallest reward"),
    "max_reward": Meaning(PLAIN, 0, "the largest reward"),
}

# Of training steps alone, beside those above.
OF_STEPS: dict[str, str] = {
    "grad_norm": "of the gradient, before it is clipped",
    "skipped": "updates left out in a row: no finite gradient, or nothing to train on",
    "lr": "the rate of the step",
    "tokens": "trained tokens so far; of an evaluation: its own",
    "tokens_per_s": "places of the step's rows that hold a token, trained or not",
    "time": "seconds since the run began",
    "value_loss": "PPO: of the value head, per token",
    "objective/rlhf_reward": "PPO: the reward of an answer less the price of its KL",
    "clip_ratio/*": "tokens whose probability moved beyond the clip, and where",
    "rewards/NAME/mean": "what each of several rewards gives, before its weight",
}


def table() -> str:
    """All of them, as Markdown."""
    lines = ["| metric | what it says |", "|---|---|"]
    lines += [f"| `{name}` | {meaning.text} |" for name, meaning in MEANINGS.items()]
    lines += [f"| `{name}` | {text} |" for name, text in OF_STEPS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
