"""The frozen transformer shared out: every process of a run keeps a part of each weight and gathers the rest when due.

By FSDP2 (`torch.distributed.fsdp.fully_shard`), block by block: the parts are joined right before a block runs, forward
or backward, and the whole is given up right after. What is trained stays whole everywhere, for DDP.

Joining is a collective: nobody gets a block unless everybody asks for it. In training, processes run the transformer
equally often by themselves. Where they need not (a validation or an evaluation of samples that they share), each says
so before it runs it, and one that has no more to run goes on handing out its parts until none has (`keep_up`). That
takes neither samples that are drawn for nothing nor a device that could hold the whole.
"""

from datetime import timedelta
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from layerdecomp.models.mmdit import MMDiT


class ShardedBase:
    """Shares the frozen parameters of a transformer among all processes of `torch.distributed`, in place.

    Every process must call this, with the same weights, wherever they are: a block at a time is brought to the device.
    The transformer must not run before. Parameters that are trained are left alone, and where they are.

    Args:
        device: of the parts; its kind says how they are gathered ("cuda": this process's current one).
    """

    def __init__(self, transformer: MMDiT, device: torch.device) -> None:
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        trained = {parameter for parameter in transformer.parameters() if parameter.requires_grad}
        modules: list[nn.Module] = [*transformer.double_blocks, *transformer.single_blocks, transformer]
        for module in modules:  # what stands outside the blocks last, as what is left
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
        self.transformer, *self._blocks = (cast(FSDPModule, module) for module in [transformer, *modules[:-1]])
        # On the host, and patient: some samples take longer than others, which NCCL would call a fault.
        self._group: Any = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
        # Now: what is first gathered while sampling, in inference mode, could not be trained with.
        self._gather()
        transformer.register_forward_pre_hook(self._announce_run, prepend=True)  # before FSDP's own, which gathers

    def keep_up(self) -> None:
        """To be called by every process when it has run the transformer, without gradients, as often as it had to.

        Takes part in what the others still run; returns when none of them has any more to run.
        """
        while self._running(False):
            self._gather()

    def _announce_run(self, *_: Any) -> None:
        if not torch.is_grad_enabled():  # else it is training, where all run equally often
            self._running(True)

    def _running(self, mine: bool) -> bool:
        """Whether any process is about to run the transformer, told by all to all."""
        count = torch.tensor(int(mine))
        torch.distributed.all_reduce(count, group=self._group)
        return bool(count)

    def _gather(self) -> None:
        """What a run of the transformer gathers, in the same order."""
        self.transformer.unshard()
        for block in self._blocks:
            block.unshard()
            block.reshard()
        self.transformer.reshard()
