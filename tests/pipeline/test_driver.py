"""Whatever cells do, every shard is done or given up with its reasons, and nothing waits for ever.

Cells are scripts here, and the clock is one: what cells do with real shards is in test_cells.py.
"""

import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import CheckSettings, EncodeConfig, decode_settings
from pipeline.driver import MAX_FAILED_STARTS, MAX_GIVEN_UP, Driver, complaint
from pipeline.files import NoRoomError
from pipeline.fleet import Lost
from pipeline.format import FormatError
from pipeline.jobs import Job, ShardTask, ShardUpdate
from pipeline.leases import MAX_HELD, MAX_LOSSES, MAX_UNWRITTEN
from pipeline.media import Clip
from pipeline.settings import ConfigError

ROWS = 4
STEP_S = 1.0
JOB = Job(
    root="",
    facts="",
    plan_id="plan",
    run_id="run",
    columns={},
    batch={},
    media_root="",
    cache_dir=None,
    cache_bytes=0,
    decode=decode_settings(EncodeConfig()),
    checks=CheckSettings(),
    decode_timeout_s=10.0,
    fetch_timeout_s=20.0,
    encode_timeout_s=60.0,
    clips_per_decoder=100,
    window_bytes=1,
)
NO_PROGRESS_S = 60.0 + 2 * (10.0 + 20.0)


def task_of(shard):
    clips = [Clip(f"{shard}-{row}", f"{row}.mp4", 0, 10) for row in range(ROWS)]
    return ShardTask(shard, ("video",), clips=clips)


class Script:
    """A cell that does a row of its oldest shard per step, unless its fleet says otherwise."""

    num_decoders = 3

    def __init__(self, fleet, number):
        self.fleet, self.number, self.name = fleet, number, f"node-{number}/{number}"
        self.life = fleet.lives[number]
        fleet.lives[number] += 1
        self.tasks, self.rows, self.said_alive, self.dead = [], 0, False, False

    def is_placed(self):
        return (self.number, self.life) not in self.fleet.unplaced

    def lease(self, task):
        assert self.said_alive, "a cell that is not there yet is given nothing"
        assert not self.dead
        self.fleet.given.append((task.name, task.attempt))
        self.tasks.append(task)

    def kill(self):
        self.dead = True
        self.fleet.living.discard(self)

    def step(self):
        """Return what it says in this step, or None."""
        if not self.is_placed():
            return None
        if (self.number, self.life) in self.fleet.fails_to_start:
            return Lost("no codec")
        if not self.said_alive:
            self.said_alive = True
            return ShardUpdate("alive")
        if not self.tasks:
            return ShardUpdate("alive")
        task = self.tasks[0]
        behaviour = self.fleet.behaviour(self, task)
        if behaviour == "dies":
            return Lost("killed")
        if behaviour == "sick":
            return Lost("decoders can't start", is_sick=True)
        if behaviour == "silent":
            return None
        if behaviour == "stuck":
            return ShardUpdate("alive")
        if isinstance(behaviour, Lost):
            return behaviour
        if isinstance(behaviour, Exception):
            raise behaviour
        self.rows += 1
        if self.rows <= ROWS:
            return ShardUpdate("progress", task=task.name, statuses=Counter(ok=1))
        self.tasks.pop(0)
        self.rows = 0
        self.fleet.committed.append(task.name)
        return ShardUpdate("committed", task=task.name, committed=("video@x",))


class Fleet:
    """Scripted cells; ``behave(cell, task)`` says what goes wrong."""

    place_timeout_s = 120.0

    def __init__(self, num_cells, behave=lambda cell, task: None):
        self.num_cells, self.behaviour = num_cells, behave
        self.now, self.lives, self.living = 0.0, defaultdict(int), set()
        self.unplaced, self.fails_to_start = set(), set()
        self.committed, self.given, self.most = [], [], defaultdict(int)

    def start(self, number):
        assert number not in {cell.number for cell in self.living}
        cell = Script(self, number)
        self.living.add(cell)
        return cell

    def poll(self, cells, timeout_s):
        self.now += STEP_S
        for cell in cells:
            assert not cell.dead
            self.most["held"] = max(self.most["held"], len(cell.tasks))
            unwritten = len(cell.tasks) - (cell.rows == ROWS)
            self.most["unwritten"] = max(self.most["unwritten"], unwritten)
        said = [(cell, cell.step()) for cell in cells]
        return [(cell, news) for cell, news in said if news is not None]

    def shortage(self):
        return "asked is 9 CPUs, there are 2"

    def clock(self):
        return self.now


