"""Small models of every kind of router, and held-out text for them."""

from pathlib import Path
from typing import Any

from lightbulb.config import build_config
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.evaluation.held_out import HeldOutText
from lightbulb.models.language import LanguageConfig, LanguageModel
from lightbulb.nn.parameter import initialise

SWITCH: dict[str, Any] = {"type": "switch", "num_experts": 4, "hidden_dim": 16}
MODEL: dict[str, Any] = {
    "vocab_size": 512, "dim": 32, "num_layers": 2, "context_length": 32,
    "block_pattern": [
        {"token": {"type": "attention", "num_heads": 4, "num_kv_heads": 2}, "channel": SWITCH},
        {
            "token": {"type": "moa", "num_experts": 4, "num_kv_heads": 2, "head_dim": 8},
            "channel": {"type": "deepseek_moe", "num_experts": 4, "hidden_dim": 16, "router": {"top_k": 1}},
        },
    ],
}  # fmt: skip


def text_of(corpus: Path, **settings: Any) -> HeldOutText:
    tokenizer = Tokenizer.load(corpus / "tokenizer.json")
    return HeldOutText(corpus, build_config(LanguageConfig, MODEL), tokenizer, **settings)


def model_of(seed: int, **changes: Any) -> LanguageModel:
    """A model with weights drawn from a seed."""
    model = build_config(LanguageConfig, MODEL | {"init_std": 0.3} | changes).build()
    initialise(model, seed)
    return model.eval().requires_grad_(False)
