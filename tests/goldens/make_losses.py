"""Makes losses.json: losses and gradients of TRL's own trainers, on fixed numbers.

Run by hand, from the root of the repository, in an environment that has torch and trl:

    python -m tests.goldens.make_losses

The trainers' methods run as they are; their models are stood in for by functions that
return fixed log-probabilities. Every array is made of its name, here and in the tests.
"""

import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np

from tests.goldens import trl_stand_ins as stand
from tests.goldens.weights import random_tensor

OUT = Path(__file__).parent / "losses.json"

# Of three pairs: the tokens of the chosen completions, then of the rejected ones.
LENGTHS = np.array([5, 2, 3, 3, 4, 1])
TOKENS = 5
LABELS = np.array([True, False, True, True, False, False])
DPO = {"beta": 0.3, "label_smoothing": 0.1}
DPO_CASES: dict[str, dict[str, Any]] = {
    **{
        name: {"loss_types": [name]}
        for name in [
            "sigmoid",
            "hinge",
            "ipo",
            "exo_pair",
            "nca_pair",
            "robust",
            "bco_pair",
            "sppo_hard",
            "aot",
            "aot_unpaired",
            "apo_zero",
            "apo_down",
            "discopop",
            "sft",
            "sigmoid_norm",
        ]
    },
    **{
        f"{name} {divergence}": {"loss_types": [name], "f_divergence_type": divergence}
        for name in ("sigmoid", "ipo")
        for divergence in ("forward_kl", "js_divergence", "alpha_divergence")
    },
    "ld": {"loss_types": ["sigmoid"], "ld_alpha": 0.4},
    "rpo": {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
}
KTO = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8}
CPO_CASES: dict[str, dict[str, Any]] = {
    f"{name} {alpha}": {"loss_type": name, "alpha": alpha}
    for name in ("sigmoid", "hinge", "ipo", "simpo")
    for alpha in (0.0, 0.25)
}
CPO = {"beta": 0.4, "label_smoothing": 0.1, "simpo_gamma": 0.5}
GRPO = {"beta": 0.04, "epsilon_low": 0.2, "epsilon_high": 0.3, "longest": 8}
GRPO_LENGTHS = np.array([6, 1, 4, 5])
DISTILL = {"forward_kl": 0.0, "js_divergence": 0.3, "reverse_kl": 1.0}
TEMPERATURE = 1.5


def token_logps(name: str, lengths: Any, width: int) -> Any:
    """[N, width] float32, 0 beyond each row's length."""
    mask = np.arange(width) < np.asarray(lengths)[:, None]
    return -2 * np.abs(random_tensor(name, (len(lengths), width))) * mask


def reference_sums(name: str, logps: Any) -> Any:
    """Near the sums of these log-probabilities, [N] float32."""
    near = logps.sum(1) + 2 * random_tensor(name, (len(logps),))
    return near.astype(np.float32)


def dpo() -> dict[str, Any]:
    """Each loss of the DPO trainer, by the log-probabilities of tokens [6, 5]."""
    import torch
    from trl import DPOTrainer

    found = {}
    for case, settings in DPO_CASES.items():
        logps = token_logps("policy", LENGTHS, TOKENS)
        leaf = stand.leaf(logps)
        reference = torch.tensor(reference_sums("reference", logps)).chunk(2)
        defaults: dict[str, Any] = {
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "ld_alpha": None,
            "loss_weights": [1.0],
            "use_weighting": False,
            "precompute_ref_logps": True,
        }
        trainer = stand.trainer(**{**defaults, **DPO, **settings})
        trainer.args.discopop_tau = 0.05
        inputs = stand.batch(LENGTHS)
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference
        model = stand.standing_in(leaf)
        loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
        found[case] = stand.found(loss, leaf)
        if case == "sigmoid":
            found[case]["metrics"] = stand.metrics(trainer)
    return found


