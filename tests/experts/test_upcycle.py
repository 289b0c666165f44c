"""Mixtures of dense models: equal to what they are made of where they must be, made of the right parts elsewhere."""

import math
from pathlib import Path

import pytest
import torch
from dense_runs import MODEL, make_run, model_of, tensor, tensors, write_run

from lightbulb.config import ConfigError, build_config, load_config, read_yaml, save_config
from lightbulb.data.config import DataConfig
from lightbulb.experts import pieces
from lightbulb.experts.pieces import dropped_units
from lightbulb.experts.receipt import RECEIPT, ReceiptError, read_receipt
from lightbulb.experts.source import open_source
from lightbulb.experts.upcycle import upcycle
from lightbulb.experts.upcycle_config import UpcycleConfig
from lightbulb.folder import FolderError
from lightbulb.train.config import RunConfig
from lightbulb.train.verify import verify_run

ATTENTION = MODEL["block_pattern"][0]["token"]
BTX = {"method": "btx"}


def mix(folder: Path, sources, **settings) -> Path:
    """Upcycle runs and give the result's folder."""
    values = {"run": str(folder), "sources": [{"path": str(path)} for path in sources]}
    upcycle(build_config(UpcycleConfig, values | settings))
    return folder


def block(channel=None, token=None):
    return {"block_pattern": [{"token": token or ATTENTION, "channel": channel or {"type": "mlp", "hidden_dim": 24}}]}


def assert_equal_models(run, reference, tokens, bound=1e-5):
    found, expected = model_of(run)(tokens), model_of(reference)(tokens)
    assert expected.std() > 0.05
    assert (found - expected).abs().max() < bound


BIASED = {"type": "mlp", "hidden_dim": 24, "activation": "gelu_tanh", "bias": True}
GPT2 = {"norm": "layer", "learned_positions": True, "tie_embeddings": True} | block(
    BIASED, {"type": "attention", "num_heads": 4, "rope_theta": None, "bias": "all"}
)
QWEN2 = block({"type": "mlp", "hidden_dim": 24, "bias": True}, ATTENTION | {"bias": "qkv"})

KINDS = {
    "gpt2": GPT2,
    "biases": QWEN2,
    "plain": {},
    "tied": {"tie_embeddings": True},
    "gelu": block({"type": "mlp", "hidden_dim": 24, "activation": "gelu"}),
    "kan": block({"type": "kan", "hidden_dim": 8}),
    "bitlinear, denseformer, depths": {
        "modifiers": [{"type": "bitlinear"}, {"type": "denseformer"}, {"type": "mixture_of_depths", "capacity": 0.5}]
    },
    "first block": {"first_blocks": [{"token": {"type": "attention", "num_heads": 2}}], "num_layers": 3},
    "retention": block(token={"type": "retention", "num_heads": 2}),
    "mamba": block(token={"type": "mamba", "head_dim": 8}),
    "one mixture already": {
        "num_layers": 2,
        "block_pattern": [
            {
                "token": ATTENTION,
                "channel": {"type": "switch", "num_experts": 2, "hidden_dim": 8, "router": {"bias_rate": 1e-3}},
            },
            {"token": ATTENTION, "channel": {"type": "mlp", "hidden_dim": 24}},
        ],
    },
}


