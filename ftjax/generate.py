"""Continues prompts, or talks: with a model, a run or an adapter.

    python -m ftjax.generate --workdir=runs/mine                          # a chat
    python -m ftjax.generate --model=DIR --prompt="Once upon a time" --json
    python -m ftjax.generate --model=DIR --adapter=A,B --prompt=x --prompt=y --use=1,0

With --template=auto a prompt goes through the chat template where a run was trained on
conversations, and is continued as it stands otherwise. Several adapters are added up;
with --use each prompt has its own, in one batch, and in a chat `/adapter` changes it.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags

from ftjax import cli
from ftjax.adapters import names_of
from ftjax.console import printable, say
from ftjax.data.tokenizer import Tokenizer
from ftjax.decoding.generator import Completion, Generator
from ftjax.decoding.sampling import Sampling
from ftjax.errors import UserError
from ftjax.methods.heads import SCORE
from ftjax.policy import Policy, open_policy
from ftjax.switch import Switch, each_row_its_own, parse_use

ROWS = 32  # prompts that are continued side by side
UNFINISHED = "\ufffd"  # what a decoder gives for half of a character


def define(args: flags.FlagValues) -> None:
    cli.define_source(args)
    integer, real = flags.DEFINE_integer, flags.DEFINE_float
    flags.DEFINE_multi_string("prompt", None, "may be repeated", flag_values=args)
    flags.DEFINE_string(
        "use",
        "",
        "which of the adapters each prompt uses, all in one batch: 0,1,0",
        flag_values=args,
    )
    integer("max_new_tokens", 128, "at most", lower_bound=1, flag_values=args)
    real("temperature", 0.0, "0: the likeliest token", flag_values=args)
    integer("top_k", 0, "only the k likeliest tokens; 0: all", flag_values=args)
    real("top_p", 1.0, "only the likeliest tokens up to p", flag_values=args)
    flags.DEFINE_integer("seed", 0, "of the sampling", 0, 2**31 - 1, flag_values=args)
    flags.DEFINE_bool("ignore_eos", False, "do not stop early", flag_values=args)
    flags.DEFINE_enum(
        "template",
        "auto",
        ["auto", "chat", "raw"],
        "how a prompt is written: through the chat template, or as it stands",
        flag_values=args,
    )
    flags.DEFINE_enum(
        "dtype",
        "float32",
        ["float32", "bfloat16"],
        "of the computation",
        flag_values=args,
    )


def main(args: flags.FlagValues) -> dict[str, Any] | None:
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    policy = open_policy(
        model=args.model,
        workdir=args.workdir,
        adapter=args.adapter,
        adapter_weights=args.adapter_weights,
        adapter_rank=args.adapter_rank,
        dtype=jnp.dtype(args.dtype),
        weights=args.weights,
        note=_note,
    )
    refuse_reward(policy)
    chat = is_chat(args.template, policy)
    talks = args.prompt is None and sys.stdin.isatty()
    prompts = [] if talks else _prompts(args)
    names = names_of(args.adapter)
    uses: list[int] = []
    if args.use:
        summed = bool(args.adapter_weights or args.adapter_rank)
        uses = parse_use(args.use, names, len(prompts), summed=summed)
        policy = each_row_its_own(policy, names)
    generator = Generator(
        policy.base.spec,
        policy.variables,
        dtype=jnp.dtype(args.dtype),
        eos_ids=policy.base.eos_ids,
        release=True,
        apart=talks,
    )
    _note(f"{policy.label}, {'chat template' if chat else 'raw text'}")
    tokenizer = policy.base.tokenizer
    if talks:
        command = Switch(policy, generator, args.adapter)
        say("/adapters lists the adapters, /adapter NAME takes another")
        most = args.max_new_tokens
        talk(generator, tokenizer, most, sampling, chat=chat, command=command)
        return None
    ids = [encode_prompt(tokenizer, prompt, chat=chat) for prompt in prompts]
    made = _continue(generator, ids, sampling, args, uses)
    results = [
        _result(tokenizer, *row, chat=chat)
        for row in zip(prompts, ids, made, strict=True)
    ]
    for i, result in enumerate(results):
        if uses:
            result["adapter"] = names[uses[i]]
            _note(f"with {names[uses[i]]}:")
        say(printable(result["text"] if chat else result["prompt"] + result["text"]))
    return results[0] if len(results) == 1 else {**results[0], "results": results}


def refuse_reward(policy: Policy) -> None:
    """A reward model judges answers; what it would write means nothing."""
    if SCORE in policy.variables:
        raise UserError(
            "a reward model gives scores and writes nothing",
            where=policy.label,
            expected="a language model, or a run of another task",
            fix="python -m ftjax.evaluate --to=scores --data=FILE --out=FILE, of it",
        )


def _continue(
    generator: Generator,
    ids: list[list[int]],
    sampling: Sampling,
    args: flags.FlagValues,
    uses: list[int],
) -> list[Completion]:
    return generator.generate(
        ids,
        args.max_new_tokens,
        sampling,
        ignore_eos=args.ignore_eos,
        use=uses,
        max_num_seqs=ROWS,
    )


def _prompts(args: flags.FlagValues) -> list[str]:
    prompts = args.prompt
    if prompts is None:
        prompts = _lines()
    if not prompts:
        raise UserError(
            "there is no prompt",
            fix="--prompt='...', or one prompt per line on standard input",
        )
    return prompts


def _lines() -> list[str]:
    """The prompts on standard input, one a line."""
    try:
        lines = [line.rstrip("\r\n") for line in sys.stdin]
        "".join(lines).encode()  # what was no UTF-8 is let in, and cannot go out
    except UnicodeError as error:
        raise UserError(
            "a prompt is no text",
            where="standard input",
            expected="UTF-8, one prompt a line",
            got=str(error)[:200],
        ) from error
    return lines


def is_chat(template: str, policy: Policy) -> bool:
    """Whether prompts go through the chat template."""
    if template == "chat" and policy.base.tokenizer.template is None:
        raise UserError(
            "this model's tokenizer has no chat template",
            where="--template=chat",
            fix="--template=raw continues the prompt as it stands",
        )
    has = policy.base.tokenizer.template is not None
    return has and (template == "chat" or (template == "auto" and policy.chat))


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, chat: bool) -> list[int]:
    if chat:
        return tokenizer.encode_chat([{"role": "user", "content": prompt}])
    return tokenizer.encode_prompt(prompt)


def _result(
    tokenizer: Tokenizer, prompt: str, ids: list[int], made: Completion, *, chat: bool
) -> dict[str, Any]:
    text = tokenizer.decode(made.tokens)
    if not chat:
        # Some decoders drop a leading space: it is there in the whole text.
        before, whole = tokenizer.decode(ids), tokenizer.decode(ids + made.tokens)
        text = whole[len(before) :] if whole.startswith(before) else text
    return {
        "prompt": prompt,
        "text": text,
        "tokens": made.tokens,
        "prompt_tokens": len(ids),
        "stopped": made.stopped,
    }


def talk(
    generator: Generator,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    chat: bool,
    command: Callable[[str], bool] = lambda line: False,
) -> None:
    """A conversation on the terminal; without a template, one continuation per line.

    Args:
      command: told each line; says whether it has dealt with it.
    """
    say("/reset forgets what was said, /quit ends" if chat else "/quit ends")
    messages: list[dict[str, Any]] = []
    while (line := _ask()) is not None:
        if line == "/reset":
            messages = []
            continue
        if not line.strip() or command(line):
            continue
        said = [*messages, {"role": "user", "content": line}]
        try:
            if chat:
                ids = tokenizer.encode_chat(said)
            else:
                ids = encode_prompt(tokenizer, line, chat=False)
            blocks = generator.stream(ids, max_new_tokens, sampling)
            text = ""
            for piece in pieces(tokenizer, [] if chat else ids, blocks):
                say(printable(piece), end="")
                text += piece
        except UserError as error:
            say(error.screen())
            continue
        say()
        messages = [*said, {"role": "assistant", "content": text}]


def pieces(
    tokenizer: Tokenizer, before: list[int], blocks: Iterator[Sequence[int]]
) -> Iterator[str]:
    """The text of a stream of tokens, never cutting a character in two."""
    tokens, shown = list(before), len(tokenizer.decode(before))
    text = ""
    for block in blocks:
        tokens += block
        text = tokenizer.decode(tokens)
        if not text.endswith(UNFINISHED):
            yield text[shown:]
            shown = len(text)
    yield text[shown:]


def _ask() -> str | None:
    """A line from the terminal; None at its end, or where /quit was typed."""
    try:
        line = input("> ")
    except (EOFError, KeyboardInterrupt):
        say()
        return None
    return None if line.strip() in ("/quit", "/exit") else line


def _note(text: str) -> None:
    say(text, stream=sys.stderr)


if __name__ == "__main__":
    cli.entry(main, define)
