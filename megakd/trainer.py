"""The loop: which iteration it is, what is logged, evaluated and saved when. It names no method."""

from __future__ import annotations

import math
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from megakd import begun_with, preflight
from megakd.checkpointing.best import NATIVE, BestStudent
from megakd.checkpointing.export_hf import export_to_hf
from megakd.checkpointing.native import read_latest, write_latest
from megakd.checkpointing.publish import remove_left_behind
from megakd.checkpointing.soft_prompt_folder import FOLDER as SOFT_PROMPT
from megakd.checkpointing.soft_prompt_folder import write_soft_prompt
from megakd.checkpointing.training import TeacherWeights, load_checkpoint, load_nothing, save_checkpoint, save_nothing
from megakd.config import Config
from megakd.data.batch import Sample
from megakd.data.dataloader import DataLoader
from megakd.errors import UserError, tell
from megakd.evaluation.held_out import held_out_losses
from megakd.evaluation.held_out_answers import HeldOutAnswers
from megakd.faults import NonFiniteError, all_finite, find, write_down
from megakd.generation.generate import generate
from megakd.generation.sampling import Sampling
from megakd.generation.vllm_engine import VllmEngine
from megakd.loading import ModelFolders, Places, start_apart
from megakd.methods import METHODS, build_method
from megakd.methods.base import Method
from megakd.models.lora import adapt
from megakd.models.shared_weights import with_adapters_of_its_own, without_adapters
from megakd.reporting.jsonl import JsonLines
from megakd.reporting.logger import RunLogger
from megakd.reporting.own_folder import write_text
from megakd.reporting.plots import plot_training
from megakd.reporting.wandb_run import WandbRun
from megakd.run_data import RunData
from megakd.runtime.background import background, look, settle
from megakd.runtime.deterministic import deterministic_mode
from megakd.runtime.initialize import agreed, hear, is_rank_zero, prepare, seed_everything
from megakd.runtime.lock import locked
from megakd.runtime.peers import Peers
from megakd.runtime.stop import agree_to_stop, name_of, stop_after
from megakd.runtime.waiting import set_timeout, wait_for_all
from megakd.schedules import TOKENS
from megakd.teachers.build import build_teacher
from megakd.teachers.relayed import RelayedTeacher
from megakd.teachers.teacher import Teacher

SAMPLES_SHOWN = 4  # held-out prompts that the student answers greedily at every evaluation, for people to read
LEFT_OUT_IN_A_ROW = 10  # iterations of which a run with --on-nonfinite skip takes no step, before it gives up
GIB = 1024**3


@dataclass(frozen=True)
class Callbacks:
    """What a caller is told on every rank, when it has been logged: the iteration and its numbers by name."""

    on_iteration: Callable[[int, dict[str, float]], None] = lambda iteration, metrics: None
    on_evaluation: Callable[[int, dict[str, float]], None] = lambda iteration, metrics: None


def train(config: Config, *, callbacks: Callbacks = Callbacks(), write_inputs: Callable[[], None] = lambda: None) -> None:
    """A whole run: from folders to a Hugging Face folder. `write_inputs` is called when the run may write into its folder.

    Raises:
        UserError: something does not fit; before any weight is loaded where that can be known.
    """
    background.forget()
    stop_after(config.running.exit_duration_in_mins)
    set_timeout(config.running.timeout_minutes)
    preflight.check_run_folder(config)
    lock = nullcontext() if config.output.show_data else locked(Path(config.output.save))
    with deterministic_mode(config.training.deterministic_mode), lock:
        write_inputs()
        _train(config, callbacks)


def _train(config: Config, callbacks: Callbacks) -> None:
    folders = open_checked(config)
    prepare()
    peers = Peers.meet()
    with peers.watched():
        _run_on(config, callbacks, folders, peers)


