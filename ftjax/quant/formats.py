"""What a quantized weight is made of, as one small value: its format.

    nf4, fp4   4-bit tables over blocks of 64, as bitsandbytes has them (2305.14314)
    int8       symmetric, or affine with a zero point
    int4       the same, with half a byte a code

Blocks run over the flattened [outputs, inputs] weight, also across rows. Groups of the
integers run along the inputs of each output channel; group 0 is the whole channel.
"""

import math
from dataclasses import dataclass

from ftjax.errors import UserError

NAMES = ("nf4", "fp4", "int8", "int4")
TABLES = ("nf4", "fp4")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256  # scales that share one scale under double quantization


@dataclass(frozen=True)
class Format:
    """How the numbers of one weight are stored.

    Attributes:
      name: of NAMES.
      group: numbers that share a scale; 0 for a whole output channel (integers only).
      affine: codes are offset by a zero point, so that they cover [min, max].
      double: the scales of a table format are themselves 8-bit codes.
    """

    name: str
    group: int
    affine: bool = False
    double: bool = False

    @property
    def bits(self) -> int:
        """Of one code."""
        return 8 if self.name == "int8" else 4

    @property
    def is_table(self) -> bool:
        return self.name in TABLES

    def bits_per_parameter(self, inputs: int, outputs: int) -> float:
        """Of a weight of that size, codes and scales and whatever belongs to them.

        >>> Format('nf4', 64).bits_per_parameter(4096, 4096)
        4.5
        >>> round(Format('nf4', 64, double=True).bits_per_parameter(4096, 4096), 3)
        4.127
        """
        count = inputs * outputs
        if self.is_table:
            blocks = math.ceil(count / self.group)
            scales = 32 * blocks
            if self.double:
                scales = 8 * blocks + 32 * math.ceil(blocks / NESTED_BLOCK) + 32
            return (8 * math.ceil(count / 2) + scales) / count
        groups = outputs * (inputs // self.group if self.group else 1)
        codes = 8 * outputs * math.ceil(inputs * self.bits / 8)
        return (codes + groups * (32 + 8 * self.affine)) / count

    def __str__(self) -> str:
        parts = [self.name]
        if not self.is_table:
            parts.append("affine" if self.affine else "symmetric")
            parts.append(f"groups of {self.group}" if self.group else "per channel")
        elif self.group != 64:
            parts.append(f"blocks of {self.group}")
        if self.double:
            parts.append("double quantization")
        return ", ".join(parts)


def make_format(
    name: str,
    *,
    group: int = -1,
    scheme: str = "symmetric",
    double: bool = False,
    prefix: str = "config.quant.",
) -> Format:
    """A format from what a user says; group -1 is the usual one.

    The usual group is 64, and a whole channel for int8. Errors name the settings as
    `prefix` and their own names.

    Raises:
      UserError: for a name that is not known, or settings that do not go together.
    """
    if name not in NAMES:
        raise UserError(
            "this quantization format is not known",
            where=f"{prefix}format",
            expected=" or ".join(NAMES),
            got=repr(name),
        )
    if group == -1:
        group = 0 if name == "int8" else 64
    table = name in TABLES
    if table and group not in BLOCKS:
        raise _bad(f"{prefix}group", f"one of {', '.join(map(str, BLOCKS))}", group)
    if group < 0:
        raise _bad(f"{prefix}group", "0 (a whole channel) or more", group)
    if table and scheme != "symmetric":
        raise _bad(f"{prefix}scheme", f"symmetric: {name} has no zero point", scheme)
    if scheme not in ("symmetric", "affine"):
        raise _bad(f"{prefix}scheme", "symmetric or affine", scheme)
    if double and not table:
        raise _bad(f"{prefix}double_quant", f"False: {name} has no blocks", double)
    return Format(name, group, scheme == "affine", double)


def _bad(where: str, expected: str, got: object) -> UserError:
    return UserError(
        "a setting does not go with this quantization format",
        where=where,
        expected=expected,
        got=repr(got),
    )


def require_fit(
    fmt: Format, inputs: int, where: str, prefix: str = "config.quant."
) -> None:
    """A group must divide the inputs of the weight; blocks always fit.

    Raises:
      UserError: naming the weight.
    """
    if fmt.is_table or not fmt.group or inputs % fmt.group == 0:
        return
    near = [g for g in (32, 64, 128, 256) if inputs % g == 0]
    fix = f"{prefix}group={near[0] if near else 0}"
    raise UserError(
        "the group does not divide the inputs of a weight",
        where=f"{prefix}group for {where}",
        expected=f"a divisor of {inputs}",
        got=str(fmt.group),
        fix=fix + ", or leave this weight out: " + prefix + "pattern",
    )
