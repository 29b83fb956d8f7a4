"""Stored targets against a live teacher: the same, in other arithmetic, another, a damaged row."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from dump_world import TEACHER, dump_config, make_world, tokenize_config
from rich.console import Console

from gemma2 import checkpoint, model
from logit_store import manifests
from logit_store.ledger import Ledger
from logit_store.verify import verify
from pipelines import cli, dump, tokenize
from schemas.runs import CorpusConfig, DumpConfig, SamplerConfig
from teacher_dump import audit as audits
from teacher_dump.audit import audit
from teacher_dump.teacher import Gemma2Teacher, RowCandidates

QUIET = Console(quiet=True)
VOCAB = 512


def loud_teacher(folder: Path, seed: int) -> None:
    """Sure enough of itself that two of them disagree."""
    params = model.init_params(TEACHER, jax.random.key(seed))
    params["final_norm"]["weight"] = params["final_norm"]["weight"] + 4.0
    checkpoint.save(folder, TEACHER, params)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("world"))
    for seed in (5, 6):
        loud_teacher(world / f"loud{seed}", seed)
    corpus = CorpusConfig(paths=(str(world / "corpus" / "0.py"),))
    store = world / "store"
    tokenize.tokenize(tokenize_config(world, store, corpus=corpus), QUIET)
    # Draws, whose program is compiled sooner than that of systematic sampling.
    draws = SamplerConfig(name="multinomial", points=8, entries_per_token=8, block_tokens=32)
    top = SamplerConfig(name="top_k", entries_per_token=5, block_tokens=32)
    for config in (config_of(world, "default", draws), config_of(world, "top", top)):
        dump.dump(config, QUIET)
    return world


def config_of(world: Path, name: str, sampler: SamplerConfig) -> DumpConfig:
    return dump_config(world, world / "store", teacher=world / "loud5", name=name, sampler=sampler)


def verify_by(world: Path, teacher: str, *flags: str) -> int:
    """The exit status; what was found is printed as JSON."""
    command = ["verify", str(world / "store"), "--teacher", str(world / teacher), "--json"]
    return cli.main([*command, *flags])


def test_the_stores_own_teacher_repeats_it_to_the_bit(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = verify_by(world, "loud5", "--rows", "9", "--seed", "3")
    found = json.loads(capsys.readouterr().out)
    assert (status, found["ok"], found["audit"]["identical_rows"]) == (0, True, 9)
    rows = found["audit"]["rows"]
    assert len({row["row"] for row in rows}) == 9
    assert all(row["shard"] == row["row"] // 16 for row in rows)
    assert sum(row["predicted"] for row in rows) > 400
    # The estimate of a KL that is nothing, from eight draws a token, and what it may be off.
    means = found["audit"]["means"]
    assert abs(means["kl"]) < 0.05
    assert 0.001 < rows[0]["kl_error"] < 0.2
    assert (means["entropy_error"], means["label_error"]) == (0, 0)
    assert means["stored_mass"] == pytest.approx(1, abs=1e-5)
    assert 0.05 < means["fresh_mass"] < 0.95
    assert abs(means["control_kl"]) < 1e-4
    assert cli.main(["verify", str(world / "store"), "--teacher", str(world / "loud5")]) == 0
    assert "16 rows are the teacher's; 16 of 16 to the bit" in capsys.readouterr().out


def test_the_mass_that_was_captured_is_that_of_the_teacher(world: Path) -> None:
    """And the rest, which top_k stores, counts in the KL."""
    teacher = Gemma2Teacher.load(world / "loud5", "float32", VOCAB)
    found = audit(str(world / "store"), "top", teacher, rows=8, seed=0)
    assert found.ok
    assert found.identical == 8
    assert 0.1 < found.mean("stored_mass") < 0.9
    assert found.mean("fresh_mass") == pytest.approx(found.mean("stored_mass"), abs=1e-4)
    assert abs(found.mean("kl")) < 1e-4


class Sociable(Gemma2Teacher):
    """Gives some rows, of a batch that is not one of the dump's, other numbers in it."""

    always: tuple[int, ...] = ()
    """Rows that get other numbers in any batch."""

    def begin(self, tokens, segment_ids, rows, spec, seed):
        wait = super().begin(tokens, segment_ids, rows, spec, seed)

        def other() -> RowCandidates:
            found = wait()
            is_dumped = rows[0] % len(rows) == 0 and (np.diff(rows) <= 1).all()
            changed = np.isin(rows, self.always) | ((rows % 3 == 0) & (not is_dumped))
            entropy = found.teacher_entropy + 0.5 * changed[:, None]
            return found._replace(teacher_entropy=entropy.astype(np.float32))

        return other


