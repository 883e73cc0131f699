"""Joins the processes of a run: from flags, or from what Slurm, Kubernetes or a TPU VM says."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.errors import MissingProcesses

flags.disclaim_key_flags()  # --help shows those that are defined here as the command's

ENDED = "duc_dlc_jax/ended"  # with JAX's coordination service: [process, exit code, message]
ALIVE = "duc_dlc_jax/alive"  # below it each process counts, to show that it is there
LOOK_EVERY = 2.0  # seconds between two looks for the first, and two counts
MEET_WITHIN = 24 * 3600  # seconds; a process that is lost meanwhile ends the others earlier
_MEETINGS = itertools.count()

# What an indexed job of Kubernetes and launch/kubernetes.yaml set.
KUBERNETES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX")


def define_flags() -> None:
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0; empty: ask the cluster.")
    flags.DEFINE_integer("processes", 0, "Number of processes, with --coordinator.")
    flags.DEFINE_integer("process", 0, "This process, from 0, with --coordinator.")
    flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for all processes to arrive.")
    flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds after which a silent process is dead.")


def start(args: Any, environment: Mapping[str, str] = os.environ) -> None:
    """Joins this process to the others of its run, if there are any; before JAX is used.

    Raises ConfigError where the flags do not fit, and MissingProcesses in every process that did
    arrive where others did not within `start_timeout`.
    """
    settings = place(args, environment)
    if settings is None:
        return
    if settings:
        address, count, index = (
            settings[name] for name in ("coordinator_address", "num_processes", "process_id")
        )
        roll_call(address, count, index, args.start_timeout)
    jax.distributed.initialize(
        **settings,
        initialization_timeout=args.start_timeout,
        heartbeat_timeout_seconds=args.heartbeat_timeout,
    )
    logging.info("process %d of %d", jax.process_index(), jax.process_count())
    if several():
        over = threading.Event()
        watch = threading.Thread(
            target=_watch, args=(over,), name="the end of another process", daemon=True
        )
        watch.start()
        atexit.register(_part, over, watch)  # before JAX's own, which was registered earlier


def several() -> bool:
    """Whether this process is one of several that were joined."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def meet(where: str) -> None:
    """Waits until every process of the run is there, for the same time.

    For work whose duration differs between hosts: the time limits of collectives are short, on CPUs
    30 s.
    """
    if several():
        name = f"duc_dlc_jax/{where}/{next(_MEETINGS)}"  # a barrier serves once
        _service().wait_at_barrier(name, 1000 * MEET_WITHIN)


def end_all(code: int, message: str) -> tuple[int, str]:
    """Tells the other processes that this one ends; returns the code and message of the first.

    They end with that code within `LOOK_EVERY` seconds, also from inside a collective. Without it
    they would wait for this process until its heartbeat is missed, and end by an abort.
    """
    own, service = jax.process_index(), _service()
    with contextlib.suppress(Exception):  # another was first
        service.key_value_set(ENDED, json.dumps([own, code, message[:2000]]))
    if found := _ended():
        first, code, text = found
        message = message if first == own else _said(first, code, text)
    if own == 0:  # the service ends with this process
        time.sleep(2 * LOOK_EVERY)
    return code, message


def silent() -> list[int]:
    """The other processes that do not count any more; takes three times `LOOK_EVERY`."""
    before = _counts()
    time.sleep(3 * LOOK_EVERY)
    after, own = _counts(), str(jax.process_index())
    return sorted(int(i) for i in after if after[i] == before.get(i) and i != own)


def _counts() -> dict[str, str]:
    with contextlib.suppress(Exception):  # the service is gone
        found = _service().key_value_dir_get(ALIVE)
        return {key.rpartition("/")[2]: count for key, count in found}
    return {}


def _part(over: threading.Event, watch: threading.Thread) -> None:
    """At the end of a process: waits for the others, and for the thread that watches them.

    A thread that asks the service while the interpreter ends would abort the process.
    """
    with contextlib.suppress(Exception):  # the service is gone
        _service().wait_at_barrier("duc_dlc_jax/the end", 1000 * MEET_WITHIN)
    over.set()
    watch.join()


def _watch(over: threading.Event) -> None:
    """Shows that this process is there; ends it when another one has said that it ends."""
    name = f"{ALIVE}/{jax.process_index()}"
    for count in itertools.count():
        with contextlib.suppress(Exception):  # the service is gone
            _service().key_value_set(name, str(count), allow_overwrite=True)
        if over.wait(LOOK_EVERY):
            return
        if (found := _ended()) and found[0] != jax.process_index():
            with contextlib.suppress(OSError):
                print(f"error: {_said(*found)}", file=sys.stderr, flush=True)
            os._exit(found[1])


