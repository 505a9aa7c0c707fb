"""How the processes of a run find each other, before they can compute together.

They meet at a store and say there what they will compute on. A process that cannot start says that
instead, so that nobody waits for it and all know why.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from greenmim.messages import first_line
from greenmim.recipe import UserError
from greenmim.training.world import World, meeting_point, run_name

# How long processes wait for each other to start, and for the rest once one of them cannot.
START_SECONDS, SHORT_SECONDS = 600.0, 10.0
_POLL_SECONDS = 0.1


def meet(
    world: World, find_device: Callable[[], torch.device]
) -> tuple[dist.TCPStore, torch.device | None, str | None]:
    """Meet the others. Called by every process of a run of several.

    Args:
        world: Which process this is.
        find_device: As for `distributed.Processes`.

    Returns:
        The store where they met; this process's device; and why the run cannot start, the same
        sentence in all processes, or None. Where it can, the device is there.

    Raises:
        ValueError, RuntimeError: there is no place to meet.
    """
    host, port = meeting_point()
    # torchrun serves the store of its processes itself.
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    tcp = dist.TCPStore(
        host,
        port,
        is_master=world.is_main and not served,
        timeout=datetime.timedelta(seconds=START_SECONDS),
        wait_for_workers=False,
        multi_tenant=True,
    )
    store = dist.PrefixStore(f"{run_name()}/meet", tcp)
    device = None
    facts = {"host": socket.gethostname(), "torch": str(torch.__version__)}
    try:
        device = _working(find_device())
        facts["device"] = device.type
    except UserError as error:
        facts["error"] = str(error)
    store.set(f"here/{world.rank}", json.dumps(facts))
    if world.is_main:
        verdict = _verdict(_gather(store, world.size))
        store.set("verdict", verdict)
        if verdict:
            _wait_for_readers(store, world.size)
    else:
        store.wait(["verdict"], datetime.timedelta(seconds=START_SECONDS + 2 * SHORT_SECONDS))
        verdict = store.get("verdict").decode()
        store.add("read", 1)
    return tcp, device, verdict or None


def _working(device: torch.device) -> torch.device:
    """The device, if something can be put on it."""
    try:
        torch.zeros((), device=device)
    except RuntimeError as error:
        raise UserError(f"{device} cannot be used: {first_line(error)}") from error
    return device


def _gather(store: dist.Store, size: int) -> list[dict[str, str] | None]:
    """What the processes say, by rank; None for those that did not come in time."""
    found: list = [None] * size
    end = time.monotonic() + START_SECONDS
    failed = False
    while None in found and time.monotonic() < end:
        for rank in range(size):
            if found[rank] is None and store.check([f"here/{rank}"]):
                found[rank] = json.loads(store.get(f"here/{rank}"))
                if "error" in found[rank] and not failed:
                    failed, end = True, min(end, time.monotonic() + SHORT_SECONDS)
        time.sleep(_POLL_SECONDS)
    return found


def _verdict(found: list[dict[str, str] | None]) -> str:
    """Why the run cannot start; empty where it can."""
    for rank, facts in enumerate(found):
        if facts is not None and "error" in facts:
            return (
                f"Process {rank} on {facts['host']}: {facts['error']}" if rank else facts["error"]
            )
    missing = [rank for rank, facts in enumerate(found) if facts is None]
    if missing:
        names = ", ".join(map(str, missing))
        return (
            f"Process {names} of {len(found)} did not come within {START_SECONDS / 60:g} minutes;"
            " look into its own output, or at the network between the machines."
        )
    for name, advice in (
        ("device", "--device cuda says why there is no GPU, --device cpu takes none anywhere"),
        ("torch", "install one version everywhere"),
    ):
        kinds = {facts[name]: (rank, facts["host"]) for rank, facts in enumerate(found)}
        if len(kinds) > 1:
            which = " and ".join(
                f"{kind} in process {rank} on {host}" for kind, (rank, host) in kinds.items()
            )
            return f"The processes do not have the same {name}: {which}; {advice}."
    return ""


def _wait_for_readers(store: dist.Store, size: int) -> None:
    # The store ends with this process.
    end = time.monotonic() + SHORT_SECONDS
    while store.add("read", 0) < size - 1 and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
