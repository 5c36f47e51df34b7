"""Time every attention backend, forward and backward, in the shapes of the presets.

Run it from anywhere: ``python benchmarks/attention.py --presets tiny baby``. A number is the
median milliseconds of one layer with the preset's batch; ``–`` means that the backend does not run
on this machine, shape or type.
"""

from __future__ import annotations

import argparse
import typing

import torch
from torch import Tensor

from chargpt.compute import native
from chargpt.compute.device import choose_device, describe_device
from chargpt.compute.fast_layers import Backend, set_attention, use_fast_dropout
from chargpt.compute.library import KernelsError
from chargpt.config import PRESETS, GPT2Config
from chargpt.measure.timing import median_seconds
from chargpt.model import CausalSelfAttention

BACKENDS: tuple[Backend, ...] = typing.get_args(Backend)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Print a line for each preset, type and dropout, with a column for each backend."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--seconds", type=float, default=0.5, help="for each number (0.5)")
    arguments = parser.parse_args()
    device = choose_device("auto").device
    print(f"{describe_device(device)}, torch {torch.__version__}; milliseconds per layer")
    columns = "".join(f"{backend:>10}" for backend in BACKENDS)
    print(f"{'preset':<8}{'B × H × T × D':<20}{'type':<6}{'dropout':<9}{columns}")
    for name in arguments.presets:
        for dtype in DTYPES if device.type == "cuda" else ("fp32", "bf16"):
            for dropout_p in sorted({0.0, PRESETS[name]().model_config.dropout}):
                print(f"{name:<8}{_shape(name):<20}{dtype:<6}{dropout_p:<9g}", end="", flush=True)
                for backend in BACKENDS:
                    qkv = _random(name, DTYPES[dtype], device)
                    config = PRESETS[name]().model_config.replace(attention_dropout=dropout_p)
                    shown = time_backend(backend, config, qkv, arguments.seconds)
                    print(f"{shown:>10}", end="", flush=True)
                print()


def time_backend(backend: Backend, config: GPT2Config, qkv: Tensor, seconds: float) -> str:
    """Return the median milliseconds of a forward and backward pass; – if the backend does not run.

    Args:
        backend: the backend to time.
        config: the shape and the dropout.
        qkv: queries, keys and values side by side, (B, T, 3C).
        seconds: how long to measure.
    """
    layer = CausalSelfAttention(config).train()
    use_fast_dropout(layer)
    set_attention(layer, backend)
    upstream = torch.randn_like(qkv[..., : config.d_model])  # (B, T, C)

    def both_ways() -> None:
        layer.attend(qkv).backward(upstream)
        qkv.grad = None

    try:
        width = config.d_model // config.n_head
        if backend == "native" and not native.supports(qkv, widths=(width,)):
            return "–"  # it would fall back to another backend
        return f"{1000 * median_seconds(both_ways, seconds, qkv.device):.2f}"
    except (KernelsError, torch.OutOfMemoryError):
        return "–"


def _shape(name: str) -> str:
    preset = PRESETS[name]()
    H, T, C = (
        preset.model_config.n_head,
        preset.model_config.block_size,
        preset.model_config.d_model,
    )
    return f"{preset.train_config.batch_size} × {H} × {T} × {C // H}"


def _random(name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    preset = PRESETS[name]()
    size = (
        preset.train_config.batch_size,
        preset.model_config.block_size,
        3 * preset.model_config.d_model,
    )
    return torch.randn(size, device=device).to(dtype).requires_grad_()  # (B, T, 3C)


if __name__ == "__main__":
    main()
