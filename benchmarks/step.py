"""Time of one micro-step, forward and backward, against the frozen model and against the usual way.

    python benchmarks/step.py                         # toy and one block of the real width
    python benchmarks/step.py --cases toy block full  # also the whole decoder; for a CUDA device
    python benchmarks/step.py --cases full --variants LoRA "LoRA, usual, checkpointed" --repeats 2  # or some of it

All variants of a case share the frozen weights, and take turns in one process, so that whatever else the machine does
meets all of them; compare the ratios. On the CPU the time is that of the processor, and not of the clock.

The floor is the frozen model with windowed attention, differentiated to its inputs, as all of them are. The usual way
is PEFT, LoRA with dropout 0.1, or LyCORIS adding to the weight, with attention that masks its window, with and without
gradient checkpointing. All adapters are on attention and MLP, with the default settings here (LoRA rank 64; LoKr rank
64, factor 8).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["LYCORIS_KERNEL_BACKEND"] = "torch"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peft
import torch
from diffusers import AceStepTransformer1DModel
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sidestep.acestep.attention import WindowedAttention
from sidestep.acestep.frozen import streamline
from sidestep.adapters import AdapterConfig
from sidestep.adapters.base import resolve_targets
from sidestep.adapters.lokr import LokrConfig
from sidestep.adapters.lora import DoraConfig, LoraConfig
from sidestep.training.loop import compile_blocks

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONDITION_TOKENS = 769  # a long caption and lyrics


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and its input."""

    name: str
    dtype: str
    num_tokens: int
    """Latent patches, 12.5 for each second."""
    sizes: dict[str, Any]
    """Of the transformer; everything else is as in the real one."""
    batch_size: int = 1


TOY = Case(
    name="toy (256 wide, 4 layers)",
    dtype="float32",
    num_tokens=750,
    sizes={
        "num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64,
    },
)  # fmt: skip
BLOCKS = [
    Case(name="one block, 2,048 wide", dtype=dtype, num_tokens=1500, sizes={"num_hidden_layers": 1})
    for dtype in ("bfloat16", "float32")
]
FULL = [Case(name="whole decoder", dtype="bfloat16", num_tokens=tokens, sizes={}) for tokens in (750, 3000)]
CASES = {"toy": [TOY], "block": BLOCKS, "full": FULL}


def windowed(config: AdapterConfig | None) -> Callable[[AceStepTransformer1DModel], None]:
    """Ours: an adapter, or none for the floor."""

    def prepare(transformer: AceStepTransformer1DModel) -> None:
        streamline(transformer)
        WindowedAttention(transformer)
        if config is not None:
            config.attach(transformer)

    return prepare


def with_peft(transformer: AceStepTransformer1DModel) -> None:
    paths = resolve_targets(transformer, TARGETS)
    peft.get_peft_model(transformer, peft.LoraConfig(r=64, lora_alpha=64, lora_dropout=0.1, target_modules=paths))


def with_lycoris(transformer: AceStepTransformer1DModel) -> None:
    layers = nn.ModuleList()
    for path in resolve_targets(transformer, TARGETS):
        layer = LokrModule(path.replace(".", "_"), transformer.get_submodule(path), lora_dim=64, alpha=64, factor=8)
        layer.apply_to()
        layers.append(layer)
    transformer.add_module("lycoris", layers.to(transformer.device))


def peft_s_dora(transformer: AceStepTransformer1DModel) -> None:
    paths = resolve_targets(transformer, TARGETS)
    peft.get_peft_model(transformer, peft.LoraConfig(r=64, lora_alpha=64, use_dora=True, target_modules=paths))


LORA, LOKR = LoraConfig(target_modules=TARGETS), LokrConfig(target_modules=TARGETS)
DORA = DoraConfig(target_modules=TARGETS)
VARIANTS: dict[str, tuple[Callable[[AceStepTransformer1DModel], None], bool]] = {
    "floor": (windowed(None), False),
    "frozen, masked attention": (lambda transformer: None, False),
    "LoRA": (windowed(LORA), False),
    "LoRA, checkpointed": (windowed(LORA), True),
    "LoRA, usual": (with_peft, False),
    "LoRA, usual, checkpointed": (with_peft, True),
    "DoRA": (windowed(DORA), False),
    "DoRA, usual": (peft_s_dora, False),
    "LoKr": (windowed(LOKR), False),
    "LoKr, checkpointed": (windowed(LOKR), True),
    "LoKr, usual": (with_lycoris, False),
    "LoKr, usual, checkpointed": (with_lycoris, True),
}
"""How each is prepared, and whether it recomputes every layer."""


def compiled(config: AdapterConfig) -> Callable[[AceStepTransformer1DModel], None]:
    def prepare(transformer: AceStepTransformer1DModel) -> None:
        windowed(config)(transformer)
        compile_blocks(transformer, transformer.device)

    return prepare


ON_CUDA = {"LoRA, compiled": (compiled(LORA), False), "LoKr, compiled": (compiled(LOKR), False)}
"""Further variants for a CUDA device."""


