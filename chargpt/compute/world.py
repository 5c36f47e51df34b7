"""The processes that train one model together, started by torchrun; or this process alone.

Each process, a *rank*, runs the same program. Rank 0 decides, writes and prints. What it decides
reaches the others through `World.on_first`.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from chargpt.base.errors import TrainingError, UserError
from chargpt.data.workers import available_cores

T = TypeVar("T")
JOIN_SECONDS = 300
c10d: Any = dist  # whose stores have no types
CPU = torch.device("cpu")
_SIOCGIFADDR = {"linux": 0x8915, "darwin": 0xC0206921}  # ioctl(2): the address of an interface
_ANOTHER_NETWORK = "192.0.2.1"  # reserved for documentation (RFC 5737): the default route


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The processes that train together. The default is this process alone."""

    rank: int = 0
    size: int = 1  # processes on all machines
    local_rank: int = 0
    local_size: int = 1  # processes on this machine

    @property
    def is_first(self) -> bool:
        """Whether this is the process that decides, writes and prints."""
        return self.rank == 0

    # --- rank 0 decides

    def on_first(self, call: Callable[[], T]) -> T:
        """Call on rank 0, and return the result on every rank."""
        if self.size == 1:
            return call()
        result: list[Any] = [call() if self.is_first else None]
        dist.broadcast_object_list(result, src=0, device=CPU)
        value: T = result[0]
        return value

    @contextmanager
    def entered_on_first(self, context: AbstractContextManager[T]) -> Iterator[T]:
        """Enter a context on rank 0 alone, and yield its value on every rank."""
        with ExitStack() as stack:
            yield self.on_first(lambda: stack.enter_context(context))

    def send_tensors(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Return rank 0's named tensors on every rank, on the CPU; the others give None."""
        if self.size == 1:
            return dict(tensors or {})
        forms = self.on_first(
            lambda: {name: (t.shape, t.dtype) for name, t in (tensors or {}).items()}
        )
        received = {}
        for name, (shape, dtype) in forms.items():
            own = tensors[name].cpu().contiguous() if tensors else torch.empty(shape, dtype=dtype)
            dist.broadcast(own, src=0)
            received[name] = own
        return received

    # --- all ranks together

    def total(self, *numbers: float) -> list[float]:
        """Return the sum of each number over all ranks, the same bits on every rank."""
        return self._reduce(numbers, "SUM")

    def highest(self, *numbers: float) -> list[float]:
        """Return the highest value of each number among all ranks."""
        return self._reduce(numbers, "MAX")

    def _reduce(self, numbers: tuple[float, ...], operation: str) -> list[float]:
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, getattr(dist.ReduceOp, operation))
        return values.tolist()

    def share(self, count: int) -> range:
        """Return this rank's part of 0 … count - 1; the parts differ by at most one in length."""
        length, more = divmod(count, self.size)
        start = self.rank * length + min(self.rank, more)
        return range(start, start + length + (self.rank < more))


ALONE = World()

# --- torchrun


@contextmanager
def joined_world() -> Iterator[World]:
    """Join the processes that torchrun started; without torchrun, yield this one alone.

    If the block fails on one rank, the others end with its exit code and print nothing.

    Raises:
        TrainingError: another process has ended without a word, or cannot be reached.
    """
    if not _is_launched():
        yield ALONE
        return
    world, store = _join()
    try:
        yield world
    except Exception as error:
        _end_together(error, store)
        raise
    dist.destroy_process_group()


def _is_launched() -> bool:
    """Return whether torchrun started this process; some builds of PyTorch cannot join others."""
    return dist.is_available() and "TORCHELASTIC_RUN_ID" in os.environ


