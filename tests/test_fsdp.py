"""FSDP2 in two gloo processes: planes come back bit-equal after sharding, and so does the forward."""

import os

import bitfold
import pytest
import torch
import torch.multiprocessing
from bitfold import QuantEmbedding, QuantLinear
from cases import columns
from torch import nn

VARIANTS = [*(format.canonical for format in bitfold.FORMATS.values()), "int8-tensor-asym", "nf4-b32-dq"]
WORLD = 2
N = 11  # rows that two ranks can't share evenly


class Model(nn.Module):
    def __init__(self, format: str):
        super().__init__()
        torch.manual_seed(0)
        k = columns(format)
        self.embed = QuantEmbedding(bitfold.encode(torch.randn(N, k), format))
        self.inner = nn.Linear(k, k)
        self.head = QuantLinear(bitfold.encode(torch.randn(N, k), format), torch.randn(N))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embed(ids)))


def check(format: str, mesh: torch.distributed.DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, plain = Model(format), Model(format)
    for module in (model.embed, model.inner, model.head, model):
        fully_shard(module, mesh=mesh)
    ids = torch.tensor([[0, 10, 3]])
    expected = plain(ids)
    expected.sum().backward()

    def planes_are_whole() -> None:
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            assert parameter.to_local().shape[0] < max(2, plain.get_parameter(name).shape[0])
            assert parameter.dtype == plain.get_parameter(name).dtype
            assert torch.equal(parameter.full_tensor(), plain.get_parameter(name)), name

    planes_are_whole()
    for _ in range(2):
        model.zero_grad()
        output = model(ids)
        assert torch.equal(output, expected)
        output.sum().backward()
        planes_are_whole()
    assert torch.equal(model.inner.weight.grad.full_tensor(), plain.inner.weight.grad)
    assert torch.equal(model.head.bias.grad.full_tensor(), plain.head.bias.grad)
    model.head.unshard()
    for name, plane in model.head.qtensor.planes.items():
        assert not isinstance(plane, DTensor)
        assert torch.equal(plane, plain.head.qtensor.planes[name])
    model.head.reshard()
    planes_are_whole()


def check_cast(mesh: torch.distributed.DeviceMesh) -> None:
    """A mixed-precision policy would round the scales: that is an error, never a silent change."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = Model("int4-g32")
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="scales"):
        model(torch.tensor([0]))


def run(rank: int, store: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for format in VARIANTS:
        check(format, mesh)
    check_cast(mesh)
    dist.barrier()
    # All has been asserted. gloo's threads race the end of the interpreter now and then ("terminate called without an
    # active exception"), so the end is left out.
    os._exit(0)


def test_two_ranks_shard_and_gather_every_family(tmp_path):
    torch.multiprocessing.spawn(run, args=(str(tmp_path / "store"),), nprocs=WORLD)
