"""A run whose shards lie in an object store: the run from disk, to the last bit, also when it is killed; staging."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import obstore
import pytest

from configs import ConfigError
from data_pipeline import failpoints, files
from pretrain import checkpoint
from pretrain.guard import STOPPED, StopSignals
from pretrain.ranks import Ranks
from pretrain.run import load_run
from pretrain.staging import stage_shards
from pretrain.watchdog import Watchdog
from tests.data_pipeline.servers import Server, moto
from tests.processes import on_ranks
from tests.runs import Started, final_state, losses, run_to_end, write_run

STEPS = 20


def upload(bucket: Any, folder: Path) -> list[str]:
    """Both corpora, and the overrides that name them there."""
    for name in ("alpha", "beta"):
        for path in sorted((folder / name).rglob("*")):
            if path.is_file():
                obstore.put(bucket, f"pre/{path.relative_to(folder)}", path.read_bytes())
    return [f"data.sources.{name}.shards=s3://shards/pre/{name}" for name in ("alpha", "beta")]


def stop_in_an_outage(config: Path, *overrides: str) -> None:
    """A storage that answers one rank no more: a signal to the other one is a save and exit 3, as everywhere."""
    variables = {"LONGHAUL_FAIL_AT": "cache.fetched@1#16=sleep:1000"}
    slow = ("data.fetch_threads=1", "data.prefetch_steps=1", "data.prefetch_blocks=1")
    started = Started(config, 2, *overrides, *slow, variables=variables)
    deadline, text = time.monotonic() + 300, ""
    while "checkpoint step-0" not in text or text != started.text:  # until it goes on no more
        assert time.monotonic() < deadline and started.processes[0].poll() is None, started.text
        text = started.text
        time.sleep(3)
    started.signal(signal.SIGTERM, rank=0)
    assert started.wait(120) == [3, 3], started.text
    newest = checkpoint.open_checkpoint(checkpoint.live_checkpoints(config.parent / "run")[0])
    assert newest.position.step < STEPS and f"at step {newest.position.step} (exit 3)" in started.text


def test_a_run_from_a_store_is_the_run_from_disk_also_when_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden, away = tmp_path / "golden", tmp_path / "away"
    run_to_end(write_run(golden, steps=STEPS), 2)
    config = write_run(away, steps=STEPS)
    with moto(monkeypatch, "shards") as bucket:
        overrides = [*upload(bucket, away), f"data.cache.folder={away / 'cache'}", "data.cache.gib=0.1"]
        for name in ("alpha", "beta"):
            (away / name).rename(away / f"not-{name}")
        stop_in_an_outage(config, *overrides, f"data.cache.folder={away / 'lost'}")
        variables = {"LONGHAUL_FAIL_AT": "cache.fetched@1#25=kill"}
        started = Started(config, 2, *overrides, "checkpoint.save_every_steps=2", variables=variables)
        deadline = time.monotonic() + 300
        while started.processes[1].poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert started.processes[1].poll() == -9
        started.kill()
        text = run_to_end(config, 2, *overrides, "checkpoint.save_every_steps=2")
    assert "damaged" not in text and f"step {STEPS}/{STEPS}" in text
    assert final_state(away)[0] == final_state(golden)[0]  # the digest too
    expected = losses(golden, 1)
    later = losses(away, 3)
    assert later == {step: loss for step, loss in expected.items() if step in later} and STEPS in later


def test_a_start_that_waits_for_a_server_hears_a_signal(tmp_path: Path) -> None:
    server = Server()
    try:
        server.files["/alpha/MANIFEST.json"] = b""
        server.faults["/alpha/MANIFEST.json"] = ["503*"]
        started = Started(write_run(tmp_path), 1, f"data.sources.alpha.shards={server.address}/alpha")
        deadline = time.monotonic() + 100
        while not server.requests and time.monotonic() < deadline:
            time.sleep(0.05)
        started.signal(signal.SIGTERM)
        assert started.wait(60) == [3]
        assert "stopped while it waited for its shards, before a step (exit 3)" in started.text
    finally:
        server.close()


def stage_here(ranks: Ranks, config: str, *fails: str) -> tuple[int | None, str, list[str]]:
    """What staging comes to, and what it says. With `fails`, one for each rank, the ranks are nodes of their own."""
    logging.basicConfig(level=logging.INFO)
    said: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("pretrain").addHandler(Keeping())
    run = load_run(Path(config), [f"data.stage={config}-disk-{ranks.rank}"] if fails else [])
    os.environ[failpoints.VARIABLE] = f"stage.piece={fails[ranks.rank]}" if fails else ""
    watchdog = Watchdog(ranks, run.run_folder, 100.0, 100.0)
    try:
        return stage_shards(run, ranks, StopSignals(), watchdog), "", said
    except ConfigError as error:
        return None, str(error), said
    finally:
        watchdog.stop()


def stop_on_one(ranks: Ranks, config: str, address: str) -> list[int | None]:
    """What a start comes to, at two of its places, where rank 1 alone waits and is asked to stop."""
    away, stop = ranks.rank == 1, StopSignals()
    run = load_run(Path(config), [f"data.sources.alpha.shards={address}/alpha"] if away else [])
    watchdog = Watchdog(ranks, run.run_folder, 100.0, 100.0)
    try:
        with files.stopping(lambda: stop.exit_code() is not None):
            if away:
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            staged = stage_shards(run, ranks, stop, watchdog)
            try:
                ranks.each(lambda: files.wait(30.0 * away))
            except files.Stopped:
                return [staged, STOPPED]
            return [staged, None]
    finally:
        watchdog.stop()


def test_a_start_that_one_rank_alone_waits_in_is_stopped_on_all(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    text = config.read_text().replace("weight: 0.", "shared_mount: true, weight: 0.")
    config.write_text(text.replace("  seq_tokens: 64\n", f"  seq_tokens: 64\n  stage: {tmp_path}/disk\n"))
    server = Server()
    try:
        server.files["/alpha/MANIFEST.json"], server.faults["/alpha/MANIFEST.json"] = b"", ["503*"]
        found = on_ranks(tmp_path, 2, stop_on_one, str(config), server.address)
    finally:
        server.close()
    assert found == [[STOPPED, STOPPED]] * 2


def test_one_rank_of_a_node_stages_and_all_wait(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=STEPS)
    text = config.read_text().replace("weight: 0.", "shared_mount: true, weight: 0.")
    config.write_text(text.replace("  seq_tokens: 64\n", f"  seq_tokens: 64\n  stage: {tmp_path}/disk\n"))
    results = on_ranks(tmp_path, 2, stage_here, str(config))
    assert [result[:2] for result in results] == [(None, ""), (None, "")]
    assert sum(line.startswith("staged: ") for _, _, said in results for line in said) == 1
    for name in ("alpha", "beta"):
        for path in (tmp_path / name).rglob("*.tar"):
            (copy,) = [p for p in (tmp_path / "disk").rglob(path.name) if p.read_bytes() == path.read_bytes()]
            assert copy.parent.name == path.parent.name


def test_a_node_whose_disk_is_full_ends_the_staging_of_all(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=STEPS)
    config.write_text(config.read_text().replace("weight: 0.", "shared_mount: true, weight: 0."))
    full, slow = on_ranks(tmp_path, 2, stage_here, str(config), "ENOSPC", "sleep:5")
    assert full[1] == slow[1] and full[1].startswith("data.stage: disk full at ")
    assert not any(line.startswith("staged: ") for line in slow[2])  # not waited for
