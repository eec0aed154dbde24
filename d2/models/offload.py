"""A network whose weights live in host memory and are on the GPU only while it runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Offload:
    """Brings a network's weights to the device and lets them go again.

    Weights never change, so letting go copies nothing: the parameters point at the host's copy again.  On a GPU
    the host's copy is pinned and goes over on a stream of its own, one block after the other; each block waits
    for its own weights only, so that the first blocks run while the rest is still on its way.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.host = [(parameter, self._pinned(parameter.data)) for parameter in network.parameters()]
        self.blocks = _blocks(network)
        self.events: dict[nn.Module, torch.cuda.Event] = {}
        if self.cuda:
            self.stream = torch.cuda.Stream(device)
            for block in self.blocks:
                block.register_forward_pre_hook(self._wait)
        self.release()

    def fetch(self, whole: bool = False) -> None:
        """Starts to bring the weights over; a block that runs waits for its own, or everything does with `whole`."""
        host = {id(parameter): data for parameter, data in self.host}
        if not self.cuda:
            for parameter, data in self.host:
                parameter.data = data.to(self.device)
            return
        compute = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(compute)  # the network before this one may still run in that memory
        with torch.cuda.stream(self.stream):
            for block in self.blocks:
                for parameter in block.parameters():
                    parameter.data = host[id(parameter)].to(self.device, non_blocking=True)
                    parameter.data.record_stream(compute)
                self.events[block] = self.stream.record_event()
        if whole:
            compute.wait_stream(self.stream)

    def release(self) -> None:
        """Frees the device's copy."""
        for parameter, data in self.host:
            parameter.data = data

    def _pinned(self, data: Tensor) -> Tensor:
        return data.to("cpu").pin_memory() if self.cuda else data.to("cpu")

    def _wait(self, block: nn.Module, inputs: object) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.events[block])


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Parts that cover every parameter, in the order in which they run: children, lists of them one by one."""
    blocks: list[nn.Module] = []
    for child in network.children():
        blocks.extend(child if isinstance(child, nn.ModuleList) else [child])
    covered = {id(parameter) for block in blocks for parameter in block.parameters()}
    assert covered == {id(parameter) for parameter in network.parameters()}, "a parameter belongs to no block"
    return blocks