def _ended() -> tuple[int, int, str] | None:
    """Which process was the first that said it ends, its code and its message."""
    with contextlib.suppress(Exception):  # none did, or the service is gone
        process, code, message = json.loads(_service().key_value_try_get(ENDED))
        return process, code, message
    return None


def _said(process: int, code: int, message: str) -> str:
    return f"process {process} ended with code {code}: {message}"


def _service() -> Any:
    """The client of JAX's coordination service."""
    from jax._src import distributed

    return distributed.global_state.client


def place(args: Any, environment: Mapping[str, str]) -> dict | None:
    """Arguments of jax.distributed.initialize; {} lets JAX ask a TPU's metadata; None: alone."""
    # A shell in an allocation has the first variable too, but it is no step of several tasks.
    slurm = int(environment.get("SLURM_NTASKS") or 1) > 1 and "SLURM_STEP_NODELIST" in environment
    if slurm and not args.processes:
        return _slurm(environment, args.coordinator)
    if args.coordinator:
        if not 0 <= args.process < args.processes:
            raise ConfigError(
                f"--process={args.process} --processes={args.processes}: a process counts from 0 "
                "and must be below their number"
            )
        return _settings(args.coordinator, args.processes, args.process)
    if args.processes or args.process:
        raise ConfigError("--processes and --process need --coordinator=HOST:PORT of process 0")
    if all(environment.get(name) for name in KUBERNETES):
        address, count, index = (environment[name] for name in KUBERNETES)
        return _settings(address, int(count), int(index))
    if environment.get("JAX_PLATFORMS", "tpu") != "cpu" and _has_tpu():
        return {}
    return None


def _settings(address: str, count: int, index: int) -> dict:
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _slurm(environment: Mapping[str, str], address: str) -> dict:
    """Process 0 is on the step's first node and the port follows from the job's number.

    address: in place of these, where nodes have other names than their hosts.
    """
    host = re.match(r"([^,\[]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"])
    if not host:
        raise ConfigError(f"SLURM_STEP_NODELIST={environment['SLURM_STEP_NODELIST']} has no host")
    port = 61440 + int(environment["SLURM_JOB_ID"]) % 4096
    address = address or f"{host[1]}{host[2] or ''}:{port}"
    count, index = int(environment["SLURM_NTASKS"]), int(environment["SLURM_PROCID"])
    settings = _settings(address, count, index)
    cards = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(cards) > 1 and _slurm_tasks_here(environment) > 1:  # all see all cards: one each
        settings["local_device_ids"] = [int(environment["SLURM_LOCALID"])]
    return settings


def _slurm_tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks of the step on this node; Slurm writes those of all nodes as "16(x2),1"."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    counts: list[int] = []
    for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(nodes or 1)
    return counts[int(environment.get("SLURM_NODEID", 0))]


def _has_tpu() -> bool:
    devices = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


def roll_call(address: str, count: int, index: int, timeout: float) -> None:
    """Waits until all processes are there; raises MissingProcesses, with their numbers, if not.

    (JAX's own wait ends in an abort that names nobody.) It uses the coordinator's port before JAX
    does: process 0 listens, the others say their number and host and hear "go" or who is missing.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    answer = _listen(int(port), count, deadline) if index == 0 else None
    if index > 0:
        answer = _report((host, int(port)), index, deadline)
    if answer != "go":
        raise MissingProcesses(
            f"within --start_timeout={timeout:g} s "
            + (answer or f"process 0 did not answer at {address}")
        )


def _listen(port: int, count: int, deadline: float) -> str:
    """Process 0: the answer that everyone gets."""
    arrived = {0: socket.gethostname()}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("", port), backlog=count))
        waiting = []
        while len(arrived) < count and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):
                connection, _ = server.accept()
                stack.enter_context(connection)
                connection.settimeout(5)
                number, _, name = connection.recv(200).decode().partition(" ")
                arrived[int(number)] = name
                waiting.append(connection)
        missing = [str(i) for i in range(count) if i not in arrived]
        answer = "go"
        if missing:
            there = ", ".join(f"{i} ({arrived[i]})" for i in sorted(arrived))
            answer = f"process {', '.join(missing)} of {count} did not arrive; there: {there}"
        for connection in waiting:
            with contextlib.suppress(OSError):
                connection.sendall(answer.encode())
        return answer


def _report(address: tuple[str, int], index: int, deadline: float) -> str | None:
    """Another process: what process 0 answers; None where it cannot be reached."""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(address, timeout=5) as connection:
                connection.sendall(f"{index} {socket.gethostname()}".encode())
                connection.settimeout(max(deadline - time.monotonic(), 0) + 10)
                if answer := connection.recv(10000).decode():
                    return answer
        except OSError:
            pass
        time.sleep(0.2)
    return None
