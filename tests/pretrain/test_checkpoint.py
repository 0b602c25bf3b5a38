"""The checkpoint protocol by itself: ranks as threads' worth of savers over random tensors, no engine."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from configs import ConfigError
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoints, Committed, Damaged, Position, SaveError, Saver
from pretrain.engine.state import Fragment, State, share
from pretrain.lineage import Lineage, TakenOver

SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 5), "b": (7,), "c": (2, 2, 2), "d": (1,)}
KINDS = ("fp32", "exp_avg", "exp_avg_sq")


def make_state(rank: int, ranks: int, seed: int | None) -> State:
    """Every rank holds all; random values of a seed, or zeros."""
    generator = torch.Generator().manual_seed(seed or 0)
    sizes = [int(torch.Size(shape).numel()) for shape in SHAPES.values()]
    flats = [
        {k: torch.randn(n, generator=generator) if seed is not None else torch.zeros(n) for k in KINDS} for n in sizes
    ]
    held = [Fragment(name, 0, n, i, 0) for i, (name, n) in enumerate(zip(SHAPES, sizes, strict=True))]
    return State(dict(SHAPES), flats, held, share(SHAPES, rank, ranks), dict.fromkeys(SHAPES, float(seed or 0)))


def commit(folder: Path, step: int, ranks: int = 2, branch: int = 1, settings: Checkpoints | None = None) -> None:
    """Save one step as every rank does; the seed of its values is the step."""
    savers = [Saver(folder, settings or Checkpoints(), branch, r, ranks, {"identity": {}}) for r in range(ranks)]
    for rank, saver in enumerate(savers):
        saver.save(
            make_state(rank, ranks, step), Position(step, 10 * step, 640 * step, "0" * 32), digest_share=2**127 + 1
        )
    for saver in savers:
        saver.wait()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    Lineage(tmp_path).take(None, 0, None, "start")
    return tmp_path


@pytest.mark.parametrize(("written", "read"), [(1, 1), (1, 3), (2, 3), (3, 2), (5, 1)])
def test_any_number_of_ranks_loads_what_any_other_wrote(written: int, read: int, run_folder: Path) -> None:
    commit(run_folder, 7, written)
    committed = checkpoint.open_checkpoint(checkpoint.live_checkpoints(run_folder)[0])
    assert committed.position == Position(7, 70, 4480, f"{(2**127 + 1) * written % 2**128:032x}")
    expected = make_state(0, 1, 7)
    for rank in range(read):
        state = make_state(rank, read, None)
        checkpoint.load(committed, state)
        for flat, wanted in zip(state.flats, expected.flats, strict=True):
            assert all(torch.equal(flat[kind], wanted[kind]) for kind in KINDS)
        assert state.steps == expected.steps
    weights = dict(checkpoint.read_weights(committed))
    assert {name: tuple(w.shape) for name, w in weights.items()} == SHAPES
    assert torch.equal(weights["c"].view(-1), expected.flats[2]["fp32"])


def test_owned_fragments_tile_every_parameter() -> None:
    for ranks in range(1, 9):
        owned = sorted((f.name, f.start, f.numel) for rank in range(ranks) for f in share(SHAPES, rank, ranks))
        for name, shape in SHAPES.items():
            position = 0
            for _, start, numel in [f for f in owned if f[0] == name]:
                assert start == position
                position += numel
            assert position == torch.Size(shape).numel()


def damages(folder: Path, change: str, rng: random.Random) -> None:
    """Spoil one file of a checkpoint."""
    path = rng.choice([p for p in sorted(folder.iterdir()) if p.stat().st_size])
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    if change == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif change == "truncate":
        del data[place:]
    elif change == "zero":
        path.unlink()
        return
    else:
        data = bytearray()
    path.write_bytes(data)


@pytest.mark.parametrize(("change", "trials"), [("flip", 300), ("truncate", 50), ("zero", 20), ("empty", 20)])
def test_every_damage_is_found(change: str, trials: int, run_folder: Path) -> None:
    commit(run_folder, 3, 2)
    folder = checkpoint.live_checkpoints(run_folder)[0]
    safe = run_folder / "safe"
    shutil.copytree(folder, safe)
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(trials):
        damages(folder, change, rng)
        with pytest.raises(Damaged):
            load_all(folder)
        assert checkpoint.verify(folder)
        shutil.rmtree(folder)
        shutil.copytree(safe, folder)
    load_all(folder)
    assert checkpoint.verify(folder) == []


def load_all(folder: Path) -> Committed:
    committed = checkpoint.open_checkpoint(folder)
    checkpoint.load(committed, make_state(0, 1, None))
    return committed


def test_another_model_is_refused_with_the_parameter(run_folder: Path) -> None:
    commit(run_folder, 1)
    committed = checkpoint.open_checkpoint(checkpoint.live_checkpoints(run_folder)[0])
    state = make_state(0, 1, None)
    state.shapes["a"] = (3, 6)
    with pytest.raises(ConfigError, match=r"parameter a is \[3, 5\] there and \[3, 6\] in this model"):
        checkpoint.load(committed, state)


def test_a_newer_format_is_refused(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    commit(run_folder, 1)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"format 2 is newer than this code's 1; update longhaul"):
        checkpoint.open_checkpoint(checkpoint.live_checkpoints(run_folder)[0])


def test_a_newer_branch_is_refused(run_folder: Path) -> None:
    path = run_folder / "lineage" / "1.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ConfigError, match=r"1.json: format 2 is newer than this code's 1; update longhaul"):
        Lineage(run_folder).live()


def test_a_rank_that_never_writes_leaves_nothing_behind_that_counts(run_folder: Path) -> None:
    settings = Checkpoints(peer_timeout_s=0.2)
    saver = Saver(run_folder, settings, 1, 0, 2, {})
    saver.save(make_state(0, 2, 1), Position(1, 10, 640, "0" * 32), 0)
    with pytest.raises(SaveError, match=r"rank-1-of-2 not written in 0 s"):
        saver.wait()
    assert checkpoint.live_checkpoints(run_folder) == []
    checkpoint.sweep(run_folder)
    assert list((run_folder / "checkpoints").iterdir()) == []


def test_retention_keeps_the_last_ones_and_those_for_good(run_folder: Path) -> None:
    settings = Checkpoints(keep_last=2, keep_every_steps=4)
    for step in range(10):
        commit(run_folder, step, 1, settings=settings)
    assert [path.name for path in checkpoint.live_checkpoints(run_folder)] == [
        "step-9.b1", "step-8.b1", "step-4.b1",
    ]  # fmt: skip


def test_the_dead_stay_dead(run_folder: Path) -> None:
    """A paused attempt that goes on after another has taken over commits nothing, or something dead."""
    lineage = Lineage(run_folder)
    commit(run_folder, 10, branch=1)
    lineage.take(1, 10, "x", "resume")
    with pytest.raises(TakenOver, match=r"branch 2 \(resume, host .*\) has taken over this run from branch 1"):
        commit(run_folder, 20, branch=1)
    (run_folder / "checkpoints" / ".tmp-step-20.b1").rename(run_folder / "checkpoints" / "step-20.b1")  # lost the race
    assert [path.name for path in checkpoint.live_checkpoints(run_folder)] == ["step-10.b1"]
    commit(run_folder, 15, branch=2, settings=Checkpoints(keep_last=9))
    assert [path.name for path in checkpoint.live_checkpoints(run_folder)] == ["step-15.b2", "step-10.b1"]


def test_rolled_back_and_killed_does_not_bring_back_the_retired_branch(run_folder: Path) -> None:
    lineage, many = Lineage(run_folder), Checkpoints(keep_last=99)
    for step in (10, 20, 30):
        commit(run_folder, step, branch=1, settings=many)
    lineage.take(1, 10, "x", "rollback")
    assert [path.name for path in checkpoint.live_checkpoints(run_folder)] == ["step-10.b1"]
    lineage.take(1, 10, "x", "resume")
    commit(run_folder, 20, branch=3, settings=many)
    assert [path.name for path in checkpoint.live_checkpoints(run_folder)] == ["step-20.b3", "step-10.b1"]
    assert lineage.live() == [(3, None), (1, 10)]


def test_what_a_save_is_given_comes_back_and_older_manifests_have_nothing(run_folder: Path) -> None:
    told: list[float] = []
    saver = Saver(
        run_folder, Checkpoints(), 1, 0, 1, {}, on_commit=lambda committed, seconds: told.append(seconds)
    )  # fmt: skip
    saver.save(make_state(0, 1, 1), Position(1, 10, 640, "0" * 32), 0, {"guard": {"skipped": [3, 4]}})
    saver.wait()
    committed = checkpoint.open_checkpoint(checkpoint.live_checkpoints(run_folder)[0])
    assert committed.state == {"guard": {"skipped": [3, 4]}} and told and told[0] > 0
    del committed.manifest["state"]
    assert committed.state == {}
