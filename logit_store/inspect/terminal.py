"""A store in the terminal: each view as plain data (for `--json`) and as something to print.

Corpus text, and the names that a manifest or a folder holds, may be hostile: control characters are
shown as signs, and nothing is taken for markup.
"""

import shlex
from dataclasses import asdict
from typing import Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from logit_store import manifests, reader
from logit_store.inspect.queries import PieceText, Row, check_range, targets_row, tokens_row
from logit_store.inspect.text import printable, visible
from logit_store.repair import Outcome
from logit_store.statistics import Distribution, Summary, profile, summary
from logit_store.verify import Problem, Report, metadata_problems
from schemas.manifest import TargetsManifest, TokensManifest

_CANDIDATES = 6
_PIECE_CELLS = 14
_SOURCE_CELLS = 34
_SOURCES = 20


# inspect


def inspect_data(url: str) -> dict[str, Any]:
    """What a store is: tokens, every set of targets, completeness, sizes."""
    manifest = manifests.read_manifest(url, None)
    assert isinstance(manifest, TokensManifest)
    targets = {}
    for name in manifests.list_targets(url):
        about = manifests.read_manifest(url, name)
        assert isinstance(about, TargetsManifest)
        targets[name] = {
            "teacher": about.teacher.model_dump(),
            "sampler": about.sampler.model_dump(),
            "seed": about.seed,
            "summary": summary(url, name).as_dict(),
        }
    return {
        "store": url,
        "format_version": manifest.format_version,
        "tokenizer": manifest.tokenizer.model_dump(),
        "sequence_tokens": manifest.sequence_tokens,
        "source_files": manifest.corpus.files,
        "source_bytes": manifest.corpus.file_bytes,
        "software": manifest.software,
        "tokens": summary(url, None).as_dict(),
        "targets": targets,
        "problems": _problems(metadata_problems(url)),
    }


def inspect_view(data: dict[str, Any]) -> RenderableType:
    """One screen from `inspect_data`."""
    tokens = Summary(**data["tokens"])
    parts: list[RenderableType] = [
        _pairs(
            f"{data['store']}: format version {data['format_version']}",
            [
                (
                    "tokens",
                    f"{tokens.tokens:,} in {tokens.sequences:,} x {data['sequence_tokens']:,}",
                ),
                ("complete", _complete(tokens)),
                (
                    "tokenizer",
                    f"{data['tokenizer']['vocab_size']:,} pieces, "
                    f"{data['tokenizer']['sha256'][:12]}",
                ),
                ("sources", f"{data['source_files']:,} files, {data['source_bytes']:,} bytes"),
                ("made with", ", ".join(f"{k} {v}" for k, v in data["software"].items())),
            ],
        )
    ]
    for name, about in data["targets"].items():
        found = Summary(**about["summary"])
        sampler = about["sampler"]
        parts += [
            _pairs(
                f"targets '{name}'",
                [
                    (
                        "teacher",
                        f"{about['teacher']['name']}, weights "
                        f"{about['teacher']['weights_sha256'][:12]}",
                    ),
                    (
                        "sampler",
                        f"{sampler['name']}, {sampler['points']} points per token, at most "
                        f"{sampler['slots_per_token']} entries over blocks of "
                        f"{sampler['block_tokens']}, seed {about['seed']}",
                    ),
                    ("complete", _complete(found)),
                    (
                        "entries per token",
                        f"{found.entries_per_token:.2f} (most {found.max_entries})",
                    ),
                    ("stored mass", f"{found.mean_mass:.4f}"),
                    ("teacher entropy", f"{found.mean_entropy_nats:.3f} nats"),
                    ("teacher's loss", f"{-found.mean_label_logprob_nats:.3f} nats per token"),
                    ("bytes per token", f"{found.bytes_per_token:.2f}"),
                ],
            ),
            _sizes(found),
        ]
    parts.append(_health(data["problems"]))
    return Group(*parts)


def _health(problems: list[dict[str, Any]]) -> RenderableType:
    if not problems:
        return Text("manifests, ledger and tables are whole; `retort verify` checks every byte")
    lines = [Text(f"  {printable(p['file'] + ': ' + p['what'])}") for p in problems]
    return Group(_title("damaged; run `retort verify`"), *lines)


# show


def show_data(
    url: str, name: str | None, sequence: int, position: int | None, count: int, text: PieceText
) -> dict[str, Any]:
    """One sequence: its tokens and, for `count` positions from `position`, the stored candidates.

    name None shows the tokens alone. Raises ConfigError for a sequence or position out of range.
    """
    tokens = reader.TokensReader(url)
    check_range("sequence", sequence, tokens.manifest.num_sequences)
    start = 0 if position is None else position
    check_range("position", start, tokens.manifest.sequence_tokens)
    stop = min(start + count, tokens.manifest.sequence_tokens)
    if name is None:
        row = tokens_row(tokens, sequence)
    else:
        row = targets_row(reader.TargetsReader(url, name), sequence)
    return {
        "store": url,
        "targets": name,
        "sequence": sequence,
        "text": "".join(text(int(i)) for i in row.tokens[start:stop]),
        "positions": [_position(row, t, text) for t in range(start, stop)],
    }


