"""Cells on a real cluster of two nodes: whatever is killed, the data set is that of a quiet run.

The nodes are raylets of their own on this machine; clips, decoders, codecs and commits are real.
"""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group

from pipeline.cells import RayCells, check_node, lost_by
from pipeline.cluster import connected, joined_cluster
from pipeline.config import EncodeConfig, column_specs
from pipeline.data_root import open_root
from pipeline.driver import Driver, encode_shards
from pipeline.encode import make_job
from pipeline.files import NoRoomError
from pipeline.fleet import Lost
from pipeline.format import FormatError
from pipeline.plan import ensure_plan
from pipeline.plan_table import PlanTable
from pipeline.pool import CellError, CellLostError
from pipeline.request import Request
from pipeline.settings import ConfigError, load
from pipeline.shards import create_column
from pipeline.sources import open_source
from pipeline.work import open_work
from tests.pipeline.encoded import record_films

NUM_CLIPS = 13  # and a mute one
NUM_SHARDS = 7
SETTINGS = [
    *("shard_size=2", "clip.seconds=2", "video.size=64", "video.fps=8", "window_mb=20"),
    *("columns=[video,audio]", "encode_timeout_s=12", "decoders=1"),
]
STORE_BYTES = 100_000_000


class Watch:
    """Notes what it is told, and does ``act(news)`` with all news."""

    def __init__(self, act=lambda news: None):
        self.act, self.updates, self.losses, self.events = act, [], [], []

    def update(self, news):
        self.updates.append(news)
        self.act(news)

    def set_cells(self, num_cells, num_decoders):
        pass

    def lost(self, task, attempt, reason, cell=""):
        self.losses.append((task, attempt, reason, cell))

    def event(self, kind, **fields):
        self.events.append((kind, fields))


class Run:
    """One run over the clips into a data set of its own."""

    def __init__(self, src, out, settings=()):
        self.config = load(EncodeConfig, None, [*SETTINGS, *settings])
        self.request = Request(src=str(src), out=str(out))
        source, root = open_source(str(src), self.config), open_root(str(out))
        self.plan = ensure_plan(root, source, self.config)
        specs = column_specs(self.config)
        self.columns = {m: create_column(root, s, self.plan.plan_id) for m, s in specs.items()}
        run_id = f"run-{os.urandom(3).hex()}"
        self.job = make_job(self.request, source, self.plan, run_id, specs, self.config)
        self.table, self.root = PlanTable(root, self.plan), root

    def tasks(self):
        return (work.task(self.table) for work in open_work(self.plan, self.columns))

    def encode(self, watch, address=None):
        return encode_shards(self.job, self.tasks(), self.config, watch, address)

    def payloads(self):
        """Return the hashes of all tars and indexes, by path; each must be committed."""
        assert open_work(self.plan, self.columns) == []
        return {
            path.relative_to(self.root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for pattern in ("*@*/*.tar", "*@*/*.npy")
            for path in sorted(self.root.glob(pattern))
        }

    def temporaries(self):
        """Return what lost writers left in the columns; that of facts is for gc to remove."""
        return [path.name for path in self.root.glob("[va]*@*/.*.tmp")]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return record_films(tmp_path_factory.mktemp("source") / "clips", NUM_CLIPS)


@pytest.fixture(scope="module")
def quiet(clips, tmp_path_factory):
    """What a run on one local cell writes that nothing befalls."""
    run = Run(clips, tmp_path_factory.mktemp("quiet") / "out")
    watch = Watch()
    assert run.encode(watch) == []
    assert not ray.is_initialized()
    rows = sum((news.statuses for news in watch.updates), Counter())
    assert rows == {"ok": NUM_CLIPS, "no_audio": 1}
    return run.payloads()


@pytest.fixture(scope="module")
def cluster(quiet):
    """A head without CPUs; tests add nodes. After ``quiet``, which has a cluster of its own."""
    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    head["_system_config"] = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def nodes(cluster):
    added = [
        cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES, wait=False) for _ in range(2)
    ]
    cluster.wait_for_nodes()
    yield added
    for node in added:
        if node in cluster.list_all_nodes():
            cluster.remove_node(node)


