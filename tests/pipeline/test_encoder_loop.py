"""The encoder's loop over shards: order, bytes in flight, batches, commits. No Ray, no media."""

import errno
import pickle
import queue
import tarfile
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import encoder as encoder_module
from pipeline import format as fmt
from pipeline import open_shard, write_behind
from pipeline.checks import read_facts
from pipeline.encoder import ShardEncoder
from pipeline.files import NoRoomError
from pipeline.format import ColumnSpec
from pipeline.jobs import ShardTask
from pipeline.media import Clip, Decoded
from pipeline.shards import ShardWriter, create_column
from tests.pipeline.pools import InProcessPool, mailbox_of, make_job

AXES = {"video": ("time", "channel"), "audio": ("time", "channel"), "text": ("token", "channel")}
SPECS = {
    modality: ColumnSpec(modality, {"name": "mean"}, {}, axes, 8.0, 0.0, True)
    for modality, axes in AXES.items()
}
CLIPS = ("video", "audio")


class MeanCodec:
    """The means of frames, samples or words; only for batches of one shape and size."""

    def __init__(self, batch, log):
        self.batch, self.log = batch, log

    def encode(self, batch):
        assert len(batch) == self.batch
        assert len({getattr(media, "shape", None) for media in batch}) == 1
        self.log.append(len(batch))
        return [self.latent(media) for media in batch]

    @staticmethod
    def latent(media):
        if isinstance(media, str):
            return np.full((len(media) + 1, 1), 1.0, np.float32)
        if media.size and media.flat[0] == 66:
            raise ArithmeticError("66 is not encoded")
        return media.reshape(len(media), -1).mean(axis=1, keepdims=True).astype(np.float32)


def number_of(clip):
    return int(clip.key.split("-")[1])


def decode(clip, wanted):
    """Shapes, failures and values follow from the clip's number."""
    number = number_of(clip)
    if number % 7 == 3:
        return Decoded.failed("unreadable", "it is the third of seven")
    frames = np.full((2 + number % 3, 4, 4, 3), number % 200, np.uint8)
    sound = np.full((1, 8), float(number % 200), np.float32)
    return Decoded(frames, sound, {}, {"duration_s": 1 + clip.duration_s}, seconds=0.5)


class Bench:
    """A data set in a folder, tasks for it, and an encoder."""

    def __init__(self, root, monkeypatch, window_bytes=100_000_000, batch=1, seed=0, decode=decode):
        self.root, self.batches = root / "shards", []
        self.root.mkdir(exist_ok=True)
        (root / "here.mp4").touch()
        self.job = make_job(
            root=str(self.root),
            columns=SPECS,
            batch=dict.fromkeys(SPECS, batch),
            media_root=str(root),
            window_bytes=window_bytes,
        )
        for spec in SPECS.values():
            create_column(self.root, spec, self.job.plan_id)
        codec = MeanCodec(batch, self.batches)
        monkeypatch.setattr(encoder_module, "build_codec", lambda *_: codec)
        self.pool = InProcessPool(window_bytes, decode, seed=seed)
        self.encoder = ShardEncoder(self.job, self.pool)

    def task(self, shard, seconds, first=0, attempt=1):
        clips = [
            Clip(f"clip-{first + row}", "here.mp4", 0.0, length)
            for row, length in enumerate(seconds)
        ]
        return ShardTask(shard, CLIPS, clips=clips, attempt=attempt)

    def run(self, *tasks):
        return list(self.encoder.run(mailbox_of(*tasks)))

    def column(self, modality):
        spec = SPECS[modality]
        return fmt.Column(self.root / spec.directory, spec, "plan")

    def latents(self, modality, task):
        """Return the rows of a committed shard: their latents, or their statuses."""
        column, rows = self.column(modality), len(task.clips or task.captions)
        index = column.index(task.shard, rows)
        payload = column.tar_path(task.shard).read_bytes()
        found = []
        for record in index:
            if record["status"] != fmt.OK:
                found.append(fmt.STATUSES[record["status"]])
                continue
            start, size = int(record["offset"]), int(record["nbytes"])
            shape = [side for side in record["shape"].tolist() if side]
            found.append(np.frombuffer(payload[start : start + size], np.float16).reshape(shape))
        return found

    def left_over(self):
        return [path.name for path in self.root.rglob(".*")]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return lambda **given: Bench(tmp_path, monkeypatch, **given)


