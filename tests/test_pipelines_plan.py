"""`retort plan`: exact arithmetic on a case worked out by hand, labels, output and errors."""

import json
import shlex
from pathlib import Path

import pytest
from rich.cells import cell_len
from test_pipelines_cli import run

from logit_store import sizes
from pipelines import plan as planning
from schemas.accelerators import ACCELERATORS
from schemas.errors import ConfigError
from schemas.runs import DumpConfig, PlanConfig, TokenizeConfig

ROOT = Path(__file__).parents[1]
COMMAND = "plan --tokens 2e12 --entries 12 --teacher gemma2-27b"
ROUND = sizes.StoredBytes(
    tokens_bytes_per_token=2.0,
    statistics_bytes_per_token=4.0,
    head_bytes_per_entry=1.0,
    id_bytes_per_entry=3.0,
    ledger_bytes_per_shard=100.0,
    entries_per_token=2,
    source="made up",
)
MODEL = """
vocab_size: 10
d_model: 4
num_layers: 2
mlp_width: 8
num_heads: 2
num_kv_heads: 1
head_size: 2
query_scalar: 2
window_tokens: 4
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Flags of a plan with round figures: 1,000 tokens in rows of 16, shards of 4 rows."""
    monkeypatch.setattr(sizes, "MEASURED", ROUND)
    (tmp_path / "model.yaml").write_text(MODEL)
    return {
        "tokens": 1000,
        "entries": 2,
        "teacher": str(tmp_path / "model.yaml"),
        "sequence_tokens": 16,
        "shard_sequences": 4,
        "accelerator": "v4",
        "share_of_peak": 0.5,
        "price_per_chip_hour": 3.0,
        "student": str(tmp_path / "model.yaml"),
        "student_accelerator": "v5e",
        "student_chips": 2,
        "student_share_of_peak": 0.25,
        "price_per_gb_month": 0.5,
    }


def planned(flags, **changes) -> planning.Plan:
    kept = {key: value for key, value in (flags | changes).items() if value is not None}
    return planning.plan(PlanConfig.parse(kept, "here"))


def test_the_store_is_as_worked_out_by_hand(small):
    found = planned(small)
    # 2 + 4 and, twice, 3 + 1; 63 rows hold 1,000 tokens, in 16 shards of 8 files.
    assert found.store.bytes_per_token == 14
    assert {part.arrays: part.bytes for part in found.store.parts} == {
        ("tokens", "segment_ids"): 2000,
        ("head_count", "head_points", "block_points"): 2000,
        ("entry_bucket", "entry_offset"): 6000,
        ("teacher_nats",): 4000,
    }
    assert found.store.ledger_bytes == 16 * 100
    assert found.store.bytes == 14_000 + 1_600
    assert found.price_per_month == pytest.approx(15_600 / 1e9 * 0.5)
    objects = found.objects
    assert (objects.sequences, objects.shards, objects.shard_files) == (63, 16, 128)
    assert (objects.ledger_records, objects.ledger_objects, objects.metadata) == (32, 4, 23)
    assert (objects.while_written, objects.complete) == (128 + 32 + 23, 128 + 4 + 23)


def test_the_choices_of_shards_are_as_worked_out_by_hand(small):
    first, second, third = planned(small).shard_choices
    assert (first.shard_sequences, first.shards, first.objects) == (4, 16, 155)
    assert (first.shard_bytes, first.id_bytes) == (4 * 16 * 14, 4 * 16 * 6)
    assert first.index_bytes == 4 * 16 + 4
    assert first.index_share == pytest.approx(8 * 68 / (16 * 14))
    assert first.teacher_seconds == pytest.approx(4 * 16 * 850 / 137.5e12)
    assert (second.shard_sequences, second.shards, second.objects) == (16, 4, 32 + 4 + 23)
    # More rows to a shard than there are: one shard of all 63.
    assert (third.shard_sequences, third.shards, third.objects) == (64, 1, 8 + 4 + 23)
    assert (third.shard_bytes, third.index_bytes) == (63 * 16 * 14, 63 * 16 + 4)


