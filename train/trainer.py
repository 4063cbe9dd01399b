"""The training loop: agree, build or restore, then step, report, save, stop. No maths.

Every rank runs the same sequence of collective calls. What may fail on one rank alone, such as
opening files, runs ``together``: if it fails anywhere it fails everywhere, with one message.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import settings
from pipeline.files import write_atomically
from pipeline.format import fingerprint
from pipeline.settings import ConfigError
from train import checkpoint
from train.checkpoint_folders import (
    checkpoint_folder,
    find_checkpoints,
    newest_checkpoint,
    prune,
)
from train.config import TrainConfig, as_dict
from train.data.loader import LatentLoader
from train.data.view import View, open_view
from train.ema import Ema
from train.engine import Engine, StepResult, choose_precision
from train.guard import Guard
from train.identity import (
    check_continues,
    describe_data,
    describe_run,
    program_versions,
    with_columns,
)
from train.meter import Meter
from train.new_model import describe_model, new_model
from train.objective.flow import flow_loss
from train.objective.tasks import Task, task_of_step
from train.preempt import StopRequest
from train.ranks import USER_ERRORS, AgreedError, Ranks, Verdict, one_message
from train.sinks import Sinks

ASK_EVERY_S = 1.0  # while data is waited for: whether someone wants the run to stop
FIRST_STEP_S = 10.0  # a first step is waited for this long, before a stop is heeded without it


class Trainer:
    """One rank of a training run.

    Args:
        config: the run.
        ranks: the ranks, which have joined.

    Raises:
        AgreedError: on all ranks, if the run can't start on one.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.run_dir = Path(config.run_dir)
        self.precision = choose_precision(config.precision, ranks.device)
        self.accumulation = ranks.together(lambda: config.accumulation(ranks.num_ranks))
        # Rank 0 chooses, as a shared file system may show the ranks different folders.
        self.resumed: Path | None = ranks.first(lambda: newest_checkpoint(self.run_dir))
        self.saved = ranks.together(self._read_saved)
        self.view, self.loader = ranks.together(self._open_data)
        self.sinks: Sinks | None = None
        self.step = ranks.together(self._position)  # optimiser steps done
        self.first_step = self.saved_step = self.step
        self.guard = Guard()
        self.data_error: str | None = None
        ranks.check_agreement(
            {
                "data": self.view.view_id,
                "settings": fingerprint(as_dict(config)),
                "programs": fingerprint(program_versions()),
                "steps": (self.step, config.steps),
                "steps per epoch": self.loader.steps_per_epoch,
                "place in the data": fingerprint(self.loader.state_dict()),
            }
        )

    def _read_saved(self) -> dict[str, Any] | None:
        return checkpoint.read_state(self.resumed) if self.resumed else None

    def _open_data(self) -> tuple[View, LatentLoader]:
        config, ranks, data = self.config, self.ranks, self.config.data
        if self.saved:
            data = with_columns(data, [part["columns"] for part in self.saved["data"]["parts"]])
        view = open_view(data, "train", config.model.time_patches)
        loader = LatentLoader(
            view,
            seed=config.seed,
            global_batch=config.global_batch,
            rank=ranks.rank,
            num_ranks=ranks.num_ranks,
            micro_batch=config.micro_batch,
            device=ranks.device,
        )
        return view, loader

    def _layout(self) -> dict[str, Any]:
        """What the files of the ranks depend on, beside the run itself."""
        return {
            "num_ranks": self.ranks.num_ranks,
            "zero_stage": self.config.zero_stage,
            "precision": self.precision,
        }

    def _position(self) -> int:
        """Put the loader where the newest checkpoint was taken; return the steps done."""
        if not (self.resumed and self.saved):
            return 0
        run = describe_run(self.config, self.view)
        check_continues(self.resumed, self.saved, run, self._layout())
        self.loader.load_state_dict(self.saved["loader"])
        return self.saved["step"]

    def run(self) -> None:
        """Train until ``steps`` are done or someone asks to stop; either way it is saved.

        Raises:
            AgreedError: too many steps in a row had gradients that are not finite; or a rank can't
                read its data any more: then what was trained is saved.
        """
        self.ranks.on_first(self._open_run_dir)
        try:
            if self.step < self.config.steps:
                self._build()
                self._train()
            else:
                self.say(f"nothing to do: {self.step} of {self.config.steps} steps are done")
        finally:
            self.loader.close()
            if self.sinks:
                self.sinks.close()

    def _say_where(self) -> None:
        """Say what is continued, and what is not as it was."""
        if self.saved:
            self.say(
                f"continuing from {self.resumed}, step {self.step} of {self.config.steps}: "
                f"{self.loader.position()}"
            )
            before = self.saved["loader"]["global_batch"]
            if before != self.config.global_batch:
                self.say(
                    f"global_batch was {before}, is now {self.config.global_batch}: the samples go "
                    "on where they were, the steps are not those of an unchanged run"
                )
        found = find_checkpoints(self.run_dir)
        for folder in found.broken_off:
            self.say(f"ignoring {folder}: saving it broke off")
        for folder, damage in found.damaged.items():
            self.say(f"ignoring {folder}: {damage}")

    def _open_run_dir(self) -> None:
        """Record the settings and open the metrics; on rank 0."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(self.run_dir / "config.yaml", settings.dump(self.config).encode())
        except OSError as error:
            raise ConfigError(f"run_dir {self.run_dir} can't be written: {error}") from None
        self.sinks = Sinks(self.run_dir, self.step, self.config.steps)
        self._say_where()

    def _build(self) -> None:
        """Build model, optimiser and EMA, or restore them; heed requests to stop from now on."""
        config = self.config
        model = self.ranks.together(lambda: new_model(config, self.view))
        planned = sum(part.census.head.tally.planned for part in self.view.parts)
        self.say(
            f"{self.view.num_clips:,} of {planned:,} clips (train.data.inspect says why), "
            f"{' + '.join(map(str, self.loader.steps_per_epoch))} steps an epoch"
        )
        self.say(
            f"{describe_model(model, self.view)}, {self.ranks.num_ranks} ranks × "
            f"{config.micro_batch} samples × {self.accumulation} passes a step, {self.precision}, "
            f"ZeRO-{config.zero_stage}"
        )
        self.engine = Engine(model, config, self.ranks, self.accumulation)
        self.ema = Ema(self.engine, config.ema_decay)
        if self.resumed:
            checkpoint.restore(self.resumed, self.engine, self.ema, self.ranks)
        self.null_text = self.view.null_text.to(self.ranks.device)
        self.stop = StopRequest(self.run_dir, watch_file=self.ranks.rank == 0)
        self.stop.listen()
        self.meter = Meter(self.ranks, config.global_batch)

    def _train(self) -> None:
        """Take steps until all are done or the ranks agree to end, then save."""
        config = self.config
        verdict = self._agree()
        self.meter.restart()  # what was before is start-up
        while verdict == Verdict.GO:
            task = task_of_step(config.tasks, config.seed, self.step)
            result = self._train_step(task)
            self.step += 1
            if not result.was_applied:
                self.say(f"step {self.step} skipped: gradients of {task.name} are not finite")
            self.guard.check(result, self.step)
            if self.step % config.log.every_steps == 0:
                self._report()
            if self.step % config.checkpoint.every_steps == 0:
                self._save()
            if self.step == config.steps:
                break
            verdict = self._agree()
        self._finish(verdict)

    def _agree(self) -> Verdict:
        """Wait until all ranks have their part of the next step, or else agree to end.

        The only collective call of a step beside DeepSpeed's. A rank that can't read its data, and
        failed alone, would leave the others waiting for it in the middle of a step; one that waits
        for data that are lost must not keep the others from stopping.
        """
        verdict = Verdict.WAIT
        while verdict == Verdict.WAIT:
            verdict = self.ranks.agree(self._await_data())
        return verdict

    def _await_data(self) -> Verdict:
        """Wait a while for this rank's part of the next step; return what it is for then."""
        try:
            with self.meter.waiting():
                is_read = self.loader.wait_step(ASK_EVERY_S)
        except USER_ERRORS as error:
            self.data_error = str(error) or repr(error)
            return Verdict.NO_DATA
        # One step is made if it can be, so that a run that is stopped again and again goes on.
        is_first = self.step == self.first_step
        is_late = not is_read and self.meter.waiting_s > FIRST_STEP_S
        if self.stop.is_set() and (is_late or not is_first):
            return Verdict.STOP
        return Verdict.GO if is_read else Verdict.WAIT

    def _finish(self, verdict: Verdict) -> None:
        """Report and save what was done since the last time, and say why it ends.

        Raises:
            AgreedError: a rank can't read its data.
        """
        if self.meter.num_steps:
            self._report()
        if self.step > self.saved_step:
            self._save()
        if self.step > self.first_step:
            self.say(f"waited for data {self.meter.data_wait:.2%} of the time")
        if verdict == Verdict.NO_DATA:
            failures = one_message(self.ranks.gather(self.data_error))
            if not self.step:
                raise AgreedError(failures)
            raise AgreedError(
                f"the data can't be read any more: {failures}. Step {self.step} of "
                f"{self.config.steps} is saved in {self.run_dir}: mend the data, and the same "
                "command continues"
            )
        if verdict == Verdict.STOP:
            self._say_stopped()
        if self.ranks.rank == 0:
            self.stop.clear_file()

    def _train_step(self, task: Task) -> StepResult:
        """Run one optimiser step: accumulate micro-batches, update weights and EMA."""
        config, view = self.config, self.view
        for _ in range(self.accumulation):
            with self.meter.waiting():
                batch = next(self.loader)
            loss = flow_loss(
                self.engine.wrapped,
                batch,
                self.null_text,
                task,
                (view.video, view.audio),
                config.flow,
                config.seed,
            )
            self.engine.accumulate(loss.total)
            self.meter.add_micro_batch(task, loss, len(batch.keys))
        result = self.engine.step(config.learning_rate(self.step))
        if result.was_applied:
            self.ema.update(self.engine, self.step)
        self.meter.add_step(result)
        return result

    def _report(self) -> None:
        metrics = self.meter.summary(self.loader.num_substituted)
        metrics["learning_rate"] = self.config.learning_rate(self.step - 1)
        metrics["samples"] = self.loader.state_dict()["samples_consumed"]
        if self.sinks:
            self.sinks.write(self.step, metrics)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "loader": self.loader.state_dict(),
            "run": describe_run(self.config, self.view),
            "data": describe_data(self.config, self.view),
            "layout": self._layout(),
            "programs": program_versions(),
        }
        folder = checkpoint_folder(self.run_dir, self.step)
        checkpoint.save_checkpoint(folder, self.engine, self.ema, self.ranks, state)
        keep_last = self.config.checkpoint.keep_last
        self.ranks.on_first(lambda: prune(self.run_dir, keep_last))
        self.saved_step = self.step
        self.say(f"saved {folder}")

    def _say_stopped(self) -> None:
        reasons = dict.fromkeys(reason for reason in self.ranks.gather(self.stop.reason) if reason)
        self.say(
            f"stopped at step {self.step} of {self.config.steps} by {', '.join(reasons)}; "
            "the same command continues"
        )

    def say(self, text: str) -> None:
        """Show a message on rank 0."""
        if self.sinks:
            self.sinks.say(text)
