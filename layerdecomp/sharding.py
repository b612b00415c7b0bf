"""Sharding of the frozen transformer: every rank holds a shard of each weight and gathers the rest when needed.

Weights are sharded block by block with FSDP2 (`torch.distributed.fsdp.fully_shard`): a block is all-gathered right
before its forward or backward pass and resharded right after. Trained parameters stay replicated, for DDP.

An all-gather is a collective, so all ranks must run the transformer equally often. Training does so by design.
Validation and evaluation, which split samples among ranks, need not: each rank announces a run beforehand, and a rank
that has finished takes part in the gathers of the others until all have finished (`join_remaining_gathers`). This needs
neither padding samples nor a device that can hold all weights.
"""

from datetime import timedelta
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from layerdecomp.models.mmdit import MMDiT


class ShardedBase:
    """Shards the frozen parameters of a transformer among all ranks of `torch.distributed`, in place.

    Every rank must call this, with the same weights on any device: one block at a time is moved to `device`. The
    transformer must not have run before. Trained parameters are neither sharded nor moved.

    Args:
        device: of the shards; its type selects the collectives ("cuda": this process's current device).
    """

    def __init__(self, transformer: MMDiT, device: torch.device) -> None:
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        trained = {parameter for parameter in transformer.parameters() if parameter.requires_grad}
        modules: list[nn.Module] = [*transformer.double_blocks, *transformer.single_blocks, transformer]
        for module in modules:  # the root last: it takes what is outside the blocks
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
        self.transformer, *self._blocks = (cast(FSDPModule, module) for module in [transformer, *modules[:-1]])
        # On the CPU, with a long timeout: NCCL's would expire, since some samples take longer than others.
        self._group: Any = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
        # Gather once now: weights first gathered in inference mode, while sampling, could not be used in training.
        self._gather()
        transformer.register_forward_pre_hook(self._announce_run, prepend=True)  # before FSDP's own, which gathers

    def join_remaining_gathers(self) -> None:
        """Takes part in the gathers of ranks that still run the transformer; returns when none does.

        Every rank must call this after its last run of the transformer without gradients.
        """
        while self._any_rank_runs(False):
            self._gather()

    def _announce_run(self, *_: Any) -> None:
        if not torch.is_grad_enabled():  # in training, all ranks run equally often
            self._any_rank_runs(True)

    def _any_rank_runs(self, this_rank: bool) -> bool:
        """Whether any rank is about to run the transformer, by an all-reduce."""
        count = torch.tensor(int(this_rank))
        torch.distributed.all_reduce(count, group=self._group)
        return bool(count)

    def _gather(self) -> None:
        """The gathers of one run of the transformer, in the same order."""
        self.transformer.unshard()
        for block in self._blocks:
            block.unshard()
            block.reshard()
        self.transformer.reshard()
