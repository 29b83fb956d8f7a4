"""The same training step in PyTorch: transformers, FlashAttention-4, layers compiled one by one.

`python -m benchmarks.peer_step --out DIR` wants a GPU, PyTorch, transformers and flash-attn-4. The
peer is given every advantage: parameters and AdamW's moments in bfloat16 (ours are float32), no
clipping, no guard, no label's loss, one document a row, targets that need no unpacking, and steps
timed in a row. Its head is measured twice: with autograd, and with its gradient formed in one pass.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import transformers

from benchmarks.synthetic import zipf_ids
from gemma2 import flops, presets
from schemas.model import ModelConfig

FLASH = "flash_attention_4"
MATRIX, MATRIX_ON_CPU = 8192, 1024
PRODUCTS, REPEATS = 20, 5
WARM_UP = 4
GIB = 2**30

Head = Callable[..., torch.Tensor]
"""(hidden [N, D], table [V, D], ids [N, K], weights [N, K], scale) → loss; adds gradients."""


def make_model(config: ModelConfig, attention: str, device: str) -> Any:
    """The model with random parameters in bfloat16."""
    theirs = transformers.Gemma2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_size,
        query_pre_attn_scalar=config.query_scalar,
        sliding_window=config.window_tokens,
        attn_logit_softcapping=config.attention_cap,
        final_logit_softcapping=config.final_cap,
        max_position_embeddings=config.max_tokens,
        rms_norm_eps=config.norm_epsilon,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.Gemma2ForCausalLM._from_config(theirs, attn_implementation=attention)
    torch.set_default_dtype(torch.float32)
    return model.train()


def capped(z: torch.Tensor, cap: float) -> torch.Tensor:
    return cap * torch.tanh(z.float() / cap)


def autograd_loss(
    cap: float,
    hidden: torch.Tensor,
    table: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Σ m·logsumexp − Σ p̂ s, times `scale`, to differentiate."""
    z = hidden @ table.t()
    s = capped(z, cap)
    kd = weights.sum(-1) * torch.logsumexp(s, -1) - (weights * s.gather(1, ids)).sum(-1)
    return scale * kd.sum()