@pytest.mark.parametrize("router", [{}, {"score": "sigmoid", "top_k": 1, "normalizer_gradient": False}, {"top_k": 3}])
def test_equality_of_identical_experts_and_the_dense_model(dense, tmp_path, tokens, router):
    source = dense("a")
    assert_equal_models(mix(tmp_path / "out", [source] * 3, **BTX, router=router), source, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_equality_of_identical_experts_for_every_kind_of_model(dense, tmp_path, tokens, kind):
    source = dense("a", drift=0.1, **KINDS[kind])
    assert_equal_models(mix(tmp_path / "out", [source] * 2, **BTX), source, tokens)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equality_of_identical_attention_experts(dense, tmp_path, tokens, kv_heads):
    source = dense("a", **block(token=ATTENTION | {"num_kv_heads": kv_heads}))
    out = mix(tmp_path / "out", [source] * 3, method="btx+moa", attention_router={"top_k": 2})
    assert load_config(RunConfig, out / "config.yaml").model.layer(0).token.num_experts == 3 * 4 // kv_heads
    assert_equal_models(out, source, tokens)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "sparse", "num_experts": 4},
        {"method": "sparse", "num_experts": 3, "router": {"top_k": 3}, "layers": [1]},
        {"method": "sparse", "num_experts": 4, "shared_expert": True, "router": {"normalize_gates": False}},
        {"method": "drop", "num_experts": 4, "shared_expert": True},
        {"method": "drop", "num_experts": 4, "drop_ratio": 0.0},
        *(
            {"method": "virtual-group", "num_experts": copies * shards, "shards": shards, "router": {"top_k": top_k}}
            for copies, shards, top_k in [(2, 2, 2), (4, 2, 4), (2, 4, 4), (4, 3, 6), (3, 3, 9), (8, 8, 8)]
        ),
    ],
    ids=lambda settings: "-".join(f"{value}" for value in settings.values()),
)
def test_equality_of_copies_and_the_dense_model(dense, tmp_path, tokens, settings):
    source = dense("a")
    out = mix(tmp_path / "out", [source], **settings)
    assert_equal_models(out, source, tokens)
    receipt = read_receipt(out / RECEIPT)
    assert receipt.comparison.greatest_difference < 1e-5 < receipt.comparison.standard_deviation
    assert receipt.parameters_out == load_config(RunConfig, out / "config.yaml").model.cost().params


@pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
def test_equality_of_virtual_groups_without_gates(dense, tmp_path, tokens, activation):
    source = dense("a", **block({"type": "mlp", "hidden_dim": 24, "activation": activation}))
    settings = {"method": "virtual-group", "num_experts": 6, "shards": 2, "router": {"top_k": 4}}
    assert_equal_models(mix(tmp_path / "out", [source], **settings), source, tokens)


@pytest.mark.parametrize("model", [GPT2, QWEN2], ids=["gpt2", "biases"])
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "sparse", "num_experts": 3, "router": {"top_k": 2}},
        {"method": "drop", "num_experts": 3, "drop_ratio": 0.0},
        {"method": "virtual-group", "num_experts": 6, "shards": 3, "router": {"top_k": 3}},
    ],
    ids=lambda settings: settings["method"],
)
def test_equality_of_copies_with_biases_and_the_dense_model(dense, tmp_path, tokens, settings, model):
    source = dense("a", drift=0.1, **model)
    out = mix(tmp_path / "out", [source], **settings)
    assert_equal_models(out, source, tokens)
    old = tensor(source, "blocks.0.channel.down.bias")
    assert old.any() and all(torch.equal(each, old) for each in tensor(out, "blocks.0.channel.experts.each.down.bias"))


def test_drop_redraws_the_biases_of_its_units(dense, tmp_path):
    source = dense("a", drift=0.1, **block(BIASED | {"hidden_dim": 400}))
    out = mix(tmp_path / "out", [source], method="drop", num_experts=3, drop_ratio=0.25, seed=7)
    found, old = tensor(out, "blocks.1.channel.experts.each.up.bias"), tensor(source, "blocks.1.channel.up.bias")
    for expert in range(3):
        units = dropped_units(400, 0.25, 7, 1, expert)
        changed = (found[expert] != old).nonzero().flatten()
        assert torch.equal(changed, units.sort().values)
        assert float(found[expert, units].std()) == pytest.approx(float(old[units].std()), rel=0.3)  # of 100 draws


