"""GPU memory and disk that a run takes, estimated before it starts."""

import math
import shutil
from dataclasses import dataclass, replace

from tool_calling.arguments import CONVERTED_GGUF
from tool_calling.engines.graphs import EAGER_MEMORY, HELD_SHARE, RECORDED_MEMORY, count_token_bytes
from tool_calling.files import find_existing
from tool_calling.terminal import UserError, plural

SMALL_FILES = 2**24  # bytes of tokenizer, settings and state that are saved beside weights
FOUR_BIT = 0.53  # bytes of a weight in 4 bits, with the scales of its block


@dataclass(frozen=True)
class Saving:
    """What a run saves, and where: the flags of the same names."""

    output_dir: str
    final_model_dir: str
    save_method: str = "merged_16bit"
    save_gguf: str | None = None
    save_steps: int | None = None
    save_total_limit: int | None = None
    metric_for_best: str | None = None

    def count_final_bytes(self, parameters: dict[str, int]) -> int:
        """Return the bytes of the final folder at most, also while it is made; 0 if only the adapter is saved."""
        whole = parameters["linear"] + parameters["other"]
        sizes = [2.0]  # bytes per weight
        if self.save_method == "merged_4bit":
            sizes.append((FOUR_BIT * parameters["linear"] + 2 * parameters["other"]) / whole)
        names = self.save_gguf.split(",") if self.save_gguf else []
        if not set(names) <= set(CONVERTED_GGUF):
            sizes.append(2)  # the file from which the others are made
        sizes += [{"f32": 4, "f16": 2, "bf16": 2}.get(name, 1.1) for name in names]
        return 0 if self.save_method == "lora" else math.ceil(sum(sizes) * whole)

    def count_checkpoints(self, saves: list[int], first_step: int = 0) -> int:
        """Return how many new checkpoints are on the disk at once, at most.

        Args:
            saves: the steps after which one is written; those up to `first_step` are there already.
        """
        written, limit = sum(step > first_step for step in saves), self.save_total_limit
        # A new one is written before the oldest is removed, and the best is kept beside the newest.
        return min(written, limit + 1 + bool(self.metric_for_best)) if limit else written

    def estimate_disk(self, parameters: dict[str, int], optim: str, checkpoints: int) -> dict[str, int]:
        """Return the bytes of the weights that a run saves at most, without the SMALL_FILES beside each."""
        trained = parameters["adapter"] or parameters["linear"] + parameters["other"]
        return {
            "merged_model": self.count_final_bytes(parameters),
            "adapter": 4 * parameters["adapter"],
            "checkpoints": checkpoints * trained * (4 + count_moment_bytes(optim)),
        }

    def check_disk(self, parameters: dict[str, int], optim: str, checkpoints: int) -> None:
        """Refuse to start if adapter, checkpoints and final model do not fit on their disks."""
        sizes, lora = self.estimate_disk(parameters, optim, checkpoints), parameters["adapter"]
        kept = ("the adapter and " if lora else "") + plural(checkpoints, "checkpoint")
        small = (1 + checkpoints) * SMALL_FILES
        needs = [("--output_dir", self.output_dir, kept, sizes["adapter"] + sizes["checkpoints"] + small)]
        if self.save_method != "lora":
            model = f"the {'merged' if lora else 'trained'} model"
            needs.append(("--final_model_dir", self.final_model_dir, model, sizes["merged_model"] + SMALL_FILES))
        disks: dict[int, list] = {}
        for need in needs:
            folder = find_existing(need[1])
            disks.setdefault(folder.stat().st_dev, []).append((*need, shutil.disk_usage(folder).free))
        for wanted in disks.values():
            flags, folders, names, sizes, free = zip(*wanted)
            if free[0] < sum(sizes):
                fewer = ", or keep fewer checkpoints with --save_total_limit" if "--output_dir" in flags else ""
                raise UserError(
                    f"{' and '.join(map(' '.join, zip(flags, folders)))}: {' and '.join(names)} need "
                    f"{sum(sizes) / 1e9:.2f} GB, and the disk has {free[0] / 1e9:.2f} GB free; free some space or "
                    f"choose another disk{fewer}"
                )


def count_moment_bytes(optim: str) -> int:
    """Return the bytes of Adam's two moments of one weight."""
    return 2 if "8bit" in optim else 8


@dataclass(frozen=True)
class Footprint:
    """What decides how much GPU memory training takes."""

    config: object  # of the model
    parameters: dict[str, int]  # see count_parameters
    four_bit: bool
    optim: str
    checkpointing: bool = True
    may_keep: bool = False  # whether activations are kept all the same where a GPU has room (see use_checkpointing)
    recorded: bool = False  # whether streams are recorded as CUDA graphs
    split_over: int = 1  # devices over which --fsdp splits the weights

    def estimate(self, tokens: int, lengths: tuple[int, ...] = ()) -> dict[str, float]:
        """Return the GiB of GPU memory that training holds at its peak, without CUDA's own.

        Args:
            tokens: of the longest micro-batch.
            lengths: of streams; each recorded length has memory of its own.
        Returns: the total, its parts, and "without_graphs": the total if no stream is recorded; perhaps also
        "keeping_activations": the total where the GPU has room for them, and "free_to_keep": how much that is.
        """
        linear, other, adapter = (self.parameters[name] for name in ("linear", "other", "adapter"))
        base = linear * (FOUR_BIT if self.four_bit else 2) + 2 * other
        # Without an adapter all weights are trained in fp32, and "base" is their copy in 16 bits that autocast holds.
        trained = (adapter or linear + other) * (8 + count_moment_bytes(self.optim))
        trained /= 1 if adapter else self.split_over
        eager = self._hold(tokens, EAGER_MEMORY)
        stream = self._hold(sum(lengths) or tokens, RECORDED_MEMORY) if self.recorded else eager
        parts = {"base": base / self.split_over / 2**30, "adapter": trained / 2**30, "longest_stream": stream}
        total = sum(parts.values())
        found = {"total": total, **parts, "without_graphs": total - stream + eager}
        if self.may_keep:
            kept = replace(self, checkpointing=False, may_keep=False).estimate(tokens, lengths)
            found["keeping_activations"] = kept["total"]
            found["free_to_keep"] = kept["longest_stream"] / HELD_SHARE
        return {name: round(part, 2) for name, part in found.items()}

    def _hold(self, tokens: int, memory: tuple[float, float]) -> float:
        fixed, working = memory
        return tokens * count_token_bytes(self.config, self.checkpointing, working) / 2**30 + fixed