def test_a_row_is_judged_among_those_it_was_dumped_with(world: Path) -> None:
    teacher = Sociable.load(world / "loud5", "float32", VOCAB)
    found = audit(str(world / "store"), "default", teacher, rows=9, seed=3)
    assert any(row.row % 3 == 0 for row in found.rows)
    assert (found.ok, found.identical) == (True, 9)
    teacher.always = (found.rows[2].row,)
    again = audit(str(world / "store"), "default", teacher, rows=9, seed=3)
    assert [row.row for row in again.rows if row.fault] == [found.rows[2].row]
    assert again.identical == 8


def test_other_arithmetic_agrees_without_being_the_same(world: Path) -> None:
    """bfloat16, as if on other hardware: rows are not the same, and none is wrong."""
    teacher = Gemma2Teacher.load(world / "loud5", "bfloat16", VOCAB)
    found = audit(str(world / "store"), "default", teacher, rows=8, seed=1)
    assert found.identical < 4
    assert found.ok, [row.fault for row in found.rows]
    assert 0 < found.mean("label_error") < 0.1


def test_another_teacher_is_told_by_its_rows(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = verify_by(world, "loud6", "--rows", "8")
    found = json.loads(capsys.readouterr().out)
    assert (status, found["ok"], found["problems"]) == (1, False, [])
    assert not found["audit"]["same_weights"]
    assert found["audit"]["means"]["kl"] > 0.3
    assert all("nats, and" in row["fault"] for row in found["audit"]["rows"])
    command = ["verify", str(world / "store"), "--teacher", str(world / "loud6"), "--rows", "2"]
    assert cli.main([*command, "--targets", "top"]) == 1
    said = capsys.readouterr().out
    assert "2 of 2 rows are not the teacher's" in said
    assert "shard" in said


def test_a_row_of_other_targets_under_a_seal_of_its_own_is_found(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes, seals and records are all right; what is stored was drawn by another seed."""
    store = str(world / "store")
    ledger = Ledger(store, "default", manifests.read_manifest(store, "default"))
    ledger.withdraw([1])
    begin_rows = dump.begin_rows

    def damaged(*arguments, **settings):
        right = begin_rows(*arguments, **settings)()
        settings["seed"] += 1
        wrong = begin_rows(*arguments, **settings)()
        for name, values in right.columns().items():
            values[3] = wrong.columns()[name][3]
        return lambda: right

    monkeypatch.setattr(dump, "begin_rows", damaged)
    config = config_of(
        world,
        "default",
        SamplerConfig(name="multinomial", points=8, entries_per_token=8, block_tokens=32),
    )
    dump.dump(config, QUIET)
    monkeypatch.setattr(dump, "begin_rows", begin_rows)
    assert verify(store).ok
    rows = manifests.read_manifest(store, "default").num_sequences
    status = verify_by(world, "loud5", "--rows", str(rows))
    found = json.loads(capsys.readouterr().out)["audit"]
    assert (status, found["identical_rows"], len(found["rows"])) == (1, rows - 1, rows)
    [bad] = [row for row in found["rows"] if row["fault"]]
    assert (bad["row"], bad["shard"]) == (19, 1)
    assert "not what the teacher gives, which repeats other rows to the bit" in bad["fault"]
    # Of a teacher that does not repeat itself, nothing is concluded from the bits.
    monkeypatch.setattr(audits, "_is_steady", lambda *_: False)
    teacher = Gemma2Teacher.load(world / "loud5", "float32", VOCAB)
    faults = [row.fault for row in audit(store, "default", teacher, rows=rows, seed=0).rows]
    assert not any("to the bit" in fault for fault in faults if fault)
    ledger.withdraw([1])
    dump.dump(config, QUIET)
    np.testing.assert_equal(audit(store, "default", teacher, rows=rows, seed=0).identical, rows)
