"""A quantized base as a run had it, and the run's adapter for it, in one folder.

    OUT/            the frozen codes as a model; transformers loads nf4, fp4 and int8
    OUT/adapter/    the update as it was trained, right over these codes alone

Nothing is rounded again, so that both together are the policy. Where the codes are not
those of the weights themselves (PiSSA, OLoRA, LoftQ of several turns) no other form
keeps all of it in a few bits. ftjax finds by its hash that the adapter belongs here.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from ftjax.checkpoints.folder import write_folder
from ftjax.checkpoints.peft_others import save_any
from ftjax.checkpoints.quant_save import save_quantized
from ftjax.errors import UserError
from ftjax.loading import open_base
from ftjax.merged import kinds, tree_reader
from ftjax.models.names import Path as LeafPath
from ftjax.models.proj import find_sites
from ftjax.policy import Policy
from ftjax.quant.encode import Encoded
from ftjax.quant.qtensor import QTensor, unpack

ADAPTER = "adapter"
WriteRest = Callable[[Path, Policy, dict[str, str], str], None]


def write_pair(out: Path, policy: Policy, write_rest: WriteRest) -> str:
    """Writes the folder; returns the dtype of what stays floating point in it.

    Args:
      out: the folder to make.
      policy: a low-rank update over a quantized base, loaded in float32.
      write_rest: writes what lies beside the weights.

    Raises:
      UserError: it is something else.
    """
    variables, plan, base = policy.variables, policy.plan, policy.base
    if variables.keys() != {"params", "quant", "lora"} or plan is None:
        raise UserError(
            "there are no two parts: codes that are frozen, and an update",
            where=policy.label,
            expected="LoRA over a quantized base",
            got=", ".join(sorted(variables)),
            fix="--to=peft or --to=merged",
        )
    quant = flatten_dict(variables["quant"])
    formats = {path[:-1]: codes.format for path, codes in quant.items()}
    wide = base.weights is None or base.weights.dtype != "BF16"
    dtype = "float32" if wide else "bfloat16"

    def fill(folder: Path) -> None:
        save_quantized(
            folder,
            tree_reader(variables["params"]),
            base.spec,
            formats,
            config=base.config,
            dtype=dtype,
            codes=codes_reader(quant),
        )
        facts = {"weights": kinds(variables["quant"]), "adapter": f"in {ADAPTER}/"}
        write_rest(folder, policy, facts, "transformers")
        written = open_base(str(folder), note=lambda _: None)
        sites, name = find_sites(policy.model), str(out.absolute())
        tree = {"lora": variables["lora"]}
        save_any(folder / ADAPTER, tree, plan, sites, name, written.hash)

    write_folder(out, fill)
    return dtype


def codes_reader(
    quant: dict[tuple[str, ...], QTensor],
) -> Callable[[LeafPath, int], Encoded]:
    """Gives the codes of a layer in the order of a checkpoint; exact."""

    def read(path: LeafPath, layer: int) -> Encoded:
        codes = quant[path]
        if codes.stack:
            codes = jax.tree.map(lambda x: np.asarray(x[layer]), codes)
        return unpack(codes)

    return read
