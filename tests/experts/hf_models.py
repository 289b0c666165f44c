"""Small random models of transformers, and runs of ours that nobody trained, as the tests of exchange use them."""

import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightbulb.config import build_config
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.experts.run_folder import untrained_config, whole_pieces, write_run
from lightbulb.models.language import LanguageConfig
from lightbulb.nn.parameter import initialise, stored_values

VOCAB = 320
BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}

GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", BASE | {"rms_norm_eps": 1e-5, "rope_theta": 5e5}),
    "llama-tied": ("Llama", BASE | {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("Mistral", BASE | {"sliding_window": 8}),
    "qwen2": ("Qwen2", BASE | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "llama-biases": ("Llama", BASE | {"attention_bias": True, "mlp_bias": True}),
    "qwen3": ("Qwen3", BASE | {"head_dim": 16}),
    "qwen3-biases": ("Qwen3", BASE | {"attention_bias": True}),
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", GPT2 | {"n_inner": 48, "activation_function": "gelu", "tie_word_embeddings": False,
                                    "layer_norm_epsilon": 1e-4}),
    "mixtral": ("Mixtral", BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "olmoe": ("Olmoe", BASE | EXPERTS),
    "olmoe-normed": ("Olmoe", BASE | EXPERTS | {"norm_topk_prob": True}),
    "qwen3-moe": ("Qwen3Moe", BASE | EXPERTS | {"head_dim": 8, "moe_intermediate_size": 24, "mlp_only_layers": [0],
                                                 "norm_topk_prob": True}),
    "mamba2": ("Mamba2", {"vocab_size": VOCAB, "hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 16,
                          "num_hidden_layers": 2, "n_groups": 1, "chunk_size": 16}),
}  # fmt: skip
"""Name to class and config."""

ATTENTION = {"type": "attention", "num_heads": 4, "num_kv_heads": 2}
MLP = {"type": "mlp", "hidden_dim": 40}
SWITCH = {"type": "switch", "num_experts": 4, "hidden_dim": 24}


def their_model(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A model of transformers whose logits spread; no norm is one and no bias zero."""
    kind, values = THEIRS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**values | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)
        else:
            parameter.add_(torch.randn_like(parameter) / 10)
    return model


def save_theirs(model: nn.Module, folder: Path) -> Path:
    """The model with the tokenizer in a folder."""
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer().save(folder / "tokenizer.json")
    return folder


def our_config(pattern: list[dict[str, Any]], **changes: Any) -> LanguageConfig:
    """A model of ours of these blocks."""
    values = {"vocab_size": VOCAB, "dim": 32, "num_layers": 2, "context_length": 64, "init_std": 0.1}
    return build_config(LanguageConfig, values | {"block_pattern": pattern} | changes)


def save_ours(config: LanguageConfig, run: Path) -> Path:
    """A run of random weights, biases too."""
    model = config.build()
    initialise(model, 1)
    values: dict[str, Tensor] = {name: stored_values(p) for name, p in model.named_parameters()}
    for name, value in values.items():
        if name.endswith(("norm.weight", ".bias")):
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(2)) / 10)
    for name, buffer in model.named_buffers():
        if name.endswith(".bias"):
            values[name] = torch.linspace(-0.3, 0.3, len(buffer))
    run.mkdir(parents=True)
    pieces = whole_pieces(config, values.__getitem__, values)
    write_run(run, untrained_config(run, config, Path("data")), pieces, vocabulary())
    return run


def vocabulary() -> str:
    """Content of a small ``tokenizer.json``."""
    return tokenizer()._text


@cache
def tokenizer() -> Tokenizer:
    """Trained on a module of the library; fewer entries than the models have rows."""
    return Tokenizer.train([Path(textwrap.__file__).read_text("utf-8")], VOCAB - 20)


def sample(length: int = 40) -> Tensor:
    """``[2, length]`` tokens."""
    return torch.randint(0, VOCAB - 20, (2, length), generator=torch.Generator().manual_seed(3))
