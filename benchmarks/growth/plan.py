"""What benchmarks/upcycling.py runs: tasks, the arms they make, and what each arm may cost.

Every arm begins with the same seed model and may spend the same training FLOPs after it; those of its branches count.
FLOPs are those of the models' configs (``cost().train_flops``), so an arm whose model is dearer per token sees fewer
tokens, and an arm with more phases loses less than a step of each.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from growth.corpora import CLUSTERS, CONTEXT, VOCABULARY
from lightbulb.config import build_config
from lightbulb.models.language import LanguageConfig

DIM, LAYERS, HEADS, HIDDEN, TOP_K = 64, 2, 4, 176, 2
BASELINE = "continued_dense"
BETTER_DOMAIN = "reference"
"""The domain whose text counts as the better data of a decay."""
SYNC_EVERY = (1, 8, 64)
TEMPERATURES = (0.05, 0.2, 1.0)
SEED_LENGTHS = {"short": 0.5, "long": 3.0}
BRANCH_SHARES = (0.05, 0.15)
"""Of the budget, in branches, besides :attr:`Tuned.branch_share`."""
FEED_FORWARD = ["blocks.*.channel.*"]
"""What a branch trains that leaves its trunk as it is in the seed."""

DILOCO: Mapping[str, float] = {"lr": 0.7, "momentum": 0.9}
"""Outer optimizer of "DiLoCo" (2023, arXiv:2311.08105), besides the plain mean of the branches."""

Settings = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is trained: tokens of the seed, tokens that continued dense training has after it, rows of a step."""

    seed_tokens: int
    budget_tokens: int
    rows: int = 8

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step of one run or branch."""
        return self.rows * CONTEXT

    def steps(self, flops: float, model: LanguageConfig, rows: int | None = None) -> int:
        """Optimizer steps, of other than the usual rows if need be, that so many training FLOPs pay for."""
        return int(flops / self.flops(1, model, rows) * (1 + 1e-12))

    def flops(self, steps: int, model: LanguageConfig, rows: int | None = None) -> float:
        """Training FLOPs of so many steps."""
        return steps * (rows or self.rows) * CONTEXT * model.cost().train_flops


@dataclass(frozen=True)
class Tuned:
    """What was chosen on a seed that is not reported; the same for all arms of a family."""

    lr: float = 4e-3
    """Of the seed, and of everything dense that goes on from it or stands beside it."""
    branch_lr: float = 4e-3
    moe_lr: float = 4e-3
    warmup: float = 0.03
    """Share of a phase's steps over which the learning rate rises, its moments being new."""
    decay: float = 0.5
    """Share of a last phase's steps over which the learning rate falls to zero."""
    branch_share: float = 0.5
    """Of the budget, in branches that become experts."""
    router_scale: float = 1.0
    """Standard deviation of a learned router's logits before it is trained."""
    keep_moments: bool = False
    """Whether a mixture begins with the moments of what it was made of, and the learning rate at its peak."""
    branch_rows: int = 8
    """Rows of a branch's step."""
    outer_lr: float = 1.0
    outer_momentum: float = 0.0


@dataclass(frozen=True)
class Task:
    """One training, or one evaluation of several models.

    Attributes:
        name: unique within a seed; the name of its run folder.
        kind: ``train``, ``sync`` (branches NAME/0.. that share their trunk) or ``ensemble``.
        settings: all that decides its result besides the seed and what it needs.
        needs: tasks that must be done.
        flops: training FLOPs, this task's own.
    """

    name: str
    kind: str
    settings: Settings
    needs: tuple[str, ...] = ()
    flops: float = 0.0


@dataclass(frozen=True)
class Arm:
    """A result to compare, and all tasks that were trained for it after the seed.

    Attributes:
        name: in the JSON.
        label: in tables.
        task: gives the result.
        spent: tasks whose FLOPs count.
        baseline: the arm it is compared with.
        value: key of the task's result.
        free: its FLOPs are not those of the others, and it says so.
    """

    name: str
    label: str
    task: str
    spent: tuple[str, ...]
    baseline: str = BASELINE
    value: str = "bpb"
    free: bool = False


def model_config(token: Settings, channel: Settings) -> LanguageConfig:
    """The benchmark's transformer with these mixers."""
    values = {
        "vocab_size": VOCABULARY,
        "dim": DIM,
        "num_layers": LAYERS,
        "context_length": CONTEXT,
        "tie_embeddings": True,
        "init_std": 0.08,
        "block_pattern": [{"token": token, "channel": channel}],
    }
    return build_config(LanguageConfig, values, "the benchmark's model")


