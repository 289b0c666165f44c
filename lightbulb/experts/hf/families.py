"""The architectures that models are exchanged with, and which one a model is."""

from typing import Any

from lightbulb.experts.hf.decoders import DECODERS, traits
from lightbulb.experts.hf.family import Family, InteropError
from lightbulb.experts.hf.gpt2 import GPT2, check_gpt2
from lightbulb.experts.hf.mamba2 import MAMBA2, check_mamba
from lightbulb.experts.hf.own import OWN
from lightbulb.mixers.token.mamba import MambaConfig
from lightbulb.models.language import LanguageConfig

FAMILIES: dict[str, Family] = {family.model_type: family for family in [*DECODERS, GPT2, MAMBA2, OWN]}
"""By the ``model_type`` of config.json."""

REASONS = {
    "gpt_neox": "its rotations are partial and its blocks parallel",
    "deepseek_v2": "its attention is latent",
    "deepseek_v3": "its attention is latent",
    "gemma": "its norms add one to their weights and its embeddings are scaled",
    "gemma2": "its norms add one to their weights and its logits are capped",
    "phi3": "its projections are fused",
    "mamba": "its state is Mamba-1's",
}
"""Why the first that people try are not among them."""


def family_of(ours: LanguageConfig) -> Family:
    """The stock architecture that a model is.

    Raises:
        InteropError: it is none; the message says why.
    """
    if ours.modifiers:
        names = ", ".join(modifier.type for modifier in ours.modifiers)
        raise InteropError(f"the modifiers {names} are in no stock architecture")
    if ours.scaling is not None:
        raise InteropError("width and depth scaling is in no stock architecture")
    if ours.gist_token_id is not None:
        raise InteropError("gist tokens are in no stock architecture")
    if ours.norm == "layer" and ours.learned_positions:
        check_gpt2(ours)
        return GPT2
    if ours.norm != "rms" or ours.learned_positions:
        raise InteropError(
            f"norm {ours.norm!r} with learned_positions {str(ours.learned_positions).lower()} is in no stock "
            "architecture; GPT-2 has 'layer' with true, all others 'rms' with false"
        )
    if isinstance(ours.layer(0).token, MambaConfig):
        check_mamba(ours)
        return MAMBA2
    found = traits(ours)
    for family in DECODERS:
        if family.fits(found):
            return family
    raise InteropError(f"no stock architecture has all of {', '.join(sorted(found))}")


def family_named(theirs: dict[str, Any], source: str) -> Family:
    """The architecture of a config.json.

    Raises:
        InteropError: it is none of ours.
    """
    name = theirs.get("model_type")
    if name in FAMILIES:
        return FAMILIES[name]
    reason = f": {REASONS[name]}" if name in REASONS else ""
    raise InteropError(f"{source}: model_type {name!r} cannot be imported{reason}; known are {', '.join(FAMILIES)}")