class Watch:
    """Notes what it is told."""

    def __init__(self):
        self.updates, self.losses, self.events, self.cells = [], [], [], []

    def update(self, news):
        self.updates.append(news)

    def set_cells(self, num_cells, num_decoders):
        self.cells.append((num_cells, num_decoders))

    def lost(self, task, attempt, reason, cell=""):
        self.losses.append((task, attempt, reason, cell))

    def event(self, kind, **fields):
        self.events.append((kind, fields))


def drive(fleet, num_shards, watch=None):
    tasks = (task_of(shard) for shard in range(num_shards))
    return Driver(fleet, tasks, JOB, watch or Watch(), clock=fleet.clock).run()


def names(shards):
    return [("clips", shard) for shard in shards]


def dies_on(shard, times):
    """Return a behaviour: cells that begin with ``shard`` die, so many times."""
    left = {shard: times}

    def behave(cell, task):
        if task.shard in left and left[task.shard] > 0:
            left[task.shard] -= 1
            return "dies"
        return None

    return behave


@pytest.mark.parametrize("num_cells", [1, 2, 5])
@pytest.mark.parametrize("num_shards", [0, 1, 2, 7])
def test_every_shard_is_committed_once(num_cells, num_shards):
    fleet, watch = Fleet(num_cells), Watch()
    assert drive(fleet, num_shards, watch) == []
    assert sorted(fleet.committed) == names(range(num_shards))
    assert fleet.most["held"] <= MAX_HELD
    assert not fleet.living, "what was started is ended"
    assert sum(news.statuses.total() for news in watch.updates) == num_shards * ROWS
    assert {news.cell for news in watch.updates} <= {f"node-{n}/{n}" for n in range(num_cells)}
    assert watch.losses == []


def test_no_more_cells_are_started_than_there_are_shards():
    fleet, watch = Fleet(8), Watch()
    drive(fleet, 2, watch)
    assert dict(fleet.lives) == {0: 1, 1: 1}
    assert max(watch.cells) == (2, 6) and watch.cells[-1] == (0, 0)


def test_a_cell_has_the_next_shard_while_it_does_one_but_the_last_ones_are_shared():
    fleet = Fleet(1)
    drive(fleet, 9)
    assert dict(fleet.most) == {"held": MAX_HELD, "unwritten": MAX_UNWRITTEN}
    fleet = Fleet(3)  # three shards: one each
    drive(fleet, 3)
    assert fleet.most["held"] == 1


def test_a_long_plan_is_pulled_as_it_is_done():
    fleet, ahead = Fleet(2), []

    def tasks():
        for shard in range(50):
            ahead.append(shard - len(fleet.committed))
            yield task_of(shard)

    Driver(fleet, tasks(), JOB, Watch(), clock=fleet.clock).run()
    assert len(fleet.committed) == 50
    assert max(ahead) <= 2 * MAX_HELD + fleet.num_cells


def test_what_the_list_of_work_raises_ends_the_run_and_its_cells():
    fleet = Fleet(2)

    def tasks():
        yield from map(task_of, range(5))
        raise ConfigError("too many clips failed")

    with pytest.raises(ConfigError, match="too many clips failed"):
        Driver(fleet, tasks(), JOB, Watch(), clock=fleet.clock).run()
    assert not fleet.living


def test_a_lost_cell_is_replaced_and_its_shards_come_first_as_other_attempts():
    fleet, watch = Fleet(1, dies_on(2, times=2)), Watch()
    assert drive(fleet, 6, watch) == []
    assert sorted(fleet.committed) == names(range(6))
    assert fleet.committed[:4] == names(range(4))
    assert len(set(fleet.given)) == len(fleet.given), "no attempt has the name of another"
    assert [loss[:3] for loss in watch.losses] == [
        (("clips", 2), attempt, "killed") for attempt in (1, 2)
    ]
    assert [kind for kind, _ in watch.events].count("cell_lost") == 2


def test_a_shard_that_costs_three_cells_is_given_up_and_the_others_are_done():
    fleet, watch = Fleet(2, dies_on(3, times=99)), Watch()
    (lost,) = drive(fleet, 8, watch)
    assert lost.task == ("clips", 3) and lost.reasons == ("killed",) * MAX_LOSSES
    assert sorted(fleet.committed) == names([0, 1, 2, 4, 5, 6, 7])
    assert ("given_up", {"shard": ["clips", 3], "attempts": 3, "reason": "killed"}) in watch.events
    text = complaint([lost])
    assert "shard 3 of clips (killed)" in text and "Committed shards are safe" in text


