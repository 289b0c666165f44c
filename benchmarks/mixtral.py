"""The two models that ``train_moe.py`` compares, ours and Hugging Face's Mixtral, and how exact their gradients are."""

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from lightbulb.config import build_config
from lightbulb.models.language import LanguageConfig
from lightbulb.nn.parameter import initialise, logical_of
from lightbulb.routing.router import Router, Routing

VOCAB, DIM, LAYERS, HEADS, KV_HEADS, EXPERTS, TOP_K = 8192, 256, 4, 8, 4, 8, 2
HIDDEN = 520  # brings the model to 17.8 M parameters
LENGTH, BATCH = 512, 4
ATTENTION = {"type": "attention", "num_heads": HEADS, "num_kv_heads": KV_HEADS}
SEEDS = 3  # weights and samples that gradients are compared on

Step = Callable[[], float]
"""Runs one step and returns its loss."""


def language_config() -> LanguageConfig:
    """Our model."""
    channel = {"type": "switch", "num_experts": EXPERTS, "hidden_dim": HIDDEN, "router": {"top_k": TOP_K}}
    return build_config(
        LanguageConfig,
        {
            "vocab_size": VOCAB,
            "dim": DIM,
            "num_layers": LAYERS,
            "context_length": LENGTH,
            "block_pattern": [{"token": ATTENTION, "channel": channel}],
        },
    )


def build_ours(dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Our model in ``dtype``, routers in float32 as the engine keeps them."""
    model = language_config().build()
    initialise(model, seed)
    for parameter in model.parameters():
        if not logical_of(parameter).keep_fp32:
            parameter.data = parameter.data.to(dtype)
    return model.train()


def build_mixtral(dtype: torch.dtype, ours: nn.Module, attention: str) -> nn.Module:
    """The peer in ``dtype`` with our weights."""
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=LENGTH,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        rms_norm_eps=language_config().norm_eps,
        rope_theta=10_000.0,
        sliding_window=None,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation=attention,
    )
    model = MixtralForCausalLM(config).to(dtype)
    weights = {name: parameter.detach() for name, parameter in ours.named_parameters()}
    missing, unexpected = model.load_state_dict(mixtral_names(weights), strict=False)
    if missing or unexpected:
        raise RuntimeError(f"transformers {transformers.__version__} names Mixtral's weights otherwise: {missing[:3]}")
    return model.train()


def mixtral_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights, or their gradients, under Mixtral's names (transformers 4)."""
    theirs = {
        "model.embed_tokens.weight": weights["embedding.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["head"],
    }
    names = {
        "token_norm.weight": "input_layernorm.weight",
        "channel_norm.weight": "post_attention_layernorm.weight",
        "token.query.weight": "self_attn.q_proj.weight",
        "token.key.weight": "self_attn.k_proj.weight",
        "token.value.weight": "self_attn.v_proj.weight",
        "token.output.weight": "self_attn.o_proj.weight",
        "channel.router.weight": "block_sparse_moe.gate.weight",
    }
    for layer in range(LAYERS):
        block, peer = f"blocks.{layer}.", f"model.layers.{layer}."
        theirs |= {peer + theirs_name: weights[block + name] for name, theirs_name in names.items()}
        for expert in range(EXPERTS):
            inside = f"{peer}block_sparse_moe.experts.{expert}."
            theirs[inside + "w1.weight"], theirs[inside + "w3.weight"] = weights[
                block + "channel.experts.gate_up.weight"
            ][expert].unbind(0)
            theirs[inside + "w2.weight"] = weights[block + "channel.experts.down.weight"][expert]
    return theirs


def sample(batch: int = BATCH, seed: int = 0) -> Tensor:
    """``[batch, LENGTH + 1]`` random tokens."""
    return torch.randint(0, VOCAB, (batch, LENGTH + 1), generator=torch.Generator().manual_seed(seed))


def forward_backward(name: str, model: nn.Module, tokens: Tensor | None = None) -> Step:
    """A step of one contender without its update; the gradients are left in ``.grad``."""
    tokens = sample() if tokens is None else tokens
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        if name == "ours":
            loss = model(inputs, labels).mean()
        else:
            loss = model(input_ids=inputs, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    return step


def gradient_errors() -> dict[str, list[float]]:
    """Distance of both models' bfloat16 gradients from float32's, relative to its length, by seed (in a child process).

    All three have the same weights, which bfloat16 holds, and the experts that the float32 model chooses.
    """
    errors: dict[str, list[float]] = {"ours": [], "hf": []}
    for seed in range(SEEDS):
        ours = build_ours(torch.bfloat16, seed)
        for module in ours.modules():
            if isinstance(module, Router):
                module.weight.data = module.weight.data.bfloat16().float()
        exact, peer = (build_mixtral(dtype, ours, "eager") for dtype in (torch.float32, torch.bfloat16))
        tokens, choices = sample(1, seed), record_choices(exact)
        forward_backward("hf", exact, tokens)()
        pin_peer(peer, choices)
        pin_ours(ours, choices)
        forward_backward("hf", peer, tokens)()
        forward_backward("ours", ours, tokens)()
        found = {"ours": mixtral_names(gradients(ours)), "hf": gradients(peer)}
        wanted = gradients(exact)
        for name, values in errors.items():
            values.append(distance(found[name], wanted) / distance({}, wanted))
    return errors


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, by name."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Euclidean distance of two sets of tensors; what is not found is zero."""
    squares = ((found[n].double() - t if n in found else t.double()).square().sum() for n, t in wanted.items())
    return float(sum(squares)) ** 0.5


def record_choices(model: nn.Module) -> list[Tensor]:
    """A list that the next forward of a Mixtral fills with each layer's experts, ``[tokens, TOP_K]``."""
    choices: list[Tensor] = []
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.block_sparse_moe.gate.register_forward_hook(
            lambda module, inputs, logits: choices.append(logits.detach().topk(TOP_K, dim=-1).indices)
        )
    return choices


def pin_peer(model: nn.Module, choices: list[Tensor]) -> None:
    """Make a Mixtral choose these experts: the others have no probability, and the gates of two sum to one anyway."""

    def hook(chosen: Tensor) -> Callable[..., Tensor]:
        return lambda module, inputs, logits: torch.full_like(logits, float("-inf")).scatter(
            1, chosen, logits.gather(1, chosen)
        )

    for layer, chosen in zip(model.model.layers, choices, strict=True):  # type: ignore[union-attr]
        layer.block_sparse_moe.gate.register_forward_hook(hook(chosen))


def pin_ours(model: nn.Module, choices: list[Tensor]) -> None:
    """Make our routers choose these experts, without the losses that Mixtral does not have.

    The model holds its tokens position by position; there is one sample, so that their order is the peer's.
    """

    def pinned(router: Router, chosen: Tensor) -> Callable[..., Routing]:
        return lambda x, noise=None: Routing(
            torch.nn.functional.linear(x.float(), router.weight).gather(1, chosen).softmax(-1), chosen
        )

    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, chosen in zip(routers, choices, strict=True):
        router.forward = pinned(router, chosen)  # type: ignore[method-assign]