def test_the_teacher_is_as_worked_out_by_hand(small):
    """Rows of 16: a global layer sees 136 pairs, a window of 4 sees 1 + 2 + 3 + 13 x 4 = 58."""
    teacher = planned(small).teacher
    per_token = teacher.flops_per_token
    weights = 2 * (2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 8)
    assert per_token.linear == 2 * weights == 576
    assert per_token.head == 2 * 10 * 4
    assert per_token.global_attention == 136 / 16 * 2 * 2 * 2 * 2
    assert per_token.local_attention == 58 / 16 * 2 * 2 * 2 * 2
    assert per_token.total == 850
    assert teacher.flops == 850_000
    assert teacher.flops_per_second_per_chip == 137.5e12
    assert teacher.chip_hours == pytest.approx(850_000 / 137.5e12 / 3600)
    assert teacher.price == pytest.approx(3 * 850_000 / 137.5e12 / 3600)
    assert teacher.weight_bytes == 2 * (10 * 4 + weights + (2 * 4 + 1) * 4)
    assert teacher.chips_for_weights == 1
    assert planned(small, price_per_chip_hour=None).teacher.price is None


def test_the_reader_is_as_worked_out_by_hand(small):
    reader = planned(small).reader
    assert reader.student_flops_per_token == 3 * 850
    assert reader.tokens_per_second == pytest.approx(2 * 197e12 * 0.25 / 2550)
    students = [key for key in small if key.startswith("student")]
    at_rate = planned(small | dict.fromkeys(students), train_tokens_per_second=800).reader
    assert at_rate.student_flops_per_token is None
    assert (at_rate.tokens_per_second, at_rate.sequences_per_second) == (800, 50)
    assert at_rate.bytes_per_second == 800 * 14
    assert at_rate.index_bytes_per_second == 50 * 8 * 68
    assert (at_rate.requests_per_second, at_rate.requests_per_pass) == (50 * 8 * 2, 63 * 8 * 2)
    assert at_rate.seconds_per_pass == 1.25


def test_given_bytes_replace_the_measured_ones_in_proportion(small):
    found = planned(small, bytes_per_token=28.0)
    assert found.store.bytes_per_token == pytest.approx(28)
    assert found.store.bytes == pytest.approx(28_000 + 1_600)
    sizes_of_parts = {part.arrays[0]: part.bytes_per_token for part in found.store.parts}
    assert sizes_of_parts["entry_bucket"] == pytest.approx(12)
    assert found.shard_choices[0].shard_bytes == pytest.approx(4 * 16 * 28)


def test_weights_that_no_chip_holds_take_several():
    found = planned({"tokens": 1}, accelerator="v5e").teacher
    assert found.weight_bytes == 2 * (1_180_237_824 + 26_047_480_320)
    assert found.chips_for_weights == 4  # 54.5 GB over 16 GB


def kinds(found: planning.Plan) -> dict[str, str]:
    return {item.flag or item.name: item.kind for item in found.assumptions}


def test_every_figure_that_goes_in_is_labelled():
    found = planned({"tokens": "2e12"})
    assert kinds(found) == {
        "bytes_per_token": "measured",
        "ledger per shard": "measured",
        "accelerator": "datasheet",
        "share_of_peak": "measured",
        "student_accelerator": "datasheet",
        "student_chips": "assumed",
        "student_share_of_peak": "assumed",
        "reads per chunk": "measured",
        "price_per_gb_month": "assumed",
    }
    assert all(item.source for item in found.assumptions)
    share = next(item for item in found.assumptions if item.flag == "share_of_peak")
    assert share.value == 576e12 / (1979e12 / 2)
    assert found.teacher.flops_per_second_per_chip == pytest.approx(576e12)


@pytest.mark.parametrize(
    "change",
    [{"teacher": "gemma2-9b"}, {"accelerator": "b200"}, {"sequence_tokens": 4096}],
    ids=lambda change: next(iter(change)),
)
def test_a_share_that_was_measured_on_something_else_is_an_assumption(change):
    found = planned({"tokens": 1} | change)
    assert kinds(found)["share_of_peak"] == "assumed"
    share = next(item for item in found.assumptions if item.flag == "share_of_peak")
    assert share.source.startswith("as was measured elsewhere: 576 model TFLOP/s of 989.5")


