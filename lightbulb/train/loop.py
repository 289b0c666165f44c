"""Pretraining from a run file to a finished run folder, on any number of ranks.

:class:`Trainer` is one process's share of a run. Its :meth:`Trainer.run` reads as the recipe: batch, step, metrics,
evaluation, checkpoint, until the steps are done or a stop is asked for. Started again with the same config it goes on
from the newest good checkpoint, and the losses are those of a run that was never interrupted.
"""

import logging
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from lightbulb.config import save_config
from lightbulb.data.config import DataError
from lightbulb.data.loader import HeldOut, TrainLoader
from lightbulb.data.mixture import OutOfRows
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.folder import FolderError, check_writable, claim
from lightbulb.models.trainable import train_flops
from lightbulb.parallel.collective import RankError, agree, on_rank_zero
from lightbulb.parallel.engine import Engine, StepResult
from lightbulb.parallel.host import Precision
from lightbulb.train.accounts import DomainAccount, HeldOutTally, bytes_predicted
from lightbulb.train.agreement import check_same_on_all_ranks
from lightbulb.train.checkpoint import Checkpoint, CheckpointError, load_into
from lightbulb.train.config import RunConfig
from lightbulb.train.exchange import ExchangeError
from lightbulb.train.faults import StopSignal, fault_point, poisoned
from lightbulb.train.first_weights import take_first_weights
from lightbulb.train.kernels import use_kernels
from lightbulb.train.ledger import Ledger, rewind_ledger
from lightbulb.train.manifest import TrainState, set_aside_newer, step_folder, sweep
from lightbulb.train.meeting import Outer
from lightbulb.train.metrics import FILE_NAME, MetricsWriter, read_metrics
from lightbulb.train.resume import find_checkpoint, settle_precision
from lightbulb.train.save import Saver
from lightbulb.train.schedule import learning_rate_factor
from lightbulb.train.spikes import WINDOW, SpikeRule
from lightbulb.train.throughput import Speedometer, memory_gib, peak_flops
from lightbulb.train.watchdog import Watchdog, sweep_heartbeats

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why and what to change."""


class Trainer:
    """One process's share of a run; use it as a context, which holds the run folder.

    Args:
        config: the run file, resolved for this world size.
        device: where this rank computes.

    Raises:
        FolderInUse: another live run holds the folder.
        CheckpointError: the checkpoint to resume from belongs to another model, or was trained otherwise.
    """

    def __init__(self, config: RunConfig, device: torch.device):
        self.device = device
        self.folder = Path(config.run).expanduser()
        self.is_main = dist.get_rank() == 0
        self._cleanup = ExitStack()
        self._signals = self._cleanup.enter_context(ExitStack())
        self._stop = self._signals.enter_context(StopSignal(device))
        try:
            on_rank_zero(self._claim)
            self._watchdog = self._cleanup.enter_context(Watchdog(self.folder, config.train.hang_seconds))
            checkpoint = find_checkpoint(self.folder, config)
            self.config = settle_precision(config, checkpoint, device)
            self._build(checkpoint)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let a save in flight end, close the metrics and give the run folder back."""
        self._cleanup.close()

    def run(self) -> bool:
        """Train to the last step; False when a signal stopped the run earlier (its state is saved)."""
        train = self.config.train
        is_together = self._meet()
        while self.step < train.steps and is_together:
            try:
                with self._watchdog.section("step", self.step + 1):
                    self._train_one_step()
                    self.saver.poll()
            except OutOfRows as error:
                self._end_without_rows(error)
            is_together = self._meet()
            if train.eval_every and self.step % train.eval_every == 0 and self.step < train.steps:
                self.evaluate(train.eval_contexts, self._stop)
            stopping = self._stop.requested()
            if self.step == train.steps or stopping or (train.save_every and self.step % train.save_every == 0):
                with self._watchdog.section("save", self.step):
                    self.save()
            if stopping and self.step < train.steps:
                break
        with self._watchdog.section("save", self.step):
            self.saver.wait()
        if self.step < train.steps or not is_together:
            self._signals.pop_all()  # the process ends: a launcher that asks twice shall not turn that into a failure
            return False
        self._signals.close()
        return True

    def evaluate(self, max_contexts: int | None = None, stop: StopSignal | None = None) -> dict[str, Any]:
        """Held-out loss and bits per byte, of all and by domain, to the metrics; empty when a stop cut it short.

        Bits per byte divides the summed bits by the bytes of the predicted tokens' text, so that it compares across
        tokenizers.
        """
        model, data = self.config.model, self.config.parallel.data or 1
        held_out = HeldOut(
            self.config.data, model.context_length, model.vocab_size, self.config.train.micro_batch_size,
            self.engine.data_rank, data, max_contexts,
        )  # fmt: skip
        tally = HeldOutTally(held_out, self._token_bytes)
        for number, batch in enumerate(held_out):
            if stop is not None and stop.requested():
                return {}
            with self._watchdog.section("evaluate", self.step):
                fault_point("eval", self.step)
                for domain, part in tally.by_domain(number, batch):
                    tally.add(domain, part, *self.engine.evaluate([part]))
        result = tally.results(self._sum_over_data(tally.bytes))
        self.metrics.write({"kind": "eval", "step": self.step, "contexts": len(held_out.rows), **result})
        return result

    def save(self) -> None:
        """Write a checkpoint of this step, or begin to (``train.async_save``)."""
        state = TrainState(
            step=self.step,
            tokens=self.tokens,
            optimizer_step=self.engine.optimizer_step,
            skipped_steps=self.skipped_steps,
            loader=self.loader.state_dict(),
            config=self.config.model_dump(mode="json"),
            layout=self.config.parallel.label(),
            domain_tokens=dict(self.account.tokens),  # written while training goes on
            meetings=self.outer.meetings if self.outer else 0,
        )
        lines = self.ledger.take()
        self.saver.save(state, lambda: self.ledger.write(lines))

    def facts(self) -> dict[str, Any]:
        """What a summary says of the run besides its results."""
        return {
            "steps": self.step,
            "tokens": self.tokens,
            "tokens_per_second": self.mean_tokens_per_second,
            "world_size": dist.get_world_size(),
            "layout": self.config.parallel.label(),
            "precision": self.config.train.precision,
            "device": self.device.type if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
            "parameters": self.cost.params,
            "active_parameters": self.cost.active_params,
            "skipped_steps": self.skipped_steps,
            "domain_tokens": self.account.tokens,
            "group_epochs": self.loader.group_epochs,
        }

    @property
    def mean_tokens_per_second(self) -> float:
        """Tokens per second of all ranks over the steps of this process."""
        return self._tokens_here / max(self._seconds_here, 1e-9)

    def _claim(self) -> None:
        self._cleanup.enter_context(claim(self.folder))
        check_writable(self.folder)
        sweep(self.folder)
        sweep_heartbeats(self.folder)

    def _build(self, checkpoint: Checkpoint | None) -> None:
        config = self.config
        model, train, data = config.model, config.train, config.parallel.data or 1
        self.step = self.tokens = self.skipped_steps = self._skipped_in_a_row = 0
        self._tokens_here, self._seconds_here = 0, 0.0
        precision: Precision = "bf16" if train.precision == "bf16" else "fp32"
        self.cost = model.cost()
        self.peak = peak_flops(self.device, precision)
        self.engine = Engine(
            model, config.parallel, config.optimizer, precision, config.seed, self.device, train.trainable
        )
        self._train_flops = train_flops(model, self.engine.trained)
        self._cleanup.callback(self.engine.close)
        self.outer = Outer(config.outer, self.engine, self.folder, self._stop, self._watchdog) if config.outer else None
        self.loader = TrainLoader(
            config.data, model.context_length, model.vocab_size, config.seed, config.batch_sizes(),
            train.micro_batch_size, self.engine.data_rank, data, config.mixtures(), config.distil,
        )  # fmt: skip
        self._cleanup.callback(self.loader.close)
        tokenizer = config.data.path.expanduser() / "tokenizer.json"
        self._token_bytes = torch.from_numpy(np.asarray(Tokenizer.load(tokenizer).token_bytes()))
        self.account = DomainAccount(self.loader)
        self.metrics = MetricsWriter(self.folder, train.steps, self.is_main, train.log_every)
        self._cleanup.callback(self.metrics.close)
        self._speed = Speedometer()
        self._spikes = SpikeRule(train.spike_sigma)
        if checkpoint is not None:
            self._resume(checkpoint)
        elif config.start_from is not None:
            take_first_weights(
                self.engine, Path(config.start_from).expanduser(), config.start_from_moments, self.folder
            )
        self.loader.check_enough(train.steps)
        if self.is_main:
            save_config(config, self.folder / "config.yaml")
            shutil.copyfile(tokenizer, self.folder / "tokenizer.json")
        self.metrics.rewind(self.step)
        self._spikes.restore(on_rank_zero(self._last_steps))
        on_rank_zero(lambda: rewind_ledger(self.folder, self.step))
        groups = self.loader.sequence.names
        self.ledger = Ledger(self.folder, self.engine.data_rank, self._is_first_reader(), groups)
        self.saver = Saver(self.folder, self.engine, train.keep_checkpoints, train.async_save)
        self._cleanup.callback(self.saver.close)
        fault_point("start")

    def _last_steps(self) -> list[tuple[float | None, float | None]]:
        """Loss and gradient norm of the steps the spike rule looks at, from the metrics of the run so far."""
        if not (self.folder / FILE_NAME).is_file():
            return []
        steps = [record for record in read_metrics(self.folder) if record["kind"] == "train"]
        return [(record["loss"], record["grad_norm"]) for record in steps[-WINDOW:]]

    def _is_first_reader(self) -> bool:
        """Whether no rank before this one reads the same samples."""
        shares: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(shares, self.engine.data_rank)
        return self.engine.data_rank not in shares[: dist.get_rank()]

    def _resume(self, checkpoint: Checkpoint) -> None:
        state, error = checkpoint.state, None
        try:
            if not state.is_untrained:
                self.loader.load_state_dict(state.loader)  # first: it refuses other data before anything is loaded
            load_into(self.engine, checkpoint)
        except (CheckpointError, DataError) as caught:
            error = caught
        agree(error)
        for aside in on_rank_zero(lambda: set_aside_newer(self.folder, state.step)):
            log.warning("set aside the damaged checkpoint: it is %s now; delete it when you have looked at it", aside)
        self.step, self.tokens, self.skipped_steps = state.step, state.tokens, state.skipped_steps
        self.account.tokens |= state.domain_tokens
        if self.outer is not None:
            self.outer.meetings = state.meetings
        log.info("resumed from %s (written as %s)", checkpoint.folder, state.layout)

    def _train_one_step(self) -> None:
        fault_point("step", self.step + 1)
        started = time.perf_counter()
        batches = self.loader.next_step()
        waited = time.perf_counter() - started
        factor = learning_rate_factor(self.config.schedule, self.step, self.config.train.steps)
        lr = self.config.optimizer.lr * factor
        limits = self._spikes.limits()
        with poisoned(self.engine.chunks[0], self.step + 1):
            self.engine.forward_backward(batches)
        self.saver.settle()  # the snapshot in flight must be whole before the update changes the weights
        result = self.engine.update(lr, *limits)
        self._spikes.add(result.loss, result.grad_norm)
        self.step += 1
        self.tokens += result.tokens
        seconds = time.perf_counter() - started
        self._speed.add(result.tokens, seconds)
        self._tokens_here += result.tokens
        self._seconds_here += seconds
        self.ledger.add(self.step, batches, not result.applied)
        self._count_skips(result)
        counted = self._sum_over_data([bytes_predicted(batches, self._token_bytes), *self.account.count(batches)])
        self.account.add(counted[1:])
        for sentence in self.account.news():
            log.info("step %d: %s", self.step, sentence)
        # Of the whole contexts: places without a label are computed too.
        places = sum(batch.tokens.numel() for batch in batches) * (self.config.parallel.data or 1)
        self._write_metrics(result, lr, counted[0], waited / seconds, places)

    def _meet(self) -> bool:
        """Bring the trunk together with the other branches', where that is due; False when a stop came before it."""
        if self.outer is None or not self.outer.is_due(self.step):
            return True
        self.saver.settle()
        try:
            meeting = self.outer.meet(self.step)
        except (ExchangeError, FolderError, RankError):
            self._save_once()
            raise
        if meeting is not None:
            self.metrics.write({"kind": "outer", "step": self.step, "tokens": self.tokens, **meeting._asdict()})
            if self.step == self.config.train.steps and on_rank_zero(step_folder(self.folder, self.step).exists):
                self.save()  # what is there is of a stop before the meeting
        return meeting is not None

    def _save_once(self) -> None:
        """Save this step, if it is not saved yet, and wait for it."""
        with self._watchdog.section("save", self.step):
            self.saver.wait()
            if not on_rank_zero(step_folder(self.folder, self.step).exists):
                self.save()
                self.saver.wait()

    def _end_without_rows(self, error: OutOfRows) -> NoReturn:
        """Save what was trained and stop: the mixture has nothing left for another step."""
        self._save_once()
        raise TrainingError(
            f"step {self.step + 1} of {self.config.train.steps} cannot be drawn, the run is saved after step "
            f"{self.step}: {error}; raise max_epochs, give other groups a weight, or set train.steps={self.step}"
        )

    def _count_skips(self, result: StepResult) -> None:
        if result.applied:
            self._skipped_in_a_row = 0
            return
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        first, stop = map(self.loader.batch_sizes.samples, (self.step - 1, self.step))
        spike = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        log.warning(
            "step %d skipped on all ranks, %s: loss %s, gradient norm %s (samples %d to %d)",
            self.step, f"a spike over {self.config.train.spike_sigma:g} sigma" if spike else "not finite",
            result.loss, result.grad_norm, first, stop - 1,
        )  # fmt: skip
        if self._skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise TrainingError(
                f"{self._skipped_in_a_row} steps in a row were skipped for "
                f"{'spikes' if spike else 'non-finite gradients'}; the last checkpoint is intact: "
                f"lower optimizer.lr ({self.config.optimizer.lr}) or look at the samples named above"
            )

    def _write_metrics(self, result: StepResult, lr: float, text_bytes: int, data_wait: float, places: int) -> None:
        rate = self._speed.tokens_per_second
        achieved = places / max(self._speed.seconds_per_step, 1e-9) * self._train_flops
        routers = result.routers
        count = max(len(routers), 1)
        self.metrics.write(
            {
                "kind": "train",
                "step": self.step,
                "tokens": self.tokens,
                "loss": result.loss,
                "bits_per_byte": result.loss * result.tokens / math.log(2) / max(text_bytes, 1),
                "balance_loss": sum(r["balance_loss"] for r in routers.values()) / count,
                "router_z_loss": sum(r["z_loss"] for r in routers.values()) / count,
                "lr": lr,
                "grad_norm": result.grad_norm,
                "clip_coefficient": result.clip_coefficient,
                "skipped_steps": self.skipped_steps,
                "tokens_per_second": rate,
                "data_wait": data_wait,
                "flops_per_second": achieved,
                "peak_flops": self.peak,
                "mfu": achieved / self.peak,
                "memory_gib": memory_gib(self.device),
                "eta_seconds": (self.config.train.steps - self.step) * self._speed.seconds_per_step,
                "expert_load": {layer: router["load"] for layer, router in routers.items()},
                "router_entropy": {layer: router["entropy"] for layer, router in routers.items()},
                **self.account.record(),
                **({"divergence": result.divergence} if self.config.distil else {}),
            }
        )

    def _sum_over_data(self, counts: list[int]) -> list[int]:
        """Counts of every data rank's share, summed."""
        total = torch.tensor(counts, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [round(count) // self.config.parallel.copies for count in total.tolist()]


@contextmanager
def open_trainer(config: RunConfig, device: torch.device) -> Iterator[Trainer]:
    """A trainer for the ranks that were started, all with the same config, code, packages and kernels."""
    check_same_on_all_ranks(config)
    use_kernels(config.train.kernels)
    with Trainer(config.resolve(dist.get_world_size()), device) as trainer:
        yield trainer
