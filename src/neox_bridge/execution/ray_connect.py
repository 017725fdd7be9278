"""Joins or starts a Ray cluster, quietly, with the same code on every node."""

import contextlib
import os
import socket
import tempfile
from dataclasses import dataclass
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.execution.executors import LOSSES, default_slots
from neox_bridge.execution.ray_guard import guard
from neox_bridge.execution.ray_node import asker
from neox_bridge.extras import install_command

_ANSWER_SECONDS = 60.0  # how long a node may take to report its code
_REACH_SECONDS = 5.0  # how long a cluster may take to answer
_STORE_BYTES = 128 << 20  # object store size if Ray is started here; units are small
_START = (
    "Start one with `ray start --head`, give its `address=HOST:PORT`, or use `address=local` for "
    "this machine only."
)


@dataclass(frozen=True, slots=True)
class Node:
    """A living node.

    Attributes:
        name: Host and address, for people.
        cpus: How many calls it runs at a time.
    """

    id: str
    name: str
    cpus: int


def ray_module() -> Any:
    """The module. Raises BridgeError if Ray is not installed."""
    try:
        import ray
    except ImportError:
        raise BridgeError(
            "`executor=ray` needs Ray, which is missing. Install it on every node: "
            f"{install_command('ray')}"
        ) from None
    return ray


def connect(address: str, workers: int | None) -> tuple[bool, set[str]]:
    """Join a cluster and make sure that every node has the same code. Sends the code if needed.

    Args:
        address: HOST:PORT. ``auto``: the cluster of RAY_ADDRESS, or the one that runs on this
            machine. ``local``: start one on this machine only.
        workers: The CPUs of a cluster that is started here.

    Returns:
        Whether this process must leave the cluster (not if it had joined before), and the ids of
        the nodes that have the code.

    Raises:
        BridgeError: There is no cluster, or a node does not have the dependencies.
    """
    ray = ray_module()
    if ray.is_initialized():
        return False, _same_code(
            ray, "Send it to every node with the runtime_env of the ray.init call."
        )
    _check(address)
    _join(ray, address, workers, None)
    try:
        same, others = _codes(ray)
        if others:
            ray.shutdown()
            home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
            _join(ray, address, workers, {"py_modules": [home]})
            install = f"Install the same version on every node: {install_command('ray')}"
            same = _same_code(ray, install)
    except BaseException:
        ray.shutdown()
        raise
    return True, same


def living_nodes(ray: Any) -> list[Node]:
    """The nodes that have CPUs. Raises exceptions of Ray if the cluster does not answer."""
    return [
        Node(node["NodeID"], _name(node), int(node["Resources"]["CPU"]))
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    ]


def on_node(node: Node, cpus: int) -> dict[str, Any]:
    """The options of a task that runs only on this node; Ray repeats lost tasks."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return {"num_cpus": cpus, "max_retries": LOSSES - 1, "scheduling_strategy": strategy}


def first_words(error: BaseException) -> str:
    """The line to quote of a long exception of Ray: the first, or the last of a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return lines[-1] if "Traceback" in str(error) else lines[0]


def _join(ray: Any, address: str, workers: int | None, environment: dict[str, Any] | None) -> None:
    # Ray would report lost workers on stdout, which is for results. It has no setting for that:
    # listen_error_messages prints with log_to_driver=False too (_private/worker.py of Ray 2.60).
    # A Ray without this name prints them.
    with contextlib.suppress(AttributeError):
        ray._private.worker._worker_logs_enabled = False
    # prevents a warning of Ray about a coming change
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    local: dict[str, Any] = {}
    if address == "local":
        guard()
        local = {"num_cpus": workers or default_slots(), "object_store_memory": _STORE_BYTES}
        local["include_dashboard"] = False
    try:
        ray.init(
            address, log_to_driver=False, logging_level="CRITICAL", runtime_env=environment, **local
        )
    except Exception as error:  # Ray raises many kinds of exceptions
        reason = " ".join(str(error).split())[:300]
        if address == "local":
            raise BridgeError(
                f"Ray cannot be started here ({reason}). Use `executor=local`, which does not need "
                "Ray."
            ) from None
        where = "running here" if address == "auto" else f"at {address}"
        raise BridgeError(f"There is no Ray cluster {where} ({reason}). {_START}") from None


def _check(address: str) -> None:
    """Check the address first, because Ray would retry for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or _last_started() or address
    host, colon, port = address.rpartition(":")
    if address.startswith("ray://"):
        raise BridgeError(
            f"{address}: Ray Client is not supported. Run the command on a node of the cluster, "
            "with `address=auto`."
        )
    if colon and not port.isdigit():
        raise BridgeError(f"`address={address}`: not HOST:PORT. {_START}")
    if colon:
        try:
            socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise BridgeError(f"There is no Ray cluster at {address} ({error}). {_START}") from None


def _last_started() -> str:
    """The address that the last ``ray start`` on this machine recorded, or ""."""
    path = os.path.join(
        os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", "ray_current_cluster"
    )
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        return file.read().strip()
    return ""


def _same_code(ray: Any, way_out: str) -> set[str]:
    """The ids of the nodes. Raises BridgeError if one of them has other code."""
    same, others = _codes(ray)
    if others:
        raise BridgeError(f"In the Ray cluster, {'; '.join(others)}. {way_out}")
    return same


def _codes(ray: Any) -> tuple[set[str], list[str]]:
    """The ids of nodes with the code of this process, and descriptions of nodes with other code.

    Nodes that do not answer are in neither. Raises BridgeError if none answers.
    """
    ask = asker()
    code_here = ask()
    nodes = living_nodes(ray)
    task = ray.remote(ask)
    tasks = {task.options(**on_node(node, 0)).remote(): node for node in nodes}
    answered = (
        ray.wait(list(tasks), num_returns=len(nodes), timeout=_ANSWER_SECONDS)[0] if nodes else []
    )
    same, others = set(), []
    for ref in answered:
        with contextlib.suppress(ray.exceptions.RayError):
            if words := difference(ray.get(ref), code_here):
                others.append(f"node {tasks[ref].name} {words}")
            else:
                same.add(tasks[ref].id)
    if not same and not others:
        raise BridgeError(
            f"None of the {len(nodes)} nodes with CPUs in the Ray cluster answers. Check `ray "
            "status`."
        )
    return same, sorted(others)


def difference(code: tuple[str | None, str], code_here: tuple[str | None, str]) -> str:
    """How the code of a node differs, from its answer to ``asker``; "" if it is the same."""
    if code == code_here:
        return ""
    if code[0] is None:
        return f"cannot import neox-bridge ({code[1]})"
    if code[1] != code_here[1]:
        return f"has neox-bridge {code[1]}, and this is {code_here[1]}"
    return f"has different code of neox-bridge {code[1]}"


def _name(node: dict[str, Any]) -> str:
    host, address = node.get("NodeManagerHostname"), node["NodeManagerAddress"]
    return f"{host} ({address})" if host and host != address else address
