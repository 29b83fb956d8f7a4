"""Compiling for TPUs that are not there: two generations, and what is read out of a program."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gemma2 import attention, flops, splash
from pipelines import cli, collectives, topology
from pipelines.collectives import Collective
from pipelines.products import product_flops
from schemas.errors import MissingDependencyError
from schemas.model import ModelConfig

needs_compiler = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed"
)
ROOT = Path(__file__).parent.parent
# Three pairs of layers are a loop; two would be unrolled.
MODEL = ModelConfig(
    vocab_size=2048,
    d_model=256,
    num_layers=6,
    mlp_width=768,
    num_heads=4,
    num_kv_heads=2,
    head_size=128,
    query_scalar=128,
    window_tokens=256,
)
# One block of the attention's kernel on v5e, two on v4, whose blocks are smaller.
LENGTH = {"v5e": 512, "v4": 1024}
BLOCK = 512


def compiled(folder: Path, generation: str, *flags: str) -> dict[str, Any]:
    """What `retort compile --json` says; in a process of its own, as libtpu is one for each."""
    file = folder / "model.json"
    file.write_text(MODEL.model_dump_json())
    command = [sys.executable, "-m", "pipelines.cli", "compile", "--json", "--model", str(file)]
    command += ["--sequence_tokens", str(LENGTH[generation]), *flags]
    # Without the eight CPU devices of the other tests.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def v5e(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compiled(tmp_path_factory.mktemp("v5e"), "v5e", "--topology", "v5e:2x2")


@pytest.fixture(scope="module")
def v4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("v4")
    mesh = ["--mesh.fsdp", "2", "--mesh.model", "2"]
    return compiled(folder, "v4", "--topology", "v4:2x2x1", *mesh)


def computed_flops(generation: str, rows: int) -> float:
    """Of a step over all chips: layers are run forward twice, attention in whole blocks."""
    length = LENGTH[generation]
    blocks = length // BLOCK
    needed = flops.forward_flops_per_token(MODEL, length)
    tokens = rows * length
    # A window of 256 reaches into the block before.
    local = blocks + (blocks - 1)
    causal = blocks * (blocks + 1) // 2
    visited = (local + causal) * BLOCK**2 * MODEL.num_layers // 2
    # Products of a pair: 2 forward, twice; 3 for the query's gradient, 4 for key's and value's.
    attention = rows * visited * (2 * 2 + 3 + 4) * 2 * MODEL.num_heads * MODEL.head_size
    return tokens * (4 * needed.linear + 3 * needed.head) + attention


def find(report: dict[str, Any], kind: str, axes: str, dtype: str) -> dict[str, Any]:
    (found,) = (
        item
        for item in report["collectives"]
        if (item["kind"], item["axes"], item["dtype"]) == (kind, axes, dtype)
    )
    return found


def check_memory(report: dict[str, Any]) -> None:
    memory, counted = report["memory"], flops.parameters(MODEL)
    # float32 parameters and two moments; norms lie whole on each chip. The rest is the batch.
    state = 12 * (counted.embedding + counted.linear) / report["chips"] + 12 * counted.norms
    tokens = report["tokens"] // report["mesh"]["fsdp"]
    batch = tokens * (18 * 8 + 8 + 4 + 8)
    assert memory["arguments_bytes"] == pytest.approx(state + batch, rel=0.03)
    # The state is donated.
    assert memory["aliased_bytes"] == pytest.approx(state, rel=0.03)
    # At least the logits of a chunk in float32, and a float32 gradient of the table.
    share = report["mesh"]["model"]
    chunk = min(report["config"]["loss_chunk_tokens"], tokens)
    least = 4 * MODEL.vocab_size * (chunk + MODEL.d_model) / share
    assert least < memory["temporary_bytes"] < 10 * least
    assert memory["fits"]


@needs_compiler
def test_a_step_for_v5e(v5e):
    assert (v5e["chips"], v5e["attention"], v5e["tokens"]) == (4, "splash", 4 * LENGTH["v5e"])
    check_memory(v5e)
    assert v5e["program_flops"] * 4 == pytest.approx(computed_flops("v5e", 4), rel=1e-3)
    assert v5e["model_flops"] * 4 == pytest.approx(
        4 * LENGTH["v5e"] * flops.training_flops_per_token(MODEL, LENGTH["v5e"])
    )
    # Weights are gathered for the forward and again for the backward, the table once or twice,
    # in bfloat16: a chip sends 3 of 4 parts.
    counted = flops.parameters(MODEL)
    gathered = find(v5e, "all-gather", "fsdp", "bf16")["sent_bytes"]
    layers, table = 2 * counted.linear * 2 * 3 / 4, counted.embedding * 2 * 3 / 4
    assert layers + 0.9 * table < gathered < layers + 2.1 * table
    assert not [c for c in v5e["collectives"] if c["kind"] == "all-gather" and c["dtype"] == "f32"]
    assert {c["axes"] for c in v5e["collectives"]} == {"fsdp"}


@needs_compiler
def test_a_step_for_v4_with_a_model_axis(v4):
    assert (v4["chips"], v4["attention"]) == (4, "splash_v4")
    assert v4["mesh"] == {"replica": 1, "fsdp": 2, "model": 2}
    check_memory(v4)
    assert v4["program_flops"] * 4 == pytest.approx(computed_flops("v4", 2), rel=1e-3)
    # Each chip gathers its half of the layers' weights from one other.
    counted = flops.parameters(MODEL)
    gathered = find(v4, "all-gather", "fsdp", "bf16")["sent_bytes"]
    layers, table = 2 * counted.linear / 2, counted.embedding / 2
    assert layers + 0.9 * table < gathered < layers + 2.1 * table
    # What heads and the MLP add up: hidden states of each layer, at least four times.
    reduced = sum(
        c["sent_bytes"] for c in v4["collectives"] if c["axes"] == "model" and c["dtype"] == "bf16"
    )
    assert reduced > 4 * MODEL.num_layers * LENGTH["v4"] * MODEL.d_model * 2


@needs_compiler
def test_replicas_lie_on_slices():
    code = """