class MicroStep:
    """One variant of a case, to be run again and again."""

    def __init__(
        self,
        case: Case,
        prepare: Callable[[AceStepTransformer1DModel], None],
        checkpointed: bool,
        weights: dict[str, Tensor],
        device: torch.device,
    ) -> None:
        with torch.device("meta"):
            self.transformer = AceStepTransformer1DModel(**case.sizes)
        self.transformer.load_state_dict(weights, assign=True)
        self.transformer.requires_grad_(False).train()
        prepare(self.transformer)
        if checkpointed:
            self.transformer.enable_gradient_checkpointing()
        self.dtype, self.device = getattr(torch, case.dtype), device
        generator = torch.Generator().manual_seed(0)

        def draw(length: int, channels: int) -> Tensor:
            return torch.randn(case.batch_size, length, channels, generator=generator).to(device, self.dtype)

        config = self.transformer.config
        t = torch.full((case.batch_size,), 0.5, device=device, dtype=self.dtype)
        self.target = draw(2 * case.num_tokens, 64)
        self.inputs = {
            "hidden_states": draw(2 * case.num_tokens, 64).requires_grad_(),  # in each, as if other layers were below
            "timestep": t,
            "timestep_r": t,
            "encoder_hidden_states": draw(CONDITION_TOKENS, config.encoder_hidden_size or config.hidden_size),
            "context_latents": draw(2 * case.num_tokens, 128),
        }

    def __call__(self) -> float:
        """Run forward and backward and return the seconds they took."""
        for tensor in (*self.transformer.parameters(), self.inputs["hidden_states"]):
            tensor.grad = None
        on_cuda = self.device.type == "cuda"
        clock = time.perf_counter if on_cuda else time.process_time
        if on_cuda:
            torch.cuda.synchronize()
        start = clock()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            velocity = self.transformer(**self.inputs, return_dict=False)[0]
            loss = (velocity.float() - self.target).square().mean()
        loss.backward()
        if on_cuda:
            torch.cuda.synchronize()
        return clock() - start

    def flops(self) -> int:
        """Count the operations of a step; of a variant that recomputes nothing, all of them are useful."""
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops()

    def kept_mib(self) -> float:
        """Count what one forward pass keeps for the backward pass, besides the weights, in MiB."""
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self()
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.transformer.parameters()}
        return sum(size for at, size in kept.items() if at not in weights) / 2**20

    def peak_mib(self) -> float | None:
        """Measure the peak of a step above what is held before it, in MiB; only a CUDA device counts it."""
        if self.device.type != "cuda":
            return None
        for tensor in (*self.transformer.parameters(), self.inputs["hidden_states"]):
            tensor.grad = None  # those of the step before
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def matmul_rate(device: torch.device, dtype: str) -> float:
    """Measure how many operations per second a large matrix product makes."""
    size, repeats = 8192, 20
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def random_weights(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Weights of a case's transformer, for all its variants."""
    torch.manual_seed(0)
    with device:
        weights = AceStepTransformer1DModel(**case.sizes).state_dict()
    return {name: tensor.to(getattr(torch, case.dtype)) for name, tensor in weights.items()}


def measure(case: Case, device: torch.device, repeats: int, variants: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Give one row for each variant of a case; ratios are those to the first one."""
    weights = random_weights(case, device)
    steps = {name: MicroStep(case, *(VARIANTS | ON_CUDA)[name], weights, device) for name in variants}
    memory = {variant: (step.kept_mib(), step.peak_mib()) for variant, step in steps.items()}  # also warms up
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    order = random.Random(0)  # what runs before a step leaves caches and memory to it
    for _ in range(repeats):
        for variant in order.sample(list(steps), len(steps)):
            seconds[variant].append(steps[variant]())
    first = next(iter(steps))
    floor = statistics.median(seconds[first])
    rate = matmul_rate(device, case.dtype) if device.type == "cuda" else None
    useful = {name: steps[name].flops() for name in ("LoRA", "LoKr") if name in steps} if rate is not None else {}
    for variant, times in seconds.items():
        median = statistics.median(times)
        ratio = statistics.median(time / base for time, base in zip(times, seconds[first], strict=True))
        kept, peak = memory[variant]
        family = variant.partition(",")[0]
        yield {
            "variant": variant,
            "seconds": round(median, 5),
            "to_floor": round(ratio, 3),
            "spread": round((max(times) - min(times)) / floor, 3),
            "kept_mib": round(kept, 1),
            "peak_mib": None if peak is None else round(peak, 1),
            "of_matmul_rate": round(useful[family] / median / rate, 3) if rate and family in useful else None,
        }


def table(rows: list[dict[str, Any]]) -> str:
    """Write rows as a Markdown table."""
    lines = [
        "| variant | time / floor | spread | kept for backward, MiB | peak, MiB | of the matmul rate |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        rate = "" if row["of_matmul_rate"] is None else f"{row['of_matmul_rate']:.0%}"
        cells = (row["variant"], f"{row['to_floor']:.2f}", f"{row['spread']:.2f}", f"{row['kept_mib']:.0f}", peak, rate)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["toy", "block"])
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, *ON_CUDA], help="all by default")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each variant; the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/step.json"))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    on_cuda = device.type == "cuda"
    if not on_cuda and "full" in options.cases and options.variants is None:
        parser.error("--cases full takes hours on a CPU; say which --variants")
    variants = options.variants or [*VARIANTS, *(ON_CUDA if on_cuda else ())]
    torch.set_num_threads(options.threads)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {options.threads} thread(s)"
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "load": os.getloadavg(), "cases": []}
    for case in [case for name in options.cases for case in CASES[name]]:
        if not on_cuda and case.num_tokens > 1500:
            continue  # an hour of a CPU for each step
        rows = list(measure(case, device, options.repeats, variants))
        result["cases"].append({**asdict(case), "rows": rows})
        print(f"\n{case.name}, {case.num_tokens} tokens, {case.dtype}, {name}\n\n{table(rows)}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