def _join() -> tuple[World, Any]:
    """Return the world, and a store of keys and values for its processes only."""
    environment = os.environ
    world = World(
        rank=int(environment["RANK"]),
        size=int(environment["WORLD_SIZE"]),
        local_rank=int(environment["LOCAL_RANK"]),
        local_size=int(environment["LOCAL_WORLD_SIZE"]),
    )
    if sys.platform == "win32":
        environment.setdefault("USE_LIBUV", "0")  # PyTorch's wheels for Windows lack it
    if "GLOO_SOCKET_IFNAME" not in environment and (name := _interface()):
        environment["GLOO_SOCKET_IFNAME"] = name
    if environment.get("OMP_NUM_THREADS") == "1":  # torchrun's default
        torch.set_num_threads(max(1, available_cores() // world.local_size))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store = _own_store(world)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
        return world, store
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the processes of torchrun cannot reach each other ({error!s:.200}): check "
            "--rdzv-endpoint, the firewall, and GLOO_SOCKET_IFNAME, the network interface to use "
            f"({environment.get('GLOO_SOCKET_IFNAME', 'not set')})"
        ) from error


def _torchrun_store() -> Any:
    """Return the store of torchrun, which outlives the processes that it starts."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = not hosted and os.environ["RANK"] == "0"
    return c10d.TCPStore(host, port, is_master=is_master, wait_for_workers=False, multi_tenant=True)


def _own_store(world: World) -> Any:
    """Return a store for these processes, apart from that of the ones they may be in place of.

    PyTorch would use the keys of those again, and connect to addresses that are gone. So rank 0
    names the group. It is sure to be alive when it has listed a process by the number that this
    process has just drawn.
    """
    store, me = _torchrun_store(), uuid.uuid4().hex
    if world.is_first:
        store.set("chargpt/group", me)
        numbers = [store.get(f"chargpt/{me}/{rank}").decode() for rank in range(1, world.size)]
        store.set(f"chargpt/{me}/members", " ".join(numbers))
        return c10d.PrefixStore(me, store)
    end = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < end:
        group = store.get("chargpt/group").decode()
        store.set(f"chargpt/{group}/{world.rank}", me)
        members = f"chargpt/{group}/members"
        if store.check([members]) and me in store.get(members).decode():
            return c10d.PrefixStore(group, store)
        time.sleep(0.05)
    raise RuntimeError(f"rank 0 did not answer for {JOIN_SECONDS} s")


def launch_id() -> str | None:
    """Return the ``--rdzv-id`` of torchrun, or the one it made up; None: it has none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name


def remember(key: str, value: str) -> None:
    """Keep a value for the processes that torchrun starts in place of failed ones."""
    if _is_launched():
        _torchrun_store().set(f"chargpt/{key}", value)


def recall(key: str) -> str | None:
    """Return what `remember` kept since torchrun was started; None: nothing."""
    if not _is_launched():
        return None
    store, name = _torchrun_store(), f"chargpt/{key}"
    return store.get(name).decode() if store.check([name]) else None


def _end_together(error: Exception, store: Any) -> None:
    """Return on the rank whose error is to be shown; end the others with its exit code."""
    lost = isinstance(error, dist.DistError) or "gloo" in str(error)
    code = 2 if isinstance(error, UserError) else 1
    with suppress(dist.DistError, RuntimeError):  # the store may be lost, too
        if store.add("failed", 1) > 1:
            sys.exit(int(store.get("exit_code")))
        store.set("exit_code", str(code))
    if lost:
        first_line = str(error).partition("\n")[0]
        raise TrainingError(
            f"another process of this run ended, or cannot be reached ({first_line:.200}); "
            "torchrun --max-restarts continues from the last checkpoint"
        ) from error


# --- network


def _interface() -> str | None:
    """Return the network interface that leads to the other machines; None: gloo chooses.

    It takes the address of the host's name, often that of loopback, which others cannot reach.
    """
    name = interface_to(os.environ["MASTER_ADDR"])
    several_machines = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    if several_machines and (name or "lo").startswith("lo"):  # this host is the master
        return interface_to(_ANOTHER_NETWORK)
    return name


def interface_to(host: str) -> str | None:
    """Return the network interface whose route leads to a host (IPv4); None: not known."""
    try:
        import fcntl  # not on Windows

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((socket.gethostbyname(host), 9))  # sends nothing
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                with suppress(OSError):  # it has no address
                    answer = fcntl.ioctl(probe, _SIOCGIFADDR[sys.platform], request)
                    if socket.inet_ntoa(answer[20:24]) == own:
                        return name
    except (ImportError, OSError, KeyError):
        pass
    return None
