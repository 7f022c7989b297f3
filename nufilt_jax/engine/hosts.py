"""Several processes that merge one model: they share a file system, and meet at a few points by JAX's own service.

Each reads, solves and writes windows of its own; what one has written is what the others find on disk. If one stops,
all do: the first says why.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from nufilt_jax.config import problem
from nufilt_jax.engine.job import Agreed
from nufilt_jax.engine.memory import free_memory
from nufilt_jax.errors import ConfigError, NufiltError, Problem, raise_all

_POLL = 1000  # milliseconds after which a process that waits looks whether another has stopped
_HEARTBEAT = 30  # seconds without a sign of life of one after which JAX ends all others
_LONGEST = 24 * 3600  # seconds that a process waits at its end for others, each of which may be in the middle of a cell
_FIX = "give every process the same command, the same files and the same versions"
_STOPPED = "nufilt/stopped"


class StoppedError(NufiltError):
    """Another process has said what is wrong; there is nothing to add."""


class Cluster(NamedTuple):
    """How processes find each other; None for what JAX is to find out.

    Attributes:
      coordinator: HOST:PORT of the first process.
      processes: their number.
      process: the number of this one.
      waiting: seconds after which JAX ends the processes that have come, if not all have.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    waiting: int = 300


class Hosts:
    """The processes of a run.

    Args:
      index: of this one.
      count: of all.
      client: of JAX's coordination service; None for a process that is alone.
    """

    def __init__(self, index: int = 0, count: int = 1, client: Any = None) -> None:
        self.index, self.count, self._client = index, count, client

    @property
    def is_first(self) -> bool:
        """Whether this process does what is to be done once."""
        return self.index == 0

    @property
    def is_alone(self) -> bool:
        """Whether there are no others."""
        return self._client is None

    def start_devices(self) -> None:
        """Lets JAX find all devices, for which it waits for all processes: before one of them can have to stop."""
        jax.local_devices()

    def meet(self, point: str, told: Any = None) -> list[Any]:
        """Waits until all processes have come to a point, and gives what each has to tell there.

        Args:
          point: each is met at once.
          told: what JSON can hold.

        Raises:
          StoppedError: one will not come.
        """
        if self._client is None:
            return [told]
        self.tell(point, told)
        return [json.loads(self._awaited(f"nufilt/{point}/{index}")) for index in range(self.count)]

    def tell(self, point: str, told: Any = None) -> None:
        """Tells what those who meet at a point will hear, and goes on without waiting for them.

        Args:
          point: as in `meet`.
          told: what JSON can hold.
        """
        if self._client is not None:
            self._client.key_value_set(f"nufilt/{point}/{self.index}", json.dumps(told))

    def _awaited(self, key: str) -> str:
        while True:
            try:
                return self._client.blocking_key_value_get(key, _POLL)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):  # of its class are all errors of the service: the text tells
                    raise
            self.check()

    def check(self) -> None:
        """Ends the work of this process if another has stopped.

        Raises:
          StoppedError: one has.
        """
        if self._client is not None and self._has(_STOPPED):
            raise StoppedError

    def _has(self, key: str) -> bool:
        try:
            self._client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return False
        return True

    def stop(self) -> bool:
        """Lets all processes stop; gives whether none had been stopped before, so that this one is to say why."""
        if self._client is not None:
            try:
                self._client.key_value_set(_STOPPED, str(self.index))  # fails where it is set
            except jax.errors.JaxRuntimeError:
                return False
        return True

    def compare(self, point: str, facts: Mapping[str, Any]) -> None:
        """Requires of this process what the first has found.

        Args:
          point: as in `meet`.
          facts: by what they are of.

        Raises:
          ConfigError: facts that differ, all listed.
        """
        told = {what: str(value) for what, value in facts.items()}  # as texts: JSON makes lists of tuples
        first = self.meet(point, told if self.is_first else None)[0]
        differing = [what for what in dict.fromkeys([*told, *first]) if told.get(what) != first.get(what)]
        where = f"process {self.index}"
        raise_all(
            ConfigError,
            [
                Problem(where, f"{what} is {told.get(what)} here, and {first.get(what)} for process 0", _FIX)
                for what in differing
            ],
        )

    def agreed(self) -> Agreed:
        """What all have to plan with alike: their number, and the memory of the one that has least."""
        if self.is_alone:
            return Agreed()
        told = self.meet("memory", [socket.gethostname(), free_memory() // 2])
        names = [name for name, _ in told]
        # Processes of one machine each see all of what is free there, and share it.
        return Agreed(self.count, min(free // names.count(name) for name, free in told))


@contextlib.contextmanager
def together(cluster: Cluster | None) -> Iterator[Hosts]:
    """The processes of a run, this one alone if there is no cluster; however the context ends, all end.

    Before anything else has been done with JAX.

    Raises:
      ConfigError: the others cannot be found.
      StoppedError: another process has stopped.
    """
    if cluster is None:
        yield Hosts()
        return
    hosts = _initialized(cluster)
    try:
        yield hosts
    except StoppedError:
        raise
    except BaseException as error:
        # Another process has stopped all, and its cause is told. What nobody foresaw is told besides.
        if not hosts.stop() and isinstance(error, NufiltError | OSError):
            raise StoppedError from error
        raise
    finally:
        jax.distributed.shutdown()  # waits for the others


def _initialized(cluster: Cluster) -> Hosts:
    how: dict[str, Any] = {
        "coordinator_address": cluster.coordinator,
        "num_processes": _number(cluster.processes, "JAX_NUM_PROCESSES"),
        "process_id": _number(cluster.process, "JAX_PROCESS_ID"),
    }
    try:
        jax.distributed.initialize(
            **how,
            initialization_timeout=cluster.waiting,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_LONGEST,
        )
    except ValueError as error:
        what = f"finds no other processes: {error}"
        fix = (
            "run under SLURM, Open MPI or on a TPU pod slice, or give --coordinator HOST:PORT --processes N --process I"
        )
        raise ConfigError(problem("distributed", what.rstrip("."), fix)) from error
    except RuntimeError as error:
        raise ConfigError(problem("coordinator", f"cannot be reached: {error}", "start all processes")) from error
    from jax._src.distributed import global_state  # the only way to what orbax, too, coordinates itself by

    return Hosts(global_state.process_id, global_state.num_processes, global_state.client)


def _number(given: int | None, variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if given is None and text.isdecimal() else given