def _run_on(config: Config, callbacks: Callbacks, folders: ModelFolders, peers: Peers) -> None:
    preflight.check_same_on_all_ranks(config, peers)
    sums = begun_with.agreed_checksums(config, folders, peers, continues=preflight.continues(config))
    places = start_apart(config.parallel, config.teacher_parallel, seed=config.training.seed)
    agreed(lambda: preflight.verify_checkpoint(config, rank=dist.get_rank(), ranks=dist.get_world_size()))
    data = agreed(lambda: places.student and RunData.open(config, folders, places.student))  # a teacher's own ranks learn of an error, too
    answers = agreed(lambda: data and open_answers(config, folders, data))
    if places.student is None:
        return serve(config, folders, places)
    data.show(config.output.show_data or int(config.conditioning.adds_text), config, folders.student.tokenizer)
    if not config.output.show_data:
        Trainer(config, folders, data, places, callbacks, answers, sums).run()


def open_checked(config: Config) -> ModelFolders:
    """How every run begins, a dry one too, once its folder is its own: all that can be checked before ranks meet.

    Raises:
        UserError: something does not fit.
    """
    folders = open_folders(config)
    preflight.check(config, folders)
    return folders


def serve(config: Config, folders: ModelFolders, places: Places) -> None:
    """A rank of the teacher's own, through the whole run: it does what the student's ranks ask for."""
    if config.output.show_data:
        return
    _, (teacher,) = folders.load_apart(places, config.models.dtype, **model_options(config))
    RelayedTeacher.between(places.grids, None, teacher).serve()


def model_options(config: Config) -> dict[str, Any]:
    """Of ModelFolders.load_apart."""
    sequence_parallel = config.parallel.sequence_parallel
    return {"sequence_parallel": sequence_parallel, "student": student_options(config), "teacher": teacher_options(config)}


