"""`retort train` as a person meets it: the plan of a run, its console, its mistakes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console
from student_store import MODEL, make_store, small_config

from gemma2 import flops
from pipelines import cli, training
from schemas.model import ModelConfig
from schemas.runs import MeshConfig, TrainConfig
from student_train import dry_run
from student_train import mesh as meshes
from student_train.guard import HISTORY
from student_train.report import TrainEvent

pytestmark = pytest.mark.usefixtures("compile_once", "compile_quickly")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 20 rows in 3 shards, a model, and a config for both."""
    folder = tmp_path_factory.mktemp("train")
    make_store(folder / "store")
    config = small_config(folder, folder / "out", steps=6, accumulate=1, ema_decay=0.9)
    (folder / "train.yaml").write_text(config.model_dump_json())
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_dry_run_says_what_a_run_would_be_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(folder)
    command = ["train", f"--config={folder / 'train.yaml'}", "--dry-run"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert snapshot(folder) == before
    assert not (folder / "out").exists()
    model = ModelConfig(**MODEL)
    counted = flops.parameters(model)
    assert found["parameters"] == counted.total
    assert found["embedding_parameters"] == counted.embedding
    assert (found["tokens_per_step"], found["tokens"]) == (8 * 32, 6 * 8 * 32)
    assert found["coverage"] == {
        "rows": 20,
        "shards": 3,
        "committed_token_shards": 3,
        "committed_target_shards": 3,
        "share_of_rows": 1.0,
        "epochs": 2.4,
    }
    # Parameters, Adam's two moments and the average, so small that every device has them whole;
    # the guard's history and two counts, the step and Adam's count.
    assert found["memory"]["state"] == 4 * (4 * counted.total + HISTORY + 4)
    assert found["memory"]["working"] > 0
    assert len(found["losses"]) == 3
    assert found["seconds"] == pytest.approx(6 * found["step_seconds"])
    assert found["rates"]["mfu"] is None
    # These are the run's own steps.
    assert cli.main(["train", f"--config={folder / 'train.yaml'}"]) == 0
    output = capsys.readouterr().out
    records = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in records]
    assert losses[:3] == found["losses"]
    assert "train: 6 steps in" in output
    assert "\x1b" not in output


def test_a_dry_run_is_readable(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(folder / "other")]
    assert cli.main(["train", f"--config={folder / 'train.yaml'}", *out, "--dry-run"]) == 0
    text = capsys.readouterr().out
    for part in (
        "nothing was written",
        "6 steps of 256 tokens",
        "3 of 3 shards of tokens, 3 of targets",
        "2.40 epochs: 100.0% of the rows drawn from",
        "8 x cpu",
        "median of 3",
    ):
        assert part in text
    assert not (folder / "other").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dry-run", "--store=/no/store"], "/no/store holds no"),
        (["--dry-run", "--batch_sequences=12"], "multiple of the 8 devices"),
        (["--dry-run", "--accumulate=3"], "3 does not divide 8"),
        (["--dry-run", "--trackers", "wandb"], "run `pip install wandb`"),
        (["--json"], "json is of use with dry-run alone; give --dry-run too"),
        (
            ["--routing.drop_share=0.1", "--routing.below_nats=1"],
            "drop_share and below_nats say the same",
        ),
        (["--targets=none", "--routing.drop_share=0.1"], "routing chooses between stored targets"),
        (["--spike_factor=1"], "spike_factor: Input should be greater than 1"),
    ],
)
def test_wrong_input_is_one_sentence(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    out = ["--out", str(folder / "none")]
    status = cli.main(["train", f"--config={folder / 'train.yaml'}", *out, *flags])
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (folder / "none").exists()


def test_a_terminal_has_one_live_line_and_keeps_what_matters(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(config: TrainConfig, *, on_event, **_):
        on_event(TrainEvent(1, "loss 2.0"))
        on_event(TrainEvent(2, "skipped", None, "step 2 was skipped: its loss is nan"))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run_training", fake)
    config = TrainConfig(store=str(folder / "store"), out=tmp_path, steps=2)
    texts = {}
    for name, is_terminal in (("terminal", True), ("log", False)):
        console = Console(
            file=(tmp_path / name).open("w"), force_terminal=is_terminal, highlight=False
        )
        with pytest.raises(KeyboardInterrupt):
            training.train(config, console)
        console.file.close()
        texts[name] = (tmp_path / name).read_text()
    assert texts["log"].splitlines() == ["train: step 2 was skipped: its loss is nan"]
    assert "train: step 2 was skipped" in texts["terminal"]
    assert "2/2" in texts["terminal"]


def test_memory_counts_what_lies_on_one_device() -> None:
    mesh = meshes.make_mesh(MeshConfig(replica=2), jax.devices())
    shapes = {
        "embedding": jax.ShapeDtypeStruct((4096, 64), jnp.float32),
        "final_norm": jax.ShapeDtypeStruct((64,), jnp.float32),
    }
    placed = meshes.abstract(shapes, meshes.state_shardings(shapes, mesh))
    assert dry_run._bytes_per_device(placed) == 4096 * 64 * 4 // 4 + 64 * 4


def test_what_does_not_fit_is_said_and_not_run() -> None:
    memory = dry_run.Memory(state=5, batch=1, working=5, available=10)
    assert (memory.total, memory.fits) == (11, False)
    assert memory.model_copy(update={"available": 11}).fits
    assert memory.model_copy(update={"available": None}).fits


def test_a_log_is_one_line_now_and_then(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("pipelines.progress.time.monotonic", lambda: clock[0])

    def fake(config: TrainConfig, *, on_event, **_):
        for step in range(1, 51):
            clock[0] += 1.0
            on_event(TrainEvent(step, f"loss {1 / step:.4f}, 256 tokens/s"))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run_training", fake)
    with (tmp_path / "log").open("w") as file, pytest.raises(KeyboardInterrupt):
        training.train(
            TrainConfig(store=str(folder / "store"), out=tmp_path, steps=100),
            Console(file=file, soft_wrap=True, highlight=False),
        )
    assert (tmp_path / "log").read_text().splitlines() == [
        "train: 20/100 steps, 1.0/s, 80 s left, loss 0.0500, 256 tokens/s",
        "train: 40/100 steps, 1.0/s, 60 s left, loss 0.0250, 256 tokens/s",
    ]
