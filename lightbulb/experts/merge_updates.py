"""Low-rank updates added to their weights: ``W + s B A`` ("LoRA", 2021, arXiv:2106.09685), a plain model once more.

Tensor by tensor, with memory for one; then both models are run on text, and the result is kept if no logit differs by
more than the bound.
"""

from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from lightbulb.config import ConfigError, build_config
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.experts.hf.convert import Options
from lightbulb.experts.receipt import Receipt, compare, parameters, watched_logits, write_receipt
from lightbulb.experts.run_folder import whole_pieces, write_run
from lightbulb.experts.source import RunSource, layered
from lightbulb.experts.text import held_out_text, tokens_of
from lightbulb.folder import built_beside
from lightbulb.models.language import LanguageConfig
from lightbulb.modifiers.bitlinear import BitLinearConfig
from lightbulb.modifiers.lora import LoRAConfig
from lightbulb.train.config import DETACHED, RunConfig
from lightbulb.train.origin import Origin


def merge_updates(run: Path, out: Path, data: Path | None = None, bound: float = Options.bound) -> Receipt:
    """Write a run's model without its updates, which its weights then hold, as a run to start from.

    Args:
        run: its newest checkpoint is read.
        out: folder to write.
        data: corpus whose held-out text the models are compared on; None for text that every Python has.
        bound: greatest difference of a logit.

    Raises:
        ConfigError: the model has no updates, or weights that are quantised in every product.
        CheckpointError: the run has no whole checkpoint.
        ReceiptError: the merged model computes something else.
        FolderError: there is something at ``out``, or it cannot be written.
    """
    source = RunSource(run)
    updates = _updates_of(source.model_config, run)
    plain = source.model_config.model_copy(
        update={"modifiers": [modifier for modifier in source.model_config.modifiers if modifier is not updates]}
    )
    names = set(source.names())

    def read(name: str) -> Tensor:
        stem = name.removesuffix("weight")
        values = source.read(name)
        if f"{stem}adapter.a" not in names:
            return values
        return values + updates.scale * (source.read(f"{stem}adapter.b") @ source.read(f"{stem}adapter.a"))

    tokenizer = Tokenizer.load(source.tokenizer_path)
    text = held_out_text(tokenizer, data, plain.context_length)
    with built_beside(out) as partial:
        content = source.tokenizer_path.read_text("utf-8")
        origin = Origin(kind="finetune", parents=[source.parent()], detail={"merged": True})
        pieces = whole_pieces(plain, read, names)
        written = write_run(partial, _merged_config(source.config, plain, out), pieces, content, origin)
        expected, _ = watched_logits(layered(source), tokens_of(text))
        found, routers = watched_logits(layered(RunSource(partial)), tokens_of(text))
        comparison = compare(found, expected, f"{run} with its updates beside its weights", text, bound)
        comparison.check(str(out))
        tensors_in = source.digests()
        receipt = Receipt(
            conversion="merge",
            sources=[str(run)],
            architecture="low-rank updates added to their weights",
            parameters_in=parameters(tensors_in),
            parameters_out=plain.cost().params,
            tensors_in=tensors_in,
            tensors_out=written,
            comparison=comparison,
            routers=routers,
            versions={name: version(name) for name in ("lightbulb", "torch")},
        )
        write_receipt(partial, receipt)
    return receipt


def _updates_of(model: LanguageConfig, run: Path) -> LoRAConfig:
    for modifier in model.modifiers:
        if isinstance(modifier, BitLinearConfig):
            raise ConfigError(f"{run}: its weights are quantised in every product; leave the updates beside them")
    found = [modifier for modifier in model.modifiers if isinstance(modifier, LoRAConfig)]
    if not found:
        raise ConfigError(f"{run}: its model has no low-rank updates to merge")
    return found[0]


def _merged_config(config: RunConfig, plain: LanguageConfig, out: Path) -> RunConfig:
    """Of a run that has not been trained: everything would be."""
    values = config.model_dump(mode="json") | DETACHED | {"run": str(out), "model": plain}
    values["train"] |= {"trainable": "all"}
    return build_config(RunConfig, values, str(out))
