"""Two processes that compute together, and what each of them returns: for the hands that need a second one."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORLD = 2


def run(script: Path, folder: Path, timeout: float = 300) -> list[Any]:
    """What each rank of ``script``, which calls :func:`join` and :func:`leave`, returns. ``folder`` must be new."""
    command = [sys.executable, "-W", "ignore", str(script), str(folder)]
    ranks = []
    for rank in range(WORLD):
        with (folder / f"errors{rank}").open("w") as errors:  # a file, since nobody reads pipes while they wait
            ranks.append(subprocess.Popen([*command, str(rank)], stdout=errors, stderr=errors))
    try:
        for rank in ranks:
            rank.wait(timeout)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        said = "\n".join((folder / f"errors{rank}").read_text()[-5000:] for rank in range(WORLD))
    assert all(rank.returncode == 0 for rank in ranks), said
    return [json.loads((folder / f"result{rank}").read_text(encoding="utf-8")) for rank in range(WORLD)]


def join() -> tuple[Path, int]:
    """Meet the other process; the folder of this run, and the number of this process."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    # A rank that waits for one that has raised is not to wait for long.
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(str(folder / "store"), WORLD),
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=30),
    )
    return folder, rank


def leave(folder: Path, rank: int, result: Any) -> None:
    """Return ``result``, of what JSON has."""
    (folder / f"result{rank}").write_text(json.dumps(result), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """What a DTensor is a piece of."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """The whole values of parameters, by the names that they have where nobody has wrapped anything."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    found: dict[str, Tensor] = {}
    with FullyShardedDataParallel.summon_full_params(module, writeback=False):
        for name, parameter in module.named_parameters():
            for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
                name = name.replace(wrapper, "")
            found[name.removeprefix("module.")] = whole(parameter)
    return found
