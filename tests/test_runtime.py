"""From a bare process to a rank: which cores and which GPU it takes, and that what it has joined it leaves."""

from __future__ import annotations

import os
from types import SimpleNamespace

import megatron.core.optimizer
import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from tiny import tiny_config

from megakd.models.model_provider import family_of, transformer_config
from megakd.runtime import megatron_repairs, quiet
from megakd.runtime.initialize import initialize, join, process_group_closed_at_exit, share_cores


@pytest.mark.parametrize(
    "local_ranks, asked, threads",
    [("1", None, None), ("2", None, 3), ("4", None, 1), ("8", None, 1), ("2", "1", 3), ("2", "5", None)],
    ids=["alone", "2 ranks", "4 ranks", "more ranks than cores", "torchrun's 1", "the user's 5"],
)
def test_ranks_share_the_cores_they_may_use_unless_told_otherwise(monkeypatch, local_ranks, asked, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_ranks)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    share_cores()
    assert taken == ([] if threads is None else [threads])


def gpu_of(monkeypatch, local_rank: int, visible: int) -> list[int]:
    """The device that a rank takes where it sees so many, whether cuDNN's attention stays on, and the process group."""
    taken = []
    launcher = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (launcher | {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": "8"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", taken.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout, device_id, **place: taken.append((backend, device_id)))
    join()
    return taken


def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_it_sees(monkeypatch):
    for visible, own in ((8, torch.device("cuda", 3)), (1, torch.device("cuda", 0))):
        assert gpu_of(monkeypatch, 3, visible) == [own, False, ("nccl", own)]


def test_the_allocators_segments_can_grow_unless_somebody_has_chosen(monkeypatch):
    for name in quiet.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    quiet.quiet_megatron()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    quiet.quiet_megatron()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def test_the_optimizer_is_repaired_unless_megatron_has_found_a_fused_one(monkeypatch):
    """It is megatron that is asked: a package named apex may be any."""
    monkeypatch.setattr(megatron.core.optimizer, "USING_PYTORCH_OPTIMIZER", False)
    assert not megatron_repairs.install()
    monkeypatch.setattr(megatron.core.optimizer, "USING_PYTORCH_OPTIMIZER", True)
    assert megatron_repairs.install()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_stages_talk_over_one_communicator_on_a_gpu(device):
    layout = SimpleNamespace(device=torch.device(device), tp_size=1, pp_size=2)
    hf = tiny_config("gpt2")
    config = transformer_config(hf, family_of(hf), layout, torch.float32, False, {})
    assert config.batch_p2p_comm == (device == "cuda") and not config.batch_p2p_sync


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="--nproc_per_node 8 is more than the 2 GPUs of this machine; use 2 or fewer"):
        gpu_of(monkeypatch, 2, 2)


def groups_after(layout, sizes: list[tuple[int, int]]) -> list[int]:
    """Process groups that are open after each call of `initialize`, and that all of them work."""
    counts = []
    for tp, pp in sizes:
        layout = initialize(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        counts.append(len(dist.distributed_c10d._world.pg_map))
        ones = layout.sum_over_data_parallel(torch.ones(1))
        dist.all_reduce(ones, group=layout.tp_group)
        assert (layout.tp_size, layout.pp_size, ones.item()) == (tp, pp, layout.dp_size * tp)
    return counts


def test_process_groups_do_not_pile_up():
    for counts in run_distributed(groups_after, 2, [(1, 1), (1, 1), (2, 1), (2, 1), (1, 2), (1, 1)]):
        assert counts[0] == counts[1] == counts[5] and counts[2] == counts[3]


def worlds_in_one_process(layout) -> None:
    dist.destroy_process_group()
    for _ in range(2):
        with process_group_closed_at_exit():
            assert initialize().sum_over_data_parallel(torch.ones(1)).item() == 1


def test_a_process_that_has_left_can_join_again():
    run_distributed(worlds_in_one_process, 1)