def test_a_shard_that_was_only_prefetched_is_not_blamed():
    """Shard 0 kills its cell three times; shard 1 was in the same cell, and is not given up."""
    fleet, watch = Fleet(1, dies_on(0, times=99)), Watch()
    (lost,) = drive(fleet, 4, watch)
    assert lost.task == ("clips", 0)
    assert sorted(fleet.committed) == names([1, 2, 3])
    assert {loss[0] for loss in watch.losses} == {("clips", 0)}


def test_a_shard_that_waits_for_its_commit_is_not_blamed():
    def behave(cell, task):
        """The second of two shards kills the cell while the first waits for its commit."""
        written = cell.rows == ROWS and task.shard == 0
        return "dies" if written and len(cell.tasks) > 1 else None

    fleet, watch = Fleet(1, behave), Watch()
    assert drive(fleet, 2, watch) == []
    assert sorted(fleet.committed) == names([0, 1])
    assert watch.losses == [(("clips", 1), 1, "killed", "node-0/0")]


def test_the_shard_that_a_cell_names_is_blamed():
    """A commit fails while the next shard is being written, every time."""

    def behave(cell, task):
        failing = cell.rows == ROWS and task.shard == 2
        return Lost("no answer", task=task.name) if failing else None

    fleet, watch = Fleet(1, behave), Watch()
    (lost,) = drive(fleet, 6, watch)
    assert lost.task == ("clips", 2)
    assert sorted(fleet.committed) == names([0, 1, 3, 4, 5])
    assert {loss[0] for loss in watch.losses} == {("clips", 2)}


def test_many_given_up_end_the_run():
    fleet = Fleet(1, lambda cell, task: "dies")
    lost = drive(fleet, 10)
    assert len(lost) == MAX_GIVEN_UP
    assert "stopped" in complaint(lost)
    assert not fleet.living


@pytest.mark.parametrize(
    ("behaviour", "limit_s", "words"),
    [
        ("silent", JOB.encode_timeout_s, r"nothing heard .* 60 s"),
        ("stuck", NO_PROGRESS_S, r"no row and no commit in 120 s"),
    ],
)
def test_a_cell_that_hangs_is_replaced_at_its_deadline(behaviour, limit_s, words):
    fleet, watch = Fleet(1), Watch()
    fleet.behaviour = lambda cell, task: behaviour if cell.life == 0 and task.shard == 1 else None
    assert drive(fleet, 3, watch) == []
    assert sorted(fleet.committed) == names(range(3))
    assert fleet.lives[0] == 2
    (loss,) = watch.losses
    assert loss[0] == ("clips", 1)
    assert re.search(words, loss[2])
    assert limit_s < fleet.now < limit_s + 40 * STEP_S


def test_news_of_a_shard_that_the_cell_has_no_more_are_ignored():
    fleet, watch = Fleet(1), Watch()
    step = Script.step

    def repeats(cell):
        if fleet.committed and not fleet.repeated:
            fleet.repeated = True
            return ShardUpdate("progress", task=("clips", 0), statuses=Counter(ok=99))
        return step(cell)

    fleet.repeated = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Script, "step", repeats)
        drive(fleet, 2, watch)
    assert fleet.repeated
    assert sum(news.statuses.total() for news in watch.updates) == 2 * ROWS


def test_a_cell_without_a_place_waits_while_others_work():
    fleet, watch = Fleet(3), Watch()
    fleet.unplaced = {(1, 0), (2, 0)}
    assert drive(fleet, 200, watch) == []
    assert fleet.now > fleet.place_timeout_s
    assert dict(fleet.lives) == {0: 1, 1: 1, 2: 1}
    assert max(watch.cells) == (1, 3)


def test_a_cell_that_finds_its_place_late_joins_in():
    fleet = Fleet(2)
    fleet.unplaced = {(1, 0)}
    fleet.behaviour = lambda cell, task: fleet.unplaced.clear() if fleet.now > 50 else None
    doers = Counter()
    poll = fleet.poll

    def counting(cells, timeout_s):
        doers.update(cell.number for cell in cells if cell.tasks)
        return poll(cells, timeout_s)

    fleet.poll = counting
    drive(fleet, 40)
    assert doers[1] > 20 and doers[0] > 20


