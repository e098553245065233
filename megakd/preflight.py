"""Everything that can be known to be wrong before a weight is loaded: one line, naming the flag, the value and the way out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

import megakd
from megakd.begun_with import beside_places, read
from megakd.checkpointing.best import FOLDER as BEST
from megakd.checkpointing.export_hf import REPORT
from megakd.checkpointing.model_folder import ModelFolder
from megakd.checkpointing.native import LATEST, NativeCheckpoint, iteration_folder, number_of, one_before, read_latest
from megakd.checkpointing.peft_folder import MergedSource
from megakd.checkpointing.teacher_store import TeacherStore
from megakd.config import Config, flag_name, from_yaml
from megakd.errors import UserError, tell
from megakd.generation import vllm_engine
from megakd.loading import ModelFolders, check_context, grids_of
from megakd.losses.own_divergence import objective_of
from megakd.memory import GIB, free_bytes, written_bytes
from megakd.models.hf_checkpoint import ADAPTER
from megakd.models.lora import target_modules
from megakd.models.quantized import quantization
from megakd.models.weight_only import check_quantization
from megakd.reporting.own_folder import OwnFolder
from megakd.reporting.wandb_run import check_installed
from megakd.runtime.peers import Peers
from megakd.runtime.waiting import host_group

MAY_CHANGE = {  # between a run and its resumption: the layout, and what is only written down
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel", "micro_batch_size",
    "micro_batch_tokens", "pack", "rollout_batch_size", "release_decode_cache", "vllm_gpu_memory_utilization", "recompute",
    "teacher_tensor_model_parallel_size", "teacher_pipeline_model_parallel_size", "teacher_ranks", "teacher_offload",
    "save", "save_interval", "eval_interval", "eval_iters", "log_interval", "save_rollouts", "show_data", "dry_run", "ranks", "merge_lora",
    "eval_answers", "eval_decoding", "keep_best", "keep_last", "async_save", "exact_match_rule", "gsm8k_rule", "rouge_tokenizer",
    "exit_duration_in_mins", "exit_signal", "resume", "on_nonfinite", "timeout_minutes",
    "wandb_project", "wandb_name",
}  # fmt: skip


WATCHED = {"eval_interval", "eval_iters"}  # of a method that learns from its evaluations


def check(config: Config, folders: ModelFolders) -> None:
    """Models, layout, tokenizers, lengths and batch sizes.

    Raises:
        UserError: the first thing that does not fit.
    """
    check_installed(config.output.wandb_project)
    ranks = config.preview.ranks if config.preview.dry_run else None
    folders.check(config.parallel, config.teacher_parallel, ranks=ranks)
    check_lengths(config, folders)
    check_hidden_layers(config, folders.student)
    check_adapter(config, folders.student)
    check_rollout_engine(config, folders.student)
    objective_of(config.distillation)
    check_quantization(config.teacher.teacher_quantize)
    if folders.store:
        check_store(config, folders.store)
    student, _teacher = grids_of(config.parallel, config.teacher_parallel, ranks=ranks)
    check_batch(config, student.dp_size)
    check_disk(config, folders)


def check_lengths(config: Config, folders: ModelFolders) -> None:
    """Prompt, response and, for a prompted teacher, the soft prompt fit into the models' positions."""
    data, response = config.data, config.max_new_tokens
    for folder in folders:
        soft = 0 if folder is folders.student else config.page.soft_prompt_len
        said = f"--max-length {data.max_length}" + (f" + --prompt-len {soft}" if soft else "")
        check_context(folder, data.max_length, soft, said, "use --max-length {} or less")
    if data.max_prompt_length + response > data.max_length:
        raise UserError(
            f"--max-new-tokens {response} after --max-prompt-length {data.max_prompt_length} is more than --max-length "
            f"{data.max_length}; use --max-new-tokens {data.max_length - data.max_prompt_length} or less"
        )


