"""What TRL, PEFT and transformers call the keys of our configs, and what differs.

The table of `configs/README.md` is this one: `python -m ftjax.names` prints it. It also
answers a mistyped key with the right one.
"""

from typing import NamedTuple


class Ours(NamedTuple):
    """A key of a config, and in which way it is another thing, if it is."""

    key: str
    differs: str = ""


TRAINING = {  # transformers.TrainingArguments
    "model_name_or_path": Ours("model.path"),
    "output_dir": Ours("--workdir", "the same command continues what is there"),
    "seed": Ours("seed"),
    "max_steps": Ours("train.steps"),
    "num_train_epochs": Ours("train.epochs"),
    "per_device_train_batch_size": Ours(
        "train.batch_size",
        "rows of a step, over all devices and micro-batches; packed, a row has several "
        "examples",
    ),
    "gradient_accumulation_steps": Ours(
        "train.accumulate", "cuts train.batch_size, does not multiply it"
    ),
    "gradient_checkpointing": Ours("model.remat", "none, dots or full"),
    "fp16": Ours("model.dtype", "bfloat16 or float32"),
    "bf16": Ours("model.dtype", "bfloat16 or float32; auto: by the hardware"),
    "learning_rate": Ours("optim.lr"),
    "lr_scheduler_type": Ours("optim.schedule", "ends at optim.final of the rate"),
    "warmup_steps": Ours("optim.warmup"),
    "warmup_ratio": Ours("optim.warmup", "steps, no share of them"),
    "weight_decay": Ours("optim.weight_decay"),
    "max_grad_norm": Ours("optim.clip_norm"),
    "optim": Ours("optim.name"),
    "adam_beta1": Ours("optim.b1"),
    "adam_beta2": Ours("optim.b2"),
    "adam_epsilon": Ours("optim.eps"),
    "logging_steps": Ours("train.log_every"),
    "eval_steps": Ours("train.eval_every"),
    "eval_strategy": Ours("train.eval_every", "steps; 0: at the start and the end"),
    "per_device_eval_batch_size": Ours("train.batch_size", "the same for both"),
    "save_steps": Ours("train.save_every"),
    "save_total_limit": Ours("train.keep_last", "the best is kept beside them"),
    "report_to": Ours("log.wandb", "and log.tensorboard: each on or off"),
}
ADAPTERS = {  # peft.LoraConfig, transformers.BitsAndBytesConfig
    "use_peft": Ours("method.name", "chosen as --config=FILE.py:method=lora"),
    "r": Ours("method.rank"),
    "lora_r": Ours("method.rank"),
    "lora_alpha": Ours("method.alpha"),
    "lora_dropout": Ours("method.dropout"),
    "target_modules": Ours("method.targets"),
    "lora_target_modules": Ours("method.targets"),
    "rank_pattern": Ours("method.rank_pattern", "text: regex=rank,..."),
    "alpha_pattern": Ours("method.alpha_pattern", "text: regex=alpha,..."),
    "modules_to_save": Ours("method.also_train", "regexes"),
    "init_lora_weights": Ours("method.init"),
    "use_rslora": Ours("method.use_rslora"),
    "use_dora": Ours("method.use_dora"),
    "bnb_4bit_quant_type": Ours("quant.format", "nf4 or fp4; method=qlora is nf4"),
    "bnb_4bit_use_double_quant": Ours("quant.double_quant"),
    "bnb_4bit_compute_dtype": Ours("model.dtype"),
    "load_in_8bit": Ours("quant.format", "int8"),
    "load_in_4bit": Ours("quant.format", "nf4, fp4 or int4"),
}
ROWS = {  # trl.SFTConfig and all others
    "dataset_name": Ours("data.train", "also a file"),
    "eval_dataset": Ours("data.eval"),
    "max_length": Ours("data.max_length", "0: 1024, or what the model has"),
    "max_seq_length": Ours("data.max_length"),
    "max_prompt_length": Ours("data.max_length", "of prompt and answer together"),
    "packing": Ours("data.packing", "on by default; rows never see one another"),
    "completion_only_loss": Ours("data.completion_only"),
    "assistant_only_loss": Ours("data.completion_only"),
    "truncation_mode": Ours("data.overlong", "truncate keeps the start"),
    "chat_template_path": Ours("data.chat_template"),
    "shuffle_dataset": Ours("data.shuffle"),
    "neftune_noise_alpha": Ours("loss.neftune_alpha"),
    "label_smoothing_factor": Ours("loss.label_smoothing"),
}
LOSSES = {
    "loss_type": Ours("loss.type", "the same names; several with commas between"),
    "loss_weights": Ours("loss.type_weights", "text, with commas between"),
    "beta": Ours("loss.beta"),
    "rpo_alpha": Ours("loss.type", "sigmoid,sft with loss.type_weights=1,ALPHA"),
    "label_smoothing": Ours("loss.label_smoothing"),
    "f_divergence_type": Ours("loss.divergence"),
    "f_alpha_divergence_coef": Ours("loss.alpha"),
    "discopop_tau": Ours("loss.tau"),
    "ld_alpha": Ours("loss.ld_alpha"),
    "ref_model": Ours("loss.reference"),
    "precompute_ref_log_probs": Ours("loss.precompute"),
    "desirable_weight": Ours("loss.desirable_weight"),
    "undesirable_weight": Ours("loss.undesirable_weight"),
    "cpo_alpha": Ours("loss.nll_weight"),
    "simpo_gamma": Ours("loss.gamma"),
    "center_rewards_coefficient": Ours("loss.center", "0.01 by default, TRL's is none"),
    "teacher_model_name_or_path": Ours("loss.teacher"),
}
ROLLOUTS = {  # trl.GRPOConfig, trl.RLOOConfig, and the PPOConfig of older releases
    "num_generations": Ours("rollout.group"),
    "max_completion_length": Ours("rollout.max_new_tokens"),
    "response_length": Ours("rollout.max_new_tokens"),
    "steps_per_generation": Ours("rollout.batches"),
    "num_mini_batches": Ours("rollout.batches"),
    "num_iterations": Ours("rollout.passes"),
    "num_ppo_epochs": Ours("rollout.passes"),
    "temperature": Ours("loss.temperature"),
    "top_k": Ours("rollout.top_k"),
    "top_p": Ours("rollout.top_p"),
    "epsilon": Ours("loss.clip_low", "and loss.clip_high"),
    "epsilon_high": Ours("loss.clip_high"),
    "cliprange": Ours("loss.clip_low", "and loss.clip_high"),
    "cliprange_value": Ours("loss.clip_value"),
    "kl_coef": Ours("loss.beta"),
    "vf_coef": Ours("loss.value_weight"),
    "gamma": Ours("loss.gamma"),
    "lam": Ours("loss.lam"),
    "scale_rewards": Ours("loss.scale", "leave_one_out is RLOO"),
    "mask_truncated_completions": Ours("loss.mask_truncated"),
    "reward_funcs": Ours("reward.function", "module:function, or a name of ours"),
    "reward_weights": Ours("reward.weights", "text, with commas between"),
    "reward_model_path": Ours("reward.model", "a run of configs/reward.py"),
    "missing_eos_penalty": Ours("reward.unfinished", "added: make it negative"),
}
NAMES = TRAINING | ADAPTERS | ROWS | LOSSES | ROLLOUTS


def table() -> str:
    """All names as a table in Markdown."""
    lines = ["| theirs | ours | what differs |", "|---|---|---|"]
    lines += [f"| `{n}` | `{o.key}` | {o.differs} |" for n, o in NAMES.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
