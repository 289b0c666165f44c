"""The outer step against torch's SGD, and its files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_runs import TRAIN, write_run_file

from lightbulb.config import ConfigError, build_config, load_config
from lightbulb.models.trainable import trained_names
from lightbulb.train.config import RunConfig
from lightbulb.train.exchange import Exchange, ExchangeError
from lightbulb.train.outer import OuterConfig, SyncConfig, average, outer_step, shared_names, trunk_names


def draws(seed: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 4, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, False)])
def test_equality_outer_steps_are_those_of_sgd(momentum: float, nesterov: bool) -> None:
    config = SyncConfig(every=1, lr=0.7, momentum=momentum, nesterov=nesterov)
    trunk, velocity = draws(0), [torch.zeros(5, 4) for _ in range(3)]
    naive = [torch.nn.Parameter(value.clone()) for value in trunk]
    sgd = torch.optim.SGD(naive, lr=0.7, momentum=momentum, nesterov=nesterov)
    for round_ in range(1, 6):
        means = [average(values) for values in zip(draws(10 * round_), draws(10 * round_ + 1), strict=True)]
        for parameter, mean in zip(naive, means, strict=True):
            parameter.grad = parameter.detach() - mean
        sgd.step()
        outer_step(trunk, means, velocity, config)
    for ours, theirs in zip(trunk, naive, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_equality_lr_1_without_momentum_is_the_mean_to_the_last_bit() -> None:
    trunk, means = draws(0), draws(1)
    outer_step(trunk, means, [torch.zeros(5, 4) for _ in trunk], SyncConfig(every=1, lr=1.0, momentum=0.0))
    assert all(torch.equal(a, b) for a, b in zip(trunk, means, strict=True))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_equality_the_mean_of_equal_tensors_is_the_tensor(count: int) -> None:
    (value,) = draws(3, 1)
    assert torch.equal(average([value] * count), value)


def test_trunk_is_what_no_pattern_names() -> None:
    names = ["embed.weight", "blocks.0.token.q.weight", "blocks.0.channel.up.weight"]
    assert trunk_names(names, ["*.channel.*"]) == names[:2]
    assert trunk_names(names, []) == names
    with pytest.raises(ConfigError, match=r"'\*\.chanel\.\*' matches no parameter"):
        trunk_names(names, ["*.chanel.*"])
    with pytest.raises(ConfigError, match="leave no trunk"):
        trunk_names(names, ["*"])


@pytest.mark.parametrize(("trainable", "local"), [("routers", ["*.channel.*"]), (["head"], ["head", "blocks.*"])])
def test_a_trunk_of_which_nothing_is_trained_is_refused(
    tmp_path: Path, trainable: str | list[str], local: list
) -> None:
    outer = {"every": 2, "folder": str(tmp_path), "branch": 0, "branches": 2, "local": local}
    path = write_run_file(tmp_path, tmp_path, outer=outer, train=TRAIN | {"trainable": trainable})
    with pytest.raises(ConfigError, match="leaves a trunk of which train.trainable trains nothing"):
        load_config(RunConfig, path)
    load_config(RunConfig, path, ["train.trainable=all"])


def test_branches_share_what_is_trained_of_their_trunk(tmp_path: Path) -> None:
    model = load_config(RunConfig, write_run_file(tmp_path, tmp_path)).model
    trained = trained_names(model, ["norm.*", "blocks.0.*"])
    found = shared_names(model, trained, ["*.channel.*"])
    assert "norm.weight" in found and "blocks.0.token.query.weight" in found
    assert found < trained and not any(".channel." in name for name in found)


def exchange(folder: Path, branch: int, layout: str = "TP1 on 1 ranks") -> Exchange:
    config = OuterConfig(every=2, folder=folder, branch=branch, branches=2)
    return Exchange(config, 0, layout)


def test_rounds_through_files_are_outer_steps(tmp_path: Path) -> None:
    first, second = exchange(tmp_path, 0), exchange(tmp_path, 1)
    trunk, velocity = draws(0, 2), [torch.zeros(5, 4) for _ in range(2)]
    shapes = {"a": (5, 4), "b": (5, 4)}
    first.put(0, "trunk", zip("ab", trunk, strict=True))
    for number in (1, 2, 3):
        values = draws(number, 2), draws(number + 10, 2)
        first.put(number, "branch-0", zip("ab", values[0], strict=True))
        assert first.present(number) == [0] and not second.has(number, "trunk")
        second.put(number, "branch-1", zip("ab", values[1], strict=True))
        first.bring_together(number, shapes)
        outer_step(trunk, [average(pair) for pair in zip(*values, strict=True)], velocity, first.config)
        file = second.open(number, "trunk", shapes)
        assert all(torch.equal(file.read(name, (5, 4)), value) for name, value in zip("ab", trunk, strict=True))
        first.clean(number)
    for branch, oldest in ((0, 3), (1, 2)):
        exchange(tmp_path, branch).beat({"oldest": oldest})
    first.clean(3)
    kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors"))
    # round 2 for the branch whose oldest checkpoint is before round 3, the newest momentum for the next round
    ending = "rank-0000.safetensors"
    assert kept == [f"round-00002/trunk-{ending}", f"round-00003/momentum-{ending}", f"round-00003/trunk-{ending}"]


def test_a_damaged_file_and_another_layout_are_refused(tmp_path: Path) -> None:
    exchange(tmp_path, 0).put(1, "branch-0", [("a", torch.ones(4))])
    with pytest.raises(ExchangeError, match="written by TP1 on 1 ranks, this branch is TP2"):
        exchange(tmp_path, 1, "TP2 on 2 ranks").open(1, "branch-0", {})
    with pytest.raises(ExchangeError, match=r"'b' is no tensor there and \[2\] here"):
        exchange(tmp_path, 1).open(1, "branch-0", {"a": (4,), "b": (2,)})
    path = next(tmp_path.rglob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ExchangeError, match="damaged"):
        exchange(tmp_path, 1).open(1, "branch-0", {})


def test_a_round_whose_result_is_gone_is_named(tmp_path: Path) -> None:
    first = exchange(tmp_path, 0)
    for number in (1, 2):
        first.put(number, "trunk", [("a", torch.ones(4))])
    first.check_open(1)  # its result is there
    first.check_open(3)  # it has not been held
    with pytest.raises(ExchangeError, match="round 0 is over and its result gone"):
        first.check_open(0)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="there are 2, counted from 0"):
        build_config(OuterConfig, {"every": 1, "folder": "x", "branch": 2, "branches": 2})
