"""Models that no stock architecture expresses: their own config and names, behind ``modeling_lightbulb.py``."""

from dataclasses import dataclass
from typing import Any

import torch

from lightbulb.experts.hf.family import Family, InteropError
from lightbulb.experts.hf.links import LinkTable
from lightbulb.models.language import LanguageConfig
from lightbulb.nn.parameter import keeper_of

MODELING = "modeling_lightbulb"


@dataclass(frozen=True)
class Own(Family):
    """Any language model of ours."""

    def read(self, theirs: dict[str, Any], source: str) -> dict[str, Any]:
        values = theirs.get("lightbulb")
        if not isinstance(values, dict):
            raise InteropError(f"{source}: has no section 'lightbulb' with the model's config")
        return values

    def write(self, ours: LanguageConfig) -> dict[str, Any]:
        return {
            "auto_map": {
                "AutoConfig": f"{MODELING}.LightBulbConfig",
                "AutoModelForCausalLM": f"{MODELING}.LightBulbForCausalLM",
            },
            "vocab_size": ours.vocab_size,
            "hidden_size": ours.dim,
            "num_hidden_layers": ours.num_layers,
            "max_position_embeddings": ours.context_length,
            "tie_word_embeddings": False,  # one table here is one tensor there: nothing is to be tied
            "use_cache": False,
            "lightbulb": ours.model_dump(mode="json"),
        }

    def link(self, ours: LanguageConfig, table: LinkTable) -> None:
        with torch.device("meta"):
            model = ours.build()
        if any(keeper_of(parameter) is not None for parameter in model.parameters()):
            raise InteropError("frozen weights in four bits cannot be exported; train without quantize")
        for name, values in model.named_buffers():  # loads and biases of routers
            table.shapes[name] = tuple(values.shape)
        for name in table.shapes:
            table.add(name, f"model.{name}")


OWN = Own("lightbulb", "LightBulbForCausalLM")
