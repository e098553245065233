"""A run goes on at another layout as if it had never stopped, and nothing in a checkpoint can run code."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from megakd_kernels import VocabShard
from tiny import tiny_folder
from transformers import AutoModelForCausalLM

from megakd.checkpointing import (
    ModelFolder,
    NativeCheckpoint,
    export_to_hf,
    load_checkpoint,
    read_latest,
    save_checkpoint,
)
from megakd.checkpointing.checksums import CHECKSUMS, checksums, write_checksums
from megakd.checkpointing.reshard import reshard
from megakd.config import TrainingConfig
from megakd.data.batch import Sample, micro_batches
from megakd.losses.distillation import sft_loss
from megakd.models.model_provider import build_model, padded_vocab_size
from megakd.optimizer import StudentOptimizer
from megakd.schedules import forward_backward

VOCABULARY = 60  # padded to 64 rows at TP 1 and to 128 at TP 2
EXTRA = {"vectors": torch.arange(24.0).view(3, 8) / 7, "step": torch.tensor(2.0)}
STUDENT = {"layers": 3, "vocab_size": VOCABULARY}


def samples(iteration: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(iteration)
    ids = torch.randint(2, VOCABULARY, (4, 12), generator=generator).tolist()
    return [Sample(i, tuple(row[:4]), tuple(row[4:])) for i, row in enumerate(ids)]


class Run:
    """A student and its optimizer at the layout at hand."""

    def __init__(self, layout, folder: Path, *, distributed: bool = False, dtype: torch.dtype = torch.float32):
        self.layout, self.source = layout, ModelFolder.open(folder)
        width = padded_vocab_size([VOCABULARY], layout.tp_size)
        self.model = build_model(self.source.config, layout, padded_vocab_size=width, dtype=dtype)
        self.source.load_into(self.model)
        config = TrainingConfig(lr=1e-2, micro_batch_size=1, global_batch_size=4, train_iters=4)
        self.student = StudentOptimizer(self.model, config, total_iters=4, distributed=distributed)

    def train(self, iterations) -> list[float]:
        """The loss of every iteration."""
        return [self._iterate(iteration) for iteration in iterations]

    def _iterate(self, iteration: int) -> float:
        self.student.zero_grad()
        batches = micro_batches(samples(iteration)[self.layout.dp_rank :: self.layout.dp_size], 1)
        means = forward_backward(self.student.ddp, batches, self._loss, layout=self.layout)
        self.student.step(iteration)
        return means["loss/lm"].item()

    def _loss(self, q, batch, _):
        return sft_loss(q, batch.supervised_labels, VocabShard(VOCABULARY, tp_group=self.layout.tp_group))

    def save(self, root: Path, iteration: int) -> None:
        options = {"optimizer": self.student.optimizer, "source": self.source, "extra_tensors": EXTRA}
        save_checkpoint(root, iteration, model=self.model, **options)

    def load(self, root: Path, iteration: int | None = None) -> dict[str, torch.Tensor]:
        return load_checkpoint(root, iteration, model=self.model, optimizer=self.student.optimizer)


def two_iterations_saved_and_two_more(layout, folder, root, options):
    run = Run(layout, folder, **options)
    run.train([1, 2])
    run.save(root, 2)
    return run.train([3, 4])


def two_iterations_after_loading(layout, folder, root, options):
    run = Run(layout, folder, **options)
    extra = run.load(root)
    assert extra.keys() == EXTRA.keys() and all(torch.equal(extra[name], EXTRA[name]) for name in EXTRA)
    assert extra["step"].shape == ()
    return run.train([3, 4])


ZERO = {"distributed": True}
BF16 = {"dtype": torch.bfloat16}
MOVES = [  # family, (tp, pp, options) saved, (tp, pp, options) loaded
    pytest.param("gpt2", (2, 1, {}), (1, 2, {}), id="tied head, TP2 to PP2"),
    pytest.param("llama", (1, 1, ZERO), (2, 1, {**ZERO}), id="DP2 distributed optimizer to TP2, other padding"),
    pytest.param("llama", (1, 2, BF16), (2, 1, BF16), id="bf16 with fp32 master weights, PP2 to TP2"),
]


@pytest.mark.parametrize("family, saved, loaded", MOVES)
def test_a_run_goes_on_at_another_layout_as_if_it_had_never_stopped(tmp_path, family, saved, loaded):
    folder, root = tiny_folder(tmp_path / "hf", family, **STUDENT), tmp_path / "run"
    unbroken = run_distributed(two_iterations_saved_and_two_more, 2, folder, root, saved[2], tp=saved[0], pp=saved[1])
    resumed = run_distributed(two_iterations_after_loading, 2, folder, root, loaded[2], tp=loaded[0], pp=loaded[1])
    assert read_latest(root) == 2
    tolerance = 1e-2 if saved[2] is BF16 else 2e-5
    assert resumed[0] == pytest.approx(unbroken[0], abs=tolerance)
    resharded = reshard(root, tmp_path / "resharded", tp=2, pp=2).parent
    after = run_distributed(two_iterations_after_loading, 2, folder, resharded, loaded[2], tp=loaded[0], pp=loaded[1])
    assert after == resumed  # the same numbers, however they lie on disk


def save_after_two_iterations(layout, folder, root, options=None):
    run = Run(layout, folder, **(options or {}))
    losses = run.train([1, 2])
    run.save(root, 2)
    return losses + run.train([3])


def test_a_tied_embedding_on_two_stages_is_saved_with_its_own_share_of_the_optimizer(tmp_path):
    """megatron-core gives it a bucket, and so has two of them: behind some widths' first one is padding."""
    folder, root = tiny_folder(tmp_path / "hf", "gpt2", layers=2, vocab_size=VOCABULARY), tmp_path / "run"
    run_distributed(save_after_two_iterations, 2, folder, root, ZERO, pp=2)
    native = NativeCheckpoint(root)
    whole = lambda key: native.read(key, tuple(slice(0, size) for size in native.shape(key)))
    masters = {key.removeprefix(MASTER): whole(key) for key in native.keys if key.startswith(MASTER)}
    assert "embedding.word_embeddings.weight" in masters
    assert not [key for key, master in masters.items() if not torch.equal(master, whole(key))]


