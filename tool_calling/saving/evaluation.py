"""Models, adapters and servers scored without training, alone or side by side."""

from dataclasses import dataclass

from tool_calling.data.examples import Example
from tool_calling.editions import Variation
from tool_calling.engines.device import free_gpu
from tool_calling.engines.hub import check_model, find_base, find_tokenizer, load_tokenizer
from tool_calling.origins import is_url
from tool_calling.prompts import hide_tools
from tool_calling.samples import NOT_HELD_OUT, Rendering, choose, count_origins, list_plain, name_unit, render_alike
from tool_calling.saving.proof import Questions, load_scored
from tool_calling.scores import Proof
from tool_calling.templates import read_template
from tool_calling.terminal import UserError, say, warn


@dataclass(frozen=True)
class Evaluation:
    """What is scored, and on how many rows: the flags of the same names."""

    eval_only: list[str]
    eval_model: str | None
    model_id: str
    chat_template: str | None
    tools_in_prompt: str
    load_in_4bit: bool
    trust_remote_code: bool
    eval_dataset_path: list[str] | None
    eval_samples: int
    eval_batch_size: int | None
    max_new_tokens: int | None

    def run(self, examples: list[Example], rendering: Rendering, variation: Variation) -> tuple[Proof, dict, int]:
        """Return the proof of the models, the counts of rows (see to_report), and how long answers could be.

        Servers are not asked with other lists of tools.
        """
        models = [*dict.fromkeys(self.eval_only)]
        servers, tokenizers = self.find_servers(models), {}
        bases = {model: find_base(model, "--eval_only") for model in models if model not in servers}
        for model, (base, flag) in bases.items():
            check_model(base, flag, self.trust_remote_code)
            tokenizers[model] = self.load_tokenizer(model, base, flag)
        if not tokenizers:
            tokenizers[self.model_id] = self.load_tokenizer_for(models[0])
        sides = ([], examples) if self.eval_dataset_path else (examples, [])
        rendered = dict(zip(tokenizers, render_alike([*tokenizers.values()], *sides, rendering)))
        first = train, test = next(iter(rendered.values()))
        held_out = list_plain(test)
        samples = choose(held_out or train, self.eval_samples)
        if not samples:
            paths = self.eval_dataset_path or rendering.dataset_path
            raise UserError(f"{' '.join(paths)}: no row is left to score; add rows")
        if not held_out:
            warn(NOT_HELD_OUT)
        turns, results, longest = {(sample.row, sample.turn) for sample in samples}, {}, 0
        trials = variation.make_trials(next(iter(tokenizers.values())), test or train, examples)
        for model in [*servers, *bases]:  # a server that refuses ends the run before a model is loaded
            both = rendered.get(model, first)
            own = [sample for sample in list_plain(both[1]) or both[0] if (sample.row, sample.turn) in turns]
            asked = (
                variation.make_trials(tokenizers[model], both[1] or both[0], examples, like=trials)
                if model in bases
                else {}
            )
            questions = Questions.of(own, self.eval_batch_size, self.max_new_tokens, asked)
            if model in servers:
                result = servers[model].answer(questions, examples)
            else:
                result = self.answer(questions, model, bases[model][0], tokenizers[model]) | {"asked": asked}
            results[model], longest = result | {"samples": own}, max(longest, questions.max_new_tokens)
        results = {model if len(models) > 1 else "model": results[model] for model in models}
        skipped = len(examples) - count_origins([*train, *test])
        counts = {"train": 0, "held_out": 0, "skipped": skipped, "unit": name_unit(samples)}
        counts["held_out" if held_out else "train"] = len(samples)
        return Proof.of(samples, results, trials if bases else {}), counts, longest

    def find_servers(self, models: list[str]) -> dict:
        """Return {address: its Server} of the models that are addresses."""
        urls = [model for model in models if is_url(model)]
        if not urls:
            return {}
        try:
            from tool_calling.saving.served import Server
        except ModuleNotFoundError as error:
            raise UserError(f"--eval_only {urls[0]}: needs the package {error.name}; pip install openai") from None
        return {url: Server.find(url, self.eval_model) for url in urls}

    def load_tokenizer(self, model: str, base: str, flag: str):
        """Return the tokenizer of a model or of an adapter, with its chat template."""
        folder, template = find_tokenizer(model, base), read_template(self.chat_template)
        tokenizer = load_tokenizer(folder, self.trust_remote_code, flag, template)
        if self.tools_in_prompt == "none":  # else as the model's own template has it
            hide_tools(tokenizer, True)
        return tokenizer

    def load_tokenizer_for(self, url: str):
        """Return the tokenizer of --model_id, which renders the rows of servers alone."""
        try:
            tokenizer = self.load_tokenizer(self.model_id, find_base(self.model_id)[0], "--model_id")
        except UserError as error:
            advice = "a server shows no tokenizer: give --model_id the model that it serves, or a folder with the same"
            raise UserError(f"{error}; rows for --eval_only {url} are chosen by their tokens, and {advice}") from None
        say("render", f"with the tokenizer of --model_id {self.model_id}, as a server shows none")
        return tokenizer

    def answer(self, questions: Questions, model_id: str, base: str, tokenizer) -> dict:
        """Return what ask_all does of a model or an adapter on its base, which is in memory only while it answers."""
        free_gpu()
        model = load_scored(model_id, base, self.load_in_4bit, self.trust_remote_code, tokenizer)
        return questions.ask_all(model, tokenizer, model_id)