from pipelines import topology
from schemas.runs import MeshConfig
from student_train.mesh import make_mesh
mesh = make_mesh(MeshConfig(replica=4, model=2), topology.devices("v5e:4x4", 2))
print([sorted({d.slice_index for d in part.flat}) for part in mesh.devices], mesh.devices.shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[[0], [0], [1], [1]] (4, 4, 2)"


@needs_compiler
def test_what_cannot_be_compiled_is_one_sentence(tmp_path):
    """Of all of these in one process, as each loads the compiler."""
    wrong = [
        (["--topology", "v5litepod:2x2"], "topology must be .*'v5litepod:2x2'"),
        (["--topology", "v5e:3x3"], "topology must be .*'v5e:3x3'"),
        (["--topology", "tpu7x:2x2x1"], "topology must be of v4, v5e, v5p, v6e, .* TPU7x"),
        (["--topology", "v5e:2x2", "--mesh.replica", "3"], "must use every device"),
        (["--topology", "v5e:2x2", "--slices", "2"], "mesh.replica must be a multiple of the 2"),
        (["--topology", "v5e:2x2", "--attention", "splash_v4"], "lacks device TPU v5 lite"),
        (
            ["--topology", "v5e:2x2", "--teacher", "--model", "gemma2-27b"],
            r"must fit a chip's memory, but the compiler ran out .* HBM \(15.75G\); give fewer",
        ),
    ]
    code = "import sys; from pipelines import cli\n" + "".join(
        f"print(cli.main(['compile', *{flags!r}]), file=sys.stderr)\n" for flags, _ in wrong
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    answers = done.stderr.strip().split("\n")
    for (_, message), answer, status in zip(wrong, answers[::2], answers[1::2], strict=True):
        assert re.search(f"^retort compile: .*{message}", answer)
        assert status == "2"


def test_without_the_compiler_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'jax\[tpu\]'"):
        topology.devices("v5e:2x2", 1)


def test_the_verb_has_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compile", "--help"])
    assert "--topology" in capsys.readouterr().out


HLO = """HloModule step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input: f32[64]) -> f32[16] {
  %r = f32[64]{0} all-reduce(%i), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%part.1 (p: bf16[8]) -> bf16[32] {
  %g1 = bf16[32]{0} all-gather(%p), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'b'}
}

%part.2 (p: bf16[8]) -> bf16[32] {
  %g2 = bf16[32]{0} all-gather(%p), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'b'}
}

%condition (p: (s32[])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %f1 = bf16[32] fusion(%w), kind=kCustom, calls=%part.1
  %f2 = bf16[32] fusion(%w), kind=kCustom, calls=%part.2
  %p = (f32[4], f32[4], u32[]) collective-permute-start(%x), source_target_pairs={{0,4},{4,0}}
}

ENTRY %main (w: bf16[8]) -> f32[16] {
  %loop = (s32[]) while(%init), condition=%condition, body=%body
  %s = (bf16[5,2], u32[], token[]) send(%v), is_host_transfer=true, name="xla_megascale_runtime"
  %f3 = f32[16] fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %both = (f32[10]{0}, f32[6]{0}) all-reduce(%y, %z), replica_groups=[4,2]<=[2,4]T(1,0)
}
"""


def test_collectives_are_read_with_axis_bytes_and_trips():
    mesh = {"replica": 2, "fsdp": 4}
    assert collectives.read(HLO, mesh) == [
        # 64 bytes, of which three of four parts are sent, five times, in two asynchronous parts.
        Collective("all-gather", "bf16", "fsdp", 5, 5 * 48),
        Collective("reduce-scatter", "f32", "fsdp", 1, 192),
        Collective("collective-permute", "f32", "replica", 5, 5 * 16),
        Collective("all-reduce", "f32", "replica", 1, 2 * 64 // 2),
        Collective("send", "bf16", collectives.SLICES, 1, 20),
    ]


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="must count to one constant"):
        collectives.read(HLO.replace("constant(5)", "parameter(5)"), {"replica": 2, "fsdp": 4})


def test_products_count_loops_devices_and_branches():
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,), devices=jax.devices()[:4])

    def local(x: Any) -> Any:
        x, _ = jax.lax.scan(lambda c, _: (c @ c, None), x, length=7)  # 2 · 3³ each
        return jax.lax.cond(x[0, 0] > 0, lambda a: a @ a @ a, lambda a: a, x)

    def program(x: Any, y: Any) -> Any:
        run = jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        return run(x), jnp.einsum("bij,bjk->bik", y, y)

    traced = jax.jit(program).trace(jnp.zeros((12, 3)), jnp.zeros((5, 2, 2)))
    assert product_flops(traced) == 4 * (7 + 2) * 2 * 3**3 + 5 * 2 * 2**3