def kto() -> dict[str, Any]:
    """The KTO trainer, by the log-probabilities of tokens [6, 5]."""
    import torch
    from trl import KTOTrainer

    found = {}
    logps = token_logps("policy", LENGTHS, TOKENS)
    other = token_logps("other", LENGTHS, TOKENS)
    references = reference_sums("reference", logps), reference_sums("far", other)
    for case in ("kto", "kto level", "apo_zero_unpaired"):
        leaf = stand.leaf(logps)
        trainer = stand.trainer(
            **KTO,
            loss_type=case.split()[0],
            calculate_KL=case.startswith("kto"),
            precompute_ref_logps=True,
        )
        inputs = stand.batch(LENGTHS)
        far = references[1] - (5 if case == "kto" else -5)
        inputs |= {f"KL_{name}": value.clone() for name, value in inputs.items()}
        inputs["KL_input_ids"] += 1
        inputs |= {
            "label": torch.tensor(LABELS),
            "ref_logps": torch.tensor(references[0]),
            "ref_KL_logps": torch.tensor(far),
        }
        model = stand.standing_in(leaf, torch.tensor(other))
        trainer._compute_kl_logps = lambda m, b, t=trainer: (
            KTOTrainer._compute_kl_logps(t, m, b)
        )
        loss = KTOTrainer._compute_loss(trainer, model, inputs, False)
        found[case] = {**stand.found(loss, leaf), "metrics": stand.metrics(trainer)}
    return found


def means() -> tuple[Any, Any]:
    """Of chosen and rejected completions, [3] float32, below 0."""
    logps = token_logps("policy", LENGTHS, TOKENS)
    mean = logps.sum(1) / LENGTHS
    return mean[:3], mean[3:]


def orpo_cpo() -> dict[str, Any]:
    """ORPO's and CPO's own parts, by two log-probabilities [3] each."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = (stand.leaf(x) for x in means())
    trainer = stand.trainer(beta=0.2)
    losses, *_, ratio, odds = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    found = {
        "orpo": {
            **stand.found(-losses.mean(), chosen, rejected),
            "log_odds_ratio": stand.numbers(ratio.detach()),
            "log_odds_chosen": stand.numbers(odds.detach()),
        }
    }
    for case, settings in CPO_CASES.items():
        trainer = stand.trainer(**CPO, **settings)
        losses, *_ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
        found[f"cpo {case}"] = stand.found(losses.mean(), chosen, rejected)
    return found


def rewards() -> tuple[Any, Any]:
    """Rewards of three pairs [2, 3], and margins [3]."""
    return random_tensor("scores of pairs", (2, 3)), np.abs(
        random_tensor("margins", (3,))
    )


def reward() -> dict[str, Any]:
    """The reward trainer, by the rewards [2, 3]."""
    import torch
    from trl import RewardTrainer

    found = {}
    for case, center in (("plain", None), ("margin", 0.01)):
        scores, margins = rewards()
        leaf = stand.leaf(scores)
        trainer = stand.trainer()
        trainer.args.center_rewards_coefficient = center
        inputs = {"attention_mask": torch.ones(6, 2)}
        if case == "margin":
            inputs["margin"] = torch.tensor(margins)
        model = MagicMock()
        model.return_value.logits = leaf.reshape(6, 1)
        loss = RewardTrainer.compute_loss(trainer, model, inputs)
        found[case] = {**stand.found(loss, leaf), "metrics": stand.metrics(trainer)}
    return found


def policies() -> list[Any]:
    """Log-probabilities under policy, sampler and reference [4, 6], advantages [4]."""
    logps = token_logps("policy", GRPO_LENGTHS, 6)
    mask = logps != 0
    near = [logps + 0.4 * random_tensor(x, logps.shape) * mask for x in ("old", "ref")]
    return [x.astype(np.float32) for x in (logps, *near, random_tensor("gain", (4,)))]


def grpo() -> dict[str, Any]:
    """The GRPO trainer in four reductions, and RLOO's, by token log-probabilities."""
    import torch
    from trl import GRPOTrainer, RLOOTrainer

    found = {}
    settings = {k: GRPO[k] for k in ("beta", "epsilon_low", "epsilon_high")}
    for case in ("grpo", "bnpo", "dr_grpo", "dapo", "rloo"):
        logps, old, reference, advantage = policies()
        leaf, mask = stand.leaf(logps), torch.tensor((logps != 0).astype(np.float32))
        trainer = stand.trainer(
            **settings,
            loss_type=case,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level="token",
            use_vllm=False,
            current_gradient_accumulation_steps=1,
            max_completion_length=GRPO["longest"],
            _entropy_bonus_enabled=False,
        )
        trainer.args.delta, trainer.args.use_bias_correction_kl = None, False
        trainer.args.steps_per_generation = 1
        entropy = torch.zeros(leaf.shape)
        given = (leaf, entropy, None)
        trainer._get_per_token_logps_and_entropies = lambda *a, g=given, **k: g
        inputs = {
            "prompt_ids": torch.zeros(4, 1, dtype=torch.int64),
            "prompt_mask": torch.ones(4, 1),
            "completion_ids": torch.zeros(leaf.shape, dtype=torch.int64),
            "completion_mask": mask,
            "advantages": torch.tensor(advantage),
            "old_per_token_logps": torch.tensor(old),
            "ref_per_token_logps": torch.tensor(reference),
            "old_logps": torch.tensor(old.sum(1)),
            "num_items_in_batch": mask.sum(),
        }
        kind = RLOOTrainer if case == "rloo" else GRPOTrainer
        loss = kind._compute_loss(trainer, None, inputs)
        found[case] = {**stand.found(loss, leaf), "metrics": stand.metrics(trainer)}
    return found


