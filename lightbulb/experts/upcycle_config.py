"""What `lightbulb upcycle` reads: which dense models become one mixture of experts, and how.

Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv:2403.07816), sparse upcycling (Komatsuzaki et al. 2022,
arXiv:2212.05055), Drop-Upcycling (Nakamura et al. 2025, arXiv:2502.19261), virtual groups of fine-grained experts (He
et al. 2024, arXiv:2410.07524); attention experts as in BAM (Zhang et al. 2024, arXiv:2408.08274).

A file in the shape of mergekit's mixtures (``base_model``, ``experts``, ``gate_mode``) is read too:
:func:`load_upcycle_config`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from lightbulb.config import Config, ConfigError, build_config, load_config, parse_override, read_yaml
from lightbulb.data.config import DataConfig, Mixture
from lightbulb.routing.router import RouterConfig
from lightbulb.train.config import TrainConfig

COPIES = ("sparse", "drop", "virtual-group")
"""Methods that make experts of one dense model."""

GATE_MODES = {"hidden": "centroid", "random": "random", "cheap_embed": "embedding"}
"""mergekit's name of how routers start, and ours."""
_MERGEKIT_KEYS = ("base_model", "experts", "gate_mode", "experts_per_token", "dtype", "run")
_IGNORED_PROMPTS = "negative_prompts"


class SourceConfig(Config):
    """A dense model that goes into the mixture."""

    path: Path
    """A LightBulb run, or a Hugging Face folder."""
    tokens: int | None = Field(None, ge=1)
    """Weight in the average of what is shared, such as the tokens it was trained on; all sources have one or none."""
    text: Path | None = None
    """Corpus folder of its domain, for learned routers; None for the one it was trained on."""
    mixture: Mixture | None = None
    """Which domains or clusters of that corpus; None for those (or the random part) its own run began with, of `text`
    for all."""
    prompts: list[str] = []
    """Texts of its domain, in place of a corpus."""


class RouterStart(Config):
    """What routers are before they are trained."""

    kind: Literal["random", "centroid", "closed_form", "embedding"] = "random"
    """``random``: normal. ``centroid``: the mean of the router's inputs over each cluster's text, less the mean of all.
    ``closed_form``: ridge regression from the router's inputs to the cluster. ``embedding``: the mean embedding of each
    cluster's text, the same for every layer."""
    std: float | None = Field(None, gt=0)
    """Standard deviation of random routers; None for the model's."""
    scale: float = Field(1.0, gt=0)
    """Standard deviation of a learned router's logits over the text."""
    tokens: int = Field(1024, ge=1)
    """Tokens of each cluster; their hidden states are kept, one vector for each router."""
    ridge: float = Field(1e-2, gt=0)
    """Penalty of the regression, as a share of the mean squared input."""
    balance: bool = True
    """Move a learned router's logits by a constant for each expert so that all get text."""


