"""A LightBulb model behind transformers' classes, for `trust_remote_code=True`; it needs the package lightbulb.

It has no cache: every new token is computed with all before it. Left and right padding are told apart from text by the
attention mask.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import lightbulb.modifiers  # noqa: F401  (registers what a config can name)
from lightbulb.config import build_config
from lightbulb.models.language import LanguageConfig
from lightbulb.nn.parameter import annotate, logical_of


class LightBulbConfig(PretrainedConfig):
    """transformers' view of a :class:`LanguageConfig`, which is the section ``lightbulb``."""

    model_type = "lightbulb"

    def __init__(self, lightbulb: dict[str, Any] | None = None, **others: Any):
        self.lightbulb = lightbulb
        super().__init__(**others)

    def language_config(self) -> LanguageConfig:
        """Our config.

        Raises:
            ConfigError: it does not describe a model.
        """
        return build_config(LanguageConfig, self.lightbulb or {}, "config.json: lightbulb")


class LightBulbForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A :class:`LanguageModel` that transformers can load and generate with."""

    config_class = LightBulbConfig
    config: LightBulbConfig
    _supports_sdpa = True  # attention picks its own kernel

    def __init__(self, config: LightBulbConfig):
        super().__init__(config)
        self.model = config.language_config().build()
        self.post_init()
        kept = {f"model.{name}" for name, p in self.model.named_parameters() if logical_of(p).keep_fp32}
        # Set only now: transformers takes whole names here, and single words where it checks them.
        self._keep_in_fp32_modules_strict = kept  # type: ignore[assignment]

    @classmethod
    def get_init_context(cls, *args: Any) -> list[Any]:
        """As transformers' own, without its empty parameters, which cannot carry our records; ours are without values
        too, and memory that nobody has written to is not there yet."""
        return super().get_init_context(*args)[:1]

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """As transformers' own; it makes new parameters, which must know again what they are."""
        loaded = super().from_pretrained(*args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        with torch.device("meta"):
            plain = dict(model.config.language_config().build().named_parameters())
        for name, parameter in model.model.named_parameters():
            annotate(parameter, logical_of(plain[name]))
        return loaded

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Logits ``[batch, length, vocab]`` of ``input_ids [batch, length]``, and the loss of labels if there are any.

        Padding and text see each other no more than two documents do.

        Raises:
            ValueError: padding before the text of a model with learned positions.
        """
        documents = None
        if attention_mask is not None and not bool(attention_mask.all()):
            if self.model.config.learned_positions and not bool(attention_mask[:, 0].all()):
                raise ValueError("learned positions begin at the first token; set the tokenizer's padding_side: right")
            documents = attention_mask.long().diff(dim=1, prepend=attention_mask[:, :1]).abs().cumsum(1)
        logits = self.model(input_ids, document_ids=documents).contiguous()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> dict[str, Any]:
        """The whole sequence every time."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding's module."""
        return self.model.embedding


AutoConfig.register("lightbulb", LightBulbConfig, exist_ok=True)
AutoModelForCausalLM.register(LightBulbConfig, LightBulbForCausalLM, exist_ok=True)
