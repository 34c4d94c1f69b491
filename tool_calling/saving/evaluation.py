"""A model or an adapter scored alone, without training."""

from dataclasses import dataclass

from tool_calling.data.examples import Example
from tool_calling.engines.hub import check_model, find_base, find_tokenizer, load_tokenizer
from tool_calling.samples import NOT_HELD_OUT, Rendering, choose, count_origins, name_unit, render_valid
from tool_calling.saving.proof import Questions, load_scored
from tool_calling.scores import Proof
from tool_calling.templates import read_template
from tool_calling.terminal import UserError, warn


@dataclass(frozen=True)
class Evaluation:
    """What is scored, and on how many rows: the flags of the same names."""

    eval_only: str
    chat_template: str | None
    load_in_4bit: bool
    trust_remote_code: bool
    eval_dataset_path: list[str] | None
    eval_samples: int
    eval_batch_size: int
    max_new_tokens: int | None

    def run(self, examples: list[Example], rendering: Rendering) -> tuple[Proof, dict, int]:
        """Return the proof of the model alone, the counts of rows (see to_report), and how long answers could be."""
        base, flag = find_base(self.eval_only, "--eval_only")
        check_model(base, flag, self.trust_remote_code)
        folder, template = find_tokenizer(self.eval_only, base), read_template(self.chat_template)
        tokenizer = load_tokenizer(folder, self.trust_remote_code, flag, template)
        sides = ([], examples) if self.eval_dataset_path else (examples, [])
        train, held_out = render_valid(tokenizer, *sides, rendering)
        samples = choose(held_out or train, self.eval_samples)
        if not samples:
            paths = self.eval_dataset_path or rendering.dataset_path
            raise UserError(f"{' '.join(paths)}: no row is left to score; add rows")
        if not held_out:
            warn(NOT_HELD_OUT)
        model = load_scored(self.eval_only, base, self.load_in_4bit, self.trust_remote_code, tokenizer)
        questions = Questions.of(samples, self.eval_batch_size, self.max_new_tokens)
        answers = questions.ask(model, tokenizer, self.eval_only)
        skipped = len(examples) - count_origins([*train, *held_out])
        counts = {"train": 0, "held_out": 0, "skipped": skipped, "unit": name_unit(samples)}
        counts["held_out" if held_out else "train"] = len(samples)
        return Proof.of(samples, {"model": {"answers": answers}}), counts, questions.max_new_tokens