def processes_of(node, name):
    """Return the processes of a node's workers with this in their title."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [
        child
        for child in raylet.children(recursive=True)
        if child.is_running() and name in " ".join(child.cmdline())
    ]


def once(when, act):
    """Return a watcher's deed: ``act`` at the first news that ``when`` is true of."""
    done = []

    def watcher(news):
        if not done and when(news):
            done.append(news)
            act(news)

    return watcher


def commits(number):
    """Return a condition: that many shards are committed."""
    seen = []

    def when(news):
        seen.extend([news] if news.event == "committed" else [])
        return len(seen) >= number and news.event != "alive"

    return when


@pytest.mark.slow
def test_two_cells_share_the_work_and_write_the_bytes_of_one(
    clips, quiet, cluster, nodes, tmp_path
):
    run, watch = Run(clips, tmp_path / "out"), Watch()
    assert run.encode(watch, cluster.address) == []
    assert run.payloads() == quiet and run.temporaries() == []
    committed = [news for news in watch.updates if news.event == "committed"]
    assert sorted(news.task for news in committed) == [
        ("clips", shard) for shard in range(NUM_SHARDS)
    ]
    assert all(len(news.committed) == 2 for news in committed), "each by one attempt"
    hosts = {news.cell for news in watch.updates}
    assert hosts == {f"{os.uname().nodename}/{number}" for number in (0, 1)}
    assert watch.losses == []


def test_a_lost_node_s_shards_are_done_on_another(clips, quiet, cluster, nodes, tmp_path):
    """One node is there when the run starts to lose it; another joins then."""
    cluster.remove_node(nodes[1])

    def lose_node(news):
        os.kill(nodes[0].all_processes["raylet"][0].process.pid, signal.SIGKILL)
        nodes[1] = cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)

    run, watch = Run(clips, tmp_path / "out"), Watch(once(commits(2), lose_node))
    assert run.encode(watch, cluster.address) == []
    assert run.payloads() == quiet
    assert [kind for kind, _ in watch.events] == [
        *("starting", "cell_started", "cell_lost", "cell_started")
    ]
    assert all(attempt == 1 for _, attempt, _, _ in watch.losses) and watch.losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "number", "reason"),
    [
        ("EncoderActor", signal.SIGKILL, "ActorDiedError"),
        ("EncoderActor", signal.SIGSTOP, "nothing heard of the encoder for 12 s"),
        ("DecoderActor", signal.SIGKILL, None),  # the encoder's own affair
    ],
)
def test_a_lost_process_costs_time_only(
    clips, quiet, cluster, nodes, tmp_path, title, number, reason
):
    victims = []

    def strike(news):
        victims.extend(process for node in nodes for process in processes_of(node, title))
        os.kill(victims[0].pid, number)

    run, watch = Run(clips, tmp_path / "out"), Watch(once(commits(2), strike))
    assert run.encode(watch, cluster.address) == []
    assert run.payloads() == quiet
    assert len(victims) == 2, "two cells were at work"
    assert not psutil.pid_exists(victims[0].pid), "a stopped process is ended, too"
    lost = [fields["reason"] for kind, fields in watch.events if kind == "cell_lost"]
    assert [reason in text for text in lost] == ([True] if reason else [])
    # What the lost encoder had open is nobody's until the shard's next commit removes it.
    assert run.temporaries() == []


