"""One expert run for each cluster of a corpus, from one checkpoint of a seed (the branch phase of Branch-Train-MiX,
Sukhbaatar et al. 2024, arXiv:2403.07816, on the clusters of c-BTM, Gururangan et al. 2023, arXiv:2303.14177).

Branches are ordinary runs. What this file adds is their run files, which checkpoint they start from (written down, so
that a seed that trains on does not change it), and what became of them.
"""

import re
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import yaml

from lightbulb.config import ConfigError, build_config, load_config, save_config
from lightbulb.data.corpus import Corpus
from lightbulb.data.mixture import Group
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.data_prep.manifest import read_manifest
from lightbulb.experts.branch_config import BranchConfig
from lightbulb.experts.jobs import JobsConfig
from lightbulb.experts.mixture_model import mixture_config
from lightbulb.experts.upcycle_config import UpcycleConfig
from lightbulb.folder import explained, write_atomically
from lightbulb.train.checkpoint import Checkpoint, CheckpointError
from lightbulb.train.config import RunConfig
from lightbulb.train.fork import ForkPoint
from lightbulb.train.manifest import complete_checkpoints, read_state, step_folder, step_of
from lightbulb.train.origin import Origin, Parent, parent_of, write_origin

RECORD, NEXT = "branches.json", "upcycle.yaml"
SCHEDULE = {"warmup": 0.02, "decay": 0.0}
"""A branch's learning rate: the seed's stable phase goes on, after moments and data have met."""
_GROUP = re.compile(r".+/cluster-(\d+)")


class Branch(NamedTuple):
    """One run to be.

    Attributes:
        cluster: its number; of a random part, the part's.
        groups: the corpus's groups it reads.
        words: leading terms of the cluster, as far as the corpus knows them.
        tokens: of its groups (its part) in the corpus.
        config: the run file.
    """

    cluster: int
    groups: list[str]
    words: list[str]
    tokens: int
    config: RunConfig

    @property
    def needs(self) -> int:
        """Tokens it is trained on."""
        return self.config.batch_sizes().samples(self.config.train.steps) * self.config.model.context_length

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run)

    @property
    def file(self) -> Path:
        """The run file."""
        return self.folder.with_name(f"{self.folder.name}.yaml")


