"""What an evaluation reads: which rows, how long they may be, how they are cut."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ftjax.config import USUAL_LENGTH, eval_source
from ftjax.data.dataset import Dataset, build_dataset
from ftjax.data.files import DOCUMENT_END
from ftjax.data.loader import Loader, row_length
from ftjax.data.report import DataReport
from ftjax.errors import UserError
from ftjax.loading import Base
from ftjax.objectives.tasks import task_of
from ftjax.run_folder import read_run_config

# Of plain text, where no config says otherwise: as configs/generic.py has it.
TEXT = {"overlong": "split", "separator": DOCUMENT_END}


@dataclass(frozen=True)
class Asked:
    """Which rows of what, in the words of `config.data`.

    Attributes:
      data: a file, `pydoc:...`, a name.
      split: of a `datasets` name.
      rows: at most so many, spread evenly; 0: all.
      max_length: tokens per row; 0: 1024, or the model's positions if fewer.
      batch_size: rows at a time.
    """

    data: str
    split: str = "test"
    rows: int = 0
    max_length: int = 0
    batch_size: int = 8
    completion_only: bool = True
    overlong: str = "truncate"
    separator: str = ""
    join: bool = False
    on_bad_row: str = "error"
    empty_completion: str = "drop"


def is_text(source: str) -> bool:
    """Whether a source is a file of plain text."""
    return source.endswith(".txt")


def settle(args: Any) -> Asked:
    """What the flags ask for; what they leave open is as in the config, or in the run.

    A run that is asked for no data reads its own held-out rows.

    Raises:
      UserError: there is no data.
    """
    known: dict[str, Any] = {}
    if args.config is not None:
        known = args.config.data.to_dict()
    elif args.workdir:
        known = read_run_config(args.workdir)["data"]
    source, rows = args.data, 0
    if not source and args.workdir:
        source, rows = eval_source(known), known.get("eval_rows", 0)
    if not source:
        raise UserError("there is nothing to evaluate on", fix="--data=FILE")
    known = known or (TEXT if is_text(source) else {})
    found = {"data": source, "rows": rows, "split": args.split}
    for name in (field.name for field in fields(Asked) if field.name not in found):
        given = getattr(args, name, None)
        if given is None and name in known:
            given = known[name]
        if given is not None:
            found[name] = given
    return Asked(**found)


def load_rows(
    asked: Asked, base: Base, mesh: Mesh, most: int, task: str, reads: str = ""
) -> tuple[Loader, int]:
    """The rows as a task reads them, and how many make a batch.

    Args:
      most: tokens of a row that the model has positions for.
      task: of `objectives.tasks`.
      reads: another kind of rows than the task's; see `data.groups`.
    """
    longest = length_of(asked, most)
    dataset = load_dataset(asked, base, longest, reads or task_of(task).reads)
    dataset.ends = task_of(task).ends
    length = row_length(dataset, max_length=longest, packing=False)
    loader = Loader(dataset, length=length, packing=True, seed=0, shuffle=False)
    rows = -(-min(asked.batch_size, loader.rows_per_epoch) // mesh.size) * mesh.size
    return loader, rows


def load_dataset(asked: Asked, base: Base, longest: int, reads: str) -> Dataset:
    """The data set of an evaluation, rows of at most `longest` tokens."""
    rules = asdict(asked) | {"max_length": longest, "eval_rows": asked.rows}
    return build_dataset(
        asked.data,
        base.tokenizer,
        SimpleNamespace(**rules),
        vocab_size=base.spec.vocab_size,
        split="eval",
        reads=reads,
    )


def length_of(asked: Asked, most: int) -> int:
    """How many tokens of a row are looked at.

    Raises:
      UserError: more than the `most` that the model has positions for.
    """
    if asked.max_length > most:
        raise UserError(
            "rows would be longer than the model's context",
            where="--max_length",
            expected=f"at most {most}",
            got=str(asked.max_length),
        )
    return asked.max_length or min(most, USUAL_LENGTH)


def read_batches(
    asked: Asked, base: Base, mesh: Mesh, most: int = 0
) -> tuple[Iterator[dict[str, np.ndarray]], DataReport]:
    """The batches of a data set, in file order, and what the data was.

    Args:
      most: tokens that fit into the model's context; 0: all of its positions.
    """
    loader, rows = load_rows(asked, base, mesh, most or base.spec.max_positions, "sft")
    return loader.epoch(rows), loader.dataset.report