def loss_and_gradient(
    cap: float,
    hidden: torch.Tensor,
    table: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, its dense gradient to z [N, V], what the entries add to it [N, K])."""
    z = hidden @ table.t()
    ratio = torch.tanh(z.float() / cap)
    logsumexp = torch.logsumexp(cap * ratio, -1)
    mass = weights.sum(-1)
    at_entries = torch.tanh(z.gather(1, ids).float() / cap)
    loss = scale * (mass * logsumexp - (weights * cap * at_entries).sum(-1)).sum()
    softmax = torch.exp(cap * ratio - logsumexp[:, None])
    dense = (1 - ratio * ratio) * softmax * (scale * mass)[:, None]
    entries = -scale * weights * (1 - at_entries * at_entries)
    return loss, dense.to(z.dtype), entries.to(z.dtype)


def autograd_head(function: Any, hidden: torch.Tensor, table: Any, *rest: Any) -> torch.Tensor:
    loss = function(hidden, table, *rest)
    loss.backward()
    return loss.detach()


@torch.no_grad()
def one_pass_head(
    function: Any, hidden: torch.Tensor, table: Any, ids: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """The gradients without autograd: no backward of the gather, no second pass over the logits."""
    loss, gradient, entries = function(hidden, table, ids, *rest)
    gradient.scatter_add_(1, ids, entries)
    hidden.grad = gradient @ table
    if table.grad is None:
        table.grad = gradient.t() @ hidden
    else:
        table.grad.addmm_(gradient.t(), hidden)
    return loss


HEADS: dict[str, tuple[Any, Any]] = {
    "autograd": (autograd_head, autograd_loss),
    "one-pass": (one_pass_head, loss_and_gradient),
}


class Peer:
    """The model, its optimizer, one batch, and the step over them."""

    def __init__(self, options: argparse.Namespace, config: ModelConfig, device: str):
        self.options, self.config = options, config
        self.model = make_model(config, options.attention, device)
        self._compile(options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        random = np.random.default_rng(0)
        rows, tokens, entries = options.rows, options.tokens, options.entries

        def ids(*shape: int) -> torch.Tensor:
            found = zipf_ids(random, config.vocab_size, shape)
            return torch.as_tensor(found, dtype=torch.long, device=device)

        self.tokens, self.ids = ids(rows, tokens), ids(rows * tokens, entries)
        weights = torch.rand(rows * tokens, entries, device=device)
        self.weights = weights / weights.sum(-1, keepdim=True)

    def _compile(self, options: argparse.Namespace) -> None:
        compiled = partial(torch.compile, mode=options.compile_mode, dynamic=False)
        if options.remat == "full":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in self.model.model.layers:
            # What is computed again cannot be compiled as a whole layer.
            part = layer.mlp if options.remat == "full" else layer
            part.forward = compiled(part.forward)

    def step(self, head: Head) -> torch.Tensor:
        """The loss of a step, which changes the parameters."""
        hidden = self.model.model(input_ids=self.tokens).last_hidden_state
        hidden = hidden.reshape(-1, self.config.d_model)
        leaf = hidden.detach()
        gradient = torch.empty_like(leaf)
        total = torch.zeros((), device=leaf.device)
        for first in range(0, len(leaf), self.options.head_tokens):
            part = slice(first, first + self.options.head_tokens)
            chunk = leaf[part].requires_grad_()
            table = self.model.lm_head.weight
            total += head(chunk, table, self.ids[part], self.weights[part], 1 / len(leaf))
            gradient[part] = chunk.grad
        hidden.backward(gradient)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def matrix_rates(device: str) -> list[float]:
    """FLOP/s of a product of large bfloat16 matrices, in each of several repeats."""
    size, products = (MATRIX, PRODUCTS) if device == "cuda" else (MATRIX_ON_CPU, 1)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    left @ right
    found = []
    for _ in range(REPEATS):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(products):
            left @ right
        synchronize(device)
        found.append(2 * size**3 * products / (time.perf_counter() - start))
    return found


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(peer: Peer, name: str, device: str) -> dict[str, Any]:
    """Time the step with one of the heads; prints. Returns the record."""
    options = peer.options
    run, function = HEADS[name]
    assert peer.config.final_cap is not None
    compiled = torch.compile(
        partial(function, peer.config.final_cap), mode=options.compile_mode, dynamic=False
    )
    head = partial(run, compiled)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(WARM_UP):
        loss = peer.step(head)
    synchronize(device)
    warm_up_seconds = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(options.steps):
        loss = peer.step(head)
    synchronize(device)
    seconds = (time.perf_counter() - start) / options.steps
    tokens = options.rows * options.tokens
    needed = flops.training_flops_per_token(peer.config, options.tokens) * tokens
    needed_by_head = (
        flops.TRAINING_TO_FORWARD
        * flops.forward_flops_per_token(peer.config, options.tokens).head
        * tokens
    )
    peak_bytes = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    print(
        f"  head {name}: {1e3 * seconds:.1f} ms a step, {tokens / seconds:,.0f} tokens/s, "
        f"{needed / seconds / 1e12:.1f} model TFLOP/s (head {needed_by_head / seconds / 1e12:.1f})"
        f"; peak {peak_bytes / GIB:.1f} GiB, loss {loss.item():.3f}, warm-up with compilation "
        f"{warm_up_seconds:.0f} s",
        flush=True,
    )
    return {
        "head": name,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "model_flops_per_second": needed / seconds,
        "peak_bytes": peak_bytes,
        "loss": loss.item(),
        "warm_up_seconds": warm_up_seconds,
    }


def lacks_flash() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is None
    except ModuleNotFoundError:
        return True


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="gemma2-2.6b", help="preset, or a file of a ModelConfig")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--entries", type=int, default=32, help="of each token")
    parser.add_argument("--remat", choices=("none", "full"), default="none")
    parser.add_argument("--attention", default=FLASH)
    parser.add_argument("--head", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--head-tokens", type=int, default=8192, help="tokens of one product")
    parser.add_argument("--compile-mode", default="default", help="of torch.compile")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/step_speed"))
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.attention == FLASH and lacks_flash():
        print(
            "The peer's attention is FlashAttention-4, but flash_attn.cute is not installed; "
            "install flash-attn-4 or choose another --attention.",
            file=sys.stderr,
        )
        sys.exit(2)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64
    config = presets.resolve(options.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(
        f"{kind}, torch {torch.__version__}, transformers {transformers.__version__}: "
        f"{options.model} {options.rows} x {options.tokens}, {options.entries} entries, remat "
        f"{options.remat}, {options.attention}, all of it bfloat16",
        flush=True,
    )
    rates = matrix_rates(device)
    peer = Peer(options, config, device)
    records = [measure(peer, name, device) for name in options.head]
    rates += matrix_rates(device)
    matrix = statistics.median(rates)
    best = max(record["model_flops_per_second"] for record in records)
    print(
        f"  {MATRIX if device == 'cuda' else MATRIX_ON_CPU}^3 bfloat16 product "
        f"{matrix / 1e12:.1f} TFLOP/s ({min(rates) / 1e12:.1f} to {max(rates) / 1e12:.1f}); the "
        f"better step is {best / matrix:.1%} of it",
        flush=True,
    )
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    with (options.out / "peer.jsonl").open("a") as file:
        record = {"device": kind, "settings": settings, "versions": versions}
        file.write(json.dumps(record | {"matrix": rates, "steps": records}) + "\n")


if __name__ == "__main__":
    main()
