"""A model as a graph of ONNX operators, with its weights and vocabulary; see `chargpt.export.onnx`.

Written operator by operator, so that the file has few of them. Shapes are those of `chargpt.model`;
P tokens come before the T new ones, S is P + T, and N is B × T.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from chargpt.base.errors import UserError
from chargpt.base.version import __version__
from chargpt.compute.counts import count_parameters
from chargpt.config import GPT2Config
from chargpt.data.tokenizer import CharTokenizer
from chargpt.model import GPT2, Block, CausalSelfAttention, FeedForward, Residual

OPSET, IR_VERSION = 20, 9  # ONNX Runtime 1.18 reads them
MAX_BYTES = 2**31 - 2**20  # of a file in one piece


def import_onnx() -> tuple[Any, Any]:
    """Return the packages onnx and onnxruntime; a UserError if one is missing."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"--to onnx needs {error.name}, which is not installed: pip install 'chargpt[onnx]'"
        ) from error
    return onnx, onnxruntime


def to_onnx(model: GPT2, tokenizer: CharTokenizer, *, int8: bool = False) -> bytes:
    """Return a model as the bytes of an ONNX file; with `int8`, its matrices are rounded.

    Raises:
        UserError: a package is missing, or the file would be larger than 2 GB.
    """
    onnx, _ = import_onnx()
    if count_parameters(model) * (1 if int8 else 4) > MAX_BYTES:
        raise UserError("the model is too large for one ONNX file (2 GB): give --int8")
    config, helper, kinds = model.config, onnx.helper, onnx.TensorProto
    H, D = config.n_head, config.d_model // config.n_head
    graph = _Graph(config, int8)
    logits = graph.gpt2(model)
    caches = [f"{number}.{part}" for number in range(config.n_layer) for part in ("key", "value")]
    inputs: list[Any] = [(name, kinds.INT64, ("B", "T")) for name in ("input_ids", "position_ids")]
    inputs += [(f"past_key_values.{cache}", kinds.FLOAT, ("B", H, "P", D)) for cache in caches]
    outputs: list[Any] = [(logits, kinds.FLOAT, ("B", "T", config.vocab_size))]
    outputs += [(f"present.{cache}", kinds.FLOAT, ("B", H, "S", D)) for cache in caches]
    file = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "gpt2",
            [helper.make_tensor_value_info(*value) for value in inputs],
            [helper.make_tensor_value_info(*value) for value in outputs],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="chargpt",
        producer_version=__version__,
    )
    facts = {
        "characters": tokenizer.characters,
        "end_of_text_id": tokenizer.end_of_text_id,
        "block_size": config.block_size,
    }
    helper.set_model_props(file, {name: json.dumps(value) for name, value in facts.items()})
    onnx.checker.check_model(file, full_check=True)
    data: bytes = file.SerializeToString()
    return data


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix, (n, m), as numbers from -127 to 127 and a scale for each row, (n, 1)."""
    scales = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    return (weight / scales).round().to(torch.int8), scales


class _Graph:
    """Nodes and constants; methods add some and return the name of the result."""

    def __init__(self, config: GPT2Config, int8: bool) -> None:
        self.onnx, _ = import_onnx()
        self.config, self.int8 = config, int8
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"{kind}.{len(self.nodes)}"
        node = self.onnx.helper.make_node(kind, [*inputs], [name], name=name, **attributes)
        self.nodes.append(node)
        return name

    def constant(self, value: npt.ArrayLike, name: str = "") -> str:
        name = name or f"constant.{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def parameter(self, value: Tensor | None, name: str) -> list[str]:
        """Add a parameter; [] for a bias that the model does not have."""
        if value is None:
            return []
        value = value.detach()
        if not self.int8 or value.dim() == 1:
            return [self.constant(value.numpy(), name)]
        numbers, scales = quantize(value)
        # ONNX Runtime computes this once, when it loads the file.
        whole = self.op("Cast", self.constant(numbers.numpy(), f"{name}.int8"), to=1)
        return [self.op("Mul", whole, self.constant(scales.numpy(), f"{name}.scale"))]

    def gpt2(self, model: GPT2) -> str:
        config = self.config
        [tokens] = self.parameter(model.token_embedding.weight, "token_embedding.weight")
        [places] = self.parameter(model.position_embedding.weight, "position_embedding.weight")
        self.add_shapes_and_mask()
        x = self.op("Gather", tokens, "input_ids")
        x = self.op("Add", x, self.op("Gather", places, "position_ids"))  # (B, T, C)
        x = self.op("Reshape", x, "N, C")
        for number, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            x = self.residual(x, block.attention, f"blocks.{number}.attention")
            x = self.residual(x, block.feed_forward, f"blocks.{number}.feed_forward")
        x = self.norm(x, model.final_norm, "final_norm")
        x = self.op("Gemm", x, tokens, transB=1)  # (N, V)
        size = self.constant(np.array([config.vocab_size]))
        return self.op("Reshape", x, self.op("Concat", "B, T", size, axis=0), name="logits")

    def add_shapes_and_mask(self) -> None:
        """Add what all layers use.

        The mask, (T, S), is 0 where a new token sees an earlier one or itself, and -inf elsewhere.
        """
        C, H = self.config.d_model, self.config.n_head
        self.constant(np.array([-1, C]), "N, C")
        self.op("Shape", "input_ids", name="B, T")
        self.op("Concat", "B, T", self.constant(np.array([H, C // H])), axis=0, name="B, T, H, D")
        self.constant(np.float32((C // H) ** -0.5), "scale")
        zero, one = self.constant(np.int64(0)), self.constant(np.int64(1))
        past = self.op("Squeeze", self.op("Shape", "past_key_values.0.key", start=2, end=3))  # P
        total = self.op("Add", past, self.op("Gather", "B, T", one))  # S
        columns = self.op("Range", zero, total, one)  # (S,)
        rows = self.op("Range", past, total, one)  # (T,)
        rows = self.op("Unsqueeze", rows, self.constant(np.array([1])))  # (T, 1)
        hidden = self.op("Greater", columns, rows)
        infinity, nothing = self.constant(np.float32(-np.inf)), self.constant(np.float32(0))
        self.op("Where", hidden, infinity, nothing, name="mask")

    def residual(self, x: str, residual: Residual, name: str) -> str:
        layer = residual.sublayer
        y = self.norm(x, residual.norm, f"{name}.norm")
        if isinstance(layer, CausalSelfAttention):
            y = self.attention(y, layer, f"{name}.sublayer")
        else:
            assert isinstance(layer, FeedForward)
            y = self.feed_forward(y, layer, f"{name}.sublayer")
        y = self.norm(y, residual.sublayer_norm, f"{name}.sublayer_norm")
        return self.norm(self.op("Add", x, y), residual.sum_norm, f"{name}.sum_norm")

    def norm(self, x: str, norm: nn.Module, name: str) -> str:
        if isinstance(norm, nn.Identity):
            return x
        assert isinstance(norm, nn.LayerNorm)
        parameters = self.parameter(norm.weight, f"{name}.weight")
        parameters += self.parameter(norm.bias, f"{name}.bias")
        return self.op("LayerNormalization", x, *parameters, epsilon=norm.eps)

    def linear(self, x: str, layer: nn.Linear, name: str) -> str:
        parameters = self.parameter(layer.weight, f"{name}.weight")
        parameters += self.parameter(layer.bias, f"{name}.bias")
        return self.op("Gemm", x, *parameters, transB=1)

    def attention(self, x: str, layer: CausalSelfAttention, name: str) -> str:
        number = name.split(".")[1]
        qkv = self.linear(x, layer.qkv, f"{name}.qkv")  # (N, 3C)
        parts = [f"{name}.{part}" for part in ("query", "key", "value")]
        self.nodes.append(self.onnx.helper.make_node("Split", [qkv], parts, axis=1, num_outputs=3))
        heads = [self.op("Reshape", part, "B, T, H, D") for part in parts]
        q, k, v = (self.op("Transpose", part, perm=[0, 2, 1, 3]) for part in heads)  # (B, H, T, D)
        keys, values = (
            self.op("Concat", f"past_key_values.{kind}", new, axis=2, name=f"present.{kind}")
            for kind, new in ((f"{number}.key", k), (f"{number}.value", v))
        )  # (B, H, S, D)
        keys = self.op("Transpose", keys, perm=[0, 1, 3, 2])
        scores = self.op("MatMul", self.op("Mul", q, "scale"), keys)  # (B, H, T, S)
        weights = self.op("Softmax", self.op("Add", scores, "mask"), axis=-1)
        y = self.op("MatMul", weights, values)  # (B, H, T, D)
        y = self.op("Reshape", self.op("Transpose", y, perm=[0, 2, 1, 3]), "N, C")
        return self.linear(y, layer.projection, f"{name}.projection")

    def feed_forward(self, x: str, layer: FeedForward, name: str) -> str:
        hidden = self.activation(self.linear(x, layer.expand, f"{name}.expand"))  # (N, F)
        return self.linear(hidden, layer.projection, f"{name}.projection")

    def activation(self, x: str) -> str:
        match self.config.activation_function:
            case "gelu":
                return self.op("Gelu", x, approximate="tanh")
            case "gelu_exact":
                return self.op("Gelu", x)
            case "relu_squared":
                x = self.op("Relu", x)
                return self.op("Mul", x, x)
            case "silu":
                return self.op("Mul", x, self.op("Sigmoid", x))
            case name:
                return self.op(name.capitalize(), x)  # Relu, Tanh, Sigmoid