class Branches:
    """The branches that a config asks for.

    Attributes:
        seed: the seed's run file.
        checkpoint: where all branches start.
        corpus: what they read.

    Raises:
        ConfigError: a field does not fit seed or corpus.
        CheckpointError: the seed has no such checkpoint.
        DataError: no corpus.
    """

    def __init__(self, config: BranchConfig):
        self.config = config
        if not (config.seed_run / "config.yaml").is_file():
            raise ConfigError(f"seed_run: {config.seed_run} is not a run folder (it has no config.yaml); name a run")
        self.seed = load_config(RunConfig, config.seed_run / "config.yaml")
        self.checkpoint = self._find_checkpoint()
        self.corpus = config.corpus or self.seed.data.path.expanduser()
        self._train = Corpus(self.corpus, "train", self.seed.model.context_length, self.seed.model.vocab_size)
        self._check_tokenizer()

    @cached_property
    def branches(self) -> list[Branch]:
        """All of them, in the order of their numbers."""
        chosen, words = self._chosen(), _words(self.corpus)
        found = []
        for place, (cluster, groups) in enumerate(chosen.items()):
            tokens = sum(self._train.groups[name].tokens for name in groups)
            if self.config.clusters == "random":
                tokens //= len(chosen)
            terms = words[cluster] if self.config.clusters != "random" and cluster < len(words) else []
            run_file = self._run_file(cluster, place, len(chosen))
            found.append(Branch(cluster, groups, terms, tokens, run_file))
        return found

    @property
    def jobs(self) -> JobsConfig:
        """How the runs are started; branches that meet, all at once."""
        jobs, count = self.config.jobs, len(self.branches)
        if self.config.sync is None:
            return jobs
        if jobs.hostfiles and len(jobs.hostfiles) < count:
            raise ConfigError(
                f"jobs.hostfiles: {len(jobs.hostfiles)} node groups for {count} branches that meet every "
                f"{self.config.sync.every} steps; name {count}, or leave sync out"
            )
        return jobs if jobs.hostfiles else jobs.model_copy(update={"at_once": count})

    def warnings(self) -> list[str]:
        """What should be known before the branches are trained, a sentence each."""
        found = []
        start = ForkPoint(self.checkpoint, read_state(self.checkpoint), self.seed)
        if start.unstable is not None and not start.state.is_untrained:
            found.append(f"seed_run: {start.unstable}; branch from its stable phase (at_step), before the decay")
        for branch in self.branches:
            if branch.needs > branch.tokens:
                found.append(
                    f"branch {branch.cluster}: {branch.needs:,} tokens to train on, its text has {branch.tokens:,}: "
                    f"{branch.needs / max(branch.tokens, 1):.1f} epochs"
                )
        saved = self.branches[0].config.train.save_every
        if self.config.sync is not None and not saved:
            found.append("sync: without train.save_every the trunk of every round stays on disk until the end; set it")
        try:
            mixture_config(self.seed.model, build_config(UpcycleConfig, self._mixing(), NEXT))
        except ConfigError as error:
            found.append(f"the branches cannot become a mixture: {error}")
        return found

    def prepare(self) -> None:
        """Write run files, the branches' origins, the record and the next step's config.

        Raises:
            FolderError: the folder cannot be written.
        """
        with explained(self.config.run):
            self.config.run.mkdir(parents=True, exist_ok=True)
        parent = parent_of(self.checkpoint)
        if not any(branch.folder.exists() for branch in self.branches):
            shutil.rmtree(self.config.run / "exchange", ignore_errors=True)  # of branches that were removed
        listed = [
            {"cluster": b.cluster, "groups": b.groups, "words": b.words, "tokens": b.tokens, "run": str(b.folder)}
            for b in self.branches
        ]
        record = {"seed": parent.model_dump(), "corpus": str(self.corpus), "branches": listed}
        write_atomically(self.config.run / RECORD, orjson.dumps(record, option=orjson.OPT_INDENT_2))
        for branch, detail in zip(self.branches, listed, strict=True):
            with explained(branch.folder):
                branch.folder.mkdir(exist_ok=True)
            save_config(branch.config, branch.file)
            if not complete_checkpoints(branch.folder):
                write_origin(branch.folder, Origin(kind="branch", parents=[parent], detail=detail))
        write_atomically(self.config.run / NEXT, yaml.safe_dump(self._mixing(), sort_keys=False))

    def _mixing(self) -> dict[str, Any]:
        """A config of `lightbulb upcycle` that mixes the branches."""
        is_random = self.config.clusters == "random"
        data = self.seed.data.model_dump(mode="json") | self._whole_corpus()
        return {
            "run": str(self.config.run / "mixture"),
            "method": "btx",
            "sources": [{"path": str(branch.folder), "tokens": branch.needs} for branch in self.branches],
            "seed_model": str(self.config.seed_run),
            "router": {"top_k": min(2, len(self.branches))},
            "router_start": {"kind": "random" if is_random else "centroid"},
            "data": data,
        }

    @property
    def _step(self) -> int:
        return step_of(self.checkpoint)

    def _find_checkpoint(self) -> Path:
        """The checkpoint that was written down when the branches began; else that of ``at_step``, or the newest."""
        seed, wanted = self.config.seed_run, self.config.at_step
        if (began := self._began()) is not None:
            if wanted is not None and wanted != began.step:
                raise ConfigError(
                    f"at_step: {self.config.run} was begun from step {began.step}, now {wanted} is asked for; set run "
                    "to another folder"
                )
            wanted = began.step
        listed = [step_of(folder) for folder in complete_checkpoints(seed)]
        if not listed or (wanted is not None and wanted not in listed):
            which = "no checkpoint yet" if wanted is None else f"no checkpoint of step {wanted}"
            raise CheckpointError(f"seed_run: {seed} has {which}; it has steps {sorted(listed)}")
        folder = step_folder(seed, listed[0] if wanted is None else wanted)
        if began is not None and parent_of(folder).digest != began.digest:
            raise CheckpointError(
                f"{folder}: not the checkpoint that {self.config.run} was begun from; restore it, or set another run "
                "folder"
            )
        if self.config.moments == "keep" and not Checkpoint(folder, verify=False).has_moments:
            raise ConfigError(f"moments: {folder} has none (nobody trained it); set moments: reset")
        return folder

    def _began(self) -> Parent | None:
        """What the record says, if a branch has begun to train."""
        path = self.config.run / RECORD
        if not path.is_file() or not any(self.config.run.glob("branch-*/metrics.jsonl")):
            return None
        return Parent.model_validate(orjson.loads(path.read_bytes())["seed"])

    def _check_tokenizer(self) -> None:
        path = self.config.seed_run / "tokenizer.json"
        if path.is_file() and Tokenizer.load(path).digest != self._train.tokenizer_digest:
            raise ConfigError(
                f"corpus: {self.corpus} was written with another tokenizer than {path}; run `lightbulb preprocess` "
                f"with tokenizer: {{path: {path}}}"
            )

    def _chosen(self) -> dict[int, list[str]]:
        """Groups of each branch, by its number."""
        known = clusters_of(self._train.groups)
        wanted = self.config.clusters
        if wanted == "random" and (self.config.parts or known):
            return dict.fromkeys(range(self.config.parts or len(known)), list(self._train.groups))
        if not known:
            raise ConfigError(
                f"corpus: {self.corpus} has no clusters, only {', '.join(list(self._train.groups)[:8])}; preprocess it "
                "with cluster: {num_clusters: 4}"
            )
        numbers = list(known) if isinstance(wanted, str) else wanted
        for number in numbers:
            if number not in known:
                raise ConfigError(f"clusters: {number} is none of the corpus's, which are {', '.join(map(str, known))}")
        return {number: known[number] for number in numbers}

    def _whole_corpus(self) -> dict[str, Any]:
        """What replaces the seed's choice among its data."""
        return {"path": str(self.corpus), "mixture": None, "stages": [], "part": None}

    def _run_file(self, cluster: int, place: int, count: int) -> RunConfig:
        config = self.config
        values = self.seed.model_dump(mode="json")
        values["data"] |= self._whole_corpus()
        if config.clusters == "random":
            values["data"]["part"] = {"number": place, "of": count}
        else:
            name = clusters_of(self._train.groups)[cluster][0].partition("/")[2]
            values["data"]["mixture"] = {"weights": {f"*/{name}": 1.0}}
        values["parallel"] |= {"data": None} | config.parallel
        values["schedule"] |= SCHEDULE | config.schedule
        values["optimizer"] |= config.optimizer
        batch = self.seed.batch_sizes().of_step(self._step)  # of the seed's next step
        values["train"] |= {"global_batch_size": batch, "batch_stages": []} | config.train
        values |= {
            "run": str(config.folder(cluster)),
            "start_from": str(self.checkpoint),
            "start_from_moments": config.moments == "keep",
        }
        if config.sync is not None:
            own = {"folder": str(config.run / "exchange"), "branch": place, "branches": count}
            values["outer"] = config.sync.model_dump() | own
        return build_config(RunConfig, values, f"branch {cluster}")


def clusters_of(groups: dict[str, Group]) -> dict[int, list[str]]:
    """Groups by the number of their cluster, rising; those of no cluster are left out."""
    found: dict[int, list[str]] = {}
    for name in groups:
        if match := _GROUP.fullmatch(name):
            found.setdefault(int(match[1]), []).append(name)
    return dict(sorted(found.items()))


def _words(corpus: Path) -> list[list[str]]:
    """Leading terms of each cluster; empty where the corpus has none."""
    manifest = read_manifest(corpus) or {}
    return [cluster.get("words", []) for cluster in manifest.get("clusters", [])]