MASTER = "optimizer.state.param."  # of a float32 model it is the weight


def test_export_of_any_training_checkpoint_is_the_model_that_was_training(tmp_path):
    folder, root = tiny_folder(tmp_path / "hf", "opt", **STUDENT), tmp_path / "run"
    (*_, loss), _ = run_distributed(save_after_two_iterations, 2, folder, root, tp=2)
    model, info = AutoModelForCausalLM.from_pretrained(export_to_hf(root, tmp_path / "out"), output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        tokens = torch.tensor([sample.prompt + sample.response for sample in samples(3)])
        logits = model.eval()(tokens).logits[:, 3:-1].flatten(0, 1)
    assert torch.nn.functional.cross_entropy(logits, tokens[:, 4:].flatten()).item() == pytest.approx(loss, abs=2e-6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One checkpoint with everything in it."""
    path = tmp_path_factory.mktemp("saved")
    run_distributed(save_after_two_iterations, 1, tiny_folder(path / "hf", "gpt2", **STUDENT), path / "run")
    return path


class Attack:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def with_checksums(root: Path) -> None:
    """Whoever plants something writes its checksum down."""
    write_checksums(root / "iter_0000002", checksums(root / "iter_0000002"))


def test_an_index_that_would_run_code_is_refused_before_it_does(saved, tmp_path):
    root = Path(shutil.copytree(saved / "run", tmp_path / "run"))
    (root / "iter_0000002" / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "pwned")))
    with_checksums(root)
    with pytest.raises(ValueError, match=r"\.metadata: names posix\.mkdir, which a checkpoint index never needs"):
        NativeCheckpoint(root)
    with pytest.raises(ValueError, match="names posix"):
        ModelFolder.open(root)
    assert not (tmp_path / "pwned").exists()


def refuses_a_pickle_in_common(layout, saved, root):
    run = Run(layout, saved / "hf")
    with pytest.raises(ValueError, match=r"common\.pt: damaged, or holds more than numbers and names"):
        run.load(root)


def test_common_state_that_would_run_code_is_refused(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    root = Path(shutil.copytree(saved / "run", tmp_path / "run"))
    torch.save({"optimizer": Attack(tmp_path / "pwned")}, root / "iter_0000002" / "common.pt")
    with_checksums(root)
    run_distributed(refuses_a_pickle_in_common, 1, saved, root)
    assert not (tmp_path / "pwned").exists()


def test_damage_is_named_when_a_checkpoint_is_opened(saved, tmp_path):
    root = Path(shutil.copytree(saved / "run", tmp_path / "run"))
    folder = root / "iter_0000002"
    (folder / CHECKSUMS).unlink()
    with pytest.raises(ValueError, match=r"checksums\.sha256: No such file or directory; copy the checkpoint again"):
        NativeCheckpoint(root)
    description = folder / "megakd_checkpoint.json"
    description.write_text(description.read_text().replace('"format_version": 2', '"format_version": 1'))  # of a version that wrote none
    shard = folder / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(ValueError, match=r"__0_0\.distcp: [\d,]+ bytes, but the index describes [\d,]+; it is truncated"):
        NativeCheckpoint(root)
    shard.unlink()
    with pytest.raises(ValueError, match="the index names this file, but it is not there"):
        NativeCheckpoint(root)
    (folder / ".metadata").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(ValueError, match=r"\.metadata: damaged or cut off"):
        NativeCheckpoint(root)
    (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"\.metadata: missing; the checkpoint is incomplete"):
        NativeCheckpoint(root)


def test_an_iteration_that_is_not_there_is_named_with_those_that_are(saved):
    with pytest.raises(
        ValueError, match=r"--load .*: holds no iter_0000009 \(there: iter_0000002\); the newest .* is 2; choose it with --iteration 2$"
    ):
        NativeCheckpoint(saved / "run", iteration=9)
    with pytest.raises(ValueError, match=r"no latest_checkpointed_iteration\.txt, so it is not a native checkpoint"):
        NativeCheckpoint(saved / "hf")
    assert read_latest(saved / "hf") is None


def fails_halfway(layout, saved, root):
    run = Run(layout, saved / "hf")
    with pytest.raises(FileNotFoundError):
        save_checkpoint(root, 3, model=run.model, source=run.source, run_config=root / "no.yaml")


def test_a_save_that_fails_leaves_the_last_checkpoint_and_nothing_else(saved, tmp_path):
    root = Path(shutil.copytree(saved / "run", tmp_path / "run"))
    before = sorted(path.name for path in root.iterdir())
    run_distributed(fails_halfway, 1, saved, root)
    assert sorted(path.name for path in root.iterdir()) == before and read_latest(root) == 2


def resumes_without_optimizer(layout, saved, root):
    run = Run(layout, saved / "hf")
    save_checkpoint(root, 5, model=run.model, source=run.source)
    with pytest.raises(ValueError, match="holds no optimizer state to resume from; start a new run from it with --model"):
        run.load(root)


def test_a_checkpoint_without_optimizer_state_says_so_when_resumed(saved, tmp_path):
    run_distributed(resumes_without_optimizer, 1, saved, tmp_path / "run")
