"""FSDP2, torch's fully_shard, over two processes on a CPU."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from tests.clients.common import Data, main, model, parameters


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29542"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    classifier = model().train()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in classifier.vit.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(classifier, mesh=mesh)
    optimizer = torch.optim.AdamW((p for p in classifier.parameters() if p.requires_grad), lr=1e-2)
    items = torch.utils.data.default_collate([Data()[index] for index in range(rank * 4, rank * 4 + 4)])
    for _ in range(3):
        classifier(**items).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = get_model_state_dict(classifier, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(state, f"{folder}/state.pt")
    dist.barrier()
    dist.destroy_process_group()


def check(folder: Path) -> str:
    torch.manual_seed(0)
    classifier = model()
    before = parameters(classifier)
    mp.spawn(work, (str(folder),), nprocs=2)
    classifier.load_state_dict(torch.load(folder / "state.pt", weights_only=True), strict=True)
    still = [n for n, p in classifier.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    assert not still, f"{len(still)} parameters did not change: {still[:3]}"
    return "fully_shard over two gloo processes, 3 steps; the gathered weights load"


if __name__ == "__main__":
    main(check)
