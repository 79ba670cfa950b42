"""transformers and PEFT on torch: eager, SDPA attention, fused AdamW, all cores.

QLoRA is bitsandbytes' nf4 with double quantization, prepared as PEFT asks for.
"""

from typing import Any

from benchmarks.turns import Request, Step, note_baseline, serve


def build(request: Request) -> tuple[Step, dict[str, str]]:
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if request.task in ("lora", "qlora"):
        import peft

        versions["peft"] = peft.__version__
    if request.task == "qlora":
        import bitsandbytes

        versions["bitsandbytes"] = bitsandbytes.__version__
    torch.set_num_threads(request.threads)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM  # noqa: B018  (imported lazily: it belongs to the baseline)
    note_baseline()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request.checkpoint,
        dtype=torch.float32,
        attn_implementation="sdpa",
        quantization_config=_nf4() if request.task == "qlora" else None,
    )
    make = _generate if request.task == "generate" else _train
    return make(request, model), versions


def _nf4() -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def _train(request: Request, model: Any) -> Step:
    import torch

    if request.task == "qlora":
        from peft import prepare_model_for_kbit_training

        # Checkpointing is its default; off, as for everybody here.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if request.task in ("lora", "qlora"):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=request.rank,
            lora_alpha=request.alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
    model.config.use_cache = False
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=request.learning_rate, weight_decay=0.0, fused=True
    )

    def step(index: int) -> float:
        tokens = torch.tensor(request.tokens(index))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def _generate(request: Request, model: Any) -> Step:
    import torch

    model.eval()
    model.generation_config.eos_token_id = None

    def step(index: int) -> list[int]:
        tokens = torch.tensor(request.tokens(index))
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=request.new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        new = out[:, tokens.shape[1] :]
        assert new.shape == (request.rows, request.new_tokens)
        return new[0].tolist()

    return step


if __name__ == "__main__":
    serve(build)
