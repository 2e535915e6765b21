"""Where to get what is advised, and with which settings it was run."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.advice.document import Part, Table
from analysis.advice.texts import options_of
from analysis.data.load import Run
from analysis.present.style import label

#: By policy, who has it; ``{spare}``: slots of all ranks beside one per expert, ``{slots}``: all of them.
ORIGINS = {
    "harmoeny": "this project's library: harmoeny.HarMoEny",
    "harmoeny_tokens": "this project's library: harmoeny.TokenHarMoEny",
    "eplb": "vLLM (--enable-eplb --eplb-config '{{\"num_redundant_experts\": {spare}}}'), SGLang (--enable-eplb "
    "--ep-num-redundant-experts {spare}), github.com/deepseek-ai/EPLB",
    "lplb": "SGLang (--ep-dispatch-algorithm lp --ep-num-redundant-experts {spare}), github.com/deepseek-ai/LPLB",
    "eplb_lp": "github.com/deepseek-ai/LPLB is the nearest",
    "trtllm_eplb": "TensorRT-LLM (moe_config.load_balancer: a file with num_slots: {slots} and layer_updates_per_iter)",
    "flashlb": "vLLM Ascend (FlashLB, a policy of its eplb_config)",
    "metro": "no code was published; arXiv 2512.09277",
    "libra": "github.com/SNU-ARC/Libra",
    "ultraep": "github.com/Dots-Infra/UltraEP",
    "llep": "github.com/SalesforceAIResearch/LeastLoadedEP",
    "moonep": "github.com/MoonshotAI/MoonEP",
    "fastermoe": "github.com/laekov/fastmoe, for training",
    "eps_moe": "no code was published; arXiv 2410.12247",
}
#: Options that count recorded batches.
_BATCHES = ("interval", "window")


def getting(run: Run, systems: Sequence[str]) -> list[Part]:
    """Say of every advised system where it is to be had and how it was set; nothing where nothing is advised.

    Args:
        run: any that has them with the memory that is advised.
        systems: the best one first.
    """
    if not systems:
        return []
    num_experts, world_size = int(run.manifest["model"]["num_experts"]), int(run.manifest["world_size"])
    slots = world_size * (-(-num_experts // world_size) + int(run.config.get("spare_slots") or 0))
    rows, counted = [], False
    for system in systems:
        options = options_of(run, system)
        counted |= any(name in options for name in _BATCHES)
        policy = str(run.systems[system].get("policy", system))
        origin = ORIGINS.get(policy, "docs/systems.md").format(spare=slots - num_experts, slots=slots)
        set_to = ", ".join(f"{name}={value}" for name, value in options.items())
        rows.append([label(system), set_to or "has nothing to set", origin])
    return [
        Part(
            "Where to get it",
            text=[
                "Engines and other projects have kernels and runtimes of their own, and gain something else: measure "
                "there. In this project's library, for models of Transformers, all of them run as harmoeny.load(path, "
                f"policy) (docs/models.md).{_batches(run) if counted else ''}"
            ],
            table=Table(["system", "as it was set here", "who has it"], rows),
        )
    ]


def _batches(run: Run) -> str:
    """Say what windows and intervals count."""
    tokens = (run.manifest.get("dataset") or {}).get("recorded_tokens")
    size = f", of {tokens:,} tokens of all ranks" if tokens else ""
    return f" Windows and intervals count recorded batches{size}."
