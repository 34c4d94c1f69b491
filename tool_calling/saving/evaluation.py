"""Models and adapters scored without training, alone or side by side."""

from dataclasses import dataclass

from tool_calling.data.examples import Example
from tool_calling.engines.device import free_gpu
from tool_calling.engines.hub import check_model, find_base, find_tokenizer, load_tokenizer
from tool_calling.samples import NOT_HELD_OUT, Rendering, choose, count_origins, name_unit, render_alike
from tool_calling.saving.proof import Questions, load_scored
from tool_calling.scores import Proof
from tool_calling.templates import read_template
from tool_calling.terminal import UserError, warn


@dataclass(frozen=True)
class Evaluation:
    """What is scored, and on how many rows: the flags of the same names."""

    eval_only: list[str]
    chat_template: str | None
    load_in_4bit: bool
    trust_remote_code: bool
    eval_dataset_path: list[str] | None
    eval_samples: int
    eval_batch_size: int
    max_new_tokens: int | None

    def run(self, examples: list[Example], rendering: Rendering) -> tuple[Proof, dict, int]:
        """Return the proof of the models, the counts of rows (see to_report), and how long answers could be."""
        bases, tokenizers = {model: find_base(model, "--eval_only") for model in self.eval_only}, {}
        for model, (base, flag) in bases.items():
            check_model(base, flag, self.trust_remote_code)
            folder, template = find_tokenizer(model, base), read_template(self.chat_template)
            tokenizers[model] = load_tokenizer(folder, self.trust_remote_code, flag, template)
        sides = ([], examples) if self.eval_dataset_path else (examples, [])
        rendered = dict(zip(tokenizers, render_alike([*tokenizers.values()], *sides, rendering)))
        train, held_out = rendered[self.eval_only[0]]
        samples = choose(held_out or train, self.eval_samples)
        if not samples:
            paths = self.eval_dataset_path or rendering.dataset_path
            raise UserError(f"{' '.join(paths)}: no row is left to score; add rows")
        if not held_out:
            warn(NOT_HELD_OUT)
        turns, results, longest = {(sample.row, sample.turn) for sample in samples}, {}, 0
        for model, both in rendered.items():
            own = [sample for sample in both[1] or both[0] if (sample.row, sample.turn) in turns]
            questions = Questions.of(own, self.eval_batch_size, self.max_new_tokens)
            name = model if len(bases) > 1 else "model"
            answers = self.answer(questions, model, bases[model][0], tokenizers[model])
            results[name], longest = {"answers": answers, "samples": own}, max(longest, questions.max_new_tokens)
        skipped = len(examples) - count_origins([*train, *held_out])
        counts = {"train": 0, "held_out": 0, "skipped": skipped, "unit": name_unit(samples)}
        counts["held_out" if held_out else "train"] = len(samples)
        return Proof.of(samples, results), counts, longest

    def answer(self, questions: Questions, model_id: str, base: str, tokenizer) -> list[str]:
        """Return the answers of a model or of an adapter on its base, which is in memory only while it answers."""
        free_gpu()
        model = load_scored(model_id, base, self.load_in_4bit, self.trust_remote_code, tokenizer)
        return questions.ask(model, tokenizer, model_id)