class Trainer:
    """One run on this rank."""

    def __init__(
        self,
        config: Config,
        folders: ModelFolders,
        data: RunData,
        places: Places,
        callbacks: Callbacks,
        answers: HeldOutAnswers | None,
        sums: begun_with.Sums,
    ):
        self.config, self.folders, self.data, self.places, self.callbacks = config, folders, data, places, callbacks
        self.answers, self.sums = answers, sums
        self.layout = layout = places.student
        self.folder = Path(config.output.save)
        self.checkpoints = self.folder / "checkpoints"
        self.tokenizer, self.ends = folders.student.tokenizer, folders.joined_ends()
        self.total_iters = total_iterations(config, data.loader, layout.dp_size)
        self.eval_interval = evaluation_interval(config, data.loader, self.total_iters)
        for remark in remarks(config, data.loader, self.total_iters):
            tell(remark)
        self.teacher = Teacher()  # of whom nothing is asked, until the method has one
        with self._heard_by_the_teacher():
            self.method = self._build_method()
            self.engine = VllmEngine.beside(self.method.student, folders.student, config) if config.writes_with_vllm else None
            self.iteration = self.resumed = self.saved = self._resume()
            self.stopped_by = self.left_out = 0
            self.teacher.on_teacher_ranks(hear)
            agreed(self._begin_to_write)

    def run(self) -> None:
        """Iterate, evaluate, save; leave the export and the figures.

        Raises:
            UserError: the run cannot go on.
        """
        with self._heard_by_the_teacher():
            self._run()
        self.teacher.shut_down()

    @contextmanager
    def _heard_by_the_teacher(self) -> Iterator[None]:
        """An error of all the student's ranks ends the service of the teacher's own, which would wait for what is asked next."""
        try:
            yield
        except UserError:
            with suppress(UserError):  # the first is told
                settle()  # what is being written is whole
            self.teacher.shut_down()
            raise

    def _run(self) -> None:
        tell(self.ends.line(self.tokenizer))
        if self.iteration == 0:
            self._evaluate()
        elif is_rank_zero():
            print(f"continuing {self.folder} after iteration {self.iteration}/{self.total_iters}", flush=True)
        while self.iteration < self.total_iters:
            if self._is_told_to_stop():
                return self._leave()
            self.iteration += 1
            self._iterate()
            if self._due(self.eval_interval):
                self._evaluate()
            if self._due(self.config.output.save_interval):
                self._save()
        self._finish()

    def _is_told_to_stop(self) -> bool:
        """Whether any rank of the job is, and the run can be left here."""
        if self.config.output.async_save:
            self._on_all_ranks(look)
        self.teacher.on_teacher_ranks(agree_to_stop)
        before, self.stopped_by = self.stopped_by, agree_to_stop()
        can_be_left = self.iteration == self.saved or self.method.can_be_left_after(self.iteration)
        if self.stopped_by and not (before or can_be_left):
            tell(f"{name_of(self.stopped_by)}: the phase whose responses are in no checkpoint is finished first")
        return bool(self.stopped_by) and can_be_left

    def _due(self, interval: int | None) -> bool:
        return self.iteration == self.total_iters or bool(interval and self.iteration % interval == 0)

    def _leave(self) -> None:
        """Saved, and one line that says how to go on."""
        if self.iteration > self.saved:
            self._save()
        self._on_all_ranks(settle)
        if is_rank_zero():
            done = f"iteration {self.iteration}/{self.total_iters}, which is saved" if self.iteration else "no iteration"
            print(f"{name_of(self.stopped_by)}: ended after {done}; the same command continues {self.folder}", flush=True)
        self._close()

    # ---- set-up

    def _build_method(self) -> Method:
        config, shared = self.config, self.config.teacher_shares_weights
        options = model_options(config) | {"with_teachers": not shared}
        student, models = self.folders.load_apart(self.places, config.models.dtype, **options)
        if config.lora.rank:
            adapt(student, config.lora, seed=config.training.seed)
        if shared:
            models = [without_adapters(student) if config.models.teacher_ema is None else with_adapters_of_its_own(student)]
        first = self.data.loader.samples(0)
        teacher = build_teacher(self.config, self.folders, self.places.grids, student, models, first)
        self.teacher = teacher or self.teacher
        return build_method(self.config, student, teacher, self.tokenizer, self.ends, self.data.text, total_iters=self.total_iters)

    def _resume(self) -> int:
        """The iteration of the run's last checkpoint, loaded; 0 where there is none."""
        iteration = preflight.iteration_to_resume(self.config)
        if iteration is None:
            return 0
        method = self.method
        self.teacher.on_teacher_ranks(load_nothing, self.checkpoints, iteration)
        saved = load_checkpoint(
            self.checkpoints,
            iteration,
            model=method.student,
            optimizer=method.optimizer.optimizer,
            teacher=teacher_weights(method.teacher),
            flag="--save",
        )
        self.teacher.after_load()
        method.restore(saved)
        return iteration

    def _begin_to_write(self) -> None:
        self.best = self._begin_folder()
        self.logger = RunLogger(
            self.folder,
            total_iterations=self.total_iters,
            enabled=is_rank_zero(),
            resumed_iteration=self.iteration or None,
            log_interval=self.config.output.log_interval,
            eval_interval=self.eval_interval,
            wandb=self._open_wandb(),
        )
        self.rollouts = self._open_rollouts()

    def _begin_folder(self) -> BestStudent | None:
        """Marked before anything is written into it. What a run without a checkpoint has left is replaced; but its best student stays."""
        if is_rank_zero():
            shutil.rmtree(self.folder / NATIVE, ignore_errors=True)
            preflight.own_folder(self.config).claim()
            remove_left_behind(self.folder, self.checkpoints)
            if self.iteration:
                write_latest(self.checkpoints, self.iteration)  # where --resume chose another
            write_text(self.folder / "config.yaml", yaml.safe_dump(self.config.flat(), sort_keys=False))
            if self.iteration == 0:
                (self.folder / "rollouts.jsonl").unlink(missing_ok=True)
            if self.iteration == 0 or begun_with.read(self.folder) is None:
                begun_with.keep(self.folder, self.sums)
        selection = self.config.selection
        return BestStudent(self.folder, selection.metric, lower_is_better=selection.lower_is_better) if selection.metric else None

    def _open_wandb(self) -> WandbRun | None:
        output = self.config.output
        if not (output.wandb_project and is_rank_zero()):
            return None
        return WandbRun(self.folder, output.wandb_project, output.wandb_name, self.config.flat(), continued=self.iteration > 0)

    def _open_rollouts(self) -> JsonLines | None:
        if not (self.config.output.save_rollouts and is_rank_zero()):
            return None
        return JsonLines(self.folder / "rollouts.jsonl", resumed_iteration=self.iteration or None)

    # ---- one iteration

    def _iterate(self) -> None:
        seed_everything(self.config.training.seed, self.layout, iteration=self.iteration)  # nothing random has to be saved
        self.method.rollouts = ()  # an iteration that writes none has none to show
        start = time.perf_counter()
        try:
            metrics = self.method.train_iteration(self.data.loader, self.iteration)
        except NonFiniteError as error:
            return self._leave_out(error)
        self.left_out, seconds = 0, time.perf_counter() - start
        metrics |= {"tokens_per_second": metrics["positions"] / seconds, "memory_gib": peak_memory() / GIB}
        metrics |= self._noted_beside()
        self.logger.log(self.iteration, metrics)
        if self.config.output.save_rollouts and self.method.rollouts:
            self._write_rollouts()
        self.callbacks.on_iteration(self.iteration, metrics)

    def _leave_out(self, error: NonFiniteError) -> None:
        """No step was taken; where from it came is looked for and written down.

        Raises:
            UserError: the run is to stop, or has left out LEFT_OUT_IN_A_ROW iterations.
        """
        teacher, latest, file = self.method.teacher, self._latest(), "on rank 0"
        with teacher.on_device() if teacher else nullcontext():
            findings = find(error, self.method.student, teacher and teacher.model)
        self.left_out += 1
        if is_rank_zero():
            file = write_down(self.folder / "fault", self.iteration, error, findings, self.config.flat(), latest)
        first = f"; first {findings[0]}" if findings else ""
        told = f"iteration {self.iteration}: {error}{first}; no step was taken, {file} has its rows"
        if self.config.running.on_nonfinite == "stop" or self.left_out == LEFT_OUT_IN_A_ROW:
            raise UserError(f"{told}; {way_out(latest)}, or leave such steps out with --on-nonfinite skip")
        tell(told)
        self._noted_beside()
        self.logger.log(self.iteration, {"left_out": 1.0})

    def _noted_beside(self) -> dict[str, float]:
        """What was noted beside the method's numbers since it was last asked for: another engine's rollouts, and seconds."""
        return (self.engine.take_differences() if self.engine else {}) | self.method.time.take()

    def _write_rollouts(self) -> None:
        """Every replica's responses of this iteration, on rank 0."""
        if self.layout.tp_rank or self.layout.pp_rank:
            return
        replicas = [None] * self.layout.dp_size if is_rank_zero() else None
        dist.gather_object(self.method.rollouts, replicas, group=self.layout.dp_group)
        for sample in (sample for replica in replicas or [] for sample in replica):
            mask = [0] * (len(sample.prompt) - 1) + [1] * len(sample.response)
            which = {"generation": sample.generation} if self.config.generation.num_generations > 1 else {}
            row = {"sample_id": sample.sample_id, **which, "prompt": sample.prompt, "response": sample.response, "loss_mask": mask}
            self.rollouts.append(self.iteration, row)

    # ---- evaluation

    def _evaluate(self) -> None:
        if self.data.valid is None:
            return
        with self.method.time("evaluation"):
            metrics = valid_losses(self.method, valid_samples(self.config, self.data.valid))
            if self.answers:
                rows = self.config.generation.rollout_batch_size
                metrics |= self.answers.scores(self.method.student, self.ends, batch_size=rows)
            self._show_samples()
        for name, value in metrics.items():
            if not math.isfinite(value):
                tell(f"iteration {self.iteration}: {name} is {value}, of the held-out data")
        self.method.on_evaluation(metrics)
        metrics |= self.method.time.take()
        self.logger.log(self.iteration, metrics)
        if self.best and self.iteration and self.best.beaten_by(metrics):
            self._export_best()
        self.callbacks.on_evaluation(self.iteration, metrics)

    def _show_samples(self) -> None:
        shown = [self.data.valid[i] for i in range(min(SAMPLES_SHOWN, len(self.data.valid))) if self.data.valid[i].prompt]
        if not shown:
            return
        prompts, ids = [sample.prompt for sample in shown], [sample.sample_id for sample in shown]
        sampling = Sampling(max_new_tokens=self.config.max_new_tokens, greedy=True)
        responses = generate(self.method.student, prompts, ids, sampling, eos_id=self.ends.stop)
        decode = lambda tokens: self.tokenizer.decode(tokens, skip_special_tokens=True)
        rows = [
            {"prompt": decode(s.prompt), "student": decode(response), "reference": decode(s.response)}
            for s, response in zip(shown, responses)
        ]
        self.logger.log_samples(self.iteration, rows)

    # ---- what is left behind

    def _save(self) -> None:
        if not all_finite(self.method.student):
            way = way_out(self._latest())
            raise UserError(f"iteration {self.iteration}: the student's weights are NaN or infinite, and are not saved; {way}")
        self._save_into(
            self.checkpoints,
            optimizer=self.method.optimizer.optimizer,
            extra_tensors=self.method.extra_tensors(),
            teacher_layout=self.teacher.layout,
            teacher=teacher_weights(self.method.teacher),
            keep_last=self.config.output.keep_last,
            in_background=self.config.output.async_save,
        )
        self.saved = self.iteration

    def _save_into(self, root: Path, *, in_background: bool = False, **what: Any) -> None:
        self.teacher.on_teacher_ranks(save_nothing, root, self.iteration, in_background)
        run_config, method = self.folder / "config.yaml", self.method
        options = {"model": method.student, "source": self.folders.student, "ends": self.ends, "run_config": run_config, **what}
        save_checkpoint(root, self.iteration, in_background=in_background, **options)

    def _export_best(self) -> None:
        self._save_into(self.folder / NATIVE)
        self._on_rank_zero(lambda: self.best.export(merge_adapter=self.config.lora.merge_lora))

    def _latest(self) -> int | None:
        """The iteration of the last checkpoint, one that was being written included."""
        self._on_all_ranks(settle)
        return read_latest(self.checkpoints)

    def _on_all_ranks(self, work: Callable[[], None]) -> None:
        self.teacher.on_teacher_ranks(work)
        work()

    def _on_rank_zero(self, work: Callable[[], None]) -> None:
        """While all ranks of the job wait, and hear of an error."""
        self.teacher.on_teacher_ranks(hear)
        agreed(lambda: is_rank_zero() and work())

    def _finish(self) -> None:
        self._on_all_ranks(settle)
        soft_prompt = self.method.soft_prompt()
        self._on_rank_zero(lambda: self._leave_behind(soft_prompt))
        self._close()

    def _leave_behind(self, soft_prompt: torch.Tensor | None) -> None:
        lora, hf = self.config.lora, self.folder / "hf"
        if soft_prompt is not None:
            write_soft_prompt(self.folder / SOFT_PROMPT, soft_prompt, self.folders.taught_by)
        if self.resumed < self.total_iters or not preflight.is_finished_export(hf, adapter=lora.exports_adapter):
            export_to_hf(self.checkpoints, hf, merge_adapter=lora.merge_lora)
        plot_training(self.folder)
        print(f"the student is {self.folder / 'hf'}; {self.folder} has its checkpoints, numbers and figures", flush=True)

    def _close(self) -> None:
        self.logger.close()
        self._on_all_ranks(wait_for_all)