def test_copies_that_differ_are_not_the_dense_model(dense, tmp_path, tokens):
    source = dense("a")
    out = mix(tmp_path / "out", [source], method="drop", num_experts=4)
    assert (model_of(out)(tokens) - model_of(source)(tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_drop_keeps_units_whole_and_redraws_them_alike(dense, tmp_path, ratio):
    source = dense("a", **block({"type": "mlp", "hidden_dim": 400}))
    out = mix(tmp_path / "out", [source], method="drop", num_experts=3, drop_ratio=ratio, seed=7)
    gate_up, down = (tensor(out, f"blocks.1.channel.experts.{name}.weight") for name in ("gate_up", "down"))
    old = [tensor(source, f"blocks.1.channel.{name}.weight") for name in ("gate", "up", "down")]
    sets = []
    for expert in range(3):
        units = dropped_units(400, ratio, 7, 1, expert)
        assert len(units) == round(400 * ratio)
        kept = sorted(set(range(400)) - set(units.tolist()))
        new = [gate_up[expert, 0], gate_up[expert, 1], down[expert].t()]
        for found, expected in zip(new, [old[0], old[1], old[2].t()], strict=True):
            assert torch.equal(found[kept], expected[kept])
            assert not (found[units] == expected[units]).any()
            spread = float(expected[units].std())
            assert float(found[units].std()) == pytest.approx(spread, rel=0.1)  # 1600 draws or more
            assert abs(found[units].mean() - expected[units].mean()) < 5 * spread / math.sqrt(units.numel() * 16)
        sets.append(frozenset(units.tolist()))
    assert ratio == 1.0 or len(set(sets)) == 3


def test_btx_averages_the_trunk_and_keeps_each_branch_as_an_expert(dense, tmp_path):
    branches = [dense(f"b{seed}", seed, drift=0.1) for seed in range(1, 4)]
    found = tensors(mix(tmp_path / "out", branches, **BTX))
    each = [tensors(branch) for branch in branches]
    for name in each[0]:
        if ".channel." not in name:
            average = torch.stack([part[name].double() for part in each]).mean(0).float()
            assert torch.equal(found[name], average), name
    for expert, part in enumerate(each):
        for layer in range(2):
            prefix = f"blocks.{layer}.channel"
            for index, matrix in enumerate(("gate", "up")):
                ours = found[f"{prefix}.experts.gate_up.weight"][expert, index]
                assert torch.equal(ours, part[f"{prefix}.{matrix}.weight"])
            assert torch.equal(found[f"{prefix}.experts.down.weight"][expert], part[f"{prefix}.down.weight"])


@pytest.mark.parametrize("count", [2, 3, 7])
def test_average_of_copies_is_the_copy_bit_by_bit(dense, tmp_path, count):
    source = dense("a")
    found, expected = tensors(mix(tmp_path / "out", [source] * count, **BTX)), tensors(source)
    assert all(torch.equal(found[name], expected[name]) for name in found.keys() & expected.keys())
    assert len(found.keys() & expected.keys()) > 10


def test_layers_that_stay_dense_average_their_channel_mixers(dense, tmp_path):
    branches = [dense(f"b{seed}", seed, drift=0.1) for seed in (1, 2)]
    out = mix(tmp_path / "out", branches, **BTX, layers=[1])
    average = sum(tensor(branch, "blocks.0.channel.up.weight").double() for branch in branches) / 2
    assert torch.equal(tensor(out, "blocks.0.channel.up.weight"), average.float())
    assert "blocks.0.channel.router.weight" not in tensors(out) and "blocks.1.channel.router.weight" in tensors(out)


def test_tokens_weigh_the_average(dense, tmp_path):
    branches = [dense(f"b{seed}", seed, drift=0.1) for seed in (1, 2)]
    sources = [{"path": str(path), "tokens": count} for path, count in zip(branches, (300, 100), strict=True)]
    upcycle(build_config(UpcycleConfig, {"run": str(tmp_path / "out"), "sources": sources, "method": "btx"}))
    parts = [tensor(branch, "norm.weight").double() for branch in branches]
    assert torch.equal(tensor(tmp_path / "out", "norm.weight"), (0.75 * parts[0] + 0.25 * parts[1]).float())


def test_order_of_sources_permutes_experts_and_nothing_else(dense, tmp_path):
    branches = [dense(f"b{seed}", seed, drift=0.1) for seed in range(1, 4)]
    one, other = (
        tensors(mix(tmp_path / name, order, **BTX)) for name, order in [("x", branches), ("y", branches[::-1])]
    )
    for name, values in one.items():
        expected = other[name].flip(0) if ".experts." in name else other[name]
        assert torch.equal(values, expected), name


@pytest.mark.parametrize("method", ["btx", "btx+moa"])
def test_one_hot_routing_over_a_branchs_trunk_is_that_branch(dense, tmp_path, tokens, method):
    """All that differs between branches becomes an expert, and an oracle router chooses one branch's."""
    parts = (
        ".channel.gate",
        ".channel.up",
        ".channel.down",
        *((".query.weight", ".output.weight") if "moa" in method else ()),
    )
    seed, branches = dense("seed"), []
    for number in (1, 2, 3):
        branches.append(make_branch(tmp_path / f"b{number}", seed, number, parts))
    settings = {"router": {"top_k": 1, "normalize_gates": False}, "seed_model": str(seed)}
    out = mix(tmp_path / "out", branches, method=method, **settings)
    for chosen, branch in enumerate(branches):
        model = model_of(out)
        for name, module in model.named_modules():
            if name.endswith(".router"):
                group = module.num_experts // 3
                rows = slice(chosen * group, (chosen + 1) * group)
                oracle = Oracle(rows, module.num_experts)
                module.forward = oracle
        expected = model_of(branch)(tokens)
        assert (model(tokens) - expected).abs().max() < 1e-5
        assert (model_of(branches[chosen - 1])(tokens) - expected).abs().max() > 1e-2


class Oracle:
    """Routes all tokens to given experts, whose gates sum to 1."""

    def __init__(self, rows, num_experts):
        self.experts = torch.arange(num_experts)[rows]

    def __call__(self, x, noise=None):
        experts = self.experts.expand(len(x), -1)
        return torch.full(experts.shape, 1 / len(self.experts)), experts


def make_branch(folder, seed, number, parts):
    """A branch that differs from its seed in tensors with these names only."""
    drifted = tensors(make_run(folder.with_name(f"{folder.name}-drifted"), MODEL, number, 0.2))
    values = {name: drifted[name] if any(part in name for part in parts) else v for name, v in tensors(seed).items()}
    return write_run(folder, MODEL, values)


def test_trunk_of_the_seed_model_and_distances_to_it(dense, tmp_path):
    seed, branches = dense("seed"), [dense(f"b{number}", number, drift=0.1) for number in (1, 2)]
    out = mix(tmp_path / "out", branches, **BTX, seed_model=str(seed), trunk="seed_model")
    assert torch.equal(tensor(out, "embedding.weight"), tensor(seed, "embedding.weight"))
    notes = " ".join(read_receipt(out / RECEIPT).notes)
    assert "source 1 is" in notes and "cosines" in notes


def test_cosines_are_those_of_the_differences(dense):
    seed = dense("seed")
    names = [seed, dense("b1", 1, drift=0.1), dense("b2", 2, drift=0.1)]
    values = {"run": "x", "method": "btx", "sources": [{"path": str(n)} for n in names[1:]], "seed_model": str(seed)}
    opened = [open_source(name) for name in names]
    merge = pieces.Merge(build_config(UpcycleConfig, values), opened[1:], opened[0])
    merge.compare_with_seed()
    flat = [torch.cat([source.read(n).double().flatten() for n in merge.shapes]) for source in opened]
    expected = torch.cosine_similarity(flat[1] - flat[0], flat[2] - flat[0], dim=0)
    assert merge.deltas.cosines()[0][1] == pytest.approx(float(expected), abs=1e-12)
    assert merge.deltas.cosines()[1][1] == pytest.approx(1.0)
    assert merge.deltas.distances()[0] == pytest.approx(float((flat[1] - flat[0]).norm() / flat[0].norm()))


def test_what_was_written_is_in_order(dense, tmp_path):
    report = verify_run(mix(tmp_path / "out", [dense("a")], method="sparse", num_experts=2))
    assert not report.problems and report.checkpoints[0].files == 2
    assert report.ledger.samples == report.ledger.steps == 0


def test_a_mixture_of_branches_trains_all_of_itself_on_all_that_they_read(dense, tmp_path):
    """Each branch has trained a part of itself, of a name that a mixture lacks, on a cluster of its own."""
    sources = [dense("a"), dense("b", seed=1)]
    for number, source in enumerate(sources):
        values = read_yaml(source / "config.yaml")
        values["train"]["trainable"] = ["blocks.*.channel.up.weight"]
        values["data"]["mixture"] = {"weights": {f"*/cluster-0{number}": 1}}
        save_config(build_config(RunConfig, values), source / "config.yaml")
    config = load_config(RunConfig, mix(tmp_path / "two", sources, **BTX) / "config.yaml")
    assert config.train.trainable == "all" and config.data == DataConfig(path="data/none")
    copies = load_config(RunConfig, mix(tmp_path / "one", sources[:1], method="sparse", num_experts=2) / "config.yaml")
    assert copies.data.mixture is not None  # one source's is what the mixture goes on with


def test_training_settings_that_do_not_fit_are_named(dense, tmp_path):
    train = {"steps": 1, "global_batch_size": 3, "micro_batch_size": 2}
    with pytest.raises(ConfigError, match=r"train\.global_batch_size 3 is not a multiple"):
        mix(tmp_path / "moe", [dense("a"), dense("b")], train=train, **BTX)
    assert not (tmp_path / "moe").exists()


def test_receipt_refuses_a_planted_corruption_and_leaves_nothing(dense, tmp_path, monkeypatch):
    source, original = dense("a"), pieces.Merge._matrix

    def corrupted(self, layer, matrix, expert):
        values = original(self, layer, matrix, expert)
        return values * 1.01 if (layer, matrix, expert) == (1, "down.weight", 2) else values

    monkeypatch.setattr(pieces.Merge, "_matrix", corrupted)
    with pytest.raises(ReceiptError, match=r"a logit differs by .* the bound is 0.0001"):
        mix(tmp_path / "out", [source], method="sparse", num_experts=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_draws_depend_on_seed_layer_expert_and_matrix_only(dense, tmp_path):
    source, settings = dense("a"), {"method": "drop", "num_experts": 4}
    one, again, other, fewer = (
        tensors(mix(tmp_path / name, [source], **settings | changes))
        for name, changes in [("1", {}), ("2", {}), ("3", {"seed": 5}), ("4", {"num_experts": 2})]
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    name = "blocks.0.channel.experts.down.weight"
    assert not torch.equal(one[name], other[name])
    assert torch.equal(one[name][:2], fewer[name])
    router = "blocks.0.channel.router.weight"
    assert torch.equal(one[router][:2], fewer[router]) and not torch.equal(one[router], one[router.replace("0", "1")])


ERRORS = {
    "shape": ({"dim": 32}, {}, r"b: 'head' is \(64, 32\), in the first source it is \(64, 16\)"),
    "missing": ({"tie_embeddings": True}, {}, "'head' is missing"),
    "setting": (block(token=ATTENTION | {"rope_theta": 500.0}), {}, "rope_theta is 500.0, the first source has"),
    "layers": ({}, {"layers": [0, 9]}, "layers: 9 has no dense channel mixer"),
    "folder": ({}, {"run": "taken"}, "there is something already"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_mixed_is_named(dense, tmp_path, case):
    changes, settings, message = ERRORS[case]
    if "run" in settings:
        settings = {"run": str(dense("taken"))}
    with pytest.raises((ConfigError, FolderError), match=message):
        mix(tmp_path / "out", [dense("a"), dense("b", **changes)], **{"method": "btx"} | settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("btx+moa", block(token=ATTENTION | {"window": 4}), "no window"),
        ("btx+moa", QWEN2, "no bias"),
        ("btx+moa", GPT2, "no bias"),
        ("btx+moa", block(token={"type": "retention", "num_heads": 2}), "no layer has attention"),
        ("drop", block({"type": "kan", "hidden_dim": 8}), "needs channel mixers of type 'mlp'"),
        ("virtual-group", {"modifiers": [{"type": "bitlinear"}]}, "bitlinear scales each matrix"),
        ("btx", {"modifiers": [{"type": "lora"}]}, "merge lora"),
    ],
)
def test_models_that_a_method_cannot_take_are_refused(dense, tmp_path, method, changes, message):
    source = dense("a", **changes)
    before = sorted(tmp_path.iterdir())
    more = {"num_experts": 4, "shards": 2} if method == "virtual-group" else {"num_experts": 2}
    count = 2 if method.startswith("btx") else 1
    with pytest.raises(ConfigError, match=message):
        mix(tmp_path / "out", [source] * count, method=method, **more)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("channel", "message"),
    [({"bias": True}, "without biases, not biases"), ({"activation": "gelu"}, "not activation 'gelu'")],
)
def test_a_shared_expert_without_a_fused_form_is_refused(dense, tmp_path, channel, message):
    source = dense("a", **block({"type": "mlp", "hidden_dim": 24} | channel))
    with pytest.raises(ConfigError, match=message):
        mix(tmp_path / "out", [source], method="sparse", num_experts=2, shared_expert=True)
