"""A model run one layer after the other, so that no more than two layers are in memory.

The model is built as a pipeline with a stage for each layer (:class:`lightbulb.models.stack.Stage`), and all text goes
through a stage before the next one is read.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightbulb.models.language import LanguageConfig, LanguageModel
from lightbulb.models.stack import Stage
from lightbulb.nn.parameter import set_values

Around = Callable[[LanguageModel], AbstractContextManager]


@dataclass(frozen=True)
class LayeredModel:
    """A model whose values are read when its layers run.

    Attributes:
        config: of the model.
        read: gives a logical tensor in float32.
        buffers: names of the buffers to read: biases of routers, which decide where tokens go.
        dtype: to compute in.
    """

    config: LanguageConfig
    read: Callable[[str], Tensor]
    buffers: Container[str] = field(default_factory=tuple)
    dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def logits(self, tokens: Tensor, around: Around = nullcontext) -> Tensor:
        """``[batch, length, vocab]`` in float32 (float64 of float64) for ``tokens [batch, length]``."""
        return self._run([tokens], around, with_head=True)[0]

    @torch.no_grad()
    def run_blocks(self, batches: Sequence[Tensor], around: Around) -> None:
        """All but the head, for what ``around`` finds out on the way: it is entered with each layer's stage."""
        self._run(batches, around, with_head=False)

    def _run(self, batches: Sequence[Tensor], around: Around, with_head: bool) -> list[Tensor]:
        carried: list[Tensor | None] = [None] * len(batches)
        for stage in self._stages(with_head):
            with around(stage):
                for number, tokens in enumerate(batches):
                    stage.set_input_tensor([carried[number]])
                    carried[number] = stage(tokens)
        return carried  # type: ignore[return-value]

    def _stages(self, with_head: bool) -> Iterator[LanguageModel]:
        last = self.config.num_layers - 1
        for layer in range(self.config.num_layers):
            stage = self.config.build(Stage(layer, layer + 1, layer == 0, with_head and layer == last)).to(self.dtype)
            for name, parameter in stage.named_parameters():
                set_values(parameter, self.read(name))
            for name, buffer in stage.named_buffers():
                if name in self.buffers:
                    buffer.copy_(self.read(name))
            yield stage.eval().requires_grad_(False)