def test_a_product_in_a_loop_of_unknown_length_is_refused():
    def program(x: Any) -> Any:
        return jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ c, x)

    with pytest.raises(ValueError, match="cannot be counted"):
        product_flops(jax.jit(program).trace(jnp.zeros((2, 2))))


@pytest.mark.parametrize(("name", "block"), [("splash", 1024), ("splash_v4", 512)])
def test_a_generation_has_blocks_of_its_own(name, block):
    query, segments = jnp.zeros((1, 2048, 1, 128)), jnp.ones((1, 2048), jnp.int32)

    def forward(q: Any) -> Any:
        return attention.KERNELS[name].run(q, q, q, segments, cap=50.0, window=None)

    visited = (2048 // block) * (2048 // block + 1) // 2 * block**2
    assert product_flops(jax.jit(forward).trace(query)) == 2 * 2 * visited * 128


@pytest.mark.parametrize(("window", "visited"), [(None, 10), (128, 7), (129, 7), (130, 9)])
def test_of_splash_attention_the_blocks_that_it_visits_count(window, visited):
    """Of 4 · 4 blocks of 128: the causal ones; of a window, those that some query reaches into."""
    query = jnp.zeros((3, 512, 4, 128))
    key = jnp.zeros((3, 512, 2, 128))

    def forward(q: Any, k: Any) -> Any:
        segments = jnp.ones((3, 512), jnp.int32)
        return splash.attention(q, k, k, segments, cap=50.0, window=window, largest_block=128)

    pair = 2 * 128 * 128 * 128
    one = 3 * 4 * visited * pair
    assert product_flops(jax.jit(forward).trace(query, key)) == 2 * one
    backward = jax.jit(jax.grad(lambda q, k: jnp.sum(forward(q, k)), argnums=(0, 1)))
    # The gradients' kernels compute the scores again: 3 and 4 products. Of each query, the output
    # times its gradient.
    outputs = 2 * 3 * 4 * 512 * 128
    assert product_flops(backward.trace(query, key)) == (2 + 3 + 4) * one + outputs