def test_bytes_for_another_number_of_entries_are_an_assumption():
    assert kinds(planned({"tokens": 1, "entries": 13}))["bytes_per_token"] == "assumed"


def test_every_assumption_can_be_given(small):
    found = kinds(planned(small, bytes_per_token=20.0))
    assert {flag for flag, kind in found.items() if kind == "given"} == {
        "bytes_per_token",
        "share_of_peak",
        "price_per_chip_hour",
        "student_chips",
        "student_share_of_peak",
        "price_per_gb_month",
    }
    assert "assumed" not in found.values()
    at_rate = kinds(planned({"tokens": 1}, train_tokens_per_second=5.0))
    assert at_rate["train_tokens_per_second"] == "given"
    assert not [flag for flag in at_rate if flag.startswith("student")]


def test_none_is_not_a_given_figure():
    config = PlanConfig.parse({"tokens": 1, "share_of_peak": None}, "here")
    assert kinds(planning.plan(config))["share_of_peak"] == "measured"


def test_defaults_are_those_of_the_store():
    config = PlanConfig.parse({"tokens": 1}, "here")
    fields = TokenizeConfig.model_fields
    assert config.sequence_tokens == fields["sequence_tokens"].default
    assert config.shard_sequences == fields["shard_sequences"].default
    assert config.entries == DumpConfig(store="s", teacher="t").sampler.entries_per_token


@pytest.mark.parametrize("written", ["2e12", "2E+12", "2000000000000", "2_000_000_000_000"])
def test_large_numbers_can_be_written_short(tmp_path, written):
    assert PlanConfig.parse({"tokens": written}, "here").tokens == 2 * 10**12
    (tmp_path / "plan.yaml").write_text(f"tokens: {written}\n")
    assert PlanConfig.from_yaml(tmp_path / "plan.yaml").tokens == 2 * 10**12


def test_every_digit_of_a_count_is_kept():
    assert PlanConfig.parse({"tokens": "999999999999999999"}, "here").tokens == 10**18 - 1


@pytest.mark.parametrize("name", ACCELERATORS)
def test_every_accelerator_can_be_planned_for(name):
    found = planned({"tokens": "1e9"}, accelerator=name, student_accelerator=name)
    assert found.teacher.chip_hours > 0
    assert ACCELERATORS[name].source


def test_peaks_are_dense():
    """Ratios that sparse rates, or rates of another precision, would break."""
    peaks = {name: chip.peak_flops_per_second / 1e12 for name, chip in ACCELERATORS.items()}
    assert peaks == {
        "h100": 989.5,
        "h200": 989.5,
        "b200": 2250,
        "v4": 275,
        "v5e": 197,
        "v5p": 459,
        "v6e": 918,
        "tpu7x": 2307,
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "command line: tokens is required; add it."),
        ("--tokens 0", "tokens: must be a whole number from 1 to 1e+18; write for instance 2e12"),
        ("--tokens 1.5", "tokens: must be a whole number from 1 to 1e+18"),
        ("--tokens 1e999999999", "tokens: must be a whole number from 1 to 1e+18"),
        ("--tokens nan", "tokens: must be a whole number from 1 to 1e+18"),
        ("--tokens many", "or 500e9 (got 'many')."),
        (
            "--tokens 1 --teacher gemma3-27b",
            "model must be a preset (gemma2-2.6b, gemma2-9b, gemma2-27b, tiny, mini, small) or a "
            "YAML or JSON file, but 'gemma3-27b' is neither; correct the name or the path.",
        ),
        ("--tokens 1 --student x", "but 'x' is neither; correct the name or the path."),
        (
            "--tokens 1 --accelerator a100",
            "accelerator: must be one of h100, h200, b200, v4, v5e, v5p, v6e, tpu7x; for another "
            "chip name one of these and the share of its peak that yours reaches (got 'a100').",
        ),
        ("--tokens 1 --student_accelerator x", "student_accelerator: must be one of h100"),
        (
            "--tokens 1 --price_per_gb_month=-0.02",
            "price_per_gb_month: must be at least 0; give an amount without a sign (got '-0.02').",
        ),
        ("--tokens 1 --price_per_chip_hour=-1", "price_per_chip_hour: must be at least 0;"),
        ("--tokens 1 --price_per_gb_month=nan", "price_per_gb_month: Input should be a finite"),
        (
            "--tokens 1 --entries 256129",
            "entries must be at most the teacher's vocabulary, 256128, but it is 256129; give a "
            "smaller --entries.",
        ),
        ("--tokens 1 --share_of_peak 1.1", "share_of_peak: Input should be less than or equal"),
        (
            "--tokens 1 --train_tokens_per_second 5 --student_chips 4 --student tiny",
            "train_tokens_per_second stands in place of a student and its chips, but student, "
            "student_chips is given too; leave out one or the other",
        ),
    ],
    ids=lambda value: value[:40],
)
def test_wrong_input_is_one_sentence_and_a_status(capsys, flags, message):
    status, out, err = run(capsys, "plan", *shlex.split(flags))
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("retort plan: ")
    assert err.count("\n") == 1


