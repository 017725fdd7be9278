"""The way to a Ray cluster: found or started, quiet, with the same code on every node."""

import contextlib
import os
from dataclasses import dataclass
from typing import Any

from neox_bridge import __version__
from neox_bridge.errors import BridgeError
from neox_bridge.execution.executors import default_slots
from neox_bridge.execution.ray_node import asker

_ANSWER = 60.0  # seconds in which a node is to say which code it has
_STORE = 128 << 20  # bytes of the object store of a Ray that is started here; units are small


@dataclass(frozen=True, slots=True)
class Node:
    """A living node. name: host and address, for people. cpus: calls that it makes at a time."""

    id: str
    name: str
    cpus: int


def ray_module() -> Any:
    """Raises BridgeError where Ray isn't installed."""
    try:
        import ray
    except ImportError:
        raise BridgeError(
            "--executor ray needs Ray: pip install 'neox-bridge[ray]', on every node."
        ) from None
    return ray


def connect(address: str, workers: int | None) -> bool:
    """Join a cluster. Returns whether it is this process's to leave; not where it had joined one.

    address: HOST:PORT; ``auto`` for that of RAY_ADDRESS or the one that runs here; ``local`` to
    start one of this machine alone, with ``workers`` CPUs. The package is sent to the nodes where
    some have another one. Raises BridgeError where there is no cluster, or a node lacks what the
    package needs.
    """
    ray = ray_module()
    if ray.is_initialized():
        _same_code(ray, mend="the runtime_env of its ray.init")
        return False
    if address.startswith("ray://"):
        raise BridgeError(
            f"{address}: Ray's client isn't supported. Run the command on a node of the cluster, "
            "with --address auto."
        )
    _join(ray, address, workers, None)
    try:
        if _others(ray):
            ray.shutdown()
            home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
            _join(ray, address, workers, {"py_modules": [home]})
            _same_code(ray, mend=f"pip install 'neox-bridge[ray]=={__version__}'")
    except BaseException:
        ray.shutdown()
        raise
    return True


def living(ray: Any) -> list[Node]:
    """The nodes that have CPUs. Raises what Ray does where the cluster can't be asked."""
    return [
        Node(node["NodeID"], _name(node), int(node["Resources"]["CPU"]))
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    ]


def there(node: Node, cpus: int) -> dict[str, Any]:
    """Options of a task for one node, on no other: whether it sees the files was found out."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return {"num_cpus": cpus, "max_retries": 0, "scheduling_strategy": strategy}


def said(error: BaseException) -> str:
    """What to quote of an exception of Ray, which tells much: of a traceback its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return lines[-1] if "Traceback" in str(error) else lines[0]


def _join(ray: Any, address: str, workers: int | None, environment: dict[str, Any] | None) -> None:
    # Ray's news of lost workers would go to stdout, which is for results
    with contextlib.suppress(AttributeError):
        ray._private.worker._worker_logs_enabled = False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of a change
    own: dict[str, Any] = {}
    if address == "local":
        own = {"num_cpus": workers or default_slots(), "object_store_memory": _STORE}
        own["include_dashboard"] = False
    try:
        ray.init(
            address, log_to_driver=False, logging_level="CRITICAL", runtime_env=environment, **own
        )
    except Exception as error:  # Ray raises many kinds
        if address == "auto":
            words = "no Ray cluster is running here"
        elif address == "local":
            words = "Ray can't be started here"
        else:
            words = f"there is no Ray cluster at {address}"
        told = " ".join(str(error).split())[:300]
        raise BridgeError(
            f"{words[0].upper()}{words[1:]} ({told}). Start one with `ray start --head`, name its "
            "--address HOST:PORT, or say --address local for this machine alone."
        ) from None


def _same_code(ray: Any, mend: str) -> None:
    if others := _others(ray):
        raise BridgeError(f"Ray's {'; '.join(others)}. Install the same on every node: {mend}.")


def _others(ray: Any) -> list[str]:
    """The nodes that have other code than this process, in words; those that don't answer not."""
    ask = asker()
    mine = ask()
    nodes = {ray.remote(ask).options(**there(node, 0)).remote(): node for node in living(ray)}
    answered, _ = ray.wait(list(nodes), num_returns=len(nodes), timeout=_ANSWER)
    found = []
    for ref in answered:
        with contextlib.suppress(ray.exceptions.RayError):
            if words := difference(ray.get(ref), mine):
                found.append(f"node {nodes[ref].name} {words}")
    return sorted(found)


def difference(code: tuple[str | None, str], mine: tuple[str | None, str]) -> str:
    """What is wrong with a node's answer to ``asker``; "" where it has this process's code."""
    if code == mine:
        return ""
    if code[0] is None:
        return f"can't import neox-bridge ({code[1]})"
    if code[1] != mine[1]:
        return f"has neox-bridge {code[1]}, and this is {mine[1]}"
    return f"has other code of neox-bridge {code[1]}"


def _name(node: dict[str, Any]) -> str:
    host, address = node.get("NodeManagerHostname"), node["NodeManagerAddress"]
    return f"{host} ({address})" if host and host != address else address