def check_adapter(config: Config, student: ModelFolder) -> None:
    """Adapters are trained on a whole model, with targets that it has."""
    if not config.lora.rank:
        return
    if isinstance(student.source, MergedSource):
        raise UserError(
            f"--lora-rank {config.lora.rank}: --model {student.path} is an adapter itself; give a whole model, --merge-lora exports one"
        )
    target_modules(student.config, config.lora.lora_target_modules)


def check_rollout_engine(config: Config, student: ModelFolder) -> None:
    """There is a vLLM, where it is to write, and the student's folder tells it of plain weights, as it is given."""
    if not config.writes_with_vllm:
        return
    vllm_engine.check_installed()
    if quantization(student.config):
        raise UserError(
            f"--rollout-engine vllm: the config.json of --model {student.path} asks for quantised weights, and the student's are plain; "
            "give the folder of a plain model, or leave the engine out"
        )


def check_hidden_layers(config: Config, student: ModelFolder) -> None:
    """Layers to be matched are layers that the student has."""
    layers = student.config.num_hidden_layers
    if absent := [layer for layer in config.distillation.hidden_layers if not 1 <= layer <= layers]:
        raise UserError(f"--hidden-layers {absent[0]}: --model {student.path} has the layers 1 to {layers}; name some of them")


def check_store(config: Config, store: TeacherStore) -> None:
    """The teacher read what it is to read, and its rows suffice for the loss."""
    store.check_conditioning(asdict(config.conditioning))
    temperature = config.page.temperature(config)
    if store.description.kind == "topk" and temperature != 1:
        raise UserError(
            f"temperature {temperature} needs whole distributions, and --teacher-cache {store.path} has the "
            f"{store.description.top_k} likeliest tokens of each; use temperature 1, or another store, of hidden states"
        )


def check_batch(config: Config, dp: int) -> None:
    """The global batch is a whole number of micro-batches on every replica."""
    micro, whole = config.training.micro_batch_size, config.training.global_batch_size
    if whole % (micro * dp):
        raise UserError(
            f"--global-batch-size {whole} is not a multiple of --micro-batch-size {micro} × {dp} data-parallel rank(s); "
            f"use a multiple of {micro * dp}"
        )


def check_disk(config: Config, folders: ModelFolders) -> None:
    """One checkpoint and the export have room where --save is."""
    needed, free = sum(written_bytes(config, folders)), free_bytes(Path(config.output.save))
    if free < needed:
        raise UserError(
            f"--save {config.output.save}: a checkpoint and the export take some {needed / GIB:.1f} GiB, and its disk has "
            f"{free / GIB:.1f} GiB free; free some space, or give a --save elsewhere"
        )


def own_folder(config: Config) -> OwnFolder:
    """What --save of pretrain_kd.py names."""
    return OwnFolder(Path(config.output.save), "pretrain_kd.py")


def check_run_folder(config: Config) -> None:
    """A run begins in a new folder, and is continued in its own by the same command; where nothing was saved it begins anew.

    Raises:
        UserError: `--save` is somebody else's, or a setting that decides results differs from the run's config.yaml, or the run
            has left something that would be lost.
    """
    folder, saved = Path(config.output.save), Path(config.output.save) / "config.yaml"
    own_folder(config).check(is_older=is_run)
    iteration = iteration_to_resume(config)
    check_nothing_is_lost(folder, has_checkpoint=iteration is not None)
    if continues(config):
        check_same_settings(config, from_yaml(saved) if saved.is_file() else config)
    if iteration is not None:
        NativeCheckpoint(folder / "checkpoints", iteration=iteration, flag="--save")  # a damaged one is told before the models are loaded


def continues(config: Config) -> bool:
    """Whether the run in --save goes on. What an attempt without a checkpoint has kept is beaten by the same run alone."""
    return iteration_to_resume(config) is not None or is_export(Path(config.output.save) / BEST)