class CutOff(RayCells):
    """Cells of which the first is cut off at its second shard, and can't be killed: it works on."""

    zombie = None
    is_cut = False

    def start(self, number):
        cell = super().start(number)
        if self.zombie is None:
            self.zombie, self.end_zombie = cell, cell.kill
            self.given, self.done = set(), []
            lease, cell.kill = cell.lease, lambda: None
            cell.lease = lambda task: (self.given.add(task.name), lease(task))
        return cell

    def poll(self, cells, timeout_s):
        found = super().poll(cells, timeout_s)
        return [(cell, self.cut(news) if cell is self.zombie else news) for cell, news in found]

    def cut(self, news):
        self.is_cut = news.event == "started" and len(self.done) > 0
        self.done.extend([news] if news.event == "committed" else [])
        return Lost("the network is gone") if self.is_cut else news


@pytest.mark.slow
def test_a_cell_that_lives_on_unseen_spoils_nothing(clips, quiet, cluster, nodes, tmp_path):
    """Zombie and successor do the same shards at once, on two nodes, and both commit them."""
    run, watch = Run(clips, tmp_path / "out", ["cells=1"]), Watch()
    with connected(run.job, run.config, cluster.address) as cells:
        cells.__class__ = CutOff
        assert Driver(cells, run.tasks(), run.job, watch).run() == []
        assert cells.is_cut and watch.losses
        known = len(cells.done)
        while cells.given > {news.task for news in cells.done}:
            cells.cut(cells.zombie.read())
        cells.end_zombie()
    committed = [news for news in watch.updates if news.event == "committed"]
    late = cells.done[known:]
    assert {news.task for news in late} <= {news.task for news in committed}
    columns = Counter((news.task, name) for news in committed + late for name in news.committed)
    assert columns.total() == len(columns) == 2 * NUM_SHARDS, "each was committed by one of the two"
    assert run.payloads() == quiet and run.temporaries() == []


@pytest.mark.slow
def test_two_drivers_on_one_data_set_do_no_harm(clips, quiet, cluster, nodes, tmp_path):
    """The second one starts while the first is at work, with the same list of shards."""
    run, other = Run(clips, tmp_path / "out", ["cells=1"]), Run(clips, tmp_path / "out")
    assert run.job.run_id != other.job.run_id
    tasks = list(other.tasks())
    watch, others = Watch(), Watch()
    with connected(run.job, run.config, cluster.address) as cells:
        first = Driver(cells, run.tasks(), run.job, watch)
        second = Driver(
            RayCells(other.job, other.config, cells._layout, 60), tasks, other.job, others
        )
        with ThreadPoolExecutor(2) as threads:
            ends = [threads.submit(driver.run) for driver in (first, second)]
            assert [end.result(timeout=200) for end in ends] == [[], []]
    done = [news for news in watch.updates + others.updates if news.event == "committed"]
    assert Counter(news.task for news in done) == dict.fromkeys({news.task for news in done}, 2)
    assert sum(len(news.committed) for news in done) == 2 * NUM_SHARDS, (
        "each shard by one of the two"
    )
    assert run.payloads() == quiet and run.temporaries() == []


@pytest.mark.slow
def test_a_run_waits_for_a_place_and_says_so(clips, quiet, cluster, nodes, tmp_path):
    """Other work has all CPUs of both nodes, and leaves when the run has complained."""
    run, watch = Run(clips, tmp_path / "out"), Watch()
    with connected(run.job, run.config, cluster.address) as cells:
        others = [placement_group([{"CPU": 2}], "STRICT_PACK") for _ in nodes]
        assert all(other.wait(60) for other in others)

        def leave(kind, **fields):
            watch.events.append((kind, fields))
            while kind == "waiting" and others:
                remove_placement_group(others.pop())

        watch.event = leave
        assert Driver(cells, run.tasks(), run.job, watch).run() == []
    kind, fields = watch.events[0]
    assert kind == "waiting"
    assert "asked is 2 CPUs and 0 GPUs on one node" in fields["reason"]
    assert "of which 0 CPUs and 0 GPUs are free" in fields["reason"]
    assert run.payloads() == quiet


