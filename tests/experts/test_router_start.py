"""Routers learned from text before training: they know the clusters, and no expert is idle."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from dense_runs import MODEL, make_run, model_of, tensor, write_run

from lightbulb.config import ConfigError, build_config, read_yaml, save_config
from lightbulb.data.config import DataConfig, MixtureConfig, PartConfig
from lightbulb.data.corpus import Corpus
from lightbulb.data.sequence import rows_of_part
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.data_prep.pipeline import preprocess
from lightbulb.experts.cluster_text import contexts_of
from lightbulb.experts.receipt import RECEIPT, read_receipt, watching_routers
from lightbulb.experts.router_start import balanced
from lightbulb.experts.upcycle import upcycle
from lightbulb.experts.upcycle_config import SourceConfig, UpcycleConfig
from lightbulb.models.language import LanguageConfig
from lightbulb.train.config import RunConfig

SIGNS = ["0123456789 ", "abcdefgh ", "QRSTUVWX "]
WIDE = MODEL | {"vocab_size": 300, "dim": 32}


@pytest.fixture(scope="module")
def domains(tmp_path_factory) -> list[Path]:
    """Three corpora whose texts share no letter, with one tokenizer."""
    folder, generator = tmp_path_factory.mktemp("domains"), random.Random(0)
    Tokenizer.train(SIGNS, 257).save(folder / "tokenizer.json")
    corpora = []
    for number, signs in enumerate(SIGNS):
        (folder / f"text-{number}").mkdir()
        for i in range(20):
            (folder / f"text-{number}" / f"{i}.txt").write_text("".join(generator.choices(signs, k=150)))
        values = {
            "output": str(folder / f"corpus-{number}"),
            "context_length": WIDE["context_length"],
            "held_out_fraction": 0.2,
            "tokenizer": {"path": str(folder / "tokenizer.json")},
            "sources": [{"type": "text", "domain": "all", "path": str(folder / f"text-{number}")}],
        }
        preprocess(build_config(CorpusConfig, values))
        corpora.append(folder / f"corpus-{number}")
    return corpora


def branches(folder: Path, domains) -> list[dict]:
    """Branches of one seed, and the text of each."""
    paths = [make_run(folder / f"b{number}", WIDE, number + 1, 0.02) for number in range(len(domains))]
    for path, corpus in zip(paths, domains, strict=True):
        shutil.copyfile(corpus / "tokenizer.json", path / "tokenizer.json")
    return [{"path": str(path), "text": str(corpus)} for path, corpus in zip(paths, domains, strict=True)]


def mixed(folder: Path, sources, kind, **settings) -> Path:
    start = {"kind": kind} | settings.pop("router_start", {})
    values = {
        "run": str(folder / "out"), "method": "btx", "sources": sources, "router_start": start,
        "router": {"top_k": 1, "normalize_gates": False},
    } | settings  # fmt: skip
    upcycle(build_config(UpcycleConfig, values))
    return folder / "out"


def loads_by_domain(out: Path, domains) -> dict[str, torch.Tensor]:
    """Of each router ``[domains, experts]`` shares of the tokens."""
    model, result = model_of(out), {}
    for corpus in domains:
        source = SourceConfig(path=out, text=corpus)
        contexts = contexts_of(source, None, corpus / "tokenizer.json", model.config, 240)
        with watching_routers(model) as routers:
            model(torch.tensor([ids for ids in contexts if len(ids) == 12]))
        for name, record in routers.items():
            result.setdefault(name, []).append(record.load)
    return {name: torch.tensor(loads) for name, loads in result.items()}


@pytest.mark.parametrize("kind", ["centroid", "closed_form", "embedding"])
@pytest.mark.parametrize("method", ["btx", "btx+moa"])
def test_tokens_go_to_the_expert_of_their_domain(tmp_path, domains, kind, method):
    out = mixed(tmp_path, branches(tmp_path, domains), kind, method=method)
    routers = loads_by_domain(out, domains)
    assert len(routers) == (4 if method == "btx+moa" else 2)
    own = {name: loads.view(3, 3, -1).sum(-1).diagonal().mean() for name, loads in routers.items()}
    random_ones = loads_by_domain(mixed(tmp_path / "r", branches(tmp_path / "r", domains), "random"), domains)
    chance = sum(loads.diagonal().mean() for loads in random_ones.values()) / len(random_ones)
    floor = {"centroid": 0.7, "closed_form": 0.85, "embedding": 0.4}[kind]  # untrained models mix letters at random
    assert min(own.values()) > floor > chance + 0.05, (own, chance)


def test_learned_routers_leave_no_expert_idle(tmp_path, domains):
    out = mixed(tmp_path, branches(tmp_path, domains), "centroid")
    for name, loads in loads_by_domain(out, domains).items():
        assert loads.mean(0).min() > 0.5 / 3, name
    receipt = read_receipt(out / RECEIPT)
    assert set(receipt.routers) == {"blocks.0.channel.router", "blocks.1.channel.router"}
    assert receipt.comparison is None
    assert all(0 < record.entropy < 1 and min(record.load) > 0 for record in receipt.routers.values())


def test_copies_of_one_model_learn_clusters_and_twins_come_apart(tmp_path, domains):
    source = branches(tmp_path, domains[:1])[:1]
    clusters = [{"path": "of-cluster", "text": str(corpus)} for corpus in domains]
    out = mixed(tmp_path, source, "centroid", method="sparse", num_experts=6, clusters=clusters, router={"top_k": 2})
    rows = tensor(out, "blocks.0.channel.router.weight")
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    assert all(0.9 < cosines[i, i + 1] < 1 - 1e-6 for i in (0, 2, 4))
    assert all(cosines[i, j] < 0.7 for i in range(0, 6, 2) for j in range(0, 6, 2) if i != j)
    for loads in loads_by_domain(out, domains).values():
        assert loads.view(3, 3, 2).sum(-1).diagonal().mean() > 0.7


def test_groups_share_a_learned_row(tmp_path, domains):
    source = branches(tmp_path, domains[:1])[:1]
    clusters = [{"path": "of-cluster", "text": str(corpus)} for corpus in domains]
    settings = {"num_experts": 6, "shards": 2, "router": {"top_k": 2}, "clusters": clusters}
    rows = tensor(
        mixed(tmp_path, source, "closed_form", method="virtual-group", **settings), "blocks.0.channel.router.weight"
    )
    assert torch.equal(rows[0::2], rows[1::2]) and not torch.equal(rows[0], rows[2])


def test_prompts_stand_for_a_corpus(tmp_path, domains):
    sources = branches(tmp_path, domains)
    for source, signs in zip(sources, SIGNS, strict=True):
        source |= {"text": None, "prompts": [signs, signs[::-1]]}
    loads = loads_by_domain(mixed(tmp_path, sources, "centroid"), domains)
    assert min(part.diagonal().mean() for part in loads.values()) > 0.7


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path, domains):
    sources = branches(tmp_path, domains)
    for source in sources:
        Tokenizer.train(["other letters"], 270).save(Path(source["path"]) / "tokenizer.json")
    with pytest.raises(ConfigError, match="corpus-0: written with another tokenizer"):
        mixed(tmp_path, sources, "centroid")


def test_learned_routers_need_text(tmp_path, domains):
    sources = branches(tmp_path, domains[:2])
    sources[1]["text"] = None  # nor is there the corpus its config names
    with pytest.raises(ValueError, match=r"data/none/manifest\.json: missing"):
        mixed(tmp_path, sources, "centroid")
    with pytest.raises(ConfigError, match="needs clusters"):
        mixed(tmp_path, sources[:1], "centroid", method="sparse", num_experts=4, router={})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("experts", [3, 8])
def test_balanced_rows_spread_tokens_that_all_chose_one_expert(experts, top_k):
    generator = torch.Generator().manual_seed(experts)
    x = torch.randn(600, 16, generator=generator, dtype=torch.float64) + 1.0
    rows = torch.randn(experts, 16, generator=generator, dtype=torch.float64) * 0.3
    rows[0] += 1.0  # of all tokens' mean
    weights = torch.full((2, 600), 1 / 300, dtype=torch.float64)
    before, after = (
        torch.bincount((x @ w.t()).topk(top_k).indices.flatten(), minlength=experts) / (600 * top_k)
        for w in (rows, balanced(rows, x, weights, top_k, 1e-2))
    )
    assert before.max() > 0.95 / top_k
    assert 0.5 / experts < after.min() <= after.max() < 1.5 / experts
    shift = balanced(rows, x, weights, top_k, 1e-2) - rows
    assert torch.linalg.matrix_rank(shift) == 1  # of one direction: what makes experts differ is as it was


@pytest.fixture(scope="module")
def clustered(domains, tmp_path_factory) -> Path:
    """The three domains in one corpus."""
    folder = tmp_path_factory.mktemp("clustered")
    texts = [
        {"type": "text", "domain": f"d{i}", "path": str(path.parent / f"text-{i}")} for i, path in enumerate(domains)
    ]
    values = {
        "output": str(folder / "corpus"), "context_length": WIDE["context_length"], "held_out_fraction": 0.2,
        "tokenizer": {"path": str(domains[0] / "tokenizer.json")}, "sources": texts,
    }  # fmt: skip
    preprocess(build_config(CorpusConfig, values))
    return folder / "corpus"


def one_domain(number: int) -> dict:
    return {"mixture": {"weights": {f"d{number}": 1}}}


def test_a_source_may_be_one_cluster_of_a_corpus(tmp_path, domains, clustered):
    """Branches of one corpus: each has the text of its own mixture, as if that were a corpus."""
    sources = [
        source | {"text": str(clustered)} | one_domain(i) for i, source in enumerate(branches(tmp_path, domains))
    ]
    out = mixed(tmp_path, sources, "closed_form")
    for loads in loads_by_domain(out, domains).values():
        assert loads.diagonal().mean() > 0.85


def test_a_branch_has_the_text_of_its_own_runs_mixture(tmp_path, domains, clustered):
    sources = branches(tmp_path, domains)
    for number, source in enumerate(sources):
        del source["text"]
        file = Path(source["path"]) / "config.yaml"
        values = read_yaml(file) | {"data": {"path": str(clustered)} | one_domain(number)}
        save_config(build_config(RunConfig, values), file)
    out = mixed(tmp_path, sources, "closed_form")
    for loads in loads_by_domain(out, domains).values():
        assert loads.diagonal().mean() > 0.85


def test_shares_of_a_mixture_are_kept(domains, clustered):
    tokenizer, model = Tokenizer.load(clustered / "tokenizer.json"), build_config(LanguageConfig, WIDE)
    source = SourceConfig(path=clustered, text=clustered, mixture=MixtureConfig(weights={"d0": 3, "d2": 1}))
    contexts = contexts_of(source, None, clustered / "tokenizer.json", model, 20 * WIDE["context_length"])
    letters = tokenizer.decode([i for ids in contexts for i in ids])
    counts = [sum(letter in signs.strip() for letter in letters) for signs in SIGNS]
    assert len(contexts) == 20 and len(set(map(tuple, contexts))) == 20
    assert counts[1] == 0 and counts[0] / counts[2] == pytest.approx(3, rel=0.25)


def test_a_random_part_has_text_of_its_own(clustered):
    model, own = build_config(LanguageConfig, WIDE), []
    corpus = Corpus(clustered, "train", WIDE["context_length"], WIDE["vocab_size"])
    for number in range(2):
        data = DataConfig(path=clustered, part=PartConfig(number=number, of=2))
        contexts = contexts_of(SourceConfig(path=clustered), data, clustered / "tokenizer.json", model, 240)
        rows = [corpus[int(row)] for row in rows_of_part(len(corpus), number, 2)]
        mine = {tuple(row.tokens[:-1][row.document_ids[:-1] != 0].tolist()) for row in rows}
        assert len(contexts) == 20 and mine.issuperset(map(tuple, contexts))
        own.append(set(map(tuple, contexts)))
    assert not own[0] & own[1]
    everything = contexts_of(SourceConfig(path=clustered, text=clustered), data, clustered / "none", model, 1 << 20)
    assert len(everything) == len(corpus)  # of a corpus that is named, all


def test_sources_with_the_same_text_are_refused(tmp_path, domains):
    sources = [source | {"text": str(domains[0])} for source in branches(tmp_path, domains)]
    with pytest.raises(ConfigError, match=r"sources\.1 has the same text as sources\.0"):
        mixed(tmp_path, sources, "centroid")


def trained(run: Path, out: Path, texts: list[torch.Tensor], steps: int) -> Path:
    """A run's model after a few steps on rows of these texts in turn."""
    model = model_of(run).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        rows = texts[step % len(texts)]
        loss = model(rows[:, :-1], rows[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return write_run(out, WIDE, {name: parameter.detach() for name, parameter in model.named_parameters()})


def rows_of(corpus: Path, split: str) -> torch.Tensor:
    found = Corpus(corpus, split, WIDE["context_length"], WIDE["vocab_size"])
    return torch.stack([torch.from_numpy(found[row].tokens) for row in range(len(found))])[:64]


def test_trained_branches_start_better_with_learned_routers(tmp_path, domains):
    """Held-out loss of the mixture before any step of its own."""
    texts = [rows_of(corpus, "train") for corpus in domains]
    seed = trained(make_run(tmp_path / "init", WIDE), tmp_path / "seed", texts, 30)
    sources = []
    for number, corpus in enumerate(domains):
        branch = trained(seed, tmp_path / f"b{number}", texts[number : number + 1], 30)
        shutil.copyfile(corpus / "tokenizer.json", branch / "tokenizer.json")
        sources.append({"path": str(branch), "text": str(corpus)})
    held_out = torch.cat([rows_of(corpus, "held_out")[:16] for corpus in domains])
    losses = {}
    for kind in ("random", "centroid", "closed_form"):
        moe = model_of(mixed(tmp_path / kind, sources, kind))
        losses[kind] = float(moe(held_out[:, :-1], held_out[:, 1:]).mean())
    assert max(losses["centroid"], losses["closed_form"]) < losses["random"] - 0.05, losses
