"""What is done to a component, for how long, and how it is undone."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass

import httpx

from antiphon.engines import wire
from antiphon.engines.directory_client import DirectoryError
from tests.faults.cells import Cell
from tests.faults.fleet import Fleet
from tests.faults.proxy import Cut

HOLD_S = {"kill": 3.0, "stop": 10.0, "restart": 1.0, "slow": 5.0, "cut": 5.0, "corrupt": 3.0}
SLOW_LATENCY_S = 0.15
SLOW_BYTES_PER_S = 200_000.0
SLOW_FACTOR = 8.0
LINK_SLOW_S = 2.0
LINK_RESET_S = 0.3
CUTS: tuple[Cut, ...] = ("reset", "silent", "close")


@dataclass(slots=True)
class Injury:
    """One fault on one victim: a process of the fleet, or all links between page stores."""

    fleet: Fleet
    cell: Cell
    variant: str
    victim: str
    draw: random.Random
    note: str = ""
    """What was drawn."""

    @property
    def hold_s(self) -> float:
        return HOLD_S[self.cell.fault]

    async def prepare(self) -> None:
        """Of a link fault in the phase `transfer`: it must be there when the READ begins."""
        if self.cell.component == "link":
            await self._arm_link()

    async def inject(self) -> None:
        if self.cell.component == "link":
            if self.cell.phase != "transfer":
                await self._arm_link()
            return
        process = self.fleet.processes[self.victim]
        match self.cell.fault:
            case "kill":
                await asyncio.to_thread(process.kill)
            case "restart":
                await asyncio.to_thread(process.kill)
                if self.variant == "empty":
                    self.fleet.wipe_ledger()
                process.start()
            case "stop":
                process.stop()
            case "slow":
                await self._slow()
            case "cut":
                how = self.draw.choice(CUTS)
                self.note = how
                for proxy in self.fleet.proxies_of(self.victim):
                    proxy.cut(how)

    async def heal(self) -> None:
        """Back to what it was; what was killed is started again."""
        await self.fleet.repair()

    async def _slow(self) -> None:
        if self.cell.component in ("prefill", "decode") and self.fleet.simulated and self.draw.random() < 0.5:
            self.note = "computes slowly"
            with contextlib.suppress(httpx.HTTPError):
                await self.fleet.arm(self.victim, {"fault": "slow", "factor": SLOW_FACTOR})
            return
        self.note = "slow network"
        for proxy in self.fleet.proxies_of(self.victim):
            proxy.slow(SLOW_LATENCY_S, SLOW_BYTES_PER_S)

    async def _arm_link(self) -> None:
        match self.cell.fault:
            case "slow":
                fault = wire.LinkFault("slow", seconds=LINK_SLOW_S)
            case "cut":
                silent = self.draw.random() < 0.5
                self.note = "silent" if silent else "reset"
                fault = wire.LinkFault("cut", seconds=0.0 if silent else LINK_RESET_S)
            case _:
                fault = wire.LinkFault("corrupt")
        for engine_id in self.fleet.engine_ids:
            await self.fleet.link_fault(engine_id, fault)


async def slow_reads(fleet: Fleet, seconds: float) -> None:
    """Into decode engines, so that the phase `transfer` lasts; 0 = as fast as they are."""
    kind = wire.LinkFault("slow", seconds=seconds) if seconds else wire.LinkFault("clear")
    for engine_id in fleet.engine_ids:
        if engine_id.startswith("d"):
            with contextlib.suppress(DirectoryError):
                await fleet.link_fault(engine_id, kind)
