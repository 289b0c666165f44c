"""From dense models to one mixture of experts: `lightbulb upcycle`.

Read the sources tensor by tensor, write the mixture's first checkpoint piece by piece, run it on text, and let the
receipt decide: where the result must equal the dense model (copies, parts, zero outputs, equal sources) and does not,
nothing is left behind.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch

from lightbulb.config import ConfigError, build_config
from lightbulb.data.config import DataConfig
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.experts.cluster_text import contexts_of, random_contexts
from lightbulb.experts.moments import moment_pieces, updates_so_far
from lightbulb.experts.pieces import Merge
from lightbulb.experts.receipt import (
    Comparison,
    Digests,
    Receipt,
    RouterRecord,
    Text,
    compare,
    digest,
    parameters,
    watched_logits,
    write_receipt,
)
from lightbulb.experts.router_start import dense_model, learned_routers
from lightbulb.experts.run_folder import write_run
from lightbulb.experts.source import RunSource, Source, layered, open_source
from lightbulb.experts.text import held_out_text, tokens_of
from lightbulb.experts.upcycle_config import UpcycleConfig, gates_sum_to_one
from lightbulb.folder import built_beside
from lightbulb.train.config import RunConfig, TrainConfig
from lightbulb.train.origin import Origin

RANDOM_TOKENS = 256
DATA = Path("data")
"""Corpus of a run none of whose sources has one, to be set before it is trained."""


class Reference(NamedTuple):
    """The dense model that the mixture must equal, if there is one, and why."""

    why: str
    must_equal: bool


def upcycle(config: UpcycleConfig) -> Receipt:
    """Write the run that a config describes.

    Raises:
        ConfigError: the sources cannot become this mixture.
        ReceiptError: the result is not the dense model that it should equal.
        CheckpointError, InteropError, DataError, TokenizerError, FolderError: something cannot be read or written.
    """
    out = config.run.expanduser()
    sources = [open_source(source.path.expanduser()) for source in config.sources]
    seed_model = open_source(config.seed_model.expanduser()) if config.seed_model else None
    merge = Merge(config, sources, seed_model)
    _check_tokenizers(sources)
    tensors_in = _digests(merge)
    reference = _reference(merge, tensors_in)
    updates = updates_so_far(merge) if config.moments == "keep" else 0
    with built_beside(out) as folder:
        merge.compare_with_seed()
        if config.router_start.kind != "random":
            merge.routers = learned_routers(merge, _cluster_texts(merge))
        tokenizer = next((source.tokenizer_path for source in sources if source.tokenizer_path.is_file()), None)
        content = tokenizer.read_text("utf-8") if tokenizer else None
        moments = moment_pieces(merge) if config.moments == "keep" else ()
        tensors_out = write_run(folder, run_config(merge), merge.pieces(), content, _origin(merge), moments, updates)
        comparison, routers = _run_on_text(merge, folder, reference)
        if comparison is not None:
            comparison.check(str(out))
        receipt = Receipt(
            conversion="upcycle",
            sources=[str(source.path) for source in config.sources],
            architecture=config.method,
            parameters_in=parameters(tensors_in),
            parameters_out=merge.mixture.cost().params,
            tensors_in=tensors_in,
            tensors_out=tensors_out,
            comparison=comparison,
            routers=routers,
            notes=_notes(merge, reference, routers),
            versions={name: version(name) for name in ("lightbulb", "torch")},
        )
        write_receipt(folder, receipt)
    return receipt


def run_config(merge: Merge) -> RunConfig:
    """The run that goes on with the mixture: settings of the first source that is a run, where the config has none. All
    of it is trained, whatever was of the source.

    Raises:
        ConfigError: the settings do not fit each other.
    """
    config, first = merge.config, _first_run(merge.sources)
    inherited = {} if first is None else first.model_dump(include={"optimizer", "schedule", "seed"})
    least = TrainConfig(steps=1000, global_batch_size=8, micro_batch_size=1)
    train = config.train or (first.train.model_copy(update={"trainable": "all"}) if first else least)
    data = config.data or _common_data(merge.sources)
    settings = {"run": str(config.run), "model": merge.mixture, "data": data, "train": train}
    return build_config(RunConfig, inherited | settings, "upcycle")


def _origin(merge: Merge) -> Origin:
    """All that gives weights: the sources, and the seed's model where there is one."""
    models = [*merge.sources, *([merge.seed_model] if merge.seed_model else [])]
    return Origin(kind="upcycle", parents=[model.parent() for model in models], detail={"method": merge.config.method})


def _common_data(sources: list[Source]) -> DataConfig:
    """What the first run among the sources read; all of its corpus where others read something else of theirs."""
    read = [source.config.data for source in sources if isinstance(source, RunSource)]
    if not read:
        return DataConfig(path=DATA)
    whole = {"mixture": None, "stages": (), "part": None}
    return read[0] if all(data == read[0] for data in read) else read[0].model_copy(update=whole)


def _first_run(sources: list[Source]) -> RunConfig | None:
    return next((source.config for source in sources if isinstance(source, RunSource)), None)


def _digests(merge: Merge) -> Digests:
    """Records of all tensors of all sources, which are numbered if there are several."""
    several = len(merge.sources) > 1
    return {
        f"{number}:{name}" if several else name: digest(source.read(name), record=True)
        for number, source in enumerate(merge.sources)
        for name in merge.shapes
    }


