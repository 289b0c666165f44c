"""Continue a prompt with a trained model: `lightbulb generate RUN --prompt "def main("`.

Reads the newest checkpoint of a run folder that `lightbulb pretrain` wrote. Text is printed as it comes; with beams,
when the search has ended, the best first.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lightbulb.config import ConfigError, build_config
from lightbulb.data.tokenizer import Tokenizer, TokenizerError
from lightbulb.inference.generate import Decoder, GenerationError, SamplingConfig, TextStream, beam_search, generate
from lightbulb.modifiers.packed import pack
from lightbulb.ops import FORMATS
from lightbulb.train.checkpoint import CheckpointError, load_model_for_inference


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    options = parser().parse_args(argv)
    # a warning comes while a line of text is open
    logging.basicConfig(level=logging.WARNING, format="\nwarning: %(message)s")
    try:
        settings = {name: getattr(options, name) for name in SamplingConfig.model_fields if name in options}
        sampling = build_config(SamplingConfig, settings, "options")
        check_samples(options.num_samples, sampling)
        model, tokenizer, _ = load_model_for_inference(options.run)
        if options.packed is not None and not pack(model, options.packed):
            raise ConfigError("options: packed: the model has no bitlinear layers; leave it out")
        prompt_ids = tokenizer.encode_batch([options.prompt])[0] or [tokenizer.eos_id]
        for number, pieces in enumerate(texts(model, tokenizer, prompt_ids, sampling, options.num_samples), 1):
            if options.num_samples > 1:
                print(f"--- {number} of {options.num_samples}")
            print(options.prompt, end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
    except (CheckpointError, ConfigError, TokenizerError, GenerationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Options, whose defaults and limits are those of :class:`SamplingConfig`."""
    result = argparse.ArgumentParser(prog="lightbulb generate", description=__doc__.partition(":")[0] + ".")
    result.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    result.add_argument("--prompt", default="", help="text to continue; empty starts a new document")
    result.add_argument("--num-samples", type=int, default=1, help="how many texts; with beams, the best so many")
    about = "keep the weights of bitlinear layers packed, 4 (2bit) or 5 (base3) to a byte"
    result.add_argument("--packed", nargs="?", const=FORMATS[0], choices=FORMATS, help=about)
    for name, field in SamplingConfig.model_fields.items():
        about = f"{field.description} (default {field.default})"
        kind = int if isinstance(field.default, int) else float
        option = "--" + name.replace("_", "-")
        result.add_argument(option, dest=name, type=kind, default=argparse.SUPPRESS, help=about)
    return result


def check_samples(num_samples: int, sampling: SamplingConfig) -> None:
    """Refuse a number of texts that cannot be had or would be one text several times.

    Raises:
        ConfigError: it is below 1, above the number of beams, or above 1 at temperature 0.
    """
    if num_samples < 1:
        raise ConfigError(f"options: num_samples: {num_samples} is below 1; leave it out for one text")
    if 1 < sampling.num_beams < num_samples:
        raise ConfigError(f"options: num_samples: {num_samples} is above num_beams ({sampling.num_beams}); lower it")
    if num_samples > 1 and sampling.num_beams == 1 and sampling.temperature == 0:
        raise ConfigError("options: num_samples: temperature 0 gives one text every time; raise temperature")


def texts(
    model: Decoder, tokenizer: Tokenizer, prompt_ids: list[int], sampling: SamplingConfig, num_samples: int
) -> Iterator[Iterator[str]]:
    """The continuations, each as a stream of text."""
    if sampling.num_beams > 1:
        found = beam_search(
            model, prompt_ids, sampling.num_beams, sampling.max_new_tokens, tokenizer.eos_id, sampling.length_penalty
        )
        for ids, _ in found[:num_samples]:
            yield iter([tokenizer.decode(ids)])
        return
    # one generator for all texts: each goes on where the one before stopped drawing
    generator = torch.Generator().manual_seed(sampling.seed)
    for _ in range(num_samples):
        yield stream_text(tokenizer, generate(model, prompt_ids, sampling, tokenizer.eos_id, generator))


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text as its tokens come; a character split over tokens comes whole."""
    stream = TextStream()
    for token in tokens:
        yield stream.feed(tokenizer.decode_bytes([token]))
    yield stream.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