def heads() -> dict[str, Any]:
    """Hidden states [2, 3, *], heads [V, *], targets and weights, and a cotangent."""
    shapes = {
        "h": (2, 3, 4),
        "w": (11, 4),
        "teacher_h": (2, 3, 6),
        "teacher_w": (11, 6),
    }
    return {
        **{name: random_tensor(name, shape) for name, shape in shapes.items()},
        "targets": np.array([[3, 10, 0], [7, 7, 2]]),
        "weights": np.array([[1, 0, 1], [1, 1, 1]], np.float32),
        "cotangent": random_tensor("cotangent", (2, 3)),
    }


def head() -> dict[str, Any]:
    """TRL's fused head, its distillation, and transformers' label smoothing."""
    import torch
    from transformers.trainer_pt_utils import LabelSmoother
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    given = heads()
    h, w = stand.leaf(given["h"]), stand.leaf(given["w"])
    targets, mask = torch.tensor(given["targets"]), torch.tensor(given["weights"])
    args = (h.reshape(6, 4), w, None, targets.reshape(6), TEMPERATURE, 4)
    logp, entropy, _, mean_logits, top = ChunkedLogProbFunction.apply(*args)
    gain = torch.tensor(given["cotangent"] * given["weights"]).reshape(6)
    found = {"token_logps": stand.found((logp * gain).sum(), h, w)}
    for name, x in zip(
        ("logp", "entropy", "mean_logit", "correct"),
        (logp, entropy, mean_logits, top),
        strict=True,
    ):
        found["token_logps"][name] = stand.numbers(x.tolist())
    labels = torch.where(mask != 0, targets, -100)
    smoothed = LabelSmoother(0.1)({"logits": h @ w.T}, labels)
    found["label_smoothed"] = stand.found(smoothed, h, w)
    teacher = [torch.tensor(given[x]) for x in ("teacher_h", "teacher_w")]
    for name, beta in DISTILL.items():
        models = (h, teacher[0], w, teacher[1])
        options = {"beta": beta, "temperature": TEMPERATURE}
        loss, spread, _ = _chunked_divergence_loss(*models, mask, **options)
        found[name] = {**stand.found(loss, h, w), "entropy": stand.numbers(spread)}
    return found


def sft() -> dict[str, Any]:
    """The SFT trainer's `dft`, by the log-probabilities of tokens [6, 5]."""
    from trl import SFTTrainer

    leaf = stand.leaf(token_logps("policy", LENGTHS, TOKENS))
    outputs = stand.outputs(leaf)
    outputs.label_mask = leaf != 0
    trainer = stand.trainer(compute_loss_func=None, label_smoother=None)
    trainer.args.loss_type = "dft"
    trainer.args.average_tokens_across_devices = False
    inputs = {**stand.batch(LENGTHS), "labels": None}
    loss = SFTTrainer.compute_loss(trainer, lambda **_: outputs, inputs)
    return {"dft": stand.found(loss, leaf)}


def main() -> None:
    """Writes all to losses.json."""
    import torch
    import transformers
    import trl

    golden = {
        "made_with": f"trl {trl.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "dpo": dpo(),
        "kto": kto(),
        "orpo_cpo": orpo_cpo(),
        "reward": reward(),
        "grpo": grpo(),
        "head": head(),
        "sft": sft(),
    }
    OUT.write_text(json.dumps(golden) + "\n")
    print(golden["made_with"], OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