def open_folders(config: Config) -> ModelFolders:
    """The student, and the teachers of a method that has any, or their store.

    Raises:
        UserError: a folder holds none.
    """
    if not config.needs_teacher:
        return ModelFolders.open(config.models.model)
    return ModelFolders.open(config.models.model, config.models.teachers, config.teacher.teacher_cache)


def open_answers(config: Config, folders: ModelFolders, data: RunData) -> HeldOutAnswers | None:
    """Which prompts the student answers at every evaluation, if any."""
    if data.valid is None:
        return None
    return HeldOutAnswers.open(config, data.valid, valid_samples(config, data.valid), folders.student.tokenizer)


def valid_samples(config: Config, rows: Sequence[Sample]) -> list[Sample]:
    """What an evaluation reads of --valid-data: all of it, or --eval-iters global batches."""
    iters = config.output.eval_iters
    count = min(len(rows), iters * config.training.global_batch_size) if iters else len(rows)
    return [rows[i] for i in range(count)]


def teacher_weights(teacher: Teacher | None) -> TeacherWeights | None:
    """What a checkpoint keeps of the teacher, if anything."""
    weights = teacher.weights_to_save() if teacher else {}
    return TeacherWeights(teacher.model, weights) if weights else None


def student_options(config: Config) -> dict:
    """TransformerConfig fields that a run decides for its student."""
    dropouts = {"hidden_dropout": config.models.hidden_dropout, "attention_dropout": config.models.attention_dropout}
    if not METHODS[config.method].has_dropout:
        dropouts = dict.fromkeys(dropouts, 0.0)
    fused = {"gradient_accumulation_fusion": config.training.gradient_accumulation_fusion}
    return {name: value for name, value in dropouts.items() if value is not None} | recomputation(config) | fused