def assert_encoded(bench, task):
    """Every row is what its clip gives, in plan order."""
    for modality in task.modalities:
        for clip, latent in zip(task.clips, bench.latents(modality, task), strict=True):
            expected = decode(clip, set())
            if expected.problems:
                assert latent == "unreadable"
                continue
            media = {"video": expected.frames, "audio": expected.sound}[modality]
            assert np.array_equal(latent, MeanCodec.latent(media).astype(np.float16))


@settings(max_examples=25)
@given(
    shards=st.lists(st.lists(st.floats(0.1, 3.0), min_size=1, max_size=12), min_size=1, max_size=3),
    window_s=st.floats(0.05, 20.0),
    batch=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_every_row_is_written_in_order_within_the_window(
    tmp_path_factory, shards, window_s, batch, seed
):
    """Whatever the lengths, the window, the batch, and the order in which decoders end."""
    job = make_job()
    window_bytes = job.clip_bytes(Clip("a", "a", 0, window_s))
    with pytest.MonkeyPatch.context() as monkeypatch:
        root = tmp_path_factory.mktemp("loop")
        bench = Bench(root, monkeypatch, window_bytes, batch, seed)
        tasks, first = [], 0
        for shard, seconds in enumerate(shards):
            tasks.append(bench.task(shard, seconds, first))
            first += len(seconds)
        updates = bench.run(*tasks)
    for task in tasks:
        assert_encoded(bench, task)
    assert bench.pool.popped == [clip.key for task in tasks for clip in task.clips]
    assert bench.pool.bytes_in_flight == 0
    # One clip beyond the window, and only where nothing else moved and the encoder held less
    # than half of it.
    assert 2 * bench.pool.most_beyond_window < window_bytes
    # The next shard may be first, where the last batch of the one before is not full.
    committed = sorted(news.task for news in updates if news.event == "committed")
    assert committed == [task.name for task in tasks]
    assert bench.left_over() == []


def test_bytes_do_not_depend_on_batch_window_or_order(tmp_path, monkeypatch):
    tars = set()
    for seed, batch in enumerate((1, 2, 5)):
        (root := tmp_path / str(seed)).mkdir()
        bench = Bench(root, monkeypatch, window_bytes=(1 + seed) * 10**7, batch=batch, seed=seed)
        bench.run(bench.task(0, [1.0] * 9), bench.task(1, [1.0] * 6, first=9))
        files = sorted(bench.root.glob("*@*/*.tar")) + sorted(bench.root.glob("*@*/*.npy"))
        assert len(files) == 8
        tars.add(tuple(path.read_bytes() for path in files))
    assert len(tars) == 1


def test_decoders_have_the_next_shard_before_this_one_ends(bench):
    it = bench()
    it.run(it.task(0, [1.0] * 8), it.task(1, [1.0] * 8, first=8))
    events = it.pool.log
    assert events.index(("given", "clip-8")) < events.index(("popped", "clip-7"))


def test_batches_are_filled_across_shards(bench):
    """One shape: 4 clips of each shard, and no batch but the last is filled up with copies."""
    it = bench(batch=3, decode=lambda clip, wanted: Decoded(np.ones((2, 2)), np.ones((1, 2))))
    it.run(*[it.task(shard, [1.0] * 4, first=4 * shard) for shard in range(3)])
    assert len(it.batches) == 2 * 12 // 3


def test_updates_count_every_row_once_and_start_comes_first(bench):
    it = bench(batch=2)
    tasks = [it.task(0, [1.0] * 10), it.task(1, [2.0] * 5, first=10)]
    updates = it.run(*tasks)
    for task in tasks:
        mine = [news for news in updates if news.task == task.name]
        assert [news.event for news in mine if news.event != "progress"] == ["started", "committed"]
        assert mine[0].event == "started" and mine[-1].event == "committed"
        statuses = sum((news.statuses for news in mine), Counter())
        bad = sum(number_of(clip) % 7 == 3 for clip in task.clips)
        assert statuses == {"ok": len(task.clips) - bad, "unreadable": bad}
        failed = [clip for news in mine for clip in news.failed]
        assert len(failed) == bad and failed[0].message == "it is the third of seven"
        good = [1 + clip.duration_s for clip in task.clips if number_of(clip) % 7 != 3]
        assert sum(news.media_s for news in mine) == pytest.approx(sum(good))
        assert sum(news.decode_s for news in mine) == pytest.approx(0.5 * len(good))
        assert sum(news.encode_s for news in mine) > 0 < sum(news.write_s for news in mine)
        assert mine[-1].seconds > 0
        names = {SPECS[modality].directory for modality in CLIPS}
        assert {name for news in mine for name in news.committed} == names
        record = it.column("video").committed(task.shard)
        assert record["run_id"] == "run" and record["facts"] == it.job.facts


def test_captions_go_through_batches_too(bench):
    it = bench(batch=4)
    task = ShardTask(0, ("text",), captions=["", "a dog barks", "rain", "wind", "steps", "a bell"])
    updates = it.run(task, it.task(0, [1.0] * 3))
    lengths = [len(latent) for latent in it.latents("text", task)]
    assert lengths == [len(caption) + 1 for caption in task.captions]
    statuses = sum((news.statuses for news in updates if news.task == ("text", 0)), Counter())
    assert statuses == {"ok": 6}
    assert "facts" not in it.column("text").committed(0)


def test_clip_that_a_codec_fails_over_is_a_tombstone_of_its_column(bench):
    def with_one_bad_picture(clip, wanted):
        value = 66 if clip.key == "clip-4" else 1
        return Decoded(np.full((2, 2), value), np.ones((1, 2), np.float32))

    it = bench(batch=3, decode=with_one_bad_picture)
    updates = it.run(task := it.task(0, [1.0] * 6))
    video, audio = it.latents("video", task), it.latents("audio", task)
    assert video[4] == "encode_error" and not any(isinstance(row, str) for row in audio)
    assert sum(isinstance(row, str) for row in video) == 1
    failed = [clip for news in updates for clip in news.failed]
    assert [(clip.key, clip.status) for clip in failed] == [("clip-4", "encode_error")]
    assert "ArithmeticError: 66 is not encoded" in failed[0].message
    facts = read_facts(it.root / it.job.facts, 0)
    assert facts and facts[4]["status"] == "ok", "what a codec finds is no fact"


def test_halved_batch_is_told(bench, monkeypatch):
    it = bench(batch=4)

    def encode(self, batch):
        if len(batch) > 2:
            raise MemoryError
        return [self.latent(media) for media in batch]

    monkeypatch.setattr(MeanCodec, "encode", encode)
    updates = it.run(task := it.task(0, [1.0] * 9))
    assert_encoded(it, task)
    notes = [note for news in updates for note in news.notes]
    assert len(notes) == 2 and all("batches of 4, going on with 2" in note for note in notes)


def test_shard_is_committed_while_the_next_is_encoded(bench, monkeypatch):
    """The first commit goes on until the second shard was begun with."""
    begun, commit = threading.Event(), ShardWriter.commit

    def patient_commit(self, extra=None):
        assert begun.wait(60)
        return commit(self, extra)

    monkeypatch.setattr(ShardWriter, "commit", patient_commit)
    it, events = bench(), []
    for news in it.encoder.run(mailbox_of(it.task(0, [1.0] * 3), it.task(1, [1.0] * 3, first=3))):
        events.append((news.event, news.task))
        if events[-1] == ("started", ("clips", 1)):
            begun.set()
    assert events.index(("started", ("clips", 1))) < events.index(("committed", ("clips", 0)))
    assert events[-1] == ("committed", ("clips", 1))


@pytest.mark.parametrize("method", ["add", "commit"])
def test_full_disk_ends_the_run_and_leaves_nothing_half_written(bench, monkeypatch, method):
    def fail(self, *_):
        raise NoRoomError("no room")

    monkeypatch.setattr(ShardWriter, method, fail)
    it = bench()
    with pytest.raises(NoRoomError):
        it.run(it.task(0, [1.0] * 3), it.task(1, [1.0] * 3, first=3))
    assert it.left_over() == [] and it.column("video").committed_shards() == set()


@pytest.mark.parametrize("row", [0, 2])
def test_shard_of_which_a_row_is_not_written_is_not_committed(bench, monkeypatch, row):
    """Its last row, too, which is written after the loop has left the shard behind."""
    add = ShardWriter.add

    def fail_once(self, key, array, status=fmt.OK):
        if key == f"clip-{row}":
            raise NoRoomError("no room")
        add(self, key, array, status)

    monkeypatch.setattr(ShardWriter, "add", fail_once)
    it = bench()
    with pytest.raises(NoRoomError) as caught:
        it.run(it.task(0, [1.0] * 3), it.task(1, [1.0] * 3, first=3))
    assert vars(caught.value)["task"] == ("clips", 0)
    assert it.left_over() == [] and 0 not in it.column("video").committed_shards()


def test_rows_are_written_beside_the_loop(bench, monkeypatch):
    """The first row's writing goes on until the third clip is encoded."""
    third, add, latent = threading.Event(), ShardWriter.add, MeanCodec.latent

    def patient_add(self, *row):
        assert third.wait(60)
        add(self, *row)

    def watched_latent(media):
        if media.flat[0] == 2:
            third.set()
        return latent(media)

    monkeypatch.setattr(ShardWriter, "add", patient_add)
    monkeypatch.setattr(MeanCodec, "latent", staticmethod(watched_latent))
    it = bench()
    it.run(task := it.task(0, [1.0] * 5))
    assert_encoded(it, task)


@pytest.mark.parametrize("limit", [1, 35])
def test_latents_that_wait_to_be_written_are_few(bench, monkeypatch, limit):
    it, add, waiting = bench(), ShardWriter.add, []
    row_bytes = 2 * (4 + 1)  # at most: the means of four frames, and of the sound

    def watched_add(self, *row):
        waiting.append(it.encoder._writes._waiting_bytes)
        add(self, *row)

    monkeypatch.setattr(ShardWriter, "add", watched_add)
    monkeypatch.setattr(write_behind, "MAX_WAITING_BYTES", limit)
    it.run(task := it.task(0, [1.0] * 30))
    assert_encoded(it, task)
    assert 0 < max(waiting) <= max(limit, row_bytes)


def test_error_of_a_decoder_pool_ends_the_run_and_leaves_nothing(bench):
    def broken(clip, wanted):
        raise OSError("no decoders")

    it = bench(decode=broken)
    with pytest.raises(OSError, match="no decoders"):
        it.run(it.task(0, [1.0] * 3))
    assert it.left_over() == []


def test_damaged_facts_end_the_run_and_leave_nothing(bench, monkeypatch):
    def fail(*_):
        raise fmt.FormatError("facts are damaged")

    monkeypatch.setattr(open_shard, "read_facts", fail)
    it = bench()
    with pytest.raises(fmt.FormatError, match="facts are damaged"):
        it.run(it.task(0, [1.0] * 3))
    assert it.left_over() == []


def test_late_writer_changes_nothing(bench):
    """A shard that another attempt committed meanwhile is no error, and is not written again."""
    it = bench()
    task = it.task(0, [1.0] * 5)
    it.run(task)
    before = {path: path.read_bytes() for path in it.root.glob("*@*/0*")}
    late = bench(batch=2)
    updates = late.run(late.task(0, [1.0] * 5, attempt=2), late.task(1, [1.0] * 2, first=5))
    committed = {news.task: news.committed for news in updates if news.event == "committed"}
    assert committed[("clips", 0)] == () and len(committed[("clips", 1)]) == 2
    assert {path: path.read_bytes() for path in before} == before
    assert late.left_over() == []


def test_zombie_changes_neither_columns_nor_facts(bench):
    """It hung when the shard was given to another, and finds less than that one did."""
    zombie = bench(decode=lambda clip, wanted: Decoded.failed("decode_timeout", "it hung"))
    task = zombie.task(0, [1.0] * 5)
    news = zombie.encoder.run(mailbox_of(task))
    assert next(news).event == "started"
    it = bench()
    it.run(replace(task, attempt=2))
    before = {path: path.read_bytes() for path in it.root.glob("*@*/0*")}
    assert {path.parent.name.partition("@")[0] for path in before} == {"facts", *CLIPS}
    *_, last = news
    assert (last.event, last.committed) == ("committed", ())
    assert {path: path.read_bytes() for path in before} == before
    assert it.left_over() == []


def test_error_of_a_commit_names_its_shard_though_another_is_being_written(bench, monkeypatch):
    begun = threading.Event()

    def fail(self, *_):
        assert begun.wait(60)
        raise OSError(errno.EIO, "the store is gone")

    monkeypatch.setattr(ShardWriter, "commit", fail)
    it = bench()
    with pytest.raises(OSError, match="the store is gone") as raised:
        for news in it.encoder.run(mailbox_of(it.task(3, [1.0]), it.task(4, [1.0] * 3, first=3))):
            if (news.event, news.task) == ("started", ("clips", 4)):
                begun.set()
    assert pickle.loads(pickle.dumps(raised.value)).task == ("clips", 3), "also on another node"


def test_encoder_commits_without_waiting_for_more_and_gives_signs_of_life(bench, monkeypatch):
    monkeypatch.setattr(encoder_module, "HEARTBEAT_S", 0.02)
    it, mailbox, alive = bench(batch=4), queue.SimpleQueue(), 0
    tasks = [it.task(0, [1.0] * 3), it.task(1, [1.0] * 3, first=3)]
    mailbox.put(tasks.pop())
    for news in it.encoder.run(mailbox):
        idle = it.column("video").committed_shards()
        alive += news.event == "alive" and len(idle) + len(tasks) == 2
        if alive == 3:
            alive = 0
            mailbox.put(tasks.pop() if tasks else None)
    assert it.column("video").committed_shards() == {0, 1}


def test_batch_does_not_wait_for_a_clip_that_hangs(bench, monkeypatch):
    """Rows are written though their batch is not full, or the driver would hear of no progress."""
    monkeypatch.setattr(encoder_module, "HEARTBEAT_S", 0.0)
    monkeypatch.setattr(encoder_module, "UPDATE_S", 0.0)
    it, is_written = bench(batch=4), False
    poll = it.pool.poll

    def hang(timeout_s):
        return None if it.pool.popped == ["clip-0"] and not is_written else poll(timeout_s)

    monkeypatch.setattr(it.pool, "poll", hang)
    for news in it.encoder.run(mailbox_of(task := it.task(0, [1.0] * 3))):
        is_written |= news.statuses.total() > 0
    assert_encoded(it, task)


def test_missing_files_are_tombstones_without_decoders(bench):
    it = bench()
    clips = [Clip(f"clip-{row}", "gone.mp4", 0.0, 1.0) for row in range(300)]
    clips[151] = Clip("clip-151", "here.mp4", 0.0, 1.0)
    it.run(task := ShardTask(0, CLIPS, clips=clips))
    rows = it.latents("video", task)
    assert [row for row in range(300) if not isinstance(rows[row], str)] == [151]
    assert {row for row in rows if isinstance(row, str)} == {"missing"}
    assert it.pool.popped == ["clip-151"]


def test_clips_wait_for_decoders_in_a_bounded_line(bench, monkeypatch):
    """A shard is not read whole: its first clips are decoded while others are looked at."""
    monkeypatch.setattr(encoder_module, "ROWS_AHEAD", 8)
    monkeypatch.setattr(encoder_module, "ROWS_AT_ONCE", 4)
    it = bench()
    task = it.task(0, [1.0] * 50)
    submitted, submit = [], it.pool.submit

    def counted(items):
        items = list(items)
        submitted.append(len(items))
        submit(items)

    it.pool.submit = counted
    it.run(task)
    assert sum(submitted) == 50 and max(submitted) <= 4
    assert_encoded(it, task)


def test_tars_hold_keys_in_plan_order(bench):
    it = bench(batch=3)
    it.run(task := it.task(0, [1.0] * 10))
    with tarfile.open(it.column("video").tar_path(0)) as tar:
        names = [name.split(".")[0] for name in tar.getnames()]
    assert names == [clip.key for clip in task.clips if number_of(clip) % 7 != 3]