class UpcycleConfig(Config):
    """One or more dense models to one mixture of experts."""

    run: Path
    """Folder to write: a run with a checkpoint of step 0."""
    method: Literal["btx", "btx+moa", "sparse", "drop", "virtual-group"]
    """``btx``: each source's channel mixers become experts, everything else is averaged. ``btx+moa``: each source's
    query and output projections too. ``sparse``: every expert is a copy of one model's. ``drop``: copies of which some
    hidden units are drawn anew. ``virtual-group``: parts of one model's, each in several copies."""
    sources: list[SourceConfig] = Field(min_length=1)
    """The dense models: branches of one seed, of equal shapes."""
    seed_model: Path | None = None
    """What the sources were branched from: their distances to it are reported."""
    trunk: Literal["average", "seed_model"] = "average"
    """What becomes of everything that is no expert: the sources' average, or the seed model's."""
    seed: int = Field(1234, ge=0)
    """Draws routers and units."""
    num_experts: int | None = Field(None, ge=1)
    """Experts of a layer, a multiple of the sources; None for one for each source."""
    layers: list[int] | None = None
    """Layers that become mixtures; the others' channel mixers are averaged too. None for all with dense ones."""
    router: RouterConfig = RouterConfig()
    """How tokens choose. Of ``virtual-group``, ``top_k`` counts parts."""
    attention_router: RouterConfig | None = None
    """How tokens choose whose attention they use (``btx+moa``; ``top_k`` counts sources); None for ``router``."""
    router_start: RouterStart = RouterStart()
    """Routers before training."""
    clusters: list[SourceConfig] = []
    """For learned routers over copies of one source: the text of each cluster, as many as experts or a divisor."""
    drop_ratio: float = Field(0.5, ge=0, le=1)
    """Share of the hidden units that ``drop`` draws anew in each expert."""
    shards: int = Field(1, ge=1)
    """Parts that ``virtual-group`` cuts each channel mixer into."""
    moments: Literal["zero", "keep"] = "zero"
    """The optimizer's moments in the written checkpoint: none, or those of the sources, moved, averaged and zeroed as
    the weights are; ``start_from_moments`` of another run reads them."""
    shared_expert: bool = False
    """Keep the dense channel mixer as an expert for all tokens, and start the routed ones with outputs of zero."""
    data: DataConfig | None = None
    """Corpus of the run; None for the first source's, all of it where sources read different parts or mixtures."""
    train: TrainConfig | None = None
    """Training settings of the run; None for the first source's, with everything trained."""
    compare: bool = True
    """Run the result on text, for its routers' loads and its difference to the dense model; layer by layer, with memory
    for two layers."""
    bound: float = Field(1e-4, gt=0)
    """Greatest difference of a logit where the result must equal the dense model."""

    @model_validator(mode="after")
    def _method_fits(self) -> "UpcycleConfig":
        count = len(self.sources)
        if self.method in COPIES and count > 1:
            raise ValueError(f"method {self.method!r} makes experts of one model, sources has {count}; keep one")
        if self.method in COPIES and self.num_experts is None:
            raise ValueError(f"method {self.method!r} needs num_experts; set it")
        if self.method in ("btx", "btx+moa") and self.experts < 2:
            raise ValueError(f"method {self.method!r} needs two sources or more; name them, or use method: sparse")
        if self.experts % count:
            raise ValueError(f"num_experts {self.experts} is not a multiple of the {count} sources; change it")
        if (self.method == "virtual-group") != (self.shards > 1):
            raise ValueError(f"shards {self.shards} with method {self.method!r}: virtual-group has 2 or more, others 1")
        for name, size in (("num_experts", self.experts), ("router.top_k", self.router.top_k)):
            if size % self.shards:
                raise ValueError(f"{name} {size} is not a multiple of shards {self.shards}; change one of them")
        if self.router.top_k > self.experts:
            raise ValueError(f"router.top_k {self.router.top_k} exceeds the {self.experts} experts; lower it")
        return self

    @model_validator(mode="after")
    def _options_agree(self) -> "UpcycleConfig":
        if self.shared_expert and self.method not in ("sparse", "drop"):
            raise ValueError(f"shared_expert has no meaning for method {self.method!r}; use sparse or drop")
        if self.attention_router is not None and self.method != "btx+moa":
            raise ValueError(f"attention_router has no effect with method {self.method!r}; leave it out")
        if self.method in ("sparse", "virtual-group") and not self.shared_expert and not gates_sum_to_one(self.router):
            raise ValueError(
                f"method {self.method!r} equals the dense model only where gates sum to 1; set router.normalize_gates: "
                "true and router.gate_scale: 1"
            )
        if self.trunk == "seed_model" and self.seed_model is None:
            raise ValueError("trunk: seed_model needs a seed_model; name it")
        if len({source.tokens is None for source in self.sources}) > 1:
            raise ValueError("sources: some have tokens and some have not; give all of them or none")
        if self.clusters and (self.method not in COPIES or self.rows % len(self.clusters)):
            raise ValueError(
                f"clusters has {len(self.clusters)} for {self.rows} experts to choose from: give a divisor, and only "
                f"with the methods {', '.join(COPIES)} (other sources bring their own text)"
            )
        if self.clusters and self.router_start.kind == "random":
            raise ValueError("clusters has no effect on random routers; set router_start.kind: centroid")
        if self.method in COPIES and self.router_start.kind != "random" and len(self.clusters) < 2:
            raise ValueError(f"router_start.kind {self.router_start.kind!r} needs clusters (two or more); name them")
        return self

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return self.num_experts or len(self.sources)

    @property
    def rows(self) -> int:
        """Rows of a router that differ: experts that are no parts of one."""
        return self.experts // self.shards

    def source_of(self, row: int) -> int:
        """Which source a router's row (and its experts) stands for; neighbours share one."""
        return row * len(self.sources) // self.rows


def gates_sum_to_one(router: RouterConfig) -> bool:
    """Whether equal experts behind this router are one expert."""
    return router.normalize_gates and router.gate_scale == 1


def load_upcycle_config(path: str | Path, overrides: Sequence[str] = ()) -> UpcycleConfig:
    """Read a config of our own, or one in mergekit's shape, with ``a.b=c`` overrides.

    mergekit's takes what is no expert from ``base_model`` (``trunk: seed_model`` here), and does not say where the
    result goes: add ``run: FOLDER`` to it or to the command.

    Raises:
        ConfigError: naming field, value and fix.
    """
    values = read_yaml(Path(path))
    if "base_model" not in values:
        return load_config(UpcycleConfig, path, overrides)
    own: dict[str, Any] = {}
    for override in overrides:
        own |= parse_override(override)
    return build_config(UpcycleConfig, _translated(values, str(path)) | own, str(path))


def _translated(values: dict[str, Any], source: str) -> dict[str, Any]:
    """A mergekit mixture in our own words."""
    for key in values:
        if key not in _MERGEKIT_KEYS:
            raise ConfigError(f"{source}: {key!r} has no meaning here; known of mergekit: {', '.join(_MERGEKIT_KEYS)}")
    mode, experts = values.get("gate_mode", "hidden"), values.get("experts")
    if mode not in GATE_MODES:
        raise ConfigError(f"{source}: gate_mode {mode!r} is none of {', '.join(GATE_MODES)}; choose one")
    if not isinstance(experts, list) or not all(isinstance(e, dict) and "source_model" in e for e in experts):
        raise ConfigError(f"{source}: experts: expected a list of mappings with source_model")
    for number, expert in enumerate(experts):
        if expert.get(_IGNORED_PROMPTS):
            raise ConfigError(f"{source}: experts.{number}.{_IGNORED_PROMPTS} are not used here; leave them out")
        if mode != "random" and not expert.get("positive_prompts"):
            raise ConfigError(f"{source}: experts.{number}.positive_prompts: gate_mode {mode!r} needs some")
    result = {
        "method": "btx",
        "seed_model": values["base_model"],
        "trunk": "seed_model",
        "sources": [{"path": e["source_model"], "prompts": e.get("positive_prompts") or []} for e in experts],
        "router": {"top_k": values.get("experts_per_token", 2)},
        "router_start": {"kind": GATE_MODES[mode]},
    }
    return result | ({"run": values["run"]} if "run" in values else {})