def _position(row: Row, t: int, text: PieceText) -> dict[str, Any]:
    token = int(row.tokens[t])
    found: dict[str, Any] = {
        "position": t,
        "segment": int(row.segment_ids[t]),
        "token": token,
        "text": text(token),
    }
    answer = row.answer(t, text)
    if answer is None:
        return found
    return found | {
        "entropy_nats": answer.entropy_nats,
        "label": answer.label,
        "label_text": answer.label_text,
        "label_probability": answer.probability,
        "label_rank_among_stored": answer.rank,
        "label_weight": answer.weight,
        "candidates": [{"id": c.id, "text": c.text, "weight": c.weight} for c in answer.candidates],
    }


def show_view(data: dict[str, Any]) -> RenderableType:
    """A row per position: token, entropy, true next token, heaviest candidates."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    # Pieces may be of any length, and must leave room for the candidates.
    table.add_column("pos", justify="right", no_wrap=True)
    table.add_column("token", no_wrap=True, max_width=_PIECE_CELLS)
    table.add_column("nats", justify="right", no_wrap=True)
    table.add_column("next", no_wrap=True, max_width=_PIECE_CELLS)
    table.add_column("p", justify="right", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("candidates", overflow="fold")
    for item in data["positions"]:
        row = [Text(str(item["position"])), Text(visible(item["text"]))]
        if "candidates" in item:
            shown = Text("  ").join(
                Text.assemble((visible(c["text"]), "bold"), f" {c['weight']:.3f}")
                for c in item["candidates"][:_CANDIDATES]
            )
            more = len(item["candidates"]) - _CANDIDATES
            row += [
                Text(f"{item['entropy_nats']:.2f}"),
                Text(visible(item["label_text"])),
                Text(f"{item['label_probability']:.3f}"),
                Text(str(item["label_rank_among_stored"] or "-")),
                shown + Text(f"  +{more}" if more > 0 else ""),
            ]
        table.add_row(*row)
    return Group(_title(f"{data['store']}: sequence {data['sequence']}"), table)


# stats


def stats_data(url: str, name: str, max_sequences: int) -> dict[str, Any]:
    """Summary and distributions of one set of targets, and means by source."""
    found, sources = profile(url, name, max_sequences)
    return {
        "store": url,
        "targets": name,
        "summary": summary(url, name).as_dict(),
        "distributions": {
            key: {"mean": d.mean, "percentiles": d.percentiles} for key, d in found.items()
        },
        "sources": [asdict(source) for source in sources],
    }


def stats_view(data: dict[str, Any]) -> RenderableType:
    """Percentiles of each quantity, and sizes."""
    table = Table("over predicted tokens", "mean", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    rows = {key: Distribution(**value) for key, value in data["distributions"].items()}
    for percentile in next(iter(rows.values())).percentiles if rows else ():
        table.add_column("max" if percentile == 100 else f"p{percentile}", justify="right")
    for key, found in rows.items():
        table.add_row(key, f"{found.mean:.3f}", *(f"{v:.3f}" for v in found.percentiles.values()))
    title = _title(f"{data['store']}: targets '{data['targets']}'")
    parts: list[RenderableType] = [title, table]
    if data["sources"]:
        parts.append(_sources(data["sources"]))
    return Group(*parts, _sizes(Summary(**data["summary"])))


def _sources(sources: list[dict[str, Any]]) -> RenderableType:
    """A line for each source, the least expected text first."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("by source", no_wrap=True, max_width=_SOURCE_CELLS)
    for heading in ("rows", "entries", "nats", "surprise", "mass"):
        table.add_column(heading, justify="right")
    order = sorted(sources, key=lambda s: s["means"].get("label log-probability (nats)", 0.0))
    for source in order[:_SOURCES]:
        # The end of a path tells it from others.
        end = printable(source["first_file"])
        more = f" +{source['files'] - 1}" if source["files"] > 1 else ""
        room = _SOURCE_CELLS - len(more) - 1
        name = (end if cell_len(end) <= room else "…" + _tail(end, room - 1)) + more
        means = source["means"]
        table.add_row(
            Text(name),
            f"{source['sequences']:,}",
            f"{means.get('entries per token', 0):.2f}",
            f"{means.get('teacher entropy (nats)', 0):.3f}",
            f"{-means.get('label log-probability (nats)', 0):.3f}",
            f"{means.get('stored mass', 0):.4f}",
        )
    if len(order) > _SOURCES:
        table.add_row(Text(f"and {len(order) - _SOURCES} more (--json has all)"))
    return table