def iteration_to_resume(config: Config) -> int | None:
    """As --resume says: the last that was saved, the one before it, or the one that is named; None where none was saved.

    Raises:
        UserError: there is none before it.
    """
    checkpoints, asked = Path(config.output.save) / "checkpoints", config.running.resume
    if asked.isdecimal():
        return int(asked)
    latest = read_latest(checkpoints, flag="--save")
    if asked == "latest" or latest is None:
        return latest
    if (before := one_before(iteration_folder(checkpoints, latest))) is None:
        raise UserError(f"--resume previous: {checkpoints} holds no other iteration than {latest} that can be opened; leave it out")
    return number_of(before)


def verify_checkpoint(config: Config, *, rank: int, ranks: int) -> None:
    """That this rank's share of what the run continues from is what was written.

    Raises:
        UserError: a file is damaged.
    """
    iteration = iteration_to_resume(config)
    if iteration is not None:
        NativeCheckpoint(Path(config.output.save) / "checkpoints", iteration=iteration, flag="--save").verify(rank=rank, ranks=ranks)


def check_same_on_all_ranks(config: Config, peers: Peers) -> None:
    """Every rank was started with the same settings, of the same version; all ranks call it.

    Raises:
        UserError: one was not; on all of them.
    """
    everyone: list[dict] = [{}] * len(peers.places)
    dist.all_gather_object(everyone, config.flat() | {"version": megakd.__version__}, group=host_group())
    for rank, given in enumerate(everyone):
        if name := next((name for name, value in everyone[0].items() if given.get(name) != value), None):
            what = "megakd" if name == "version" else flag_name(name)
            raise UserError(
                f"{what} {given.get(name)} on rank {rank} ({peers.places[rank][0]}) differs from the {everyone[0][name]} of rank 0; "
                "start all ranks with the same command"
            )


def is_run(folder: Path) -> bool:
    """Of a version that wrote no marker: its config.yaml has every setting, as nobody writes them by hand."""
    file = folder / "config.yaml"
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    return {"method", "train_data", "train_iters", "epochs", "seed", "save_rollouts"} <= {line.split(":")[0] for line in lines}


def is_export(folder: Path) -> bool:
    """Whether a Hugging Face folder, of a model or of an adapter, was written by megakd."""
    return (folder / REPORT).is_file()


def is_finished_export(folder: Path, *, adapter: bool) -> bool:
    """Whether it is also of the kind that this run leaves: PEFT's folder of an adapter, or a whole model."""
    return is_export(folder) and (folder / ADAPTER).is_file() == adapter


def check_nothing_is_lost(folder: Path, *, has_checkpoint: bool) -> None:
    """A run's folder without a checkpoint is begun anew, which is told, but not where that would cost a student or checkpoints.

    Raises:
        UserError: it would.
    """
    for name in ("hf", BEST):
        if (folder / name).exists() and not is_export(folder / name):
            raise UserError(f"--save {folder}: what its {name}/ holds is no export of a run; move it away, or give another --save")
    if has_checkpoint:
        return
    if found := sorted((folder / "checkpoints").glob("iter_*")):
        raise UserError(
            f"--save {folder} holds {found[-1].name}, but no checkpoints/{LATEST}; write the number of the iteration to continue from "
            "into that file, or give another --save"
        )
    if is_export(folder / "hf"):
        raise UserError(
            f"--save {folder} holds the student of a finished run in hf/, but no checkpoint to continue from; give another --save"
        )
    if (folder / "metrics.jsonl").is_file():
        tell(f"--save {folder} holds no checkpoint: its run begins anew, and the numbers it has logged are replaced")


def check_same_settings(config: Config, before: Config) -> None:
    """What decides results is as it was.

    Raises:
        UserError: the first setting that is not.
    """
    fixed, has_sums = WATCHED if config.page.learns_from_evaluations else set(), read(Path(config.output.save))
    now, then = (beside_places(one) if has_sums else one.flat() for one in (config, before))
    for name, value in now.items():
        if name not in MAY_CHANGE - fixed and then[name] != value:
            ours, theirs = config.flat()[name], before.flat()[name]
            raise UserError(
                f"{flag_name(name)} {ours} differs from the {theirs} of the run in --save {config.output.save}; "
                "give the same command to continue it, or another --save to start anew"
            )
