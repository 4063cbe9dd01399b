"""Ray itself: started on this machine, or joined where a cluster runs."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import ray

from pipeline.cells import RayCells, cluster_nodes
from pipeline.child import START_TIMEOUT_S
from pipeline.config import EncodeConfig
from pipeline.jobs import Job
from pipeline.layout import cluster_layout, local_layout, store_bytes
from pipeline.settings import ConfigError

CONNECT_TIMEOUT_S = 10.0


@contextlib.contextmanager
def connected(job: Job, config: EncodeConfig, address: str | None) -> Iterator[RayCells]:
    """Start Ray on this machine, or connect to a cluster, for the length of a block.

    Raises:
        ConfigError: the cluster can't be reached, or the settings ask for what is not there.
    """
    if address is None:
        layout = local_layout(len(os.sched_getaffinity(0)), config)
        if config.metrics_port and not importlib.util.find_spec("prometheus_client"):
            raise ConfigError(
                "metrics_port: metrics need ray[default]; pip install -e '.[cluster]'"
            )
        room = store_bytes(layout.num_cells, config)
        with local_cluster(layout.num_cpus(config), room, config.metrics_port):
            gpus = ray.cluster_resources().get("GPU", 0)
            if gpus < layout.num_cells * config.encoder_gpus:
                raise ConfigError(
                    f"{layout.num_cells} cells of encoder_gpus={config.encoder_gpus:g}: this "
                    f"machine has {gpus:g} GPUs; lower cells or encoder_gpus"
                )
            yield RayCells(job, config, layout, START_TIMEOUT_S)
        return
    with joined_cluster(address):
        layout = cluster_layout(cluster_nodes(), config)
        # Nodes that are asked for, such as on a cloud, take minutes to join.
        yield RayCells(job, config, layout, max(START_TIMEOUT_S, config.encode_timeout_s))


@contextlib.contextmanager
def local_cluster(num_cpus: int, object_store_bytes: int, metrics_port: int = 0) -> Iterator[None]:
    """Start Ray on this machine for the length of a block, without dashboard.

    ``num_cpus`` are logical ones: processes that are asked for beyond the real ones share them.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    ray.init(
        address="local",  # never a cluster that happens to run here
        num_cpus=num_cpus,
        object_store_memory=object_store_bytes,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _metrics_export_port=metrics_port or None,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def joined_cluster(address: str) -> Iterator[None]:
    """Connect to the cluster at ``address`` for the length of a block.

    This code travels to the nodes, which need its dependencies only. Nothing of the environment
    does: credentials are each node's own.
    """
    if address.startswith("ray://"):
        raise ConfigError(
            f"--address {address}: encoding does not run through Ray's client; submit the command "
            "to the cluster: ray job submit --address http://HEAD:8265 -- python -m "
            "pipeline.encode --address auto ..."
        )
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        check_answer(address)
        ray.init(
            address=address,
            runtime_env={"py_modules": [str(Path(__file__).parent)]},
            log_to_driver=False,
            configure_logging=False,
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--address {address}: no Ray cluster can be joined from here ({reason}); expected "
            "the address of a head node, or auto on a node of the cluster"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def check_answer(address: str) -> None:
    """Check that something listens at ``host:port``: Ray itself tries for many minutes.

    Raises:
        OSError: nothing does.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        is_here = host in ("localhost", "127.0.0.1")  # Ray asks at the address that others see
        target = ray.util.get_node_ip_address() if is_here else host
        socket.create_connection((target, int(port)), timeout=CONNECT_TIMEOUT_S).close()
