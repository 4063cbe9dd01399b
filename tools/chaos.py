"""``python -m tools.chaos``: kills what can be killed while clips are encoded; nothing may be lost.

On a Ray cluster of two nodes on this machine, ``pipeline.encode`` writes a data set while faults
hit it: SIGKILL of a decoder, of an encoder, of the command itself (the driver), of the second
node's raylet (another node joins), and a full disk (a small tmpfs; that needs root). A command that
ends is typed again until it succeeds. Every finished data set is compared with one that was
written undisturbed (``tools.same_data``), then the next one is begun, until all faults are spent.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from pipeline.config import EncodeConfig
from pipeline.settings import ConfigError, load
from tools import faults
from tools.faults import KINDS, Fault
from tools.hit_runs import SETTINGS, ChaosError, Result, Session
from tools.same_data import differences
from tools.stage_rates import repeated, whole_clips

REAL_CLIPS = Path(__file__).resolve().parents[2] / "shared/clips/vggsound/video"
NODE_CPUS = 2
NODE_MEMORY_BYTES = 100_000_000
DISK_BYTES = 128 << 20


class TwoNodes:
    """A Ray cluster of two nodes on this machine; the second can be killed and replaced."""

    def __init__(self) -> None:
        self._node: dict[str, Any] = {
            "num_cpus": NODE_CPUS,
            "object_store_memory": NODE_MEMORY_BYTES,
        }
        head = {**self._node, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._second = self._cluster.add_node(**self._node)
        self.address = str(self._cluster.address)

    def raylets(self) -> list[int]:
        """Return the processes that start the actors."""
        head: Any = self._cluster.head_node
        return [node.all_processes["raylet"][0].process.pid for node in (head, self._second)]

    def replace_second(self) -> None:
        """Kill the second node's raylet, and what it leaves behind; let another node join."""
        self._second.all_processes["raylet"][0].process.send_signal(signal.SIGKILL)
        self._cluster.remove_node(self._second, allow_graceful=False)
        self._second = self._cluster.add_node(**self._node)

    def close(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()


def chaos(clips: Path, folder: Path, plan: list[Fault], disk_bytes: int = DISK_BYTES) -> Result:
    """Hit runs with all faults of a plan; compare every data set with an undisturbed one.

    Args:
        clips: folder of clips.
        folder: for logs and data sets; those that are as they should be are removed.
        plan: faults in their order; "disk" is left out where no small disk can be mounted.
        disk_bytes: size of the small disk.

    Raises:
        ChaosError: the undisturbed run fails, or a command hangs or never succeeds.
    """
    started_s = time.monotonic()
    with faults.small_disk(folder / "disk", disk_bytes) as is_small, two_nodes() as nodes:
        pending = [fault for fault in plan if is_small or fault.kind != "disk"]
        session = Session(clips, folder, folder / "disk", nodes)
        result, reference = session.result, folder / "disk" / "undisturbed"
        session.undisturbed(reference)
        while pending:
            out = folder / "disk" / f"hit-{result.num_data_sets:03d}"
            session.data_set(out, pending)
            result.num_data_sets += 1
            found = differences(out, reference)
            result.problems += found
            if found:
                shutil.copytree(out, folder / out.name)  # the disk goes
            shutil.rmtree(out)
            print(
                f"{out.name}: {len(result.hits)} faults so far, {len(found)} differences",
                file=sys.stderr,
                flush=True,
            )
        result.seconds = time.monotonic() - started_s
    return result


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Start the cluster for the length of a block."""
    nodes = TwoNodes()
    try:
        yield nodes
    finally:
        nodes.close()


def print_table(result: Result, seed: int) -> None:
    """Print what became of the faults, by kind."""
    print(
        f"{len(result.hits)} faults (seed {seed}) over {result.num_data_sets} data sets in "
        f"{result.seconds / 60:.1f} min; undisturbed, a shard every {result.usual_s:.2f} s\n"
    )
    print("fault      hits  survived in place  command again  s lost: median     most")
    for kind in KINDS:
        hits = [hit for hit in result.hits if hit.kind == kind]
        if not hits:
            print(f"{kind:8} {'not tried: no small disk can be mounted':>40}")
            continue
        again, lost_s = sum(hit.again for hit in hits), [hit.lost_s for hit in hits]
        print(
            f"{kind:8} {len(hits):>6} {len(hits) - again:>18} {again:>14} "
            f"{statistics.median(lost_s):>15.1f} {max(lost_s):>8.1f}"
        )
    total_s = sum(hit.lost_s for hit in result.hits)
    print(f"all: {total_s:.0f} s lost, {total_s / max(1, len(result.hits)):.1f} s a fault\n")
    # Paths and numbers differ from time to time.
    said = Counter((hit.kind, re.sub(r"/\S+", "…", hit.said)) for hit in result.hits if hit.said)
    for (kind, line), count in sorted(said.items()):
        print(f"{count} x {kind}: {line}")
    print(f"\n{len(result.problems)} problems: " + ("nothing lost" if not result.problems else ""))
    for problem in result.problems:
        print(f"  {problem}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 where anything was lost."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--faults", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and times")
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: %(default)s")
    parser.add_argument("--clips", type=Path, default=REAL_CLIPS, help="folder of real clips")
    parser.add_argument("--num-clips", type=int, default=160, help="of a run, default: %(default)s")
    parser.add_argument("--folder", type=Path, help="kept (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    options = parser.parse_args(arguments)
    kinds = options.kinds.split(",")
    if not set(kinds) <= set(KINDS) or options.faults < 1 or options.num_clips < 8:
        parser.error(f"kinds are {', '.join(KINDS)}; 1 fault at least, and 8 clips")
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = options.folder or Path(temporary)
        plan = faults.draw(kinds, options.faults, options.seed)
        try:
            sources = whole_clips(options.clips, load(EncodeConfig, None, SETTINGS))
            repeated(sources, folder / "clips", options.num_clips)
            result = chaos(folder / "clips", folder, plan)
        except (ChaosError, ConfigError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if options.json:
        print(json.dumps(asdict(result), indent=1))
    else:
        print_table(result, options.seed)
    return int(bool(result.problems))


if __name__ == "__main__":
    sys.exit(main())