def teacher_options(config: Config) -> dict:
    """Dropout is the reference's alone; a gradient that passes through the teacher to a soft prompt keeps activations, too."""
    with_dropout = config.training.reference_compat.teacher_dropout
    return ({} if with_dropout else {"hidden_dropout": 0.0, "attention_dropout": 0.0}) | recomputation(config)


def recomputation(config: Config) -> dict:
    """Of activations, --recompute."""
    if not config.training.recompute:
        return {}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def total_iterations(config: Config, loader: DataLoader, dp_size: int) -> int:
    """Optimizer steps of the run. The reference's loop leaves before the last one when it accumulates gradients."""
    training = config.training
    steps = training.train_iters or training.epochs * loader.iterations_per_epoch
    accumulates = training.global_batch_size > training.micro_batch_size * dp_size
    return steps - (accumulates and training.reference_compat.lost_last_step)


def evaluation_interval(config: Config, loader: DataLoader, total_iters: int) -> int | None:
    """--eval-interval. A method that learns from evaluations has one an epoch, as DistiLLM's code does, and ten a run at least."""
    if config.output.eval_interval or not config.page.learns_from_evaluations:
        return config.output.eval_interval
    return min(loader.iterations_per_epoch, max(1, total_iters // 10))


def remarks(config: Config, loader: DataLoader, total_iters: int) -> Iterator[str]:
    """What is allowed, but may not be meant: known when the data are."""
    rows, batch, warmup = len(loader.dataset), loader.rows_per_batch, config.training.lr_warmup_iters
    if warmup > total_iters:
        reached = config.training.lr * total_iters / warmup
        yield f"--lr-warmup-iters {warmup} is more than the run's {total_iters} iterations: its learning rate ends at {reached:.1e}"
    if config.selection.keep_best and config.output.eval_interval is None and not config.page.learns_from_evaluations:
        yield f"--keep-best {config.selection.keep_best} without --eval-interval has the last iteration alone to choose from"
    per_prompt = f" / --num-generations {loader.num_generations}" if loader.num_generations > 1 else ""
    if rows % batch and total_iters >= loader.iterations_per_epoch:
        yield (
            f"--global-batch-size {config.training.global_batch_size}{per_prompt} does not divide the {rows} rows of the data: "
            f"{rows % batch} of them, others each time, are left out of an epoch"
        )


def valid_losses(method: Method, samples: Sequence[Sample]) -> dict[str, float]:
    """Held-out losses of the student, and KL(q‖p) against the teacher without a soft prompt, as `valid/<name>`; cut as a batch is."""
    training = method.config.training
    means = held_out_losses(
        method.student,
        method.teacher,
        samples=samples,
        micro_batch_size=training.micro_batch_size,
        micro_batch_tokens=training.micro_batch_tokens,
        pack=training.pack,
        samples_per_pass=max(1, training.global_batch_size // method.layout.dp_size),
        divergences=["reverse_kl"],
    )
    return {f"valid/{name}": value for name, value in means.items() if name != TOKENS}


def way_out(latest: int | None) -> str:
    """Of numbers that are none. A checkpoint is whole, but continued with its own settings only."""
    where = "" if latest is None else ", both with another --save"
    return f"lower --lr, or use --dtype fp32 to see whether precision is the reason{where}"


def peak_memory() -> int:
    """Bytes: of the GPU's allocator, or of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss has what this process was started from, too
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
