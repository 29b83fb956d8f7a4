"""The command line as a person meets it: help, wrong input, configs, the inspector's verbs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_store

from logit_store.codec import RowEntries
from pipelines import cli
from schemas.runs import DumpConfig, TrainConfig
from teacher_dump import tokenizer as tokenizers


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(capsys, verb):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"usage: retort {verb}" in out
    for line in out.split("options:")[1].splitlines():
        assert len(line) <= 160


def test_help_lists_the_verbs(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(f"\n  {verb} " in out for verb in cli.VERBS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distil"], "the verb must be one of quickstart, tokenize"),
        (["dump", "--store", "s"], "command line: teacher is required; add it."),
        (
            ["dump", "--store=s", "--teacher=t", "--sampler.block_tokens=0"],
            "sampler.block_tokens: Input should be greater than or equal to 1 (got '0')",
        ),
        (
            ["dump", "--store=s", "--teacher=t", "--sampler.name=full", "--sampler.points=3"],
            "sampler: points must be given",
        ),
        (["train", "--store=s", "--out=o", "--config", "none.yaml"], "none.yaml is not"),
        (["inspect", "/no/store"], "/no/store holds no tokens; check the path"),
        (["verify", "/no/store"], "holds no tokens"),
        (["train", "--store=/no/store", "--out=o"], "/no/store holds no"),
        # A choice may be called what elsewhere is no value.
        (["train", "--store=/no/store", "--out=o", "--remat=none"], "/no/store holds no"),
        (["dump", "--store=/no/s", "--teacher=t", "--", "--runner=DirectRunner"], "is refused"),
        (["inspect", "s", "--", "--x=1"], "runs no pipeline of its own"),
        (["eval", "--store=/no/s", "--model=/no/m"], "/no/s holds no tokens"),
        (["export", "--run=/no/run", "--out=/no/out"], "/no/run is no folder"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_sentence_and_a_status(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.startswith("retort")
    assert err.count("\n") == 1


def test_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["dump", "--stroe", "s"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --stroe" in capsys.readouterr().err


def test_flags_override_the_file(tmp_path):
    file = tmp_path / "dump.yaml"
    file.write_text("store: a\nteacher: t\nsampler: {entries_per_token: 7, block_tokens: 64}\n")
    found = cli.parse("dump", DumpConfig, [f"--config={file}", "--sampler.block_tokens", "32"])
    assert (found.store, found.sampler.entries_per_token, found.sampler.block_tokens) == (
        "a",
        7,
        32,
    )
    file.write_text("store: a\nteacher: t\nsamplr: {}\n")
    with pytest.raises(cli.ConfigError, match=r"dump\.yaml: samplr is not a known field"):
        cli.parse("dump", DumpConfig, ["--config", str(file)])


def test_none_can_be_said(tmp_path):
    found = cli.parse("train", TrainConfig, ["--store=s", "--out=o", "--targets=none"])
    assert found.targets is None


def rows_of_entries() -> list[RowEntries]:
    return small_store.row_entries()[0]


@pytest.fixture
def store(tmp_path) -> Path:
    small_store.write_store(str(tmp_path / "store"))
    return tmp_path / "store"


def test_inspect_stats_and_verify(capsys, store):
    status, out, _ = run(capsys, "inspect", str(store))
    assert status == 0
    assert "targets 'default'" in out
    assert "bytes per token" in out
    status, out, _ = run(capsys, "inspect", str(store), "--json")
    data = json.loads(out)
    size = sum(p.stat().st_size for p in store.rglob("*") if p.is_file())
    summary = data["targets"]["default"]["summary"]
    # All but the empty group that only holds the sets of targets.
    assert (
        summary["bytes_per_token"] * summary["tokens"]
        == size - (store / "targets/zarr.json").stat().st_size
    )
    entries = np.concatenate([e.position + 16 * i for i, e in enumerate(rows_of_entries())])
    assert summary["tokens"] == 5 * 16 - 3
    assert summary["entries_per_token"] == len(entries) / summary["tokens"]
    status, out, _ = run(capsys, "stats", str(store), "--json")
    found = json.loads(out)["distributions"]["entries per token"]
    assert found["mean"] == pytest.approx(len(entries) / len(np.unique(entries)))
    status, out, _ = run(capsys, "verify", str(store))
    assert status == 0
    assert "intact (6 shards" in out


def test_verify_names_the_shard_and_exits_with_1(capsys, store):
    path = store / "targets/default/entry_bucket/c/1/0"
    path.write_bytes(path.read_bytes()[:-1])
    status, out, _ = run(capsys, "verify", str(store))
    assert status == 1
    assert "shard 1: targets/default/entry_bucket/c/1/0" in out
    status, out, _ = run(capsys, "verify", str(store), "--json")
    assert status == 1
    assert json.loads(out)["problems"][0]["shard"] == 1


def test_diff_of_two_stores_and_of_two_sets_of_one(capsys, store, tmp_path):
    small_store.write_targets(str(store), "again", seed=1)
    small_store.write_store(str(tmp_path / "other"))
    for arguments in (
        [str(store), str(tmp_path / "other")],
        [str(store), "--other-targets", "again"],
        [str(store), str(store), "--targets", "again"],
    ):
        status, out, _ = run(capsys, "diff", *arguments, "--json")
        assert status == 0
        data = json.loads(out)
        assert (data["positions"], data["identical"], data["kl_nats"]) == (67, 1, 0)
        assert data["left"]["store"] == str(store)
    status, out, _ = run(capsys, "diff", str(store), "--other-targets", "none_such")
    assert status == 2
    status, out, _ = run(capsys, "diff", str(store), str(tmp_path / "other"))
    assert "100.00 %" in out


def test_chosen_rows_are_exported(capsys, store, tmp_path):
    out_file = tmp_path / "rows.jsonl"
    arguments = ["export", "--store", str(store), "--rows", "1,3:", "--out", str(out_file)]
    status, out, _ = run(capsys, *arguments, "--to", "jsonl", "--json")
    assert status == 0
    assert json.loads(out)["sequences"] == 3
    lines = [json.loads(line) for line in out_file.read_text().splitlines()]
    assert [line["sequence"] for line in lines] == [1, 3, 4]
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "exists; name another" in err
    status, _, err = run(capsys, "export", "--run", "r", "--out", "o", "--rows", "1")
    assert status == 2
    assert "rows and to are of a store" in err


def test_show_needs_the_stores_tokenizer(capsys, store, tmp_path):
    texts = ["def f(x):\n    return [x, 1, 2, 3]  # and so on\n" * 40]
    tokenizers.train(texts, tmp_path / "tokenizer.model", vocab_size=300)
    status, _, err = run(capsys, "show", str(store))
    assert status == 2
    assert "A store's tokenizer must be the run's" in err
    (tmp_path / "tokenizer.model").unlink()
    status, _, err = run(capsys, "show", str(store))
    assert status == 2
    assert "there is no tokenizer.model beside" in err


def test_show_lists_candidates_by_weight(capsys, tmp_path, monkeypatch):
    texts = ["def f(x):\n    return [x, 1, 2, 3]  # and so on\n" * 40]
    tokenizers.train(texts, tmp_path / "tokenizer.model", vocab_size=300)
    info = tokenizers.Tokenizer.load(tmp_path / "tokenizer.model").info
    manifest = small_store.tokens_manifest
    monkeypatch.setattr(small_store, "tokens_manifest", lambda: manifest(tokenizer=info))
    targets = small_store.targets_manifest()
    monkeypatch.setattr(
        small_store,
        "targets_manifest",
        lambda: targets.model_copy(
            update={"tokens_fingerprint": small_store.identity(small_store.tokens_manifest())}
        ),
    )
    url = str(tmp_path / "store")
    small_store.write_store(url)
    entries = rows_of_entries()[1]
    status, out, _ = run(capsys, "show", url, "--sequence", "1", "--count", "16", "--json")
    assert status == 0
    for item in json.loads(out)["positions"]:
        weights = [c["weight"] for c in item.get("candidates", [])]
        assert weights == sorted(weights, reverse=True)
        wanted = entries.id[entries.position == item["position"]]
        assert {c["id"] for c in item.get("candidates", [])} == set(wanted.tolist())
    status, out, _ = run(capsys, "show", url, "--sequence", "1")
    assert status == 0
    status, _, err = run(capsys, "show", url, "--sequence", "5")
    assert status == 2
    assert "--sequence must be in [0, 5), but it is 5" in err


def test_ctrl_c_in_what_only_reads_promises_nothing(capsys, monkeypatch, store):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("logit_store.verify.verify", interrupted)
    status, _, err = run(capsys, "verify", str(store))
    said = "retort verify: interrupted; nothing was changed."
    assert (status, err.splitlines()[-1]) == (130, said)


def test_terminal_output_fits_80_columns_and_pipes(store):
    command = [sys.executable, "-m", "pipelines.cli"]
    for verb in ("inspect", "stats", "verify"):
        done = subprocess.run(
            [*command, verb, str(store)], capture_output=True, text=True, check=True
        )
        assert "\x1b" not in done.stdout
    code = f"{' '.join(command)} stats {store} --json | head -c 1"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{"
    assert "Traceback" not in done.stderr
    assert shutil.which("bash")


def test_what_only_reads_waits_for_neither_beam_nor_jax(store):
    code = """if True:
        import sys
        from pipelines import cli
        for words in (["--help"], ["inspect", sys.argv[1]], ["verify", sys.argv[1]]):
            assert cli.main(words) == 0
        print(sorted({"apache_beam", "jax", "orbax"} & set(sys.modules)))
    """
    command = [sys.executable, "-c", code, str(store)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