def test_as_many_entries_as_the_vocabulary_are_allowed():
    assert planned({"tokens": 1, "entries": 256_128}).store.bytes > 0
    with pytest.raises(ConfigError):
        planned({"tokens": 1, "entries": 256_129})


def test_the_documents_example_is_what_the_command_prints(capsys):
    """If this fails, the output in docs/scale.md is to be replaced, and what is said of it."""
    status, out, _ = run(capsys, *shlex.split(COMMAND))
    assert status == 0
    printed = "\n".join(line.rstrip() for line in out.splitlines())
    assert f"$ retort {COMMAND}\n{printed}\n```" in (ROOT / "docs" / "scale.md").read_text()


def test_the_output_fits_80_columns(capsys):
    flags = "--price_per_chip_hour 2.5 --tokens 1e16 --shard_sequences 1 --entries 99999"
    status, out, _ = run(capsys, "plan", *shlex.split(flags))
    assert status == 0
    assert max(cell_len(line) for line in out.splitlines()) <= 80
    assert "\x1b" not in out


def test_json_has_every_figure(capsys):
    status, out, _ = run(capsys, *shlex.split(COMMAND), "--json")
    assert status == 0
    data = json.loads(out)
    found = planned({"tokens": "2e12"})
    assert data == json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert PlanConfig.parse(data["config"], "here") == found.config
    assert data["store"]["bytes"] == found.store.bytes
    assert data["objects"]["complete"] == found.objects.complete
    assert data["teacher"]["flops_per_token"]["total"] == found.teacher.flops_per_token.total
    assert data["reader"]["requests_per_second"] == found.reader.requests_per_second
    assert data["price_per_month"] == found.price_per_month
    assert [item["kind"] for item in data["assumptions"]] == [i.kind for i in found.assumptions]


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ("--price_per_chip_hour 2", "price $110,253 reader"),
        ("--train_tokens_per_second 1e6", "training 1,000,000 tokens/s bandwidth 20.0 MB/s"),
        ("--train_tokens_per_second 1e6", "one pass 23.1 days"),
        ("--accelerator v5e", "at least 4 v5e"),
        ("--share_of_peak 0.25", "given share of peak, teacher 0.250 (--share_of_peak) datasheet"),
        ("--shard_sequences 4096", "4,096 476,983 670 MB 527 MB 321 % 55.5 min"),
        ("--shard_sequences 16384", "16,384 119,271 2.68 GB 2.11 GB 1,282 % 3.7 h"),
        ("--bytes_per_token 1010", "given bytes per token 1.01 kB (--bytes_per_token) measured"),
    ],
)
def test_flags_are_seen_in_the_output(capsys, flags, shown):
    status, out, _ = run(capsys, *shlex.split(COMMAND), *shlex.split(flags))
    assert status == 0
    assert shown in " ".join(out.split())
