"""QLoRA in two gloo processes, with DDP and with FSDP2: the adapters become those of one process."""

from __future__ import annotations

import os

import bitfold
import pytest
import torch
import torch.multiprocessing
from tiny import llama
from torch import nn

pytest.importorskip("peft", reason="peft is not installed")

WORLD = 2
STEPS = 3
IDS = torch.arange(4 * 16).reshape(4, 16) % 250


def qlora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    base = llama()
    bitfold.quantize(base, "nf4-dq", quiet=True)
    torch.manual_seed(0)
    config = bitfold.peft.prepare(LoraConfig(r=4, target_modules="all-linear"), base)
    return get_peft_model(base, config).train()


def train(model: nn.Module, ids: torch.Tensor, autocast: bool = False) -> None:
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(adapters, lr=1.0)
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adapters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """By the names of one process; of FSDP2 the whole tensors."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found[name.removeprefix("module.")] = whole.detach()
    return found


def agree(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> None:
    assert set(found) == set(expected)
    moved = torch.cat([(expected[name] - start[name]).flatten() for name in expected])
    apart = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    assert moved.norm() > 0.01
    assert apart.norm() < 1e-3 * moved.norm()


def run(rank: int, store: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    mine = IDS.chunk(WORLD)[rank]
    one = qlora()
    start = {name: tensor.clone() for name, tensor in adapters_of(one).items()}
    train(one, IDS)

    several = DistributedDataParallel(qlora())
    train(several, mine)
    agree(adapters_of(several), adapters_of(one), start)

    sharded = qlora()
    planes = {name: plane.clone() for name, plane in sharded.named_parameters() if not plane.requires_grad}
    for layer in sharded.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    train(sharded, mine)
    agree(adapters_of(sharded), adapters_of(one), start)
    for name, parameter in sharded.named_parameters():
        if name in planes:  # what is frozen is the same bits, in the same dtype
            assert torch.equal(parameter.full_tensor(), planes[name]), name

    # Under autocast the sums differ in bf16: two processes agree with each other to the bit.
    several = DistributedDataParallel(qlora())
    train(several, mine, autocast=True)
    for tensor in adapters_of(several).values():
        assert tensor.dtype == torch.float32
        other = [torch.empty_like(tensor) for _ in range(WORLD)]
        dist.all_gather(other, tensor)
        assert torch.equal(*other)
    dist.barrier()
    os._exit(0)  # as in test_fsdp.py


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(run, (str(tmp_path / "store"),), nprocs=WORLD)