def _reference(merge: Merge, digests: Digests) -> Reference:
    """Whether the mixture must equal its (first) source."""
    config = merge.config
    if config.shared_expert:
        return Reference("the dense model (routed experts start with outputs of zero)", True)
    routers = [config.router, *([config.attention_router] if config.attention_router else [])]
    if not all(map(gates_sum_to_one, routers)):
        return Reference("gates do not sum to 1: no model that the mixture equals", False)
    if config.method in ("sparse", "virtual-group"):
        return Reference("the dense model (all experts are made of it)", True)
    if config.method == "drop":
        kept = config.drop_ratio == 0
        return Reference("the dense model" if kept else "units were drawn anew: no model that the mixture equals", kept)
    equal = all(
        digests[f"{number}:{name}"] == digests[f"0:{name}"]
        for number in range(1, len(merge.sources))
        for name in merge.shapes
    )
    seeded = config.trunk == "seed_model"
    scaled = merge.is_attention_split and any(modifier.type == "bitlinear" for modifier in merge.dense.modifiers)
    if not equal or seeded or scaled:
        return Reference("sources differ: no model that the mixture equals", False)
    return Reference("the dense model (all sources are equal)", True)


def _run_on_text(merge: Merge, folder: Path, reference: Reference) -> tuple[Comparison | None, dict[str, RouterRecord]]:
    """Read back what was written, run it and the dense model on text."""
    if not merge.config.compare:
        return None, {}
    text = _comparison_text(merge)
    tokens = tokens_of(text)
    # Layers that round their inputs turn the last bit of a float32 into another code now and then.
    rounds = any(modifier.type == "bitlinear" for modifier in merge.dense.modifiers)
    dtype = torch.float64 if rounds else torch.float32
    found, routers = watched_logits(layered(RunSource(folder), compute_in=dtype), tokens)
    if not reference.must_equal:
        return None, routers
    expected = dense_model(merge, 0, dtype).logits(tokens)
    return compare(found, expected, reference.why, text, merge.config.bound), routers


def _comparison_text(merge: Merge) -> Text:
    """Rows of one length: held out, else of the clusters, else any text that the tokenizer reads."""
    config, model, run = merge.config, merge.dense, _first_run(merge.sources)
    tokenizer = merge.sources[0].tokenizer_path
    data = config.data or (run.data if run else None)
    is_corpus = data is not None and (data.path.expanduser() / "manifest.json").is_file()
    if data is not None and (is_corpus or config.data):
        return held_out_text(Tokenizer.load(tokenizer), data.path.expanduser(), model.context_length)
    if any(cluster.prompts or cluster.text for cluster in config.clusters or config.sources):
        contexts = [ids for cluster in _cluster_texts(merge) for ids in cluster]
        length = min(map(len, contexts))
        return Text(source="text of the clusters", token_ids=[ids[:length] for ids in contexts])
    if tokenizer.is_file():
        return held_out_text(Tokenizer.load(tokenizer), None, model.context_length)
    return Text(source="random ids, no text", token_ids=random_contexts(model, RANDOM_TOKENS, config.seed))


def _cluster_texts(merge: Merge) -> list[list[list[int]]]:
    """Contexts of each cluster: the sources' domains, or the clusters of one source's copies."""
    config = merge.config
    runs = [source.config.data if isinstance(source, RunSource) else None for source in merge.sources]
    clusters = config.clusters or config.sources
    owns = runs * len(clusters) if config.clusters else runs
    tokenizer, tokens = merge.sources[0].tokenizer_path, config.router_start.tokens
    texts = [
        contexts_of(cluster, own, tokenizer, merge.dense, tokens) for cluster, own in zip(clusters, owns, strict=True)
    ]
    for number, text in enumerate(texts):
        if text in texts[:number]:
            field = "clusters" if config.clusters else "sources"
            raise ConfigError(
                f"{field}.{number} has the same text as {field}.{texts.index(text)}, routers cannot tell them apart; "
                "give each text, prompts, or a mixture of its own clusters, or set router_start.kind: random"
            )
    return texts


def _notes(merge: Merge, reference: Reference, routers: dict[str, RouterRecord]) -> list[str]:
    """What the numbers do not say."""
    notes = [f"equality: {reference.why}"]
    if merge.config.moments == "keep":
        notes.append("the optimizer's moments are the sources', zero for what is new")
    if merge.deltas is not None:
        distances, cosines = merge.deltas.distances(), merge.deltas.cosines()
        for number, distance in enumerate(distances):
            others = ", ".join(f"{cosines[number][other]:.3f}" for other in range(len(distances)) if other != number)
            notes.append(
                f"source {number} is {distance:.2%} of the seed's length away from it; cosines with the others' "
                f"differences: {others}"
            )
    for name, record in routers.items():
        if idle := [expert for expert, load in enumerate(record.load) if load == 0]:
            notes.append(f"{name}: no token of the text goes to experts {idle}")
    return notes


def _check_tokenizers(sources: list[Source]) -> None:
    """Raise ConfigError where two sources' ids mean different tokens."""
    known = [(source, _vocabulary(source.tokenizer_path)) for source in sources if source.tokenizer_path.is_file()]
    for source, vocabulary in known[1:]:
        if vocabulary != known[0][1]:
            raise ConfigError(
                f"{source.path}: its tokenizer has another vocabulary than {known[0][0].path}; sources must share one"
            )


def _vocabulary(tokenizer: Path) -> Any:
    try:
        return orjson.loads(tokenizer.read_bytes())["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{tokenizer}: cannot be read as a tokenizer.json ({error}); restore it") from None