def test_no_place_for_any_cell_ends_the_run_with_what_is_asked_and_there():
    fleet = Fleet(2)
    fleet.unplaced, watch = {(0, 0), (1, 0)}, Watch()
    with pytest.raises(ConfigError, match=r"no cell found a place in 120 s: asked is 9 CPUs"):
        drive(fleet, 3, watch)
    assert watch.events == [("waiting", {"reason": f"for a place: {fleet.shortage()}"})]
    assert fleet.place_timeout_s < fleet.now < fleet.place_timeout_s + 5 * STEP_S
    assert not fleet.living


def test_a_node_that_can_not_start_its_cell_is_left_out_and_the_others_do_the_work():
    fleet, watch = Fleet(2), Watch()
    fleet.fails_to_start = {(1, life) for life in range(99)}
    assert drive(fleet, 9, watch) == []
    assert sorted(fleet.committed) == names(range(9))
    assert fleet.lives[1] == MAX_FAILED_STARTS
    assert watch.losses == []


def test_no_cell_that_starts_ends_the_run_with_the_reason():
    fleet = Fleet(2)
    fleet.fails_to_start = {(number, life) for number in (0, 1) for life in range(99)}
    with pytest.raises(ConfigError, match=r"no cell can be started.*no codec"):
        drive(fleet, 9)


def test_a_cell_that_turns_sick_costs_no_shard_an_attempt_and_is_left_out_at_last():
    fleet, watch = Fleet(2, lambda cell, task: "sick" if cell.number == 1 else None), Watch()
    assert drive(fleet, 9, watch) == []
    assert sorted(fleet.committed) == names(range(9))
    assert fleet.lives[1] == MAX_FAILED_STARTS
    assert watch.losses == []
    fleet = Fleet(2, lambda cell, task: "sick")
    with pytest.raises(ConfigError, match=r"no cell can be started.*decoders can't start"):
        drive(fleet, 9)


def test_a_cell_that_commits_in_between_is_started_again():
    """Five sick spells, each after a commit: none is a third one in a row."""

    def behave(cell, task):
        return "sick" if cell.life < 5 and len(fleet.committed) > 2 * cell.life else None

    fleet = Fleet(1, behave)
    assert drive(fleet, 15) == []
    assert fleet.lives[0] == 6


def test_a_cell_that_never_starts_is_late():
    fleet, watch = Fleet(1), Watch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Script, "step", lambda cell: None)
        with pytest.raises(ConfigError, match=r"did not start in 120 s"):
            drive(fleet, 1, watch)
    assert fleet.lives[0] == MAX_FAILED_STARTS


@pytest.mark.parametrize(
    "error", [NoRoomError("disk full"), FormatError("damaged"), PermissionError(13, "not yours")]
)
def test_errors_that_another_cell_would_meet_too_end_the_run(error):
    fleet = Fleet(2, lambda cell, task: error if task.shard == 2 else None)
    with pytest.raises(type(error)):
        drive(fleet, 9)
    assert not fleet.living


def test_interrupt_ends_all_cells():
    fleet = Fleet(2)

    def interrupt(news):
        if fleet.committed:
            raise KeyboardInterrupt

    watch = Watch()
    watch.update = interrupt
    with pytest.raises(KeyboardInterrupt):
        drive(fleet, 9, watch)
    assert not fleet.living
    assert ("stopping", {}) in watch.events


@given(
    num_cells=st.integers(1, 4),
    num_shards=st.integers(0, 12),
    fates=st.lists(
        st.sampled_from(["dies", "silent", "stuck", "sick", None, None, None]), max_size=60
    ),
)
def test_whatever_befalls_cells_every_shard_ends_in_one_way(num_cells, num_shards, fates):
    fate = iter(fates)
    spells = {}

    def behave(cell, task):
        spell = spells.get(cell) or next(fate, None)
        if spell in ("silent", "stuck"):
            spells[cell] = spell  # it does not recover
        return spell

    fleet = Fleet(num_cells, behave)
    try:
        lost = drive(fleet, num_shards)
    except ConfigError:  # no cell was left
        assert fates.count("sick") >= MAX_FAILED_STARTS * num_cells
        return
    done = {shard for _, shard in fleet.committed}
    given_up = {one.task[1] for one in lost}
    if len(lost) < MAX_GIVEN_UP:
        assert done | given_up == set(range(num_shards))
    assert len(set(fleet.given)) == len(fleet.given)
    assert not fleet.living
    assert all(len(one.reasons) == MAX_LOSSES for one in lost)