ATTENTION: Settings = {"type": "attention", "num_heads": HEADS, "num_kv_heads": HEADS, "qk_norm": True}
_HEADS = {"type": "moa", "num_kv_heads": HEADS, "head_dim": DIM // HEADS, "qk_norm": True}


def dense_config(hidden: int = HIDDEN) -> LanguageConfig:
    """The dense model."""
    return model_config(ATTENTION, {"type": "mlp", "hidden_dim": hidden})


def mixture_of(experts: int = CLUSTERS, heads: bool = False) -> LanguageConfig:
    """What it becomes, with a mixture of attention heads if wanted."""
    router = {"router": {"top_k": TOP_K}}
    token = _HEADS | {"num_experts": experts} | router if heads else ATTENTION
    return model_config(token, {"type": "switch", "num_experts": experts, "hidden_dim": HIDDEN} | router)


class Plan:
    """All tasks and arms of one seed.

    Args:
        scale: how much is trained.
        tuned: learning rates and the like.
        shares: share of the corpus' training tokens by domain.
        quick: only the arms of the JSON line.

    Attributes:
        tasks: by name, each behind what it needs.
        arms: by name.
        budget: FLOPs of an arm after the seed.
    """

    def __init__(self, scale: Scale, tuned: Tuned, shares: Mapping[str, float], quick: bool):
        self.scale, self.tuned, self.shares = scale, tuned, shares
        self.tasks: dict[str, Task] = {}
        self.arms: dict[str, Arm] = {}
        self.dense, self.mixture = dense_config(), mixture_of()
        self.budget = scale.budget_tokens * self.dense.cost().train_flops
        self._seed("seed", 1.0)
        self.arms["seed"] = Arm("seed", "the seed", "seed", (), free=True)
        self._continued("", "seed")
        self._cbtm()
        self._copies()
        self._btx("", "seed")
        self._synced("", "seed", SYNC_EVERY[:1])
        self._from_scratch("from_scratch", "mixture from scratch", self.mixture, tuned.moe_lr)
        if not quick:
            self._synced("", "seed", SYNC_EVERY[1:])
            self._shares("", "seed")
            self._feed_forward()
            self._controls()
            self._schedules_and_data()
            for prefix, factor in SEED_LENGTHS.items():
                self._seed_length(f"{prefix}.", factor)

    def _seed(self, name: str, factor: float) -> None:
        steps = round(self.scale.seed_tokens * factor) // self.scale.step_tokens
        self._train(name, self.dense, steps, self.tuned.lr, {"warmup": 0.02, "decay": 0.0}, order=0)

    def _continued(self, prefix: str, seed: str) -> None:
        """Go on as a dense model, on the text that all other arms go on with."""
        name = prefix + "dense"
        self._dense(name, "moments", seed)
        self._arm(prefix + BASELINE, "continued dense" + _of_seed(prefix), name, (name,), prefix + BASELINE)

    def _dense(self, name: str, start: str, seed: str, **changes: Any) -> None:
        """Continued dense training; where its moments are new the learning rate rises again."""
        schedule = {"warmup": self.tuned.warmup if start == "weights" else 0.0, "decay": self.tuned.decay}
        steps = self.scale.steps(self.budget, self.dense)
        self._train(name, self.dense, steps, self.tuned.lr, schedule, 1, start, (seed,), **changes)

    def _cbtm(self) -> None:
        """Branches that take the whole budget, evaluated together."""
        spent = self._ensemble("final", _clusters())
        self._arm("cbtm_ensemble", "c-BTM, likelihood posterior", "final/ensemble", spent, value="likelihood")
        for temperature in TEMPERATURES:
            name, label = f"cbtm_tfidf_{temperature}", f"c-BTM, TF-IDF weights, T = {temperature}"
            self._arm(name, label, "final/ensemble", spent, value=f"tfidf {temperature}")
        self._arm("cbtm_uniform", "c-BTM, equal weights", "final/ensemble", spent, value="uniform")

    def _ensemble(self, name: str, mixtures: Sequence[Settings]) -> tuple[str, ...]:
        """Branches and their evaluation together; gives the branches."""
        runs = self._branches(name, "seed", 1.0, mixtures, decay=self.tuned.decay)
        settings = {"runs": list(runs), "by_cluster": name == "final"}
        self._add(Task(f"{name}/ensemble", "ensemble", settings, runs))
        return runs

    def _copies(self) -> None:
        """Mixtures of copies of the seed."""
        for kind in ("random", "centroid"):
            name = "sparse" if kind == "random" else f"sparse_{kind}"
            self._upcycled(name, f"sparse upcycling, {kind} router", ["seed"], ("seed",), "sparse", kind)
        self._upcycled("drop", "drop-upcycling, random router", ["seed"], ("seed",), "drop", "random")

    def _controls(self) -> None:
        """Is it routing or width, clusters or voting?"""
        label = f"{TOP_K} copies, both always used (active width of the mixtures)"
        self._upcycled("wide", label, ["seed"], ("seed",), "sparse", "random", experts=TOP_K)
        wide = dense_config(TOP_K * HIDDEN)
        self._from_scratch(
            "wide_from_scratch", "dense of the mixtures' active width, from scratch", wide, self.tuned.lr
        )
        spent = self._ensemble("random", [{}] * CLUSTERS)
        label = "c-BTM of random parts of the text, likelihood posterior"
        self._arm("cbtm_random", label, "random/ensemble", spent, value="likelihood")
        self._upcycled("drop_centroid", "drop-upcycling, centroid router", ["seed"], ("seed",), "drop", "centroid")

    def _btx(self, prefix: str, seed: str, kinds: Sequence[str] = ("random", "centroid")) -> None:
        """Branches that become experts."""
        share = self.tuned.branch_share
        runs = self._branches(prefix + "half", seed, share, _clusters(), decay=0.0)
        baseline = prefix + BASELINE
        for kind in kinds:
            name = prefix + ("btx" if kind == "random" else f"btx_{kind}")
            self._upcycled(name, f"BTX, {kind} router{_of_seed(prefix)}", runs, runs, "btx", kind, baseline=baseline)
        if not prefix:
            self._upcycled("btx_moa", "BTX + MoA, centroid router", runs, runs, "btx+moa", "centroid")

    def _shares(self, prefix: str, seed: str) -> None:
        """Less of the budget in branches, and an outer optimizer with momentum."""
        for share in BRANCH_SHARES:
            runs = self._branches(f"{prefix}share_{share}", seed, share, _clusters(), decay=0.0)
            self._mixed(f"{prefix}btx_share_{share}", f"BTX, {_branches_of(share)}{_of_seed(prefix)}", runs, prefix)
            self._synced(prefix, seed, SYNC_EVERY[1:2], share)
            self._synced(prefix, seed, SYNC_EVERY[1:2], share, "diloco")
        self._synced(prefix, seed, SYNC_EVERY[1:2], self.tuned.branch_share, "diloco")

    def _feed_forward(self) -> None:
        """Branches whose trunks are equal because none is trained; what that saves is not taken off their FLOPs."""
        for share in (*BRANCH_SHARES, self.tuned.branch_share):
            runs = self._branches(f"ffn_{share}", "seed", share, _clusters(), decay=0.0, trainable=FEED_FORWARD)
            self._mixed(f"btx_ffn_{share}", f"BTX of feed-forward layers only, {_branches_of(share)}", runs)

    def _mixed(self, name: str, label: str, runs: tuple[str, ...], prefix: str = "") -> None:
        """Branches as experts, with routers from centroids."""
        self._upcycled(name, label, runs, runs, "btx", "centroid", baseline=prefix + BASELINE)

    def _synced(
        self, prefix: str, seed: str, every: Sequence[int], share: float | None = None, outer: str = "sync"
    ) -> None:
        """Branches that share their trunk every so many steps, then become experts; of another share of the budget."""
        suffix = "" if share is None else f"_share_{share}"
        part = "centroid router" if share is None else _branches_of(share)
        tuned = {"lr": self.tuned.outer_lr, "momentum": self.tuned.outer_momentum}
        meeting = "synchronised" if outer == "sync" else "synchronised by DiLoCo"
        rows, share = self.tuned.branch_rows, self.tuned.branch_share if share is None else share
        steps = self.scale.steps(share * self.budget / CLUSTERS, self.dense, rows)
        for count in every:
            settings = {
                "model": _written(self.dense),
                "steps": steps,
                "lr": self.tuned.branch_lr,
                "schedule": {"warmup": 0.0, "decay": 0.0},
                "sync": {"every": count} | (tuned if outer == "sync" else dict(DILOCO)),
                "order": 1,
                "rows": rows,
            }
            name = f"{prefix}{outer}_{count}{suffix}"
            flops = CLUSTERS * self.scale.flops(steps, self.dense, rows)
            self._add(Task(f"{name}/branches", "sync", settings, (seed,), flops))
            runs = [f"{name}/branches:{number}" for number in range(CLUSTERS)]
            label = f"trunk {meeting} every {count} steps, {part}{_of_seed(prefix)}"
            needs = (f"{name}/branches",)
            self._upcycled(name, label, runs, needs, "btx", "centroid", baseline=prefix + BASELINE)

    def _from_scratch(self, name: str, label: str, model: LanguageConfig, lr: float) -> None:
        """A model that never was the seed, with its FLOPs and the budget's."""
        total = self.budget + self.tasks["seed"].flops
        schedule = {"warmup": 0.02, "decay": self.tuned.decay * self.budget / total}
        self._train(name, model, self.scale.steps(total, model), lr, schedule, order=0)
        self._arm(name, label, name, (name,))

    def _schedules_and_data(self) -> None:
        """Continued dense training with one thing changed."""
        for name, label, start, changes in (
            ("new_moments", "continued dense, moments new", "weights", {}),
            ("better_decay", f"half of {BETTER_DOMAIN} before the decay, the rest in it", "moments", self._later()),
            ("in_context", "in-context order of the text", "moments", {"corpus": "corpus-in-context"}),
        ):
            self._dense(name, start, "seed", **changes)
            self._arm(name, label, name, (name,))
        self._one_run()

    def _one_run(self) -> None:
        """Seed and budget as one run, in one order of the text: warmup-stable-decay, which is the seed's run gone on
        with, and cosine."""
        before, steps = self.tasks["seed"].settings["steps"], self.scale.steps(self.budget, self.dense)
        total = before + steps
        stable = {"warmup": 0.02 * before / total, "decay": self.tuned.decay * steps / total}
        self._train("wsd", self.dense, total, self.tuned.lr, stable, 0, "resume", ("seed",), before=before)
        self._arm("wsd", "one run, warmup-stable-decay", "wsd", ("wsd",))
        cosine = {"warmup": 0.02, "decay": 0.98, "shape": "cosine"}
        self._train("cosine", self.dense, total, self.tuned.lr, cosine, order=0)
        self._arm("cosine", "one run, cosine", "cosine", ("cosine",), "wsd")

    def _later(self) -> Settings:
        """Mixtures before and in the decay in which the better domain has its share of all tokens, but most in the
        decay: half of its share before."""
        share, decay = self.shares[BETTER_DOMAIN], self.tuned.decay
        others = {name: value for name, value in self.shares.items() if name != BETTER_DOMAIN}
        before = share / 2
        after = (share - before * (1 - decay)) / decay
        mixtures = [
            {"weights": {BETTER_DOMAIN: own} | {n: v * (1 - own) / (1 - share) for n, v in others.items()}}
            for own in (before, after)
        ]
        return {"mixtures": mixtures}

    def _seed_length(self, prefix: str, factor: float) -> None:
        """The comparison of branches and copies for a seed of another length."""
        seed = prefix + "seed"
        self._seed(seed, factor)
        self.arms[seed] = Arm(seed, "the seed" + _of_seed(prefix), seed, (), prefix + BASELINE, free=True)
        self._continued(prefix, seed)
        label = f"sparse upcycling, centroid router{_of_seed(prefix)}"
        baseline = prefix + BASELINE
        self._upcycled(prefix + "sparse_centroid", label, [seed], (seed,), "sparse", "centroid", baseline=baseline)
        self._btx(prefix, seed, ("centroid",))
        self._synced(prefix, seed, SYNC_EVERY[:2])
        if factor > 1:
            self._shares(prefix, seed)

    def _branches(
        self, name: str, seed: str, share: float, mixtures: Sequence[Settings], decay: float, **settings: Any
    ) -> tuple[str, ...]:
        """One run for each cluster; where there is no cluster, each has an order of its own. Gives their names."""
        rows = self.tuned.branch_rows
        steps = self.scale.steps(share * self.budget / CLUSTERS, self.dense, rows)
        schedule, lr = {"warmup": 0.0, "decay": decay}, self.tuned.branch_lr
        for number, mixture in enumerate(mixtures):
            changes = {"mixtures": [mixture] if mixture else [], "evaluate": False, "rows": rows} | settings
            order = 1 if mixture else 2 + number
            self._train(f"{name}/{number}", self.dense, steps, lr, schedule, order, "moments", (seed,), **changes)
        return _members(name)

    def _upcycled(
        self,
        name: str,
        label: str,
        sources: Sequence[str],
        needs: tuple[str, ...],
        method: str,
        router: str,
        experts: int = CLUSTERS,
        baseline: str = BASELINE,
    ) -> None:
        """A mixture of sources, trained with what they left of the budget."""
        model = mixture_of(experts, heads=method == "btx+moa")
        trained = tuple(need for need in needs if not need.endswith("seed"))
        steps = self.scale.steps(self.budget - sum(self.tasks[name].flops for name in trained), model)
        keep = self.tuned.keep_moments
        schedule = {"warmup": 0.0 if keep else self.tuned.warmup, "decay": self.tuned.decay}
        upcycle: Settings = {"method": method, "sources": list(sources), "router": router, "experts": experts}
        upcycle |= {"moments": "keep"} if keep else {}
        upcycle |= {"scale": self.tuned.router_scale} if router != "random" and self.tuned.router_scale != 1 else {}
        self._train(name, model, steps, self.tuned.moe_lr, schedule, 1, "upcycle", needs, upcycle=upcycle)
        self._arm(name, label, name, (*trained, name), baseline)

    def _train(
        self,
        name: str,
        model: LanguageConfig,
        steps: int,
        lr: float,
        schedule: Settings,
        order: int,
        start: str | None = None,
        needs: tuple[str, ...] = (),
        before: int = 0,
        **changes: Any,
    ) -> None:
        """Add a training. ``order`` numbers orders of the data; ``before`` are steps that another task trained."""
        settings = {
            "model": _written(model),
            "steps": steps,
            "rows": self.scale.rows,
            "lr": lr,
            "schedule": schedule,
            "order": order,
            "start": start,
            "evaluate": True,
        }
        settings |= changes
        self._add(Task(name, "train", settings, needs, self.scale.flops(steps - before, model, settings["rows"])))

    def _arm(
        self, name: str, label: str, task: str, spent: tuple[str, ...], baseline: str = BASELINE, value: str = "bpb"
    ) -> None:
        self.arms[name] = Arm(name, label, task, spent, baseline, value)

    def _add(self, task: Task) -> None:
        missing = [need for need in task.needs if need not in self.tasks]
        assert not missing, f"{task.name} needs {missing} before it"
        self.tasks[task.name] = task

    def flops(self, arm: str) -> float:
        """Training FLOPs of an arm after the seed; from scratch, less the seed's."""
        spent = sum(self.tasks[name].flops for name in self.arms[arm].spent)
        starts = self.tasks[self.arms[arm].task].settings.get("start", "branches")
        return spent - (self.tasks["seed"].flops if starts is None and spent else 0.0)

    def model(self, task: str) -> LanguageConfig:
        """The model that a task trains."""
        return build_config(LanguageConfig, self.tasks[task].settings["model"], task)

    def trunk(self, task: str) -> int:
        """Parameters that the branches of a task share: all but their channel mixers."""
        model = self.model(task)
        hidden = sum(block.channel.cost(DIM).params for block in model.block_pattern if block.channel) * LAYERS
        return model.cost().params - hidden

    def shown_sync(self) -> str:
        """The synchronised arm of the JSON line."""
        return f"sync_{SYNC_EVERY[0]}"

    def keys(self, seed: int, corpus: str) -> dict[str, str]:
        """A name for each task's result that changes with everything the result depends on.

        Args:
            seed: of the repetition.
            corpus: digest of the text.
        """
        keys: dict[str, str] = {}
        for name, task in self.tasks.items():
            content = [asdict(task), seed, corpus, [keys[need] for need in task.needs]]
            keys[name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        return keys


def _written(model: LanguageConfig) -> Settings:
    """A model's config without what has its default: keys of results do not change with what LightBulb learns."""
    return model.model_dump(mode="json", exclude_defaults=True)


def _of_seed(prefix: str) -> str:
    """What a label says of the seed's length."""
    return f", seed x {SEED_LENGTHS[prefix.rstrip('.')]:g}" if prefix else ""


def _branches_of(share: float) -> str:
    """What a label says of the share of the budget that branches have."""
    return f"{share:.0%} in branches"


def _clusters() -> list[Settings]:
    """Of each cluster, the mixture that draws from it alone."""
    return [{"weights": {f"*/cluster-{number:02d}": 1.0}} for number in range(CLUSTERS)]


def _members(name: str) -> tuple[str, ...]:
    return tuple(f"{name}/{number}" for number in range(CLUSTERS))
