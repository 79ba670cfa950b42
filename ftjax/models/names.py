"""The name map: every weight of a model, by module path and by published name.

All families here publish the same names, so the map follows from the `ModelSpec` alone:
no arrays and no JAX, so that a checkpoint can be checked before anything is loaded.
"""

import math
from dataclasses import dataclass

from ftjax.models.spec import ModelSpec

Path = tuple[str, ...]


@dataclass(frozen=True)
class Weight:
    """One leaf of the tree, and the tensor (or one tensor per layer) it is read from.

    Attributes:
      template: the published name; `{i}` stands for the layer.
      shape: of one layer's weight as ftjax keeps it: inputs first, then outputs.
      inputs: how many leading axes are inputs; 0 for what is not a matrix product.
      layers: how many layers are stacked on a leading axis; 0 where there is none.
    """

    template: str
    shape: tuple[int, ...]
    inputs: int = 0
    layers: int = 0

    @property
    def names(self) -> list[str]:
        """The published names, in the order of the layers."""
        return [self.template.format(i=i) for i in range(self.layers or 1)]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The published shape: [outputs, inputs] for a matrix, else `shape` flat."""
        if self.inputs:
            n = self.inputs
            return (math.prod(self.shape[n:]), math.prod(self.shape[:n]))
        if self.template.endswith("embed_tokens.weight"):
            return self.shape
        return (math.prod(self.shape),)

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """The shape of the leaf: `shape`, behind the layers where they are stacked."""
        return (self.layers, *self.shape) if self.layers else self.shape


def model_weights(spec: ModelSpec) -> dict[Path, Weight]:
    """Every weight of the model: {path in the tree: Weight}."""
    heads, kv_heads = (spec.n_heads, spec.head_dim), (spec.n_kv_heads, spec.head_dim)
    model, ffn = (spec.d_model,), (spec.d_ff,)
    found: dict[Path, Weight] = {
        ("embed_tokens", "embedding"): Weight(
            "model.embed_tokens.weight", (spec.vocab_size, spec.d_model)
        )
    }

    def layer(module: str, leaf: str, shape: tuple[int, ...], inputs: int = 0) -> None:
        suffix = "bias" if leaf == "b" else "weight"
        name = f"model.layers.{{i}}.{module}.{suffix}"
        path = ("layers", *module.split("."), leaf)
        found[path] = Weight(name, shape, inputs, spec.n_layers)

    def proj(
        module: str, ins: tuple[int, ...], outs: tuple[int, ...], bias: bool
    ) -> None:
        layer(module, "w", ins + outs, len(ins))
        if bias:
            layer(module, "b", outs)

    layer("input_layernorm", "scale", model)
    proj("self_attn.q_proj", model, heads, spec.qkv_bias)
    proj("self_attn.k_proj", model, kv_heads, spec.qkv_bias)
    proj("self_attn.v_proj", model, kv_heads, spec.qkv_bias)
    proj("self_attn.o_proj", heads, model, spec.o_bias)
    if spec.qk_norm:
        layer("self_attn.q_norm", "scale", (spec.head_dim,))
        layer("self_attn.k_norm", "scale", (spec.head_dim,))
    layer("post_attention_layernorm", "scale", model)
    proj("mlp.gate_proj", model, ffn, spec.mlp_bias)
    proj("mlp.up_proj", model, ffn, spec.mlp_bias)
    proj("mlp.down_proj", ffn, model, spec.mlp_bias)
    found[("norm", "scale")] = Weight("model.norm.weight", model)
    if not spec.tied:
        head = Weight("lm_head.weight", (spec.d_model, spec.vocab_size), 1)
        found[("lm_head", "w")] = head
    return found


def tensor_names(spec: ModelSpec) -> dict[Path, str]:
    """Published names by path: ('norm', 'scale') -> 'model.norm.weight'.

    A layer's name has `{i}` in it: 'model.layers.{i}.self_attn.q_proj.weight'.
    """
    return {path: weight.template for path, weight in model_weights(spec).items()}


def count_params(spec: ModelSpec) -> int:
    """The number of parameters; a tied head is the embedding and counts once."""
    return sum(math.prod(w.leaf_shape) for w in model_weights(spec).values())
