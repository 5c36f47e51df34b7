"""Files in nanoGPT's format: ckpt.pt of a random model, and meta.pkl."""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARGS = {
    "n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 12, "bias": True, "vocab_size": 7,
    "dropout": 0.2,
}  # fmt: skip
SORTED, UNSORTED = "\n abcé𝄞", "c\n𝄞éab "


def random_state(args: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return random parameters with the names and shapes of nanoGPT's model."""
    generator = torch.Generator().manual_seed(0)
    C, V = args["n_embd"], args["vocab_size"]
    shapes = {"transformer.wte": (V, C), "transformer.wpe": (args["block_size"], C)}
    for layer in range(args["n_layer"]):
        block = {
            "ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C),
            "ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C),
        }  # fmt: skip
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    shapes["transformer.ln_f"] = (C,)
    state = OrderedDict()
    for name, shape in shapes.items():
        state[f"{prefix}{name}.weight"] = torch.randn(shape, generator=generator)
        if args["bias"] and ".w" not in name:
            state[f"{prefix}{name}.bias"] = torch.randn(shape[:1], generator=generator)
    state[f"{prefix}lm_head.weight"] = state[f"{prefix}transformer.wte.weight"]
    return state


def checkpoint(args: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return what train.py saves."""
    state = random_state(args, prefix)
    moments = {i: {"step": torch.tensor(5.0), "exp_avg": p} for i, p in enumerate(state.values())}
    groups = [{"params": [*moments], "lr": 1e-3, "betas": (0.9, 0.99), "fused": None}]
    return {
        "model": state,
        "optimizer": {"state": moments, "param_groups": groups},
        "model_args": args,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.4697),
        "config": {"out_dir": "out", "eval_interval": 250, "wandb_log": False, "dropout": 0.2},
    }


def vocabulary(characters: str) -> dict[str, Any]:
    itos = dict(enumerate(characters))
    return {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}


def write(folder: Path, values: dict[str, Any], meta: Any) -> tuple[Path, Path, Path]:
    """Write ckpt.pt and meta.pkl, and return the arguments of `import_nanogpt`."""
    torch.save(values, folder / "ckpt.pt")
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder / "ckpt.pt", folder / "meta.pkl", folder / "run"


META = vocabulary(SORTED)