def test_a_node_that_does_not_see_the_data_set_ends_the_run_and_is_named(
    clips, cluster, nodes, tmp_path
):
    run = Run(clips, tmp_path / "out")
    job = replace(run.job, root=str(tmp_path / "only-on-the-head"))
    with pytest.raises(ConfigError, match=rf"node {os.uname().nodename} .*all nodes must share"):
        encode_shards(job, run.tasks(), run.config, Watch(), cluster.address)
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plan_id": "00000000"}, "another data set"),
        ({"media_root": "/no/such/folder"}, "has no folder /no/such/folder of media"),
        ({"root": "/no/such/folder"}, "does not see the data set /no/such/folder"),
    ],
)
def test_what_a_node_must_share_is_checked(clips, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    run = Run(clips, tmp_path / "out")
    check_node(run.job)
    with pytest.raises(CellError, match=rf"\(10\.0\.0\.7\).*{words}.*configs/cluster/README"):
        check_node(replace(run.job, **change))


def test_a_cell_that_no_node_holds_is_refused_with_what_there_is(clips, cluster, nodes, tmp_path):
    run = Run(clips, tmp_path / "out", ["encoder_gpus=1"])
    with pytest.raises(ConfigError, match=r"2 CPUs and 1 GPU on one node.*2 nodes of 2 CPUs and 0"):
        run.encode(Watch(), cluster.address)


@pytest.mark.slow
def test_gpus_that_this_machine_lacks_are_refused(clips, tmp_path):
    run = Run(clips, tmp_path / "out", ["encoder_gpus=8", "cells=99"])
    with pytest.raises(ConfigError, match=r"encoder_gpus=8: this machine has \d+ GPUs"):
        run.encode(Watch())


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://10.0.0.1:10001", "ray job submit"),
        ("127.0.0.1:1", "no Ray cluster can be joined.*refused"),
        ("no-such-host.invalid:6379", "no Ray cluster can be joined"),
    ],
)
def test_addresses_that_lead_nowhere_are_said_at_once(address, words):
    with pytest.raises(ConfigError, match=words), joined_cluster(address):
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError("EndpointConnectionError: no answer"),  # as object stores raise, without a number
        OSError(errno.ESTALE, "stale file handle"),
        ConnectionResetError("reset"),
        TimeoutError("timed out"),
        CellLostError("the GPU failed"),
        RuntimeError("CUDA error"),
    ],
)
def test_what_may_pass_costs_the_cell_only(error):
    error.task = ("clips", 3)  # over which the encoder raised
    lost = lost_by(error)
    assert str(error) in lost.reason and type(error).__name__ in lost.reason
    assert lost.task == ("clips", 3)


def test_a_sick_node_is_no_shard_s_fault_and_secrets_stay_out_of_reasons():
    assert lost_by(CellError("decoders can't start")) == Lost("decoders can't start", is_sick=True)
    lost = lost_by(RuntimeError("GET https://user:SECRET@host/x failed"))
    assert "SECRET" not in lost.reason and not lost.is_sick


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (NoRoomError("full"), NoRoomError),
        (FormatError("damaged"), FormatError),
        (PermissionError(errno.EACCES, "not yours"), PermissionError),
        (ray.exceptions.ObjectStoreFullError("no room"), NoRoomError),
        (ray.exceptions.OutOfDiskError("no room"), NoRoomError),
    ],
)
def test_what_every_cell_would_meet_ends_the_run(error, raised):
    with pytest.raises(raised):
        lost_by(error)


@pytest.mark.slow
def test_memory_that_runs_out_is_said_with_what_to_lower(clips, tmp_path):
    """Ray's memory monitor believes that the node is full, and ends whatever works there."""
    command = [sys.executable, "-m", "pipeline.encode", "--src", clips, "--out", tmp_path / "out"]
    ended = subprocess.run(
        [*command, *SETTINGS],
        env=os.environ | {"RAY_memory_usage_threshold": "0.001"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 1
    assert "Ray's memory monitor ended the encoder" in ended.stderr
    assert "lower window_mb, decoders or batch" in ended.stderr.splitlines()[-1]
