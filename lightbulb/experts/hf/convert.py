"""Export to Hugging Face and import from there, each with a receipt against transformers.

Weights are converted tensor by tensor, with memory for a file of the export or a tensor of the import. Then both models
are compared in float32, ours layer by layer, theirs as a whole, for which there must be memory; the result gets its
name when no logit differs by more than the bound.
"""

import gc
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from lightbulb.data.tokenizer import Tokenizer
from lightbulb.experts.hf import modeling_lightbulb
from lightbulb.experts.hf.families import family_of
from lightbulb.experts.hf.family import Family, InteropError
from lightbulb.experts.hf.folder import CONFIG, TOKENIZER, write_shards, write_values
from lightbulb.experts.hf.own import MODELING, OWN
from lightbulb.experts.memory import check_memory
from lightbulb.experts.receipt import (
    Comparison,
    Digests,
    Receipt,
    RouterRecord,
    Text,
    compare,
    parameters,
    watched_logits,
    write_receipt,
)
from lightbulb.experts.run_folder import untrained_config, whole_pieces, write_run
from lightbulb.experts.source import HuggingFaceSource, RunSource, Source, layered
from lightbulb.experts.text import held_out_text, tokens_of
from lightbulb.folder import built_beside, write_atomically
from lightbulb.models.language import LanguageConfig
from lightbulb.train.origin import Origin

TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json")
LOAD = ".load"  # of a router: no parameter
COMPARING = "the comparison with transformers"
VOCAB_TABLES = ("embedding.weight", "head")


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        dtype: of the exported weights.
        shard_bytes: of a file.
        data: corpus whose held-out text the models are compared on; None for text that every Python has.
        bound: of the greatest difference of a logit.
    """

    dtype: torch.dtype = torch.float32
    shard_bytes: int = 4 << 30
    data: Path | None = None
    bound: float = 1e-4


def export(run: Path, out: Path, options: Options) -> Receipt:
    """Write a run's model as a Hugging Face folder.

    Raises:
        CheckpointError: the run has no whole checkpoint.
        InteropError: the model cannot be exported.
        ReceiptError: transformers computes something else.
        FolderError: ``out`` is in use or cannot be written.
    """
    source = RunSource(run)
    tokenizer = Tokenizer.load(source.tokenizer_path)
    rows = source.model_config.vocab_size
    if tokenizer.vocab_size > rows:
        raise InteropError(f"{run}: its tokenizer has {tokenizer.vocab_size} entries, its model rows for {rows}")
    cut = source.model_config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    family, notes = _architecture(cut)
    if cut.vocab_size < rows:
        notes.append(f"{rows - cut.vocab_size} unused rows of the vocabulary were cut off")
    table = family.table(cut)
    check_memory(cut.cost().params, COMPARING)

    def ours(name: str, place: tuple[int, ...]) -> Tensor:
        values = source.read_part(name, place)
        return values[: cut.vocab_size] if name in VOCAB_TABLES else values

    text = held_out_text(tokenizer, options.data, cut.context_length)
    with built_beside(out) as partial:
        _write_config(partial, family, cut, tokenizer, options.dtype)
        _write_tokenizer(partial, source, tokenizer, cut)
        written = write_shards(
            partial, table.their_shapes, lambda name: table.theirs(name, ours), options.dtype, options.shard_bytes
        )
        expected, routers = watched_logits(layered(source, options.dtype), tokens_of(text))
        found = their_logits(partial, text)
        comparison = compare(
            found, expected[..., : cut.vocab_size], "LightBulb's model of the run", text, options.bound
        )
        receipt = _receipt("export", source, family, written, comparison, routers, notes)
        comparison.check(str(out))
        write_receipt(partial, receipt)
    return receipt


def import_model(folder: Path, run: Path, options: Options) -> Receipt:
    """Write a Hugging Face folder as a run, to start from.

    Raises:
        InteropError: the folder is damaged, or LightBulb cannot express the model.
        TokenizerError: it has no tokenizer that can be used.
        ReceiptError: our model computes something else than transformers.
        FolderError: ``run`` is in use or cannot be written.
    """
    source = HuggingFaceSource(folder)
    if not source.tokenizer_path.is_file():
        raise InteropError(
            f"{folder}: has no {TOKENIZER}; write one with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    check_memory(source.model_config.cost().params, COMPARING)
    tokenizer = Tokenizer.load(source.tokenizer_path)
    text = held_out_text(tokenizer, options.data, source.model_config.context_length)
    with built_beside(run) as partial:
        config = untrained_config(run, source.model_config, options.data or Path("data"), str(folder))
        pieces = whole_pieces(source.model_config, source.read, source.names())
        origin = Origin(kind="import", parents=[source.parent()], detail={"architecture": source.family.architecture})
        written = write_run(partial, config, pieces, source.tokenizer_path.read_text("utf-8"), origin)
        for name in TOKENIZER_EXTRAS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        expected = their_logits(folder, text)
        found, routers = watched_logits(layered(RunSource(partial)), tokens_of(text))
        comparison = compare(found, expected, f"transformers {transformers.__version__}", text, options.bound)
        receipt = _receipt("import", source, source.family, written, comparison, routers, [])
        comparison.check(str(run))
        write_receipt(partial, receipt)
    return receipt


@torch.no_grad()
def their_logits(folder: Path, text: Text) -> Tensor:
    """Logits of the model that transformers makes of a folder, in float32.

    Raises:
        InteropError: it loads with weights missing, left over or of another shape.
    """
    gc.collect()  # the model before is gone; one at a time
    own = json.loads((folder / CONFIG).read_text("utf-8")).get("model_type") == OWN.model_type
    loader: Any = modeling_lightbulb.LightBulbForCausalLM if own else transformers.AutoModelForCausalLM
    model, info = loader.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            raise InteropError(f"{folder}: transformers finds {problem.replace('_', ' ')}: {sorted(info[problem])[:3]}")
    return model.eval()(tokens_of(text), return_dict=True).logits.float()


def _architecture(config: LanguageConfig) -> tuple[Family, list[str]]:
    """The stock architecture, or our own and why."""
    try:
        return family_of(config), []
    except InteropError as error:
        return OWN, [f"not a stock architecture: {error}; load it with trust_remote_code=True where lightbulb is"]


def _write_config(
    folder: Path, family: Family, config: LanguageConfig, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    """config.json, generation_config.json, and our modelling file for a model that is not stock."""
    end = {"bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
    common = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": transformers.__version__,
    }
    write_values(folder / CONFIG, common | family.write(config) | end)
    generation = {"eos_token_id": tokenizer.eos_id, "do_sample": True, "max_length": config.context_length}
    write_values(folder / "generation_config.json", generation)
    if family is OWN:
        code = Path(modeling_lightbulb.__file__)
        write_atomically(folder / f"{MODELING}.py", code.read_bytes())


def _write_tokenizer(folder: Path, source: Source, tokenizer: Tokenizer, config: LanguageConfig) -> None:
    """The tokenizer, with the files that an imported model had beside it, or as little as there must be."""
    tokenizer.save(folder / TOKENIZER)
    defaults: list[dict[str, Any]] = [
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokenizer.eos,
            "model_max_length": config.context_length,
            "clean_up_tokenization_spaces": False,
        },
        {"eos_token": tokenizer.eos},
    ]
    for name, values in zip(TOKENIZER_EXTRAS, defaults, strict=True):
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
        else:
            write_values(folder / name, values)


def _receipt(
    conversion: str,
    source: RunSource | HuggingFaceSource,
    family: Family,
    written: Digests,
    comparison: Comparison,
    routers: dict[str, RouterRecord],
    notes: list[str],
) -> Receipt:
    given = source.digests()
    return Receipt(
        conversion=conversion,
        sources=[str(source.path)],
        architecture=family.architecture,
        parameters_in=parameters(given),
        parameters_out=parameters({name: record for name, record in written.items() if not name.endswith(LOAD)}),
        tensors_in=given,
        tensors_out=written,
        comparison=comparison,
        routers=routers,
        notes=notes,
        versions={"transformers": transformers.__version__, "torch": torch.__version__},
    )