def _tail(text: str, cells: int) -> str:
    while cell_len(text) > cells:
        text = text[1:]
    return text


# verify


def verify_data(url: str, report: Report) -> dict[str, Any]:
    """A verification's result."""
    return {
        "store": url,
        "ok": report.ok,
        "files": report.files,
        "bytes": report.bytes,
        "shards": report.shards,
        "missing_shards": report.missing_shards,
        "problems": _problems(report.problems),
    }


def verify_view(url: str, report: Report) -> RenderableType:
    """One line, then one for each problem."""
    checked = f"{report.shards} shards, {report.files} files, {report.bytes:,} bytes"
    if report.missing_shards:
        one = report.missing_shards == 1
        checked += (
            f"; {report.missing_shards} {'shard is' if one else 'shards are'} not committed yet"
        )
    if report.ok:
        return Text(printable(f"{url}: intact ({checked})"))
    count = len(report.problems)
    title = _title(f"{url}: {count} problem{'s' if count > 1 else ''} ({checked})")
    return Group(title, *(Text(f"  {printable(str(problem))}") for problem in report.problems))


def _problems(problems: list[Problem]) -> list[dict[str, Any]]:
    return [{"file": p.file, "shard": p.shard, "what": p.what} for p in problems]


# repair


def repair_data(
    url: str, report: Report, outcome: Outcome, after: Report | None, written: list[str]
) -> dict[str, Any]:
    """What was found and what was done or, without `after`, would be done about it.

    `after` is the verification that followed, where anything was mended. `ok` if the store is whole
    at the end: nothing is wrong, and nothing was given up that is not among the sets of targets
    `written` again since.
    """
    withdrawn = {name: s for name, s in outcome.withdrawn.items() if name not in written}
    final = report if after is None else after
    return {
        "store": url,
        "ok": final.ok and not withdrawn,
        "applied": after is not None,
        "missing_shards": final.missing_shards,
        "problems": _problems(report.problems),
        "mended": outcome.mended,
        "written_again": written,
        "write_again": [
            {"targets": name, "shards": shards, "command": _command(url, name)}
            for name, shards in withdrawn.items()
        ],
        "left": outcome.left,
        "remaining": _problems(final.problems),
    }


def repair_view(data: dict[str, Any], report: Report) -> RenderableType:
    """The verification's problems, then what becomes of each."""
    parts = [verify_view(data["store"], report)]
    applied = data["applied"]

    def section(title: str, lines: list[str]) -> None:
        if lines:
            parts.extend([_title(title), *(Text(f"  {printable(line)}") for line in lines)])

    section("mended" if applied else "would be mended", data["mended"])
    section(
        "lost, to be written again" if applied else "would be given up, and then be written again",
        [
            f"{_what(item['targets'])}, {_shards(item['shards'])}: {item['command']}"
            for item in data["write_again"]
        ],
    )
    section("written again", [_what(name) for name in data["written_again"]])
    section("left to you", data["left"])
    if applied:
        told = tuple(line.split(": ")[0] for line in data["left"])
        others = [problem for problem in data["remaining"] if problem["file"] not in told]
        section(
            "still damaged; repair again",
            [f"{problem['file']}: {problem['what']}" for problem in others],
        )
        if data["ok"]:
            parts.append(_title("whole again"))
    elif data["mended"] or data["write_again"]:
        parts.append(_title("nothing was changed; --apply does it"))
    return Group(*parts)


def _command(url: str, name: str | None) -> str:
    """What writes the missing shards: tokens by their config, targets by manifest and teacher."""
    if name is None:
        return f"retort tokenize --store {shlex.quote(url)} …"
    return f"retort repair {shlex.quote(url)} --apply --teacher …"


def _what(name: str | None) -> str:
    return "tokens" if name is None else f"targets '{name}'"


def _shards(indices: list[int]) -> str:
    """Sorted indices, runs of them as ranges: 'shards 0-3, 7'."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"{'shard' if len(indices) == 1 else 'shards'} {text}"


def _title(text: str) -> Text:
    return Text(printable(text), style="bold")


def _pairs(title: str, rows: list[tuple[str, str]]) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for key, value in rows:
        table.add_row(Text(f"  {key}"), Text(printable(value)))
    return Group(_title(title), table)


def _sizes(found: Summary) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("  array", "bytes", "per token"):
        table.add_column(heading, justify="left" if heading == "  array" else "right")
    for name, size in found.sizes.items():
        table.add_row(f"  {name}", f"{size:,}", f"{size / max(found.tokens, 1):.2f}")
    return table


def _complete(found: Summary) -> str:
    if found.committed_shards == found.shards:
        return f"yes, {found.shards} shards"
    return f"no, {found.committed_shards} of {found.shards} shards"
