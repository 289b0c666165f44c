"""What a conversion did: tensors in and out with digests, logits against a reference on real text, routers.

A receipt is written beside the result as ``receipt.json``. Whoever converts builds the result in
:func:`lightbulb.folder.built_beside`, compares it, and lets :meth:`Comparison.check` refuse it when the greatest
difference of a logit is above the bound: then nothing is left behind.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Literal, overload

import orjson
import torch
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from lightbulb.experts.layers import LayeredModel
from lightbulb.folder import write_atomically
from lightbulb.routing.router import Router
from lightbulb.train.manifest import CheckpointError, digest_of, read_json

RECEIPT = "receipt.json"
FORMAT = 1


class ReceiptError(RuntimeError):
    """A conversion that does not give what it should; the message says by how much."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorRecord(_Strict):
    """A tensor as it was read or written."""

    shape: list[int]
    dtype: str
    xxh3_128: str


Digests = dict[str, TensorRecord]


class Text(_Strict):
    """What two models were compared on."""

    source: str
    token_ids: list[list[int]]


class Comparison(_Strict):
    """Logits of the result and of its reference, both computed in float32."""

    reference: str
    """What the result was compared with."""
    text: Text
    greatest_difference: float
    mean_difference: float
    standard_deviation: float
    """Of the reference's logits, for scale."""
    same_choices: float
    """Share of the tokens for which both have the same greatest logit."""
    bound: float

    def check(self, what: str) -> None:
        """Refuse a result above the bound.

        Raises:
            ReceiptError: naming ``what`` and the difference.
        """
        if not self.greatest_difference <= self.bound:  # nor if it is not a number
            raise ReceiptError(
                f"{what}: a logit differs by {self.greatest_difference:.3g} from {self.reference}, the bound is "
                f"{self.bound:g}; nothing was written"
            )


class RouterRecord(_Strict):
    """How a router spreads the text's tokens."""

    entropy: float
    """Mean over tokens of the entropy of the experts' probabilities, as a share of the greatest possible."""
    load: list[float]
    """Each expert's share of the selections."""


class Receipt(_Strict):
    """The content of receipt.json, without the digest of itself."""

    format: Literal[1] = 1
    conversion: str
    """Such as export, import or upcycle."""
    sources: list[str]
    architecture: str
    parameters_in: int
    parameters_out: int
    tensors_in: Digests
    tensors_out: Digests
    comparison: Comparison | None = None
    """None where the result equals no model, or was not run."""
    routers: dict[str, RouterRecord]
    notes: list[str] = []
    """What the conversion decided."""
    versions: dict[str, str]


@overload
def digest(values: Tensor) -> str: ...
@overload
def digest(values: Tensor, record: Literal[True]) -> TensorRecord: ...
def digest(values: Tensor, record: bool = False) -> str | TensorRecord:
    """The xxh3-128 of a tensor's values in its dtype, in row order; or all that a receipt says of it."""
    flat = values.detach().cpu().contiguous().flatten().view(torch.uint8)
    found = xxhash.xxh3_128(memoryview(flat.numpy())).hexdigest()  # type: ignore[arg-type]
    if not record:
        return found
    return TensorRecord(shape=list(values.shape), dtype=str(values.dtype).removeprefix("torch."), xxh3_128=found)


def parameters(records: Digests) -> int:
    """Values in all tensors."""
    return sum(prod(record.shape) for record in records.values())


def compare(found: Tensor, expected: Tensor, reference: str, text: Text, bound: float) -> Comparison:
    """Logits ``[batch, length, vocab]`` of a result and its reference on the same text."""
    if found.shape != expected.shape:
        raise ReceiptError(f"logits {tuple(found.shape)} are not those of {reference}, {tuple(expected.shape)}")
    difference = (found.double() - expected.double()).abs()
    return Comparison(
        reference=reference,
        text=text,
        greatest_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        standard_deviation=float(expected.double().std()),
        same_choices=float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
        bound=bound,
    )


@contextmanager
def watching_routers(model: nn.Module) -> Iterator[dict[str, RouterRecord]]:
    """Fills the mapping it gives with a record per router, of a forward pass within."""
    records: dict[str, RouterRecord] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(router: Router, inputs: tuple[Any, ...], routing: Any) -> None:
            logits = nn.functional.linear(inputs[0].to(router.weight.dtype), router.weight)
            scores = logits if router.config.score == "softmax" else nn.functional.logsigmoid(logits)
            log_shares = scores.log_softmax(-1)
            entropy = -(log_shares.exp() * log_shares).sum(-1).mean()
            most = torch.tensor(float(max(router.num_experts, 2))).log()
            load = torch.bincount(routing.experts.flatten(), minlength=router.num_experts).float()
            records[name] = RouterRecord(entropy=float(entropy / most), load=(load / load.sum()).tolist())

        return record

    handles = [
        module.register_forward_hook(hook(name)) for name, module in model.named_modules() if isinstance(module, Router)
    ]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def watched_logits(model: LayeredModel, tokens: Tensor) -> tuple[Tensor, dict[str, RouterRecord]]:
    """Logits ``[batch, length, vocab]``, and what the model's routers did."""
    routers: dict[str, RouterRecord] = {}

    @contextmanager
    def around(stage: nn.Module) -> Iterator[None]:
        with watching_routers(stage) as found:
            yield
        routers.update(found)

    return model.logits(tokens, around), routers


def write_receipt(folder: Path, receipt: Receipt) -> None:
    """Write ``receipt.json``."""
    values = receipt.model_dump()
    write_atomically(folder / RECEIPT, orjson.dumps(values | {"digest": digest_of(values)}, option=orjson.OPT_INDENT_2))


def read_receipt(path: Path) -> Receipt | None:
    """A receipt, or None where there is none.

    Raises:
        ReceiptError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        values = read_json(path, "convert again")
        if not isinstance(values, dict) or values.pop("digest", None) != digest_of(values):
            raise ReceiptError(f"{path}: damaged: its digest is not that of its content; convert again or remove it")
        return Receipt.model_validate(values)
    except (CheckpointError, ValidationError) as error:
        raise ReceiptError(f"{path}: damaged or of another version ({error}); convert again or remove it") from None
